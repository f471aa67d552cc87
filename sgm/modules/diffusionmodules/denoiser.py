"""The denoiser: network + noised latents → denoised latents.

Shapes: latents are (B, T, C, H, W), noise levels and timesteps (B,).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sgm.modules.diffusionmodules.discretizer import Levels, LevelTable
from sgm.util import append_dims, instantiate_from_config


class DiscreteDenoiser:
    """D(x) = c_skip · x + c_out · F(c_in · x, c_noise); Karras et al. 2022, equation 7.

    The network was trained on a table of levels; every level is rounded to the nearest entry.

    Args:
        num_idx: levels in the table.
        discretization_config: how the table is computed, see `discretizer`.
        scaling_config: the four coefficients, see `denoiser_scaling`.
        weighting_config: the weight of a noise level, see `denoiser_weighting`.
        quantize_c_noise: pass the level's table index to the network if the scaling returns a real number
            (`VideoScaling` returns the timestep, an integer).
        flip: index 0 is the cleanest level.
    """

    def __init__(
        self,
        *,
        num_idx: Levels,
        discretization_config: Mapping[str, Any],
        scaling_config: Mapping[str, Any],
        weighting_config: Mapping[str, Any],
        quantize_c_noise: bool = True,
        flip: bool = True,
    ) -> None:
        self.table = LevelTable.from_config(discretization_config, num_idx, flip=flip)
        self.scaling = instantiate_from_config(scaling_config)
        self.weighting = instantiate_from_config(weighting_config)
        self.quantize_c_noise = quantize_c_noise

    def w(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the loss weights (B,) of the noise levels (B,)."""
        return self.weighting(self.table.at(self.table.nearest_idx(levels)))

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
            levels: noise levels √ᾱ (B,).
            cond: conditions for the network.
            idx: timesteps (B,), which `VideoScaling` needs.
            **model_kwargs: further inputs of the network, such as ``ofs``.

        Returns:
            The denoised latents (B, T, C, H, W), float32: at low noise they are a small correction of `x`.
        """
        position = self.table.nearest_idx(levels)
        scale = self.scaling(self.table.at(position), idx=idx)
        c_noise = position if self.quantize_c_noise and scale.c_noise.is_floating_point() else scale.c_noise
        c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in (scale.c_skip, scale.c_out, scale.c_in))
        x = x.float()
        return network(x * c_in, c_noise, cond, **model_kwargs).float() * c_out + x * c_skip
