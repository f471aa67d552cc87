"""What a training step reads: clips, buckets, caches, and batches that ranks share."""
