"""Training runs: optimizers, learning rates, and what a run reports."""
