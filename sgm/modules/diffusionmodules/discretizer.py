"""Discretization: noise levels for training and for sampling.

A noise level is √ᾱ (`alphas_cumprod_sqrt`): 0 is pure noise, 1 is clean.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field

from sgm.config.values import Positive
from sgm.util import InputError, instantiate_from_config

Levels = Annotated[int, Field(ge=1, le=100_000)]


class ZeroSNRDDPMDiscretization:
    """√ᾱ of the DDPM timesteps with the signal-to-noise ratio shifted, and zero at the last timestep.

    √β is linear in the timestep, ᾱ the product of 1 − β (Ho et al. 2020, section 2). The shift
    ᾱ ← ᾱ / (s + (1 − s)·ᾱ) divides ᾱ/(1 − ᾱ) by s. The rescaling √ᾱ ← (√ᾱ − √ᾱ_T)·√ᾱ_0 / (√ᾱ_0 − √ᾱ_T)
    (Lin et al. 2024, algorithm 1) applies to the chosen timesteps, so that every sampler starts from pure noise,
    with any number of steps. Computed in float64.

    Args:
        linear_start: β of timestep 0.
        linear_end: β of the last timestep.
        num_timesteps: timesteps of training.
        shift_scale: s above; s > 1 makes every timestep noisier, as large frames need.
        keep_start: choose β of timestep 0 so that the shift brings it to `linear_start`, instead of shifting it too.
        post_shift: shift after the rescaling instead of before the choice of timesteps.
    """

    def __init__(
        self,
        *,
        linear_start: Positive = 0.00085,
        linear_end: Positive = 0.012,
        num_timesteps: Levels = 1000,
        shift_scale: Positive = 1.0,
        keep_start: bool = False,
        post_shift: bool = False,
    ) -> None:
        if shift_scale <= 0:
            raise InputError(f"shift_scale is {shift_scale}; expected a positive number, 1.0 for no shift")
        if keep_start and post_shift:
            raise InputError("keep_start and post_shift exclude each other; set one of them to false")
        if not 0 < linear_start <= linear_end < 1 or num_timesteps < 1:
            raise InputError(
                f"ZeroSNRDDPMDiscretization got linear_start {linear_start}, linear_end {linear_end} and num_timesteps "
                f"{num_timesteps}; expected 0 < linear_start <= linear_end < 1 and at least one timestep"
            )
        if keep_start:
            # 1 − shifted(1 − β) = s·β / (1 − (1 − s)·β), solved for the β that gives `linear_start`.
            linear_start = linear_start / (shift_scale + (1 - shift_scale) * linear_start)
        self.num_timesteps = num_timesteps
        self.shift_scale = shift_scale
        self.post_shift = post_shift
        betas = np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps) ** 2
        self.alphas_cumprod = np.cumprod(1 - betas)
        if not post_shift:
            self.alphas_cumprod = self._shift(self.alphas_cumprod)

    def _shift(self, alphas_cumprod: np.ndarray) -> np.ndarray:
        return alphas_cumprod / (self.shift_scale + (1 - self.shift_scale) * alphas_cumprod)

    def timesteps(self, n: int) -> torch.Tensor:
        """Return the `n` timesteps visited, ascending, as int64: from the last one down in (almost) equal strides.

        Raises:
            InputError: `n` is not between 1 and `num_timesteps`.
        """
        if not 1 <= n <= self.num_timesteps:
            raise InputError(
                f"num_steps is {n}, but the schedule has {self.num_timesteps} timesteps; "
                f"choose 1 to {self.num_timesteps}"
            )
        descending = np.linspace(self.num_timesteps - 1, 0, n, endpoint=False).astype(np.int64)
        ascending = np.arange(n) if n == self.num_timesteps else descending[::-1].copy()
        return torch.from_numpy(ascending)

    def levels(self, n: int) -> np.ndarray:
        """Return √ᾱ of `n` timesteps as float64, the noisiest (exactly 0) first."""
        roots = self.alphas_cumprod[self.timesteps(n).numpy()] ** 0.5
        first, last = roots[0], roots[-1]
        # A single step is both ends of the schedule; it must be pure noise.
        roots = (roots - last) * (first / (first - last)) if n > 1 else np.zeros(1)
        if self.post_shift:
            roots = self._shift(roots**2) ** 0.5
        return roots[::-1]

    def __call__(self, n: int, *, flip: bool = False) -> torch.Tensor:
        """Return `levels` as float32 on the CPU; with `flip` the cleanest first, so that indices are timesteps."""
        levels = self.levels(n)
        return torch.from_numpy((levels[::-1] if flip else levels).astype(np.float32))


def discretization_from_config(config: Mapping[str, Any], n: int) -> Any:
    """Build a discretization and check that it returns `n` noise levels √ᾱ.

    A custom one needs the call signature of `ZeroSNRDDPMDiscretization`; samplers also call `timesteps`.

    Raises:
        InputError: its levels are not √ᾱ (for example σ), or are fewer than `n`.
    """
    discretization = instantiate_from_config(config)
    levels = discretization(n)
    if not 0 <= levels.min() <= levels.max() < 1:
        raise InputError(
            f"{config['target']} gives noise levels from {levels.min():g} to {levels.max():g}, but √ᾱ is at least 0 "
            "and below 1; use sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization"
        )
    return discretization


class LevelTable:
    """The noise levels of a trained model, looked up by timestep and by value, on any device.

    Not a buffer: a model cast to half precision keeps its noise levels in float32.

    Args:
        levels: √ᾱ, float32 (num_idx,).
    """

    def __init__(self, levels: torch.Tensor) -> None:
        self._levels = levels
        self._on_device = {levels.device: levels}

    @classmethod
    def from_config(cls, discretization_config: Mapping[str, Any], num_idx: int, *, flip: bool) -> Self:
        """Build the table of a discretization section."""
        return cls(discretization_from_config(discretization_config, num_idx)(num_idx, flip=flip))

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the levels on `device`; the copy is cached."""
        if device not in self._on_device:
            self._on_device[device] = self._levels.to(device)
        return self._on_device[device]

    def at(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the levels float32 (B,) at the indices `idx` int64 (B,)."""
        return self.on(idx.device)[idx]

    def nearest_idx(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the indices int64 (B,) of the entries nearest to `levels` (B,)."""
        return (levels.float()[:, None] - self.on(levels.device)[None, :]).abs().argmin(dim=1)
