"""Norms of the VAE with all that follows them until the next convolution, as code that `torch.compile` generates.

A kernel for the statistics of a piece and one for everything else, in float32 and rounded once. The compiled functions
get the memory of a piece as rows of any number and length, so that neither its layout nor its size compiles them again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def row_moments(rows: torch.Tensor) -> torch.Tensor:
    """Return variance and mean of rows (R, n): float32 (2, R)."""
    return torch.stack(torch.var_mean(rows.float(), dim=1, correction=0))


def activated_rows(rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """silu(rows·scale + shift) of rows (R, n), by float32 (R,)."""
    return F.silu(rows * scale[:, None] + shift[:, None]).to(rows.dtype)


def modulated_planes(
    planes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of: torch.Tensor
) -> torch.Tensor:
    """silu((planes·scale + shift)·a + b) of planes (R, H, W), by float32 (R,) and by the planes `of` of (M, h, W)."""
    blocks = planes.unflatten(1, (a.shape[1], -1))  # (R, h, H/h, W)
    normed = blocks * scale[:, None, None, None] + shift[:, None, None, None]
    return F.silu(normed * a[of, :, None] + b[of, :, None]).to(planes.dtype).flatten(1, 2)


class CompiledNorms:
    """The functions above, each compiled at its first call, for pieces (B, C, t, H, W) of a clip.

    Args:
        options: of ``torch.compile``.
    """

    def __init__(self, **options: Any) -> None:
        options = {"dynamic": True, **options}
        self._row_moments, self._activated_rows, self._modulated_planes = (
            _without_bases(torch.compile(function, **options))
            for function in (row_moments, activated_rows, modulated_planes)
        )

    def moments(self, x: torch.Tensor, num_groups: int) -> torch.Tensor:
        """Return count, mean and variance of the groups of channels of every part of memory: float32 (n, 3, B, groups).

        The parts are the frames where they lie one after the other, else the piece is the only one.
        """
        x, in_frames = _in_order(x)
        parts = x.shape[1] if in_frames else 1
        rows = x.view(len(x) * parts * num_groups, -1)
        variance, mean = self._row_moments(rows).view(2, len(x), parts, num_groups).movedim(2, 1).unbind()
        return torch.stack((torch.full_like(mean, rows.shape[1]), mean, variance), dim=1)

    def activated(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """silu(x·scale + shift), by float32 (B, C)."""
        x, in_frames = _in_order(x)
        rows = x.flatten(2 + in_frames).flatten(0, 1 + in_frames)
        if in_frames:
            scale, shift = (value[:, None].expand(x.shape[:3]) for value in (scale, shift))
        made = self._activated_rows(rows, scale.flatten(), shift.flatten()).view(x.shape)
        return made.transpose(1, 2) if in_frames else made

    def modulated(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        of_latents: tuple[torch.Tensor, torch.Tensor],
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """silu((x·scale + shift)·a + b).

        Args:
            x: the frames.
            scale: float32 (B, C).
            shift: float32 (B, C).
            of_latents: a and b, (B, C, L, h, W) each, h | H.
            latents: for every frame the number of its latent, (t,).
        """
        x, in_frames = _in_order(x)
        a, b = (value.flatten(0, 2) for value in of_latents)
        first = torch.arange(0, len(a), of_latents[0].shape[2], device=x.device).view_as(scale)
        axis, frames = (1, latents[:, None]) if in_frames else (2, latents)
        of = first.unsqueeze(axis) + frames
        scale, shift = (value.unsqueeze(axis).expand(x.shape[:3]).flatten() for value in (scale, shift))
        made = self._modulated_planes(x.flatten(0, 2), scale, shift, a, b, of.flatten()).view(x.shape)
        return made.transpose(1, 2) if in_frames else made


def _without_bases(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a compiled function not see of what its arguments are views: it would be compiled for each kind."""
    return lambda *args: function(*(x.detach() for x in args))


def _in_order(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return (B, C, t, H, W) in the order of its memory, and whether that is the order of frames, (B, t, C, H, W)."""
    in_frames = not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    return (x.transpose(1, 2), True) if in_frames else (x.contiguous(), False)
