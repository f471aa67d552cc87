"""Weights files: read, match to a network, write."""
