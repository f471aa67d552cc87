"""Sampling: videos from prompts."""
