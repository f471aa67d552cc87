"""Diffusion: noise schedules, denoisers, losses, guidance and samplers."""
