"""Samplers: from noise to latents, in the alphas_cumprod_sqrt parametrisation x = √ᾱ·x0 + √(1−ᾱ)·ε.

Shapes: latents are (B, T, C, H, W). The arithmetic between network calls is always float32, because small
corrections accumulate over the steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgm.modules.diffusionmodules.discretizer import Levels, discretization_from_config
from sgm.modules.diffusionmodules.guiders import Cond, Guider, IdentityGuider, has_effect
from sgm.modules.diffusionmodules.sampling_utils import apply_step, ddim_weights, dpmpp_2m_sde_weights, draw_noise
from sgm.util import InputError, default, instantiate_from_config

DenoiseFn = Callable[..., torch.Tensor]
Progress = Callable[[Sequence[int]], Iterable[int]]

INVERSION_ITERATIONS = 3  # of a fixed point that is nearly found after two


@dataclass(frozen=True)
class SamplingSchedule:
    """The steps of a run, the noisiest first.

    Attributes:
        timesteps: one per step, descending.
        alphas_cumprod_sqrt: √ᾱ at these timesteps, ascending from 0, then 1 (clean): num_steps + 1 values.
    """

    timesteps: list[int]
    alphas_cumprod_sqrt: list[float]


@dataclass(frozen=True)
class StepState:
    """The inputs of one update.

    Attributes:
        x: the sample, float32 (B, T, C, H, W).
        denoised: guided denoiser output for `x`.
        previous_denoised: the same at the previous step, None at the first step.
        a_previous: √ᾱ of the previous step, None at the first step.
        a: √ᾱ of `x`.
        a_next: √ᾱ after the update.
    """

    x: torch.Tensor
    denoised: torch.Tensor
    previous_denoised: torch.Tensor | None
    a_previous: float | None
    a: float
    a_next: float


class VideoSampler(ABC):
    """The loop of all samplers: denoise with guidance, then update.

    Args:
        discretization_config: the noise levels visited, see `discretizer.ZeroSNRDDPMDiscretization`.
        num_steps: network evaluations (each a doubled batch under guidance); `guiders.DynamicCFG` has its own
            ``num_steps``.
        guider_config: see `guiders`; no guidance if None.
        verbose: use the `progress` that the caller passes.
    """

    def __init__(
        self,
        *,
        discretization_config: Mapping[str, Any],
        num_steps: Levels,
        guider_config: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        self.discretization = discretization_from_config(discretization_config, num_steps)
        self.num_steps = num_steps
        self.guider: Guider = instantiate_from_config(guider_config) if guider_config else IdentityGuider()
        self.verbose = verbose

    def timesteps(self, num_steps: int | None = None) -> torch.Tensor:
        """Return the timesteps visited in `num_steps` (default: the configured number), ascending, int64."""
        return self.discretization.timesteps(default(num_steps, self.num_steps))

    def schedule(self, num_steps: int | None = None) -> SamplingSchedule:
        """Return the timesteps and noise levels in the order of a run.

        Raises:
            InputError: the schedule does not have that many timesteps.
        """
        return SamplingSchedule(
            timesteps=self.timesteps(num_steps).flip(0).tolist(),
            alphas_cumprod_sqrt=[*self.discretization(default(num_steps, self.num_steps)).tolist(), 1.0],
        )

    def first_step(self, strength: float, num_steps: int | None = None) -> int:
        """Return the step from which a noised video is denoised: the last `strength` of the steps, rounded down.

        Raises:
            InputError: no step is left.
        """
        num = default(num_steps, self.num_steps)
        if not (left := min(int(num * strength + 1e-9), num)):  # 0.58 · 50 is just below 29
            least = math.ceil(1000 / num) / 1000
            raise InputError(f"a strength of {strength:g} leaves none of {num} steps; give {least:g} or more")
        return num - left

    def __call__(
        self,
        denoise_fn: DenoiseFn,
        x: torch.Tensor,
        cond: Cond,
        uc: Cond | None = None,
        *,
        num_steps: int | None = None,
        scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generators: Sequence[torch.Generator] | None = None,
        progress: Progress | None = None,
        before_step: Callable[[float], object] | None = None,
        after_step: Callable[[torch.Tensor], object] | None = None,
        first_step: int = 0,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Sample.

        Args:
            denoise_fn: called as ``denoise_fn(x, alphas_cumprod_sqrt, cond, idx=idx, **model_kwargs)`` with levels
                and timesteps (B,), or (2B,) under guidance; returns the denoised latents.
            x: initial noise (B, T, C, H, W), or a noised video at the level of `first_step`.
            cond: conditions, each (B, ...).
            uc: unconditional conditions of the same names and shapes.
            num_steps: overrides the configured number of steps, also in the guider.
            scale: overrides the configured guidance scale; of one that is no guidance, only the conditional branch is
                computed.
            guidance_interval: shares of the steps between which guidance is used (Kynkäänniemi et al. 2024); outside
                of it only the conditional branch is computed.
            generators: one per sample for the noise of the steps, see `sampling_utils.draw_noise`.
            progress: wraps the sequence of step numbers, as tqdm does.
            before_step: called with the share of the steps that are done, before each.
            after_step: called with the denoised latents (B, T, C, H, W), float32, after each; it must not change them.
            first_step: begin there, with `x` at its noise level instead of noise; shares of the steps count those
                before, and the guider gets the number of those that run.
            **model_kwargs: further inputs of the network; tensors of length B are repeated for guidance.

        Returns:
            Latents (B, T, C, H, W) in the dtype of `x`.

        Raises:
            InputError: the schedule does not have `num_steps` timesteps.
            ValueError: `cond` and `uc`, or the generators, do not fit.
        """
        schedule = self.schedule(num_steps)
        levels, num = schedule.alphas_cumprod_sqrt, len(schedule.timesteps)
        steps = range(first_step, num)
        sample, previous, guides = x.float(), None, has_effect(self.guider, scale)
        for i in progress(steps) if progress is not None and self.verbose else steps:
            if before_step is not None:
                before_step(i / num)
            guided = guides and guidance_interval[0] <= i / num < guidance_interval[1]
            guider = self.guider if guided else IdentityGuider()
            inputs, both = guider.prepare_inputs(sample, cond, uc)
            answer = denoise_fn(
                inputs,
                torch.full((len(inputs),), levels[i], device=x.device),
                both,
                idx=torch.tensor([schedule.timesteps[i]], device=x.device).expand(len(inputs)),
                **{name: _repeat_batch(value, len(x), len(inputs)) for name, value in model_kwargs.items()},
            )
            denoised = guider.combine(
                answer.float(),
                timestep=schedule.timesteps[i],
                num_steps=len(steps) if first_step else num_steps,
                scale=scale if guided else None,
            )
            a_previous = levels[i - 1] if i > first_step else None
            state = StepState(sample, denoised, previous, a_previous, levels[i], levels[i + 1])
            sample, previous = self.update(state, generators), denoised
            if after_step is not None:
                after_step(denoised)
        return sample.to(x.dtype)

    @abstractmethod
    def update(self, state: StepState, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        """Return the sample (B, T, C, H, W) at the next noise level."""


class VPSDEDPMPP2MSampler(VideoSampler):
    """SDE-DPM-Solver++(2M) for variance-preserving models; Lu et al. 2022, see `dpmpp_2m_sde_weights`.

    Every step draws noise for its first-order result; every step but the first draws again for its second-order result,
    which replaces the first. The order of draws matches the reference implementation, so seeds give the same video.
    """

    def update(self, state: StepState, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        """Return the sample at the next level; see the class for the noise drawn."""
        noise = draw_noise(state.x, generators, num_skipped=int(state.previous_denoised is not None))
        weights = dpmpp_2m_sde_weights(state.a_previous, state.a, state.a_next)
        return apply_step(weights, state.x, state.denoised, previous_denoised=state.previous_denoised, noise=noise)


class VideoDDIMSampler(VideoSampler):
    """Deterministic DDIM; Song et al. 2021, see `ddim_weights`. It draws no noise: `generators` have no effect."""

    def update(self, state: StepState, generators: Sequence[torch.Generator] | None) -> torch.Tensor:
        """Return the sample at the next level."""
        return apply_step(ddim_weights(state.a, state.a_next), state.x, state.denoised)

    def invert(
        self,
        denoise_fn: DenoiseFn,
        x: torch.Tensor,
        cond: Cond,
        *,
        num_steps: int | None = None,
        first_step: int = 0,
        num_iterations: int = INVERSION_ITERATIONS,
        progress: Progress | None = None,
        before_step: Callable[[float], object] | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Return the sample from which the steps lead to `x` without guidance, that of `first_step`.

        A step takes y = sample · x + denoised · D(x) from x, see `ddim_weights`; its inverse is the fixed point of
        x ← (y − denoised · D(x)) / sample, found from y (Pan et al. 2023, "Effective Real Image Editing with
        Accelerated Iterative Diffusion Inversion").

        Args:
            denoise_fn: as in a call.
            x: a sample (B, T, C, H, W) before the last step, whose result is clean: it does not know its noise.
            cond: conditions, each (B, ...).
            num_steps: overrides the configured number of steps.
            first_step: how far to go back.
            num_iterations: network evaluations for each step.
            progress: wraps the sequence of step numbers.
            before_step: called with the share of the steps that are before one, before each.
            **model_kwargs: further inputs of the network.
        """
        schedule = self.schedule(num_steps)
        levels, num = schedule.alphas_cumprod_sqrt, len(schedule.timesteps)
        steps = range(num - 2, first_step - 1, -1)
        sample = x.float()
        for i in progress(steps) if progress is not None and self.verbose else steps:
            if before_step is not None:
                before_step(i / num)
            weights, after = ddim_weights(levels[i], levels[i + 1]), sample
            level = torch.full((len(x),), levels[i], device=x.device)
            timestep = torch.tensor([schedule.timesteps[i]], device=x.device).expand(len(x))
            for _ in range(num_iterations):
                denoised = denoise_fn(sample, level, cond, idx=timestep, **model_kwargs).float()
                sample = (after - weights.denoised * denoised) / weights.sample
        return sample.to(x.dtype)


def _repeat_batch(value: Any, batch: int, repeated: int) -> Any:
    """Repeat a tensor of length `batch` to length `repeated`; leave everything else."""
    if batch == repeated or not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != batch:
        return value
    if value.stride(0) == 0:
        return value[:1].expand(repeated, *value.shape[1:])  # still known to be the same for all
    return torch.cat([value] * (repeated // batch))
