"""Clips: opened, decoded, checked."""
