"""Tokens and model FLOPs of training samples, and what a card could do: model FLOPs utilization.

Chowdhery et al. 2022 (PaLM, appendix B): the products that the model needs, without recomputation, per second, as a
share of the peak of the hardware.
"""

import math
from typing import Any

import torch

from sgm.checks.cost import sample_flops
from sgm.checks.scaling.cards import PEAKS
from sgm.models.video_diffusion import TrainingInputs


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None) -> float | None:
    """Return the FLOP/s of a device, from ``args.peak_tflops`` or by its name; None if unknown, as of a CPU."""
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cpu" or dtype is torch.float32:
        return None
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    words = str(properties(device).name).replace("-", " ").split() if properties is not None else []
    return next((flops for name, flops in PEAKS.items() if set(name.split()) <= set(words)), None)


class Work:
    """Count the tokens and the FLOPs of the samples of this rank.

    Attributes:
        peak: FLOP/s of the device; None if unknown.
    """

    def __init__(self, network: Any, *, trains_all: bool, peak: float | None) -> None:
        self.peak = peak
        self._network, self._trains_all = network, trains_all
        self._flops_of: dict[int, float | None] = {}  # by number of tokens
        self._tokens, self._flops = 0, 0.0

    def add(self, inputs: TrainingInputs, num_samples: int) -> None:
        """Add samples of the same shape as those of `inputs`."""
        if "rejected" in inputs.of_loss:
            num_samples *= 2  # the forward passes of the reference are not counted, as those of recomputed blocks
        shape = inputs.latents.shape
        patches = shape[1] * shape[3] * shape[4] // math.prod(getattr(self._network, "patch_size", (1, 1, 1)))
        tokens = patches + inputs.cond["crossattn"].shape[1]
        if tokens not in self._flops_of:
            self._flops_of[tokens] = sample_flops(self._network, tokens, trains_all=self._trains_all)
        flops = self._flops_of[tokens]
        self._tokens += num_samples * tokens
        self._flops += math.nan if flops is None else num_samples * flops

    def take(self) -> tuple[int, float | None]:
        """Return tokens and FLOPs since the last call; None for FLOPs of an unknown network."""
        taken = self._tokens, None if math.isnan(self._flops) else self._flops
        self._tokens, self._flops = 0, 0.0
        return taken
