"""Guiders: classifier-free guidance (Ho & Salimans 2022) around the denoiser.

D = D_uncond + scale · (D_cond − D_uncond). Both are computed in one batch, the unconditional half first.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from sgm.modules.diffusionmodules.discretizer import Levels
from sgm.util import InputError, default

Scale = Annotated[float, Field(ge=0, le=1000)]
Cond = Mapping[str, torch.Tensor]


class Guider(ABC):
    """Prepare the denoiser's inputs and combine its outputs."""

    @abstractmethod
    def prepare_inputs(self, x: torch.Tensor, cond: Cond, uc: Cond | None) -> tuple[torch.Tensor, Cond]:
        """Return latents and conditions to denoise, for `x` (B, ...), its conditions and the unconditional ones."""

    @abstractmethod
    def combine(
        self, denoised: torch.Tensor, *, timestep: int, num_steps: int | None = None, scale: float | None = None
    ) -> torch.Tensor:
        """Return the guided result (B, ...).

        Args:
            denoised: the denoised outputs of `prepare_inputs`.
            timestep: of the trained schedule, 0 is the cleanest.
            num_steps: steps of this run; None: as configured.
            scale: guidance scale of this run; None: as configured.
        """


def has_effect(guider: Any, scale: float | None) -> bool:
    """Whether a guider guides at a scale, None: as configured; one without a method ``guides`` always does."""
    return guider.guides(scale) if hasattr(guider, "guides") else True


class IdentityGuider(Guider):
    """No guidance: only the conditional branch, at half the cost."""

    def prepare_inputs(self, x: torch.Tensor, cond: Cond, uc: Cond | None) -> tuple[torch.Tensor, Cond]:
        """Return `x` and `cond` unchanged."""
        return x, cond

    def combine(
        self, denoised: torch.Tensor, *, timestep: int, num_steps: int | None = None, scale: float | None = None
    ) -> torch.Tensor:
        """Return `denoised` (B, ...) unchanged; passing a `scale` is an error."""
        if scale is not None:
            raise InputError(f"a guidance scale of {scale} has no effect with IdentityGuider; configure VanillaCFG")
        return denoised


class VanillaCFG(Guider):
    """Guidance with one scale for the whole schedule.

    Args:
        scale: 1 is no guidance; above 1 strengthens the condition.
    """

    NEUTRAL: ClassVar[float | None] = 1.0  # the scale that is no guidance; None if there is none

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "scale_at" in vars(cls) and "NEUTRAL" not in vars(cls):  # which scale is neutral, its author has to say
            cls.NEUTRAL = None

    def __init__(self, *, scale: Scale) -> None:
        self.scale = scale

    def guides(self, scale: float | None = None) -> bool:
        """Whether there is guidance with a scale (None: as configured); without, the result is D_cond."""
        return default(scale, self.scale) != self.NEUTRAL

    def scale_at(self, timestep: int, *, num_steps: int | None = None, scale: float | None = None) -> float:
        """Return the guidance scale at a timestep; `scale` replaces the configured one, `num_steps` has no effect."""
        return default(scale, self.scale)

    def prepare_inputs(self, x: torch.Tensor, cond: Cond, uc: Cond | None) -> tuple[torch.Tensor, Cond]:
        """Return `x` twice (2B, ...), and every condition with its unconditional counterpart in front.

        Raises:
            ValueError: a condition has no counterpart, or their shapes differ.
        """
        uc = uc if uc is not None else {}
        if cond.keys() != uc.keys():
            raise ValueError(f"the conditions are {sorted(cond)}, the unconditional ones {sorted(uc)}; give the same")
        for name in cond:
            if cond[name].shape != uc[name].shape:
                raise ValueError(
                    f"condition '{name}' has the shape {tuple(cond[name].shape)}, its unconditional counterpart "
                    f"{tuple(uc[name].shape)}; give the same"
                )
        return torch.cat([x, x]), {name: torch.cat([uc[name], cond[name]]) for name in cond}

    def combine(
        self, denoised: torch.Tensor, *, timestep: int, num_steps: int | None = None, scale: float | None = None
    ) -> torch.Tensor:
        """Return D_uncond + scale · (D_cond − D_uncond), (B, ...), for `denoised` (2B, ...)."""
        uncond, conditional = denoised.chunk(2)
        return uncond + self.scale_at(timestep, num_steps=num_steps, scale=scale) * (conditional - uncond)


class DynamicCFG(VanillaCFG):
    """Guidance whose scale varies: 1 + scale · (1 − cos(π · ((num_steps − t)/num_steps)^exp)) / 2 at timestep t.

    t is the timestep of the trained schedule (0 to 999), not the number of the step, so the scale swings between 1 and
    1 + `scale` many times. The released models are sampled this way.

    Args:
        scale: largest rise of the scale above 1; 0 is no guidance.
        exp: an integer, because the base is negative for t > num_steps.
        num_steps: steps of the sampler; a run with another number of steps overrides both.
    """

    NEUTRAL: ClassVar[float | None] = 0.0

    def __init__(self, *, scale: Scale, exp: Annotated[float, Field(ge=0, le=100)], num_steps: Levels) -> None:
        if exp != int(exp) or exp < 0:
            raise InputError(f"DynamicCFG got exp {exp}; expected a whole number, such as 5")
        if num_steps < 1:
            raise InputError(f"DynamicCFG got num_steps {num_steps}; expected the steps of the sampler, such as 50")
        super().__init__(scale=scale)
        self.exp = int(exp)
        self.num_steps = num_steps

    def scale_at(self, timestep: int, *, num_steps: int | None = None, scale: float | None = None) -> float:
        """Return the guidance scale at a timestep; `num_steps` and `scale` replace the configured ones."""
        num_steps = self.num_steps if num_steps is None else num_steps
        progress = (num_steps - timestep) / num_steps
        return 1 + default(scale, self.scale) * (1 - math.cos(math.pi * progress**self.exp)) / 2
