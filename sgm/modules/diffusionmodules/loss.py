"""The training loss: the error of the denoised latents, one number per sample.

Shapes: latents are (B, T, C, H, W), noise levels and timesteps (B,), losses float32 (B,).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from sgm.config.values import SNR, Positive
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.util import InputError, append_dims, default, instantiate_from_config, to_device

LOSS_TYPES = ("l2", "l1", "huber")
SNR_VARIANTS = ("bound", "min_snr", "soft")


def x0_weight(levels: torch.Tensor, *, value: float | None, variant: str) -> torch.Tensor:
    """Return the weight of the squared error of x0 at `levels` √ᾱ (B,), float32 (B,).

    1/(1−ᾱ) = SNR + 1 without a `value` γ, the weight of the squared error of v. With γ, by `variant`: ``bound``
    min(SNR + 1, γ), that of the reference implementation; ``min_snr`` min(SNR, γ), Hang et al. 2023 (of v:
    min(SNR, γ)/(SNR + 1)); ``soft`` SNR·γ/(SNR + γ), the same without a corner, Crowson et al. 2024.
    """
    whole = 1 / (1 - levels**2)
    if value is None:
        return whole
    if variant == "bound":
        return whole.clamp(max=value)
    snr = levels**2 * whole
    return snr.clamp(max=value) if variant == "min_snr" else snr * value / (snr + value)


def mean_within(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of `values` (B, T, C, H, W) where a mask (B, T, 1, H, W) is 1; 0 where it is nowhere: (B,)."""
    if mask is None:
        return values.flatten(1).mean(dim=1)
    num = mask.flatten(1).sum(dim=1) * values.shape[2]
    return (values * mask).flatten(1).sum(dim=1) / num.clamp(min=1)


class VideoDiffusionLoss:
    """The loss on √ᾱ·x + √(1−ᾱ)·ε with the error of x0 weighted by 1/(1−ᾱ).

    For v-prediction the weight makes it the squared error of v: x0 − D = −√(1−ᾱ)·(v − F); Salimans & Ho 2022,
    section 4.

    Args:
        sigma_sampler_config: the noise levels drawn, see `sigma_sampling.DiscreteSampling`.
        type: ``l2``, ``l1`` or ``huber``: of the error e of v, e² up to `huber_delta` and 2·δ·|e| − δ² beyond (Huber
            1964), so that clips which the network cannot explain pull less.
        huber_delta: δ, in units of v, which varies by about 1; None is 1.
        offset_noise_level: scale of one extra normal number per sample, added to all of its noise, so that the model
            learns to change the mean of a video.
        min_snr_value: γ, which bounds the weight of clean timesteps; None leaves it 1/(1−ᾱ), which is SNR + 1.
        min_snr_variant: how it does: ``bound`` clamps SNR + 1, as the reference implementation; ``min_snr`` weights the
            error of x0 by min(SNR, γ), as Min-SNR (Hang et al. 2023) and as diffusers' trainers, which write it for v
            as min(SNR, γ)/(SNR + 1); ``soft`` by SNR·γ/(SNR + γ) (Crowson et al. 2024). The last two give pure noise,
            with SNR 0, no weight.
    """

    takes_mask: ClassVar[bool] = True

    def __init__(
        self,
        *,
        sigma_sampler_config: Mapping[str, Any],
        type: str = "l2",
        offset_noise_level: Annotated[float, Field(ge=0, le=10)] = 0.0,
        min_snr_value: SNR | None = None,
        huber_delta: Positive | None = None,
        min_snr_variant: Literal["bound", "min_snr", "soft"] = "bound",
    ) -> None:
        if type not in LOSS_TYPES:
            raise InputError(f"loss type '{type}' is unknown; expected one of {', '.join(LOSS_TYPES)}")
        if huber_delta is not None and type != "huber":
            raise InputError(f"huber_delta is {huber_delta:g}, and the loss type {type} has none; set type to huber")
        if min_snr_variant not in SNR_VARIANTS:
            raise InputError(f"min_snr_variant is {min_snr_variant!r}; expected one of {', '.join(SNR_VARIANTS)}")
        if min_snr_variant != "bound" and min_snr_value is None:
            raise InputError(
                f"min_snr_variant is {min_snr_variant} without min_snr_value; set it too, to 5 for example"
            )
        if offset_noise_level < 0:
            raise InputError(f"offset_noise_level is {offset_noise_level}; expected 0 or more")
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        if not hasattr(self.sigma_sampler, "draw_idx"):
            raise InputError(
                f"VideoDiffusionLoss got the sigma sampler {sigma_sampler_config['target']}, which draws no timesteps; "
                "use sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling"
            )
        self.type = type
        self.offset_noise_level = offset_noise_level
        self.min_snr_value, self.min_snr_variant = min_snr_value, min_snr_variant
        self.huber_delta = default(huber_delta, 1.0)

    def draw_noise(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Return normal noise for `x` (B, ...), float32 on its device, drawn on the generator's, offset included."""
        device = generator.device if generator is not None else x.device
        noise = torch.randn(x.shape, generator=generator, device=device)
        if self.offset_noise_level > 0:
            offset = torch.randn(x.shape[:1], generator=generator, device=device)
            noise = noise + self.offset_noise_level * append_dims(offset, x.ndim)
        return to_device(noise, x.device)

    def given_or_drawn(
        self,
        x: torch.Tensor,
        generator: torch.Generator | None,
        idx: torch.Tensor | None,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return timesteps (B,) and noise for `x` on its device; those that are None are drawn, timesteps first."""
        drawn = idx if idx is not None else self.sigma_sampler.draw_idx(len(x), generator=generator)
        noise = to_device(noise, x.device) if noise is not None else self.draw_noise(x, generator)
        return to_device(drawn, x.device), noise

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
        mask: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Return the loss of each sample.

        Args:
            network: see `DiscreteDenoiser`.
            denoiser: turns the network's output into denoised latents.
            x: clean latents (B, T, C, H, W).
            cond: conditions for the network.
            generator: source of the timesteps, then of the noise; torch's global one if None.
            idx: timesteps (B,) instead of drawn ones, for example those of a data-parallel rank.
            noise: noise of the shape of `x`, instead of drawn noise.
            mask: 1 where the loss counts, else 0, (B, T, 1, H, W); a sample without any 1 has a loss of 0.
            **model_kwargs: further inputs of the network.
        """
        idx, noise = self.given_or_drawn(x, generator, idx, noise)
        levels = self.sigma_sampler.levels(idx)
        a = append_dims(levels, x.ndim)
        noised = a * x.float() + (1 - a**2) ** 0.5 * noise.float()
        error = denoiser(network, noised, levels, cond, idx=idx, **model_kwargs).float() - x.float()
        whole = 1 / (1 - levels**2)  # of squares; the error of v is √whole times that of x0
        weight = x0_weight(levels, value=self.min_snr_value, variant=self.min_snr_variant)
        if self.type == "huber":
            of_v = error * append_dims(whole, x.ndim) ** 0.5
            # torch's has half the squares.
            losses = F.huber_loss(of_v, torch.zeros_like(of_v), reduction="none", delta=self.huber_delta)
            return weight / whole * 2 * mean_within(losses, mask)
        return weight * mean_within(error**2 if self.type == "l2" else error.abs(), mask)
