"""Discretizations: which noise levels a model is trained on, and which of them a sampler visits.

A noise level is √ᾱ (`alphas_cumprod_sqrt`, 0 is pure noise, 1 is clean) for variance-preserving video models, and
σ (0 is clean) for the EDM and the legacy DDPM discretizations. All are float32 tensors of shape (n,), computed in
float64.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch

from sgm.util import InputError


class Discretization(ABC):
    """A rule that picks `n` noise levels."""

    @abstractmethod
    def levels(self, n: int) -> np.ndarray:
        """Return `n` noise levels as float64, the noisiest first."""

    def __call__(self, n: int, *, do_append_zero: bool = False, flip: bool = False) -> torch.Tensor:
        """Return `n` noise levels as a float32 tensor on the CPU.

        Args:
            n: how many levels.
            do_append_zero: add σ = 0 behind the cleanest level, which makes n + 1.
            flip: the cleanest level first, so that the position is the timestep; otherwise the noisiest first.
        """
        levels = self.levels(n)
        if do_append_zero:
            levels = np.append(levels, 0.0)
        return torch.from_numpy((levels[::-1] if flip else levels).astype(np.float32))


class EDMDiscretization(Discretization):
    """σ_i = (σ_max^(1/ρ) + i/(n−1) · (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ; Karras et al. 2022, equation 5.

    Args:
        sigma_min: the cleanest level.
        sigma_max: the noisiest level.
        rho: how strongly the levels crowd towards `sigma_min`.
    """

    def __init__(self, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise InputError(
                f"EDMDiscretization got sigma_min {sigma_min} and sigma_max {sigma_max}; expected 0 < min < max"
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def levels(self, n: int) -> np.ndarray:
        """Return σ, the noisiest first."""
        if n < 1:
            raise InputError(f"EDMDiscretization was asked for {n} levels; ask for at least 1")
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + np.linspace(0, 1, n) * (low - high)) ** self.rho


class DDPMDiscretization(Discretization):
    """What the DDPM schedules share: √β linear in the timestep, ᾱ the product of 1 − β (Ho et al. 2020, section 2).

    Args:
        linear_start: β of timestep 0.
        linear_end: β of the last timestep.
        num_timesteps: how many timesteps the model is trained on.
    """

    def __init__(self, *, linear_start: float = 0.00085, linear_end: float = 0.012, num_timesteps: int = 1000) -> None:
        if not 0 < linear_start <= linear_end < 1 or num_timesteps < 1:
            raise InputError(
                f"{type(self).__name__} got linear_start {linear_start}, linear_end {linear_end} and num_timesteps "
                f"{num_timesteps}; expected 0 < linear_start <= linear_end < 1 and at least one timestep"
            )
        self.num_timesteps = num_timesteps
        betas = np.linspace(linear_start**0.5, linear_end**0.5, num_timesteps) ** 2
        self.alphas_cumprod = np.cumprod(1 - betas)

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
        if n == self.num_timesteps:
            descending = np.arange(n)[::-1]
        return torch.from_numpy(descending[::-1].copy())


class LegacyDDPMDiscretization(DDPMDiscretization):
    """σ = √((1 − ᾱ) / ᾱ) of the DDPM timesteps: the levels of image models trained to predict ε."""

    def levels(self, n: int) -> np.ndarray:
        """Return σ, the noisiest first."""
        alphas_cumprod = self.alphas_cumprod[self.timesteps(n).numpy()][::-1]
        return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class ZeroSNRDDPMDiscretization(DDPMDiscretization):
    """√ᾱ of the DDPM timesteps with the signal-to-noise ratio shifted, and zero at the last timestep.

    The shift ᾱ ← ᾱ / (s + (1 − s)·ᾱ) divides ᾱ/(1 − ᾱ) by s. The rescaling √ᾱ ← (√ᾱ − √ᾱ_T)·√ᾱ_0 / (√ᾱ_0 − √ᾱ_T)
    (Lin et al. 2024, algorithm 1) applies to the timesteps that were chosen, so that every sampler starts from pure
    noise, however few its steps.

    Args:
        linear_start: β of timestep 0.
        linear_end: β of the last timestep.
        num_timesteps: how many timesteps the model is trained on.
        shift_scale: s above; more than 1 makes every timestep noisier, which large frames need.
        keep_start: choose β of timestep 0 so that the shift brings it to `linear_start`, instead of shifting it too.
        post_shift: shift after the rescaling instead of before the choice of timesteps.
    """

    def __init__(
        self,
        *,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        num_timesteps: int = 1000,
        shift_scale: float = 1.0,
        keep_start: bool = False,
        post_shift: bool = False,
    ) -> None:
        if shift_scale <= 0:
            raise InputError(f"shift_scale is {shift_scale}; expected a positive number, 1.0 for no shift")
        if keep_start and post_shift:
            raise InputError("keep_start and post_shift exclude each other; set one of them to false")
        if keep_start:
            # 1 − shifted(1 − β) = s·β / (1 − (1 − s)·β), solved for the β that gives `linear_start`.
            linear_start = linear_start / (shift_scale + (1 - shift_scale) * linear_start)
        super().__init__(linear_start=linear_start, linear_end=linear_end, num_timesteps=num_timesteps)
        self.shift_scale = shift_scale
        self.post_shift = post_shift
        if not post_shift:
            self.alphas_cumprod = self._shift(self.alphas_cumprod)

    def _shift(self, alphas_cumprod: np.ndarray) -> np.ndarray:
        return alphas_cumprod / (self.shift_scale + (1 - self.shift_scale) * alphas_cumprod)

    def levels(self, n: int) -> np.ndarray:
        """Return √ᾱ, the noisiest (exactly 0) first."""
        roots = self.alphas_cumprod[self.timesteps(n).numpy()] ** 0.5
        first, last = roots[0], roots[-1]
        # One step alone is both ends of the schedule; it has to be pure noise.
        roots = (roots - last) * (first / (first - last)) if n > 1 else np.zeros(1)
        if self.post_shift:
            roots = self._shift(roots**2) ** 0.5
        return roots[::-1]

    def __call__(self, n: int, *, do_append_zero: bool = False, flip: bool = False) -> torch.Tensor:
        """Return `n` values of √ᾱ as float32; see the base class for the order.

        Raises:
            InputError: `do_append_zero` is set: zero is pure noise here, not the clean end.
        """
        if do_append_zero:
            raise InputError("do_append_zero is for discretizations of sigma; set it to false with √ᾱ")
        return super().__call__(n, flip=flip)


class LevelTable:
    """The noise levels of a trained model, for looking up by timestep and by value, on any device.

    It is not a buffer, so that a model turned to half precision keeps its noise levels in float32.

    Args:
        levels: float32 (num_idx,).
    """

    def __init__(self, levels: torch.Tensor) -> None:
        self._on_device = {levels.device: levels}
        self._levels = levels

    @property
    def max(self) -> float:
        """The largest level."""
        return self._levels.max().item()

    def on(self, device: torch.device) -> torch.Tensor:
        """Return the levels on `device`; the copy is kept."""
        if device not in self._on_device:
            self._on_device[device] = self._levels.to(device)
        return self._on_device[device]

    def at(self, idx: torch.Tensor) -> torch.Tensor:
        """Return the levels float32 (B,) of the positions `idx` int64 (B,)."""
        return self.on(idx.device)[idx]

    def nearest_idx(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the positions int64 (B,) of the entries nearest to `levels` (B,)."""
        return (levels.float()[:, None] - self.on(levels.device)[None, :]).abs().argmin(dim=1)
