"""Weights in other layouts: diffusers folders, LoRA files, ZeRO shards."""
