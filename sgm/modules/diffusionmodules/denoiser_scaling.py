"""Scalings: how the network's input and output are scaled so that together they give the denoised latents.

D(x) = c_skip · x + c_out · F(c_in · x, c_noise); Karras et al. 2022, equation 7. The tensors here are (B,), float32.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Preconditioning:
    """The coefficients of one batch, each of shape (B,).

    Attributes:
        c_skip: weight of the noised input in the result.
        c_out: weight of the network's output in the result.
        c_in: scale of the network's input.
        c_noise: what the network is told about the noise level; an integer tensor where it is a timestep.
    """

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


class DenoiserScaling(ABC):
    """A choice of the four coefficients."""

    @abstractmethod
    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return the coefficients for the noise levels (B,) at the timesteps `idx` (B,), where there are timesteps."""


class VideoScaling(DenoiserScaling):
    """v-prediction on x = √ᾱ·x0 + √(1−ᾱ)·ε: D = √ᾱ·x − √(1−ᾱ)·v; Salimans & Ho 2022, section 4 and appendix D.

    `levels` is √ᾱ; the network is told the timestep.
    """

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return c_skip = √ᾱ, c_out = −√(1−ᾱ), c_in = 1, c_noise = idx.

        Raises:
            ValueError: `idx` is missing.
        """
        if idx is None:
            raise ValueError("VideoScaling needs the timesteps: pass idx")
        return Preconditioning(
            c_skip=levels, c_out=-((1 - levels**2) ** 0.5), c_in=torch.ones_like(levels), c_noise=idx
        )


class EDMScaling(DenoiserScaling):
    """EDM preconditioning; Karras et al. 2022, table 1. `levels` is σ.

    Args:
        sigma_data: standard deviation of the clean data.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return the coefficients of σ; the network is told log(σ)/4."""
        total = levels**2 + self.sigma_data**2
        return Preconditioning(
            c_skip=self.sigma_data**2 / total,
            c_out=levels * self.sigma_data / total**0.5,
            c_in=1 / total**0.5,
            c_noise=0.25 * levels.log(),
        )


class EpsScaling(DenoiserScaling):
    """ε-prediction on x = x0 + σ·ε: D = x − σ·F(x / √(σ²+1)). `levels` is σ, and the network is told it."""

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return c_skip = 1, c_out = −σ, c_in = 1/√(σ²+1), c_noise = σ."""
        return Preconditioning(
            c_skip=torch.ones_like(levels), c_out=-levels, c_in=1 / (levels**2 + 1) ** 0.5, c_noise=levels
        )


class VScaling(DenoiserScaling):
    """v-prediction on x = x0 + σ·ε, of which x/√(σ²+1) is the variance-preserving form. `levels` is σ."""

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        """Return c_skip = 1/(σ²+1), c_out = −σ/√(σ²+1), c_in = 1/√(σ²+1), c_noise = σ."""
        total = levels**2 + 1
        return Preconditioning(c_skip=1 / total, c_out=-levels / total**0.5, c_in=1 / total**0.5, c_noise=levels)
