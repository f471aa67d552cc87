"""Which latent frames the network takes at a step: all, in overlapping windows along time, or in a loop.

Windows are blended at every step (MultiDiffusion, Bar-Tal et al. 2023). All have the same length, which the network
takes at once, so that its memory does not depend on their number. A loop begins with another latent frame at every step
(latent shift, Bi et al. 2025, "Mobius"). Steps, guidance and noise are those of the whole clip.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sgm.modules.diffusionmodules.guiders import Cond

LEAD_IN = 4  # latent frames decoded before a loop; with the toy, more change its first frame by 0.0003 on average


@dataclass(frozen=True)
class TimeWindows:
    """Windows of latent frames; all lengths are multiples of `patch`, padding in front included.

    The first latent frame of a clip holds one video frame and the others four, so the network expects that of whatever
    begins. It is wrong for the first patch of all windows but the first; their ramp gives it no weight.

    Attributes:
        length: latent frames of a window.
        overlap: latent frames that neighbours share, at least; the last window begins earlier to end with the clip.
        patch: temporal patch of the network.
    """

    length: int
    overlap: int
    patch: int = 1

    def starts(self, num_latents: int) -> list[int]:
        """Return the first latent frame of each window of a clip of `num_latents`, ascending."""
        last = max(num_latents - self.length, 0)
        return [*range(0, last, self.length - self.overlap), last]

    def weights(self, start: int, num_latents: int) -> torch.Tensor:
        """Return the weights float32 (length,) of the frames of a window, which fall towards its neighbours.

        Over the overlap they rise as 0, 1/n, ..., (n − 1)/n by patches, and fall so that neighbours add up to 1.
        """
        patches, shared = self.length // self.patch, self.overlap // self.patch
        weights, rise = torch.ones(patches), torch.arange(shared) / shared
        if start > 0:
            weights[:shared] = torch.minimum(weights[:shared], rise)
        if start + self.length < num_latents:
            weights[-shared:] = torch.minimum(weights[-shared:], 1 - rise)
        return weights.repeat_interleave(self.patch)

    def denoise(
        self, denoise_fn: Callable[..., torch.Tensor], x: torch.Tensor, levels: torch.Tensor, cond: Cond, **kwargs: Any
    ) -> torch.Tensor:
        """Return the denoised latents of all windows, one after the other, blended.

        Args:
            denoise_fn: as in `VideoSampler`, for a window.
            x: (B, T, C, H, W), padding included.
            levels: (B,).
            cond: conditions; ``concat`` and ``control`` (B, T, C', H, W) are divided as `x` is.
            **kwargs: further arguments of `denoise_fn`.
        """
        num_latents = x.shape[1]
        if num_latents <= self.length:
            return denoise_fn(x, levels, cond, **kwargs)
        total, weight_of = torch.zeros_like(x, dtype=torch.float32), torch.zeros(num_latents)
        for start in self.starts(num_latents):
            frames, weights = slice(start, start + self.length), self.weights(start, num_latents)
            denoised = denoise_fn(x[:, frames], levels, _within(cond, frames), **kwargs)
            total[:, frames] += weights.to(x.device)[:, None, None, None] * denoised
            weight_of[frames] += weights
        return total / weight_of.to(x.device)[:, None, None, None]


@dataclass
class TimeLoop:
    """A clip whose last latent frame leads into its first; its length is a multiple of `patch`.

    The network sees it from another latent frame at each call, so that no place stays a seam. What comes before that
    one stands in front of it, and gets no answer: the network takes the first latent frame for a single video frame,
    and in a loop there is none. So positions are those of a clip that is longer by a patch.

    Attributes:
        patch: temporal patch of the network.
        num_calls: done so far; a loop is for one sampling.
    """

    patch: int = 1
    num_calls: int = 0

    def denoise(
        self, denoise_fn: Callable[..., torch.Tensor], x: torch.Tensor, levels: torch.Tensor, cond: Cond, **kwargs: Any
    ) -> torch.Tensor:
        """Return the denoised latents (B, T, C, H, W); see `TimeWindows.denoise`; no ``concat`` or ``control``."""
        turn = self.num_calls % x.shape[1]
        self.num_calls += 1
        denoised = denoise_fn(led_in(x.roll(-turn, dims=1), self.patch), levels, cond, **kwargs)
        return denoised[:, self.patch :].roll(turn, dims=1)


def led_in(loop: torch.Tensor, num: int = LEAD_IN) -> torch.Tensor:
    """Return a loop (B, T, C, H, W) with the `num` latent frames in front that lead into it.

    The last 4T frames that are decoded of this are those of the loop: the causal autoencoder has seen what comes before
    the first of them.
    """
    return loop[:, torch.arange(-num, loop.shape[1], device=loop.device) % loop.shape[1]]


def _within(cond: Cond, frames: slice) -> Mapping[str, torch.Tensor]:
    return {name: value[:, frames] if name in ("concat", "control") else value for name, value in cond.items()}
