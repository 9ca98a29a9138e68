"""Objectives, one paper a file: pure functions that are handed what the networks said."""
