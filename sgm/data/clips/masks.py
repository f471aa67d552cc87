"""Masks of clips, of pixels and of latents. T frames, H, W pixels."""

import torch

from sgm.data.clips.frames import TIME_COMPRESSION
from sgm.modules.geometry import SPATIAL_COMPRESSION


def white(frames: torch.Tensor) -> torch.Tensor:
    """(T, 3, H, W) in [-1, 1] → bool (T, H, W): true where the mean of the channels is above 0."""
    return frames.mean(dim=1) > 0


def latent_mask(pixels: torch.Tensor) -> torch.Tensor:
    """(T, H, W) bool of 4k + 1 frames → (1, T', 1, H/8, W/8) of latents: true if any of their pixels is."""
    # The first latent frame holds one frame, the others four.
    pixels = torch.cat((pixels[:1].expand(TIME_COMPRESSION - 1, -1, -1), pixels)).unflatten(0, (-1, TIME_COMPRESSION))
    cells = pixels.any(dim=1).unflatten(2, (-1, SPATIAL_COMPRESSION)).unflatten(1, (-1, SPATIAL_COMPRESSION))
    return cells.any(dim=4).any(dim=2)[None, :, None]
