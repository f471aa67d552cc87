"""Inputs of a training step: clips, buckets, caches, and batches broadcast within a group."""
