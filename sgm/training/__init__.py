"""Fine-tuning: checks, parts of a run, the loop, checkpoints, evaluation."""
