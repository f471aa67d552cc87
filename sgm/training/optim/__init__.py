"""What a training step changes: trained parameters, their optimizer, its learning rate."""
