"""Tokens and model FLOPs of training samples, and what a card could do: model FLOPs utilization.

Chowdhery et al. 2022 (PaLM, appendix B): the products that the model needs, without recomputation, per second, as a
share of the peak of the hardware.
"""

import math
from typing import Any

import torch

from sgm.models.video_diffusion import TrainingInputs

# Dense FLOP/s in 16 bits by the name that the driver gives, from the data sheets; the first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None) -> float | None:
    """Return the FLOP/s of a device, from ``args.peak_tflops`` or by its name; None if unknown, as of a CPU."""
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cpu" or dtype is torch.float32:
        return None
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    words = str(properties(device).name).replace("-", " ").split() if properties is not None else []
    return next((flops for name, flops in PEAKS.items() if set(name.split()) <= set(words)), None)


def sample_flops(network: Any, num_tokens: int, *, trains_all: bool) -> float | None:
    """Return the FLOPs of the blocks for a sample, forward and backward; None for a network of another kind.

    With S tokens, n blocks of hidden size D and W elements in their weights, the forward pass takes 2·S·W for products
    with weights and 4·n·S²·D for attention. The backward pass takes 2·S·W for the gradients of tokens, the same again
    for those of weights if they are trained, and 8·n·S²·D. Adapters and embeddings, about a hundredth, are not counted.

    Args:
        network: the whole network, also if its layers are shards.
        num_tokens: S.
        trains_all: whether gradients of the weights are computed.
    """
    layers = getattr(getattr(network, "transformer", None), "layers", None)
    hidden_size = getattr(network, "hidden_size", None)
    if layers is None or hidden_size is None:
        return None
    weights = sum(_size(module) for module in layers.modules())
    products = 2 * num_tokens * weights
    attention = 4 * len(layers) * num_tokens**2 * hidden_size
    return products * (3 if trains_all else 2) + attention * 3


def _size(module: Any) -> int:
    """Return the elements of a linear layer, all shards together; 0 for other modules."""
    for sides in (("in_features", "out_features"), ("input_size", "output_size")):  # torch's, SAT's
        found = [getattr(module, side, None) for side in sides]
        if None not in found:
            rows, columns = found
            return int(rows or 0) * int(columns or 0)
    return 0


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
