"""Shapes of networks for tests: those of the released 5B, 2B and 1.5."""

from dataclasses import replace

from sgm.modules.geometry import Geometry

ROTARY = Geometry(
    patch_size=(1, 2, 2),
    time_compression=4,
    max_latents=13,
    max_latent_size=(60, 90),
    fixed_size=False,
    in_channels=16,
    out_channels=16,
    positions="rotary",
)
SINCOS = replace(ROTARY, fixed_size=True, positions="sincos")
PATCHED = replace(ROTARY, patch_size=(2, 2, 2), max_latents=21, max_latent_size=(300, 300))
