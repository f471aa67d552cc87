"""Buckets: clips of several shapes in one training run."""
