"""Encoders of the conditions: text."""
