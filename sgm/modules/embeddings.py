"""Position tables, timestep embedding and patches: pure functions on tensors.

Legend: ``B T C H W`` video latents, ``t h w`` the grid of patches, ``N = t·h·w`` patches, ``D`` hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch.autograd.function import once_differentiable

from sgm.modules.geometry import Grid, PatchSize, require_rotary_heads


def timestep_embedding(timesteps: torch.Tensor, dim: int, *, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of a scalar per sample (Vaswani et al. 2017, cosines first).

    Args:
        timesteps: (B,), any real type.
        dim: even length of the embedding.
        max_period: wavelength of the slowest component, divided by 2π.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _sincos_1d(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """(n,) float64 positions → (n, dim): sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def sincos_positions_3d(
    grid: Grid, dim: int, interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> torch.Tensor:
    """Fixed sine-cosine table of the 2B model.

    The first quarter of the channels encodes the frame; of the rest, the first half encodes the column and the second
    half the row (SAT checkpoint format).

    Args:
        grid: (t, h, w) patches.
        dim: D, a multiple of 16.
        interpolation: divisors of frame, row and column numbers: k maps k positions to one.

    Returns:
        (N, D) float32, in the order t, h, w.
    """
    if dim % 16:
        raise ValueError(f"the 3D sine-cosine table needs a hidden size that is a multiple of 16, got {dim}")
    t, h, w = grid
    dims = (dim // 4, dim // 8 * 3, dim // 8 * 3)
    frames, rows, columns = (
        _sincos_1d(torch.arange(length, dtype=torch.float64) / by, part)
        for length, by, part in zip(grid, interpolation, dims, strict=True)
    )
    return _over_grid(grid, (0, frames), (2, columns), (1, rows)).float()


def _over_grid(grid: Grid, *tables: tuple[int, torch.Tensor]) -> torch.Tensor:
    """Expand tables (length of an axis, d) over the grid and concatenate their channels: (N, sum of d)."""
    parts = []
    for axis, table in tables:
        shape = [1, 1, 1, table.shape[1]]
        shape[axis] = grid[axis]
        parts.append(table.reshape(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _one_period(frequencies: torch.Tensor, trained: int, length: int) -> torch.Tensor:
    """RIFLEx (Zhao et al. 2025, equation 8): the component that would repeat first has no more than 0.9 of a period.

    In training, components of shorter periods repeat within a clip, and so tell neighbours apart only; the first whose
    period holds a trained clip tells where in the clip a frame is. Beyond its period it would say "from the start".
    """
    slower = frequencies * trained <= 2 * math.pi
    if not slower.any():
        return frequencies
    intrinsic = int(slower.int().argmax())
    scaled = frequencies.clone()
    scaled[intrinsic] = frequencies[intrinsic].clamp(max=0.9 * 2 * math.pi / length)
    return scaled


def _interpolated(frequencies: torch.Tensor, trained: int, length: int) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023): all positions of a clip within those of training."""
    return frequencies * (trained / length)


def _of_larger_base(frequencies: torch.Tensor, trained: int, length: int) -> torch.Tensor:
    """NTK-aware scaling (bloc97 2023): the slowest component as interpolated, the fastest as it is."""
    share = torch.linspace(0, 1, len(frequencies), device=frequencies.device)
    return frequencies * (trained / length) ** share


# Name of ``args.time_scaling`` → frequencies of the time axis, for clips longer than those of training.
TIME_SCALINGS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "riflex": _one_period,
    "interpolate": _interpolated,
    "ntk": _of_larger_base,
    "extrapolate": lambda frequencies, trained, length: frequencies,
}


def rope_table_3d(
    grid: Grid,
    head_dim: int,
    *,
    num_text: int = 0,
    theta: float = 10000.0,
    device: torch.device | None = None,
    time_scaling: str = "extrapolate",
    trained: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of 3D rotary positions (Su et al. 2021, applied to three axes).

    A quarter of the head's channels rotates with the frame, three eighths each with the row and the column. Text
    tokens come first and are not rotated: cosine 1, sine 0.

    Args:
        grid: (t, h, w) patches.
        head_dim: channels of a head, a multiple of 16.
        num_text: text tokens in front of the patches.
        theta: base of the wavelengths.
        device: device of the tables.
        time_scaling: what becomes of the frequencies of the time axis, see `TIME_SCALINGS`, if `grid` is longer there
            than `trained`.
        trained: patches of the longest clip of training along time; None: no clip is longer.

    Returns:
        Two float32 tables (num_text + N, head_dim), neighbouring channels sharing an angle; the sine is negative for
        the first channel of a pair, as `rotate` needs it.

    Raises:
        InputError: heads of another size.
    """
    require_rotary_heads(head_dim)
    axes = []
    for axis, dim in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        if axis == 0 and trained is not None and grid[0] > trained:
            frequencies = TIME_SCALINGS[time_scaling](frequencies, trained, grid[0])
        axes.append((axis, torch.outer(torch.arange(grid[axis], dtype=torch.float32, device=device), frequencies)))
    angles = _over_grid(grid, *axes)
    angles = torch.cat((angles.new_zeros(num_text, head_dim // 2), angles))
    return angles.cos().repeat_interleave(2, dim=-1), torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(-2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels: (a, b) → (a·cos − b·sin, b·cos + a·sin).

    Args:
        x: (B, S, heads, head_dim).
        cos: (S, head_dim) float32: 16-bit angles are too coarse for large positions.
        sin: (S, head_dim) float32, negative for the first channel of a pair.

    Returns:
        As `x`, in its dtype.
    """
    return _rotate_real(x, cos, sin) if torch.compiler.is_compiling() else _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The rotation, whose gradient is turned back; nothing is saved but the tables."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.tables = cos, sin  # of all layers and steps, so that they are not counted or moved as saved tensors
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.tables
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    # A complex product is a single pass, but not every accelerator has complex numbers, and bfloat16 has none.
    if x.is_cpu and x.dtype == torch.float32:
        x = x if x.stride(-1) == 1 else x.contiguous()  # complex numbers lie beside each other
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turn = torch.complex(cos[:, 1::2], sin[:, 1::2])
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)
    # In place, with float32 angles: values in float32 would take twice the passes.
    return _swapped(x).mul_(sin[:, None]).addcmul_(x, cos[:, None])


def _rotate_real(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Plain form, in float32, which compilers fuse."""
    return torch.addcmul(x * cos[:, None], _swapped(x), sin[:, None]).to(x.dtype)


def _swapped(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def patchify(x: torch.Tensor, patch_size: PatchSize) -> torch.Tensor:
    """(B, T, C, H, W) → (B, N, C·pt·ph·pw), each patch in the order c, pt, ph, pw."""
    pt, ph, pw = patch_size
    return rearrange(x, "b (t pt) c (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: torch.Tensor, grid: Grid, patch_size: PatchSize) -> torch.Tensor:
    """(B, N, C·pt·ph·pw) → (B, T, C, H, W); the inverse of `patchify`."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    return rearrange(x, "b (t h w) (c pt ph pw) -> b (t pt) c (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
