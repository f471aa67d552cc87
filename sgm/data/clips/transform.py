"""Resize and crop frames.

Frames are resized as kornia does, bicubic after a Gaussian blur where it downscales. That is linear along each axis: an
output is a weighted sum of a few inputs beside each other. The weights are read off kornia's results for unit impulses,
and applied as products with small dense blocks, for the rows and columns alone that a crop keeps.

Legend: T frames, H W pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

_BLOCK = 32  # outputs of a product: with more of them it multiplies more zeros, with fewer it is slower


def cover_crop(pictures: torch.Tensor, size: tuple[int, int], place: tuple[float, float] | None = None) -> torch.Tensor:
    """Scale frames to cover `size`, and crop them to it.

    Args:
        pictures: (T, 3, H, W) uint8, or float in [-1, 1].
        size: (H, W) of the result, in pixels.
        place: relative (vertical, horizontal) crop position in [0, 1); None is the centre.

    Returns:
        (T, 3, *size) float in [-1, 1]: bicubic, with antialiasing where it downscales.
    """
    covering = covering_size(pictures.shape[-2:], size)
    spare = covering[0] - size[0], covering[1] - size[1]
    if place is None:
        corner = spare[0] // 2, spare[1] // 2
    else:
        corner = int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1))
    return _resized(pictures, covering, corner, size)


def covering_size(shown: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) to which frames of `shown` (H, W) are scaled to cover `size`."""
    scale = max(target / side for target, side in zip(size, shown, strict=True))
    return max(size[0], round(shown[0] * scale)), max(size[1], round(shown[1] * scale))


def stretch(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale frames to `size` without keeping the aspect ratio; see `cover_crop`."""
    return _resized(pictures, size, (0, 0), size)


def _resized(
    pictures: torch.Tensor, size: tuple[int, int], corner: tuple[int, int], kept: tuple[int, int]
) -> torch.Tensor:
    """Return the part (T, 3, *kept) at `corner` (top, left) of frames scaled to `size`."""
    in_bytes = pictures.dtype == torch.uint8
    out = torch.empty((*pictures.shape[:-2], *kept), dtype=torch.float32 if in_bytes else pictures.dtype)
    rows, columns = (_axis(*axis) for axis in zip(pictures.shape[-2:], size, corner, kept, strict=True))
    pictures = pictures[..., rows.inputs, columns.inputs]
    if not (rows.blocks or columns.blocks):
        out.copy_(pictures)
        return out.div_(127.5).sub_(1) if in_bytes else out
    # One at a time, frames stay in the processor's cache, and none depends on how many there are. Rows first or columns
    # first is the same work where both are scaled alike.
    frame = torch.empty(pictures.shape[1:], dtype=out.dtype)
    row_products, narrowed = _along_rows(frame, rows.blocks, kept[0])
    column_products, parts = _along_columns(narrowed, columns.blocks)
    scale, shift = (1 / 127.5, -1) if in_bytes else (1, 0)
    shifts = torch.tensor(shift, dtype=out.dtype)
    for picture, sized in zip(pictures, out, strict=True):
        frame.copy_(picture)
        for left, right, result in row_products + column_products:
            torch.matmul(left, right, out=result)
        for part, place in zip(parts, sized.split(_BLOCK if columns.blocks else kept[1], dim=2), strict=True):
            torch.add(shifts, part, alpha=scale, out=place)  # not before: weights of an output add up to 1
        sized.clamp_(-1, 1)  # bicubic interpolation overshoots at edges
    return out


class _Block(NamedTuple):
    """Up to `_BLOCK` outputs of an axis, beside each other, as weighted sums of inputs."""

    inputs: slice
    weights: torch.Tensor  # (outputs, inputs) float32


class _Axis(NamedTuple):
    """How an axis is resized: the inputs that it needs, and blocks whose slices count from the first of them."""

    inputs: slice
    blocks: list[_Block]  # none: the outputs are the inputs


_Products = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # of the first two, into the third


def _along_rows(frame: torch.Tensor, blocks: list[_Block], length: int) -> tuple[_Products, torch.Tensor]:
    """Return the products that resize (3, H, W) to (3, length, W), and the tensor that will hold the result."""
    if not blocks:
        return [], frame
    channels, _, width = frame.shape
    out = frame.new_empty(channels, length, width)
    products = []
    for low, block in zip(range(0, length, _BLOCK), blocks, strict=True):
        weights = block.weights.to(frame).expand(channels, -1, -1)
        products.append((weights, frame[:, block.inputs], out[:, low : low + _BLOCK]))
    return products, out


def _along_columns(frame: torch.Tensor, blocks: list[_Block]) -> tuple[_Products, list[torch.Tensor]]:
    """Return the products that resize (3, H, W) along W, and the tensors that will hold the blocks, (3, H, outputs).

    Products that write into a part of each row take more than twice the time.
    """
    if not blocks:
        return [], [frame]
    rows = frame.flatten(0, 1)
    products = []
    for block in blocks:
        weights = block.weights.to(frame).T.contiguous()
        products.append((rows[:, block.inputs], weights, frame.new_empty(len(rows), weights.shape[1])))
    return products, [out.unflatten(0, frame.shape[:2]) for _, _, out in products]


def _axis(source: int, target: int, first: int, kept: int) -> _Axis:
    """Return how outputs `first` to `first + kept` of `target` come from `source` inputs."""
    if source == target:
        return _Axis(slice(first, first + kept), [])
    starts, weights = (part[first : first + kept] for part in _weights(source, target))
    begin, blocks = int(starts[0]), []
    for low in range(0, kept, _BLOCK):
        some, values = starts[low : low + _BLOCK], weights[low : low + _BLOCK]
        positions = (some - some[0])[:, None] + torch.arange(values.shape[1])
        dense = torch.zeros(len(some), int(positions[-1, -1]) + 1).scatter_(1, positions, values)
        start = int(some[0]) - begin
        blocks.append(_Block(slice(start, start + dense.shape[1]), dense))
    return _Axis(slice(begin, begin + blocks[-1].inputs.stop), blocks)


@lru_cache(maxsize=64)
def _weights(source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how an axis of `source` pixels is resized to `target`.

    Returns:
        starts: (target,) int64, ascending: the first input of each output.
        weights: (target, taps) float32 of the inputs from there on.
    """
    from kornia.geometry.transform import resize  # lazy: checks need no pixels

    # An output depends on inputs within `reach` of its place: kornia blurs over about the factor to either side, and
    # over one pixel at least; bicubic interpolation takes two.
    reach = math.ceil(max(source / target, 2)) + 3
    taps = min(2 * reach, source)
    # So the impulses in one row of a picture, `taps` pixels from each other, do not disturb each other.
    impulses = torch.eye(taps).repeat(math.ceil(source / taps), 1)[:source]
    responses = resize(
        impulses[None, None], (target, taps), interpolation="bicubic", align_corners=False, antialias=True
    )[0, 0]
    places = (torch.arange(target) + 0.5) * (source / target) - 0.5
    starts = (places.floor().long() - reach + 1).clamp(0, source - taps)
    return starts, responses.gather(1, (starts[:, None] + torch.arange(taps)) % taps)
