"""Checks and estimates before a run reads any weights."""
