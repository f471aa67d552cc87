"""Sampling: prompts in, videos out."""
