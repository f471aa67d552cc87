"""Trained parameters, optimizer, learning rate."""
