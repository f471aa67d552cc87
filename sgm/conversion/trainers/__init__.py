"""Read transformers from trainers' checkpoints: ZeRO states, sharded files."""
