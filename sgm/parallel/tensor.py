"""Tensor parallelism: sharded layers of the network, and gradients of its replicated parameters.

`sgm.weights.partition` says which parameter is sharded along which dimension. Heads and inner channels are
sharded; a row-parallel layer ends with an all-reduce. All other activations are replicated, so gradients of replicated
parameters are complete and equal on all ranks, except those of the norms of queries and keys: `HeadNorm` sums them.
Sums over sequence parallel ranks are separate, see `sgm.parallel.sequence`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import sgm.distributed
from sgm.weights.adapters import initial_matrix
from sgm.weights.partition import Shard, partition_of


class HeadNorm(nn.LayerNorm):
    """Layer norm over sharded heads: its parameter gradients are summed over the ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        # Not as parameter hooks: parameters may be replaced, and ZeRO-3 gathers them. Clones: a view
        # would keep memory alive that ZeRO-3 frees after the layer.
        sum_gradient = sgm.distributed.layer_groups().copy_to_model_parallel_region
        weight, bias = (
            None if parameter is None else sum_gradient(parameter.clone()) for parameter in (self.weight, self.bias)
        )
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def average_gradients(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, the input of the last layer, with its gradient divided by the number of tensor parallel ranks.

    SAT sums this gradient over the ranks because it expects a sharded last layer. Ours is replicated: its gradient is
    already complete and equal on every rank.
    """
    size = sgm.distributed.tensor_parallel_size()
    if size > 1 and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient / size)
    return x


def shard_adapters(layers: Any, layer_range: Any, shard: Shard) -> None:
    """Initialise SAT's sharded LoRA adapters as on one rank.

    Args:
        layers: SAT's layers on this rank.
        layer_range: indices of the layers with adapters, in SAT's creation order.
        shard: this rank's shard of the network.
    """
    for attention in (layers[index].attention for index in layer_range):
        for name in ("dense", "query_key_value"):
            for index, matrix in enumerate(getattr(attention, name).matrix_A):
                full_name = f"transformer.layers.0.attention.{name}.matrix_A.{index}"
                matrix.data.copy_(initial_matrix(full_name, matrix.shape, shard))


def mark_tensor_parallel(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Mark parameters for DeepSpeed's norms: it sums sharded ones over the ranks and counts replicated ones once."""
    for name, parameter in parameters:
        vars(parameter)["model_parallel"] = partition_of(name) is not None
