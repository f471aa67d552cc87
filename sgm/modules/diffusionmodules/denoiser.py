"""Denoisers: from a network and noised latents to the denoised latents.

Shapes: latents are (B, T, C, H, W), noise levels and timesteps (B,).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.modules.diffusionmodules.discretizer import LevelTable
from sgm.util import InputError, append_dims, instantiate_from_config


class Denoiser:
    """D(x) = c_skip · x + c_out · F(c_in · x, c_noise) at any noise level; Karras et al. 2022, equation 7.

    Args:
        scaling_config: the four coefficients, see `denoiser_scaling`.
        weighting_config: the weight of a noise level in `StandardDiffusionLoss`, see `denoiser_weighting`;
            `VideoDiffusionLoss` has its own.
    """

    def __init__(self, *, scaling_config: Mapping[str, Any], weighting_config: Mapping[str, Any]) -> None:
        self.scaling = instantiate_from_config(scaling_config)
        self.weighting = instantiate_from_config(weighting_config)

    def w(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the loss weights (B,) of the noise levels (B,)."""
        return self.weighting(self.quantize_levels(levels))

    def quantize_levels(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the noise levels that the network knows: here, all of them."""
        return levels

    def quantize_c_noise(self, c_noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Return what the network is told about the noise `levels` (B,): here, `c_noise` itself."""
        return c_noise

    def __call__(
        self,
        network: Callable[..., torch.Tensor],
        x: torch.Tensor,
        levels: torch.Tensor,
        cond: Mapping[str, torch.Tensor],
        *,
        idx: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Denoise.

        Args:
            network: called as ``network(x, timesteps, cond, **model_kwargs)``; see `wrappers.OpenAIWrapper`.
            x: noised latents (B, T, C, H, W).
            levels: noise levels (B,): √ᾱ with `VideoScaling`, σ with the others.
            cond: conditions for the network.
            idx: timesteps (B,), where the scaling needs them.
            **model_kwargs: further inputs of the network, such as ``ofs``.

        Returns:
            The denoised latents (B, T, C, H, W), in float32 because at low noise they are a small correction of `x`.
        """
        levels = self.quantize_levels(levels.float())
        scale = self.scaling(levels, idx=idx)
        c_noise = self.quantize_c_noise(scale.c_noise, levels)
        c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in (scale.c_skip, scale.c_out, scale.c_in))
        x = x.float()
        return network(x * c_in, c_noise, cond, **model_kwargs).float() * c_out + x * c_skip


class DiscreteDenoiser(Denoiser):
    """A denoiser whose network was trained on the levels of a table: others are taken as the nearest of these.

    Args:
        num_idx: how many levels the table has.
        discretization_config: the rule of the table, see `discretizer`.
        scaling_config: see `Denoiser`.
        weighting_config: see `Denoiser`.
        quantize_c_noise: tell the network the level's position in the table where the scaling gives another number.
            `VideoScaling` gives the timestep, so nothing is left to do.
        do_append_zero: the table begins (with `flip`) with σ = 0.
        flip: the cleanest level has position 0.
    """

    def __init__(
        self,
        *,
        num_idx: int,
        discretization_config: Mapping[str, Any],
        scaling_config: Mapping[str, Any],
        weighting_config: Mapping[str, Any],
        quantize_c_noise: bool = True,
        do_append_zero: bool = False,
        flip: bool = True,
    ) -> None:
        super().__init__(scaling_config=scaling_config, weighting_config=weighting_config)
        discretization = instantiate_from_config(discretization_config)
        self.table = LevelTable(discretization(num_idx, do_append_zero=do_append_zero, flip=flip))
        if isinstance(self.scaling, VideoScaling) and not self.table.max < 1:
            raise InputError(
                f"VideoScaling got noise levels up to {self.table.max:g}, but √ᾱ stays below 1; "
                "use ZeroSNRDDPMDiscretization in denoiser_config"
            )
        self.quantizes_c_noise = quantize_c_noise

    def quantize_levels(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the nearest levels (B,) in the table."""
        return self.table.at(self.table.nearest_idx(levels))

    def quantize_c_noise(self, c_noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Return the positions (B,) of `levels`, unless `c_noise` is a position already or is wanted as it is."""
        if not self.quantizes_c_noise or not c_noise.is_floating_point():
            return c_noise
        return self.table.nearest_idx(levels)
