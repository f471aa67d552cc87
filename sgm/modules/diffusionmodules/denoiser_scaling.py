"""Scaling: the coefficients that turn network input and output into the denoised latents.

D(x) = c_skip · x + c_out · F(c_in · x, c_noise); Karras et al. 2022, equation 7. The tensors here are (B,), float32.
A custom scaling is called as ``scaling(levels, idx=idx)`` and returns a `Preconditioning`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Preconditioning:
    """The coefficients of one batch, each of shape (B,).

    Attributes:
        c_skip: weight of the noised input in the result.
        c_out: weight of the network's output in the result.
        c_in: scale of the network's input.
        c_noise: noise input of the network; an integer tensor if it is a timestep.
    """

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


class VideoScaling:
    """v-prediction on x = √ᾱ·x0 + √(1−ᾱ)·ε: D = √ᾱ·x − √(1−ᾱ)·v; Salimans & Ho 2022, section 4 and appendix D."""

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return c_skip = √ᾱ, c_out = −√(1−ᾱ), c_in = 1, c_noise = idx for the levels √ᾱ (B,) at timesteps `idx` (B,).

        Raises:
            ValueError: `idx` is missing.
        """
        if idx is None:
            raise ValueError("VideoScaling needs the timesteps: pass idx")
        return Preconditioning(
            c_skip=levels, c_out=-((1 - levels**2) ** 0.5), c_in=torch.ones_like(levels), c_noise=idx
        )
