"""Clips: open, decode, check."""
