"""Parallelism within a sample: tensor, sequence and guidance parallel."""
