"""Preference training: of two clips with one caption, the network learns to explain the chosen one better.

Shapes: latents are (B, T, C, H, W), noise levels and timesteps (B,), losses float32 (B,).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from sgm.config.values import SNR, Positive
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss

_MOST = 80.0  # margin of a float32 loss that is not 0 yet


class DiffusionDPOLoss(VideoDiffusionLoss):
    """Direct preference optimization of a diffusion model; Wallace et al. 2023 (Diffusion-DPO), equation 14.

    loss = −log σ(m), with the margin m = −β/2 · ((e_c − r_c) − (e_r − r_r)): e are the errors of the network for the
    chosen and the rejected clip, r those of the reference, the same network without its adapters. Both clips have the
    same noise, timestep, caption and image. A margin above 0 means that training has moved the network towards the
    chosen clip; at the start all margins are 0, and the loss is log 2.

    Errors are mean squares of v, as in `VideoDiffusionLoss`. They are finite at every level, pure noise included, where
    an error of ε, as in the paper, says nothing.

    Args:
        sigma_sampler_config: the noise levels drawn, see `sigma_sampling.DiscreteSampling`.
        beta: how soon a difference counts as a preference; the larger, the nearer the network stays to the reference.
            The T of the paper is part of it.
        offset_noise_level: see `VideoDiffusionLoss`.
        min_snr_value: see `VideoDiffusionLoss`.
        min_snr_variant: see `VideoDiffusionLoss`.
    """

    takes_pairs: ClassVar[bool] = True
    takes_mask: ClassVar[bool] = False

    def __init__(
        self,
        *,
        sigma_sampler_config: Mapping[str, Any],
        beta: Positive = 2000.0,
        offset_noise_level: float = 0.0,
        min_snr_value: SNR | None = None,
        min_snr_variant: Literal["bound", "min_snr", "soft"] = "bound",
    ) -> None:
        super().__init__(
            sigma_sampler_config=sigma_sampler_config,
            offset_noise_level=offset_noise_level,
            min_snr_value=min_snr_value,
            min_snr_variant=min_snr_variant,
        )
        self.beta = beta

    def __call__(
        self,
        network: Callable[..., torch.Tensor],
        denoiser: DiscreteDenoiser,
        x: torch.Tensor,
        cond: Mapping[str, torch.Tensor],
        *,
        generator: torch.Generator | None = None,
        idx: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        rejected: torch.Tensor | None = None,
        reference: Callable[[], AbstractContextManager] | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Return the loss of each pair; arguments as in `VideoDiffusionLoss`, of the chosen clips.

        Args:
            network: see `DiscreteDenoiser`.
            denoiser: turns the network's output into denoised latents.
            x: clean latents of the chosen clips.
            cond: conditions of both clips of each pair.
            generator: source of timesteps and noise that are not given.
            idx: timesteps (B,) of both clips.
            noise: of both clips.
            rejected: clean latents of the rejected clips.
            reference: a context in which the network is the reference.
            **model_kwargs: further inputs of the network.
        """
        if rejected is None or reference is None:
            raise ValueError("DiffusionDPOLoss needs the rejected clips, and a reference")
        idx, noise = self.given_or_drawn(x, generator, idx, noise)
        both = {
            "cond": {name: torch.cat((value, value)) for name, value in cond.items()},
            "idx": idx.repeat(2),
            "noise": torch.cat((noise, noise)),
            **{name: torch.cat((value, value)) for name, value in model_kwargs.items()},
        }
        clips = torch.cat((x, rejected))
        with torch.no_grad(), reference():
            of_reference = super().__call__(network, denoiser, clips, **both)
        chosen, other = (super().__call__(network, denoiser, clips, **both) - of_reference).chunk(2)
        return F.softplus(self.beta / 2 * (chosen - other))

    @staticmethod
    def validation_values(losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what losses (B,) say of pairs: whether the chosen clip is preferred (a half without margin), and m."""
        losses = losses.float()
        even = F.softplus(torch.zeros_like(losses))
        accuracy = (losses < even) + 0.5 * (losses == even)
        return {"accuracy": accuracy, "margin": -torch.log(torch.expm1(losses.clamp(math.exp(-_MOST), _MOST)))}
