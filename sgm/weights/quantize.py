"""Frozen weights of linear layers stored in fewer bits: int8, fp8 or nf4 numbers with scales.

A layer brings its weight back to 16 or 32 bits whenever it is used, and so runs on every device; its input, bias and
sums keep the precision of the run. The layers of the blocks are stored so, which hold nearly all parameters. Norms,
embeddings of patches, text and time, and the final layer stay: they are small, and their errors reach every token.

A backward pass brings the weight back once more, instead of keeping it. int8 is torchao's tensor; fp8 and nf4
(Dettmers et al., arXiv:2305.14314: 16 quantiles of a normal distribution, with a scale for 64 numbers, computed by
bitsandbytes) are those of `sgm.weights.quantized_tensors`. All are imported when the first layer is stored.
"""

import importlib.util
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sgm.io import readable_size
from sgm.util import InputError

Storage = Literal["int8", "fp8", "nf4"]

# The mean loss of the toy's LoRA on stored weights, beside that on its own: docs/memory.md.
LOSS_ON_TOY: Mapping[Storage, str] = {"int8": "+0.3 %", "fp8": "+0.6 %", "nf4": "+26 %"}

_PACKAGES: dict[Storage, tuple[str, ...]] = {
    "int8": ("torchao",),
    "fp8": ("torchao",),
    "nf4": ("torchao", "bitsandbytes"),
}


class _Product(torch.autograd.Function):
    """x·Wᵀ + b for a stored W, without a gradient of W and b; keeps neither x nor a second copy of W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize().to(gradient.dtype), None, None


class StoredLinear(nn.Linear):
    """A linear layer with its weight in fewer bits; see `store`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) → (..., out)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(torch.Tensor, _Product.apply(x, self.weight, self.bias))
        return functional.linear(x, self.weight, self.bias)


def linear_layers(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Return all linear layers in `modules`; those that LoRA adapts too, without the adapters."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]


def store(layer: nn.Linear, storage: Storage, *, device: torch.device | None = None) -> None:
    """Store the weight of a layer in fewer bits, in place.

    Args:
        layer: gets frozen.
        storage: ``int8``: numbers of equal steps, for each half of a long row; ``fp8``: squares as e4m3 numbers, with a
            scale for each row; ``nf4``: four bits, with a scale for each 64 numbers.
        device: where the numbers are computed; None takes that of the weight, which the result is on in any case.
    """
    home = layer.weight.device
    layer.requires_grad_(False)
    if device is not None and device != home:
        layer.weight = nn.Parameter(layer.weight.to(device), requires_grad=False)
    if storage == "int8":
        _store_in_steps(layer)
    else:
        from sgm.weights.quantized_tensors import FP8Tensor, NF4Tensor

        kind = FP8Tensor if storage == "fp8" else NF4Tensor
        layer.weight = nn.Parameter(kind.of(layer.weight.data), requires_grad=False)
    if layer.weight.device != home:
        layer.weight = nn.Parameter(layer.weight.to(home), requires_grad=False)
    layer.__class__ = StoredLinear


def _store_in_steps(layer: nn.Linear) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

    # Of one step a row, torchao scales the product: a second tensor as large as the output, and too large for float16
    # where rows are long.
    steps = PerGroup(layer.in_features // 2) if layer.in_features >= 512 else PerRow()
    config: Any = Int8WeightOnlyConfig(granularity=steps, set_inductor_config=False)
    quantize_(layer, config)


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold the numbers of `tensor`: of one in eight bits its integers and scales, or itself."""
    tensor = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def num_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all parameters of `modules`, as they are stored."""
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(part.nbytes for parameter in parameters.values() for part in plain_parts(parameter))


def stored_text(module: nn.Module, layers: Collection[nn.Linear], storage: Storage) -> str:
    """Return a text for the log: how many layers of `module` are in fewer bits, and how large it is."""
    plain = sum(2 * parameter.numel() for parameter in module.parameters())
    sizes = f"{readable_size(num_bytes([module]))}, in 16 bits {readable_size(plain)}"
    return f"{len(layers):,} linear layers in {storage} ({sizes})"


def loss_text(storage: Storage) -> str:
    """Return a text for reports: what training on stored weights changes."""
    return f"{storage}, approximate: the loss of the toy's LoRA is {LOSS_ON_TOY[storage]}, see docs/memory.md"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require_usable(storage: Storage, device: torch.device, *, gradients: bool = False) -> None:
    """Try `storage` with a layer on `device`.

    Args:
        storage: of the weight.
        device: of the layer.
        gradients: also try a backward pass.

    Raises:
        InputError: a package is not installed, or cannot do it there.
    """
    packages = _PACKAGES[storage]
    for package in packages:
        if not _is_installed(package):
            raise InputError(f"{storage} needs {package}, which is not installed: pip install 'cogvideox-sat[lowmem]'")
    layer, x = nn.Linear(64, 64, device=device), torch.ones(1, 64, device=device, requires_grad=gradients)
    try:
        store(layer, storage)
        out = layer(x)
        if gradients:
            out.sum().backward()
        finite = bool(out.isfinite().all())
    except (ImportError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{packages[-1]} cannot store weights in {storage} on '{device}': {reason}") from error
    if not finite:
        raise InputError(f"{packages[-1]} computes no finite numbers from weights in {storage} on '{device}'")
