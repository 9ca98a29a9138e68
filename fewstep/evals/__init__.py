"""Scores, their statistics and the report. Nothing here trains, and nothing imports torch."""
