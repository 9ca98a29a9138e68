"""Optimisation: one step, the loop around it, complete states, and the training of teachers."""
