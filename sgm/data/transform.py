"""From pictures of any size to those that the model takes.

Legend: T pictures, H W pixels.
"""

import torch
from kornia.geometry.transform import resize


def cover_crop(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale pictures until they cover `size` and cut out the middle.

    Args:
        pictures: (T, 3, H, W) float in [-1, 1].
        size: (H, W) of the result, in pixels.

    Returns:
        (T, 3, *size) in [-1, 1], of the same dtype: bicubic interpolation, blurred beforehand where it reduces.
    """
    (target_h, target_w), (h, w) = size, pictures.shape[-2:]
    scale = max(target_h / h, target_w / w)
    covering = (max(target_h, round(h * scale)), max(target_w, round(w * scale)))
    if covering != (h, w):
        pictures = resize(pictures, covering, interpolation="bicubic", align_corners=False, antialias=True)
    top, left = (covering[0] - target_h) // 2, (covering[1] - target_w) // 2
    # Bicubic interpolation overshoots at edges.
    return pictures[..., top : top + target_h, left : left + target_w].clamp(-1, 1).contiguous()
