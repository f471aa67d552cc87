"""Arithmetic of the samplers: weights of one update, and noise drawn per sample.

The weights are Python floats (float64) of the noise levels a = √ᾱ, s = √(1 − ᾱ), and finite at both ends of the
schedule, pure noise (a = 0) and clean (s = 0).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sgm.util import to_device


@dataclass(frozen=True)
class StepWeights:
    """One update: x ← sample · x + denoised · ((1 + k)·D − k·D_previous) + noise · ε, with k = `extrapolation`."""

    sample: float
    denoised: float
    noise: float = 0.0
    extrapolation: float = 0.0


def exp_minus_h(a: float, a_next: float) -> float:
    """Return e^(−h), h = λ_next − λ, λ = log(a/s): the ratio a·s_next / (s·a_next), which is 0 at either end."""
    return a * math.sqrt(1 - a_next**2) / (math.sqrt(1 - a**2) * a_next)


def dpmpp_2m_sde_weights(a_previous: float | None, a: float, a_next: float) -> StepWeights:
    """Return the weights of one step of SDE-DPM-Solver++(2M); Lu et al. 2022 (DPM-Solver++).

    x ← (s_next/s)·e^(−h)·x + a_next·(1 − e^(−2h))·D + s_next·√(1 − e^(−2h))·ε, where D is extrapolated from the
    previous step by k = h / (2·h_last). The extrapolation vanishes in the limit of a step from pure noise (h_last
    infinite); a step to the clean end (h infinite) is first-order.

    Args:
        a_previous: √ᾱ of the previous step, None at the first step.
        a: √ᾱ now, at least 0 and less than 1.
        a_next: √ᾱ to go to, more than `a`, at most 1.
    """
    shrink = exp_minus_h(a, a_next)
    shrink_last = exp_minus_h(a_previous, a) if a_previous is not None else 0.0
    extrapolation = math.log(shrink) / (2 * math.log(shrink_last)) if shrink > 0 and shrink_last > 0 else 0.0
    s, s_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
    return StepWeights(
        sample=s_next / s * shrink,
        denoised=a_next * (1 - shrink**2),
        noise=s_next * math.sqrt(1 - shrink**2),
        extrapolation=extrapolation,
    )


def ddim_weights(a: float, a_next: float) -> StepWeights:
    """Return the weights of one deterministic DDIM step, x ← a_next·D + s_next·(x − a·D)/s; Song et al. 2021, eq. 12.

    Args:
        a: √ᾱ now, at least 0 and less than 1.
        a_next: √ᾱ to go to, at most 1.
    """
    ratio = math.sqrt(1 - a_next**2) / math.sqrt(1 - a**2)
    return StepWeights(sample=ratio, denoised=a_next - a * ratio)


def apply_step(
    weights: StepWeights,
    x: torch.Tensor,
    denoised: torch.Tensor,
    *,
    previous_denoised: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sample (B, T, C, H, W) after one update; terms of weight 0 are skipped."""
    if weights.extrapolation:
        assert previous_denoised is not None
        denoised = denoised + weights.extrapolation * (denoised - previous_denoised)
    x = weights.sample * x + weights.denoised * denoised
    if weights.noise:
        assert noise is not None
        x = x + weights.noise * noise
    return x


def draw_noise(
    x: torch.Tensor, generators: Sequence[torch.Generator] | None = None, *, num_skipped: int = 0
) -> torch.Tensor:
    """Draw standard normal noise of the shape, dtype and device of `x` (B, ...).

    Args:
        x: gives shape, dtype and device.
        generators: one per sample; each draws its sample's noise in float32 on its own device, so that a sample is
            independent of the rest of the batch. None draws the whole batch from torch's global generator.
        num_skipped: draws of each generator before this one that are not used.

    Raises:
        ValueError: the number of generators is not B.
    """
    if generators is None:
        return [torch.randn_like(x) for _ in range(num_skipped + 1)][-1]
    if len(generators) != x.shape[0]:
        raise ValueError(f"got {len(generators)} generators for a batch of {x.shape[0]}; pass one per sample")
    for _ in range(num_skipped):
        for g in generators:
            torch.randn(x.shape[1:], generator=g, device=g.device)
    draws = [torch.randn(x.shape[1:], generator=g, device=g.device) for g in generators]
    return to_device(torch.stack(draws), x.device).to(x.dtype)
