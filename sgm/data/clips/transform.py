"""Resize and crop frames.

Legend: T frames, H W pixels.
"""

from collections.abc import Sequence

import torch


def cover_crop(pictures: torch.Tensor, size: tuple[int, int], place: tuple[float, float] | None = None) -> torch.Tensor:
    """Scale frames to cover `size`, and crop them to it.

    Args:
        pictures: (T, 3, H, W) float in [-1, 1], or of any type if they are not scaled.
        size: (H, W) of the result, in pixels.
        place: relative (vertical, horizontal) crop position in [0, 1); None is the centre.

    Returns:
        (T, 3, *size) in [-1, 1] of the same dtype: bicubic, with antialiasing where it downscales.
    """
    target_h, target_w = size
    covering = covering_size(pictures.shape[-2:], size)
    pictures = stretch(pictures, covering)
    spare = covering[0] - target_h, covering[1] - target_w
    if place is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1))
    return pictures[..., top : top + target_h, left : left + target_w].contiguous()


def covering_size(shown: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) to which frames of `shown` (H, W) are scaled to cover `size`."""
    scale = max(target / side for target, side in zip(size, shown, strict=True))
    return max(size[0], round(shown[0] * scale)), max(size[1], round(shown[1] * scale))


def stretch(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale frames to `size` without keeping the aspect ratio; see `cover_crop`."""
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    # Tests pin kornia's antialiasing; torch's interpolate differs.
    from kornia.geometry.transform import resize  # lazy: checks need no pixels

    sized = resize(pictures, size, interpolation="bicubic", align_corners=False, antialias=True)
    return sized.clamp(-1, 1)  # bicubic interpolation overshoots at edges
