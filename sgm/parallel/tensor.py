"""Tensor parallelism: the sharded layers of the network on several ranks, and the gradients of the replicated rest.

`sgm.weights.partition` says which parameter is sharded along which dimension. A rank has its own heads and inner
channels; a row layer ends with an all-reduce. Outside of them all ranks see the same tokens, so gradients of replicated
parameters are complete and equal on all ranks, except those of the norms of queries and keys: `HeadNorm` sums them.
Sums over sequence parallel ranks come on top, see `sgm.parallel.sequence`.
"""

import math
from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import sgm.distributed
from sgm.parallel.sequence import sum_gradients
from sgm.weights.partition import Part, division, take, whole_shape


class _AllReduce(torch.autograd.Function):
    """All-reduce in the forward pass, identity in the backward pass, where torch's own all-reduces again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class HeadNorm(nn.LayerNorm):
    """A layer norm for the heads of all ranks: the gradients of its parameters are summed over the ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        group = sgm.distributed.tensor_group()
        # Hooks in the forward pass, not on the parameters: those may be replaced, and ZeRO-3 gathers them. Clones: a
        # view would keep the memory of a parameter alive that ZeRO-3 frees after the layer.
        weight, bias = (
            None if parameter is None else sum_gradients(parameter.clone(), group)
            for parameter in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def average_gradients(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, the input of the last layer, with its gradient divided by the number of tensor parallel ranks.

    SAT sums this gradient over the ranks, as it expects a sharded last layer. Ours is replicated, and so its gradient
    is complete and equal on every rank.
    """
    size = sgm.distributed.tensor_parallel_size()
    if size > 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient / size)
    return x


def shard_adapters(layers: Any, layer_range: Any, part: Part) -> None:
    """Make SAT's LoRA adapters compute, and start, as those of one rank.

    Args:
        layers: SAT's, of this rank.
        layer_range: numbers of the layers with adapters, in the order in which SAT has made them.
        part: this rank's shard of the network.
    """
    for attention in (layers[index].attention for index in layer_range):
        # SAT multiplies B by A times this rank's inputs, which is one term of a sum over the ranks.
        attention.dense.forward = MethodType(_row_adapter_forward, attention.dense)
        for name in ("dense", "query_key_value"):
            for index, matrix in enumerate(getattr(attention, name).matrix_A):
                full_name = f"transformer.layers.0.attention.{name}.matrix_A.{index}"
                whole = matrix.new_empty(whole_shape(full_name, matrix.shape, part.size))
                nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
                matrix.data.copy_(take(full_name, whole, part))


def _row_adapter_forward(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """The row layer and its LoRA: inputs of this rank (B, S, D / ranks) → (B, S, D)."""
    output = adapter.original(x)
    x = adapter.lora_dropout(x)
    for a, b in zip(adapter.matrix_A, adapter.matrix_B, strict=True):
        low = cast(torch.Tensor, _AllReduce.apply(x @ a.T, sgm.distributed.tensor_group()))
        output = output + low @ b.T * adapter.scaling
    return output


def mark_tensor_parallel(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Mark parameters for DeepSpeed, which sums the norms of sharded ones over the ranks, and counts others once."""
    for name, parameter in parameters:
        vars(parameter)["model_parallel"] = division(name) is not None
