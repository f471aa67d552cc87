"""Weights of linear layers stored in eight bits: int8 or fp8 numbers with scales, as torchao's tensors.

A layer brings its weight back to 16 or 32 bits whenever it is used, and so runs on every device; its input, bias and
sums keep the precision of the run. The layers of the blocks are stored so, which hold nearly all parameters. Norms,
embeddings of patches, text and time, and the final layer stay: they are small, and their errors reach every token.

torchao is imported when the first layer is stored.
"""

import importlib.util
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sgm.io import readable_size
from sgm.util import InputError

Storage = Literal["int8", "fp8"]


def linear_layers(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Return all linear layers in `modules`; those that LoRA adapts too, without the adapters."""
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]


def store(layer: nn.Linear, storage: Storage, *, device: torch.device | None = None) -> None:
    """Store the weight of a layer in eight bits, in place.

    Args:
        layer: is frozen.
        storage: ``int8``: numbers of equal steps, for each half of a long row; ``fp8``: e4m3 numbers with a scale for
            each row.
        device: where the numbers are computed; None takes that of the weight, which the result is on in any case.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup, PerRow, quantize_

    config: Any = Float8WeightOnlyConfig(set_inductor_config=False)
    if storage == "int8":
        # Of one step a row, torchao scales the product: a second tensor as large as the output, and too large for
        # float16 where rows are long.
        steps = PerGroup(layer.in_features // 2) if layer.in_features >= 512 else PerRow()
        config = Int8WeightOnlyConfig(granularity=steps, set_inductor_config=False)
    home = layer.weight.device
    layer.requires_grad_(False)
    if device is not None and device != home:
        layer.weight = nn.Parameter(layer.weight.to(device), requires_grad=False)
    quantize_(layer, config)
    if layer.weight.device != home:
        layer.weight = nn.Parameter(layer.weight.to(home), requires_grad=False)


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
    """Return a text for the log: how many layers of `module` are in eight bits, and how large it is."""
    plain = sum(2 * parameter.numel() for parameter in module.parameters())
    sizes = f"{readable_size(num_bytes([module]))}, in 16 bits {readable_size(plain)}"
    return f"{len(layers):,} linear layers in {storage} ({sizes})"


def _is_installed() -> bool:
    return importlib.util.find_spec("torchao") is not None


def require_usable(storage: Storage, device: torch.device) -> None:
    """Try `storage` with a layer on `device`.

    Raises:
        InputError: torchao is not installed, or cannot do it there.
    """
    if not _is_installed():
        raise InputError(f"{storage} needs torchao, which is not installed: pip install 'cogvideox-sat[lowmem]'")
    layer = nn.Linear(32, 32, device=device)
    try:
        store(layer, storage)
        finite = bool(layer(torch.ones(1, 32, device=device)).isfinite().all())
    except (ImportError, RuntimeError, NotImplementedError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"torchao cannot store weights in {storage} on '{device}': {reason}") from error
    if not finite:
        raise InputError(f"torchao computes no finite numbers from weights in {storage} on '{device}'")
