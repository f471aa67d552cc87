"""What work costs: FLOPs of products, bytes that other kernels move, and FLOPs of a model's samples by formula."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}
_NO_KERNEL = {"detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "alias", "device"}


@dataclass(frozen=True)
class Cost:
    """Work of a device.

    Attributes:
        products: FLOPs of matrix products.
        attention: FLOPs of attention kernels, with the scores that a backward pass computes again.
        convolutions: FLOPs of convolutions.
        moved: bytes that all other kernels read and write.
        kernels: number of kernels.
    """

    products: float = 0.0
    attention: float = 0.0
    convolutions: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """Return this and `times` another."""
        return Cost(
            self.products + times * other.products,
            self.attention + times * other.attention,
            self.convolutions + times * other.convolutions,
            self.moved + times * other.moved,
            self.kernels + times * other.kernels,
        )


def cost_of(operator: Any, args: Any, kwargs: Any, out: Any) -> Cost | None:
    """Return the cost of a call of an aten operator; None if it runs no kernel.

    Args:
        operator: an overload, as `TorchDispatchMode` gets it.
        args: of the call.
        kwargs: of the call.
        out: its result.
    """
    name, kind = operator.overloadpacket.__name__, _kind(operator)
    if kind == "attention":
        return Cost(attention=_attention_flops(name, args), kernels=1)
    if kind == "product":
        packet = getattr(torch.ops.aten, name.removesuffix("_"))
        flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
        return Cost(**{"convolutions" if "convolution" in name else "products": flops}, kernels=1)
    moved = moved_bytes(operator, args, kwargs, out)
    return None if moved is None else Cost(moved=moved, kernels=1)


@cache
def _kind(operator: Any) -> Literal["product", "attention", "view", "other"]:
    name = operator.overloadpacket.__name__
    if "scaled_dot_product" in name:
        return "attention"
    if name in _PRODUCTS:
        return "product"
    is_view = any(made.alias_info is not None and not made.alias_info.is_write for made in operator._schema.returns)
    return "view" if is_view or name in _NO_KERNEL else "other"


def _attention_flops(name: str, args: Any) -> float:
    """Return 4·B·H·S·T·d of a forward pass; a backward pass has five products instead of two."""
    backward = name.endswith("_backward")
    queries, keys = args[1:3] if backward else args[:2]
    return (5 if backward else 2) * 2.0 * queries.numel() * keys.shape[-2]


def moved_bytes(operator: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the bytes that a kernel reads and writes; None for views, products and attention."""
    if _kind(operator) != "other":
        return None
    results = _results(operator)  # counted as `out`
    return _bytes(args) + sum(_bytes(value) for key, value in kwargs.items() if key not in results) + _bytes(out)


@cache
def _results(operator: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in operator._schema.arguments if argument.is_out)


def _bytes(value: Any) -> int:
    """Return the bytes that a kernel reads of tensors in an argument: expanded dimensions count once."""
    if isinstance(value, torch.Tensor):
        if 0 not in value.stride():
            return value.numel() * value.element_size()
        lengths = (length for length, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return math.prod(lengths) * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def sample_flops(network: Any, num_tokens: int, *, trains_all: bool) -> float | None:
    """Return the FLOPs of the blocks for a sample, forward and backward; None for a network of another kind.

    With S tokens, n blocks of hidden size D and W elements in their weights, the forward pass takes 2·S·W for products
    with weights and 4·n·S²·D for attention. The backward pass takes 2·S·W for the gradients of tokens, the same again
    for those of weights if they are trained, and 8·n·S²·D. Adapters and embeddings, about a hundredth, are not counted,
    nor is what a backward pass computes again.

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
