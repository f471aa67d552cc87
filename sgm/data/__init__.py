"""Training data: find, check, decode and order clips, reproducibly from a seed."""
