"""The layers of the network on several ranks: which parameter is divided how, by its name, and gradients of the rest.

Column layers (queries, keys, values, the way into the MLP) divide their outputs, row layers (the way out of attention
and MLP) their inputs (Shoeybi et al. 2019, Megatron-LM; SAT's layers). A rank so has heads and inner channels of its
own; a row layer ends with a sum over the ranks. Everything else stands whole on every rank. As all ranks see the same
tokens outside of a layer's inner channels, gradients of whole parameters are whole and equal on all ranks, except those
of the norms of queries and keys: `HeadNorm` sums them. Sums over the ranks that share tokens come on top, see
sgm.parallel.sequence.

Files divide alike: ``mp_rank_00_model_states``, ``mp_rank_01_...`` (docs/checkpoints.md).
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import sgm.distributed
from sgm.weights.adapters import initial_matrix
from sgm.weights.partition import Shard, partition_of


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        # A copy: a view would keep the memory of a parameter alive that ZeRO-3 frees after the layer.
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: int) -> torch.Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.by, None


class HeadNorm(nn.LayerNorm):
    """A layer norm that all heads share, those of other ranks too: its gradients are summed over the ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        group = sgm.distributed.tensor_group()
        # Within the layer, not as a hook on the parameter: it then holds for parameters that replace those of today,
        # and where ZeRO-3 gathers them.
        weight, bias = (
            None if parameter is None else cast(torch.Tensor, _SumGradient.apply(parameter, group))
            for parameter in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def equal_gradients(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, which SAT hands to the last layer, with a share of its gradient: SAT adds up those of the ranks.

    It expects a last layer that is divided; this one is whole, and its gradient too, on every rank.
    """
    size = sgm.distributed.tensor_parallel_size()
    return x if size == 1 else cast(torch.Tensor, _DivideGradient.apply(x, size))


def shard_adapters(layers: Any, layer_range: Any, shard: Shard) -> None:
    """Make SAT's adapters compute and begin as one rank's do, where `shard` is a part.

    Args:
        layers: SAT's, of this rank.
        layer_range: numbers of those with adapters, in the order in which SAT has made them.
        shard: which of the network this rank has.
    """
    for attention in (layers[index].attention for index in layer_range):
        # SAT multiplies B by what this rank's inputs make of A, which is a part of a sum.
        attention.dense.forward = MethodType(_row_adapter, attention.dense)
        for name in ("dense", "query_key_value"):
            for index, matrix in enumerate(getattr(attention, name).matrix_A):
                full_name = f"transformer.layers.0.attention.{name}.matrix_A.{index}"
                matrix.data.copy_(initial_matrix(full_name, matrix.shape, shard))


def _row_adapter(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """The row layer and its LoRA: inputs of this rank (B, S, D / ranks) → (B, S, D)."""
    output = adapter.original(x)
    x = adapter.lora_dropout(x)
    for a, b in zip(adapter.matrix_A, adapter.matrix_B, strict=True):
        low = cast(torch.Tensor, _Sum.apply(x @ a.T, sgm.distributed.tensor_group()))
        output = output + low @ b.T * adapter.scaling
    return output


def mark_tensor_parallel(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Mark parameters for DeepSpeed, which adds the norms of divided ones over the ranks and counts others once."""
    for name, parameter in parameters:
        vars(parameter)["model_parallel"] = partition_of(name) is not None
