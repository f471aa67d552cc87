"""Transformers from the checkpoints of trainers: ZeRO states, sharded files."""
