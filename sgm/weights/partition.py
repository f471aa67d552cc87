"""Sharding of tensors for tensor parallelism, by name; needs no process group.

Column-parallel layers (queries, keys, values, the first MLP layer) are sharded along their outputs, row-parallel layers
(the output of attention, the last MLP layer) along their inputs (Shoeybi et al. 2019, Megatron-LM; SAT's layers).
Everything else is replicated. Checkpoints are sharded in the same way: ``mp_rank_00_model_states``,
``mp_rank_01_...`` (docs/checkpoints.md).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sgm.util import InputError
from sgm.weights.lazy import AnyTensor, LazyTensor, compute


class Shard(NamedTuple):
    """One of `size` shards of a network, counted from zero."""

    index: int = 0
    size: int = 1


UNSHARDED = Shard()


class Partition(NamedTuple):
    """How a tensor is sharded: along `dim`, which holds `stride` blocks of equal length.

    Every shard has a slice of each block: of the queries, the keys and the values.
    """

    dim: int
    stride: int = 1


_LAYER = re.compile(r"(?:^|\.diffusion_model\.)transformer\.layers\.\d+\.(attention|mlp)\.(\w+)\.(?:original\.)?(.+)$")
_COLUMN = {"query_key_value": 3, "dense_h_to_4h": 1, "dense_h_to_4h_gate": 1}
_ROW = ("dense", "dense_4h_to_h")


def partition_of(name: str) -> Partition | None:
    """Return the partition of a tensor, by its name with or without prefix; None if it is replicated."""
    match = _LAYER.search(name)
    if match is None:
        return None
    layer, tensor = match[2], match[3]
    if layer in _COLUMN and tensor in ("weight", "bias"):
        return Partition(0, _COLUMN[layer])
    if layer in _COLUMN and tensor.startswith("matrix_B."):
        return Partition(0)
    if layer in _ROW and (tensor == "weight" or tensor.startswith("matrix_A.")):
        return Partition(1)
    return None


def unsharded_shape(name: str, shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the full shape from the `shape` of one of `size` shards."""
    how = partition_of(name)
    return tuple(n * size if how is not None and dim == how.dim else n for dim, n in enumerate(shape))


def take_shard(name: str, tensor: AnyTensor, shard: Shard) -> torch.Tensor:
    """Return a shard of a tensor: a view, or a copy if it has several blocks. Replicated tensors are unchanged.

    For tensors of `join_lazily`, only the needed stored shards are read.

    Raises:
        InputError: the tensor cannot be sharded evenly.
    """
    how = partition_of(name)
    if isinstance(tensor, LazyTensor):
        if how is not None and isinstance(tensor.make, _Join):
            tensor, shard = _join_needed(name, tensor.sources, shard)
        tensor = compute(tensor)
    if how is None or shard.size == 1:
        return tensor
    if tensor.shape[how.dim] % (how.stride * shard.size):
        raise InputError(f"{name} {tuple(tensor.shape)} cannot be divided evenly into {shard.size} shards")
    slices = [block.chunk(shard.size, how.dim)[shard.index] for block in tensor.chunk(how.stride, how.dim)]
    return slices[0] if how.stride == 1 else torch.cat(slices, how.dim)


def join_shards(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate all shards, in order, to the full tensor; return the first one if it is replicated."""
    how = partition_of(name)
    if how is None or len(shards) == 1:
        return shards[0]
    blocks = zip(*(shard.chunk(how.stride, how.dim) for shard in shards), strict=True)
    return torch.cat([part for block in blocks for part in block], how.dim)


@dataclass(frozen=True)
class _Join:
    name: str

    def __call__(self, *shards: torch.Tensor) -> torch.Tensor:
        return join_shards(self.name, shards)


def join_lazily(name: str, shards: Iterable[AnyTensor]) -> LazyTensor:
    """Return the full tensor of all shards, in order, as a lazy tensor: shards are read when it is computed."""
    return LazyTensor(tuple(shards), _Join(name))


def _join_needed(name: str, shards: Sequence[AnyTensor], shard: Shard) -> tuple[AnyTensor, Shard]:
    """Concatenate the stored `shards` that overlap `shard`; return the result and the shard to take of it."""
    if len(shards) % shard.size == 0:
        num = len(shards) // shard.size
        return join_lazily(name, shards[num * shard.index : num * (shard.index + 1)]), UNSHARDED
    if shard.size % len(shards) == 0:
        num = shard.size // len(shards)
        return shards[shard.index // num], Shard(shard.index % num, num)
    return join_lazily(name, shards), shard


def num_shards(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Infer the number of shards of a network from the shapes in one of them; None if unknown.

    Attention is as wide as the hidden size, which is unsharded in the other dimension of each matrix.
    """
    found = set()
    for name, shape in shapes.items():
        how = partition_of(name)
        if how is None or "attention." not in name or len(shape) != 2:
            continue
        whole = shape[1 - how.dim] * how.stride
        if ".matrix_" in name:  # the hidden size is in the other matrix of the pair
            other = name.replace(".matrix_A.", ".matrix_B.") if how.dim else name.replace(".matrix_B.", ".matrix_A.")
            whole = shapes[other][1 - how.dim] if len(shapes.get(other, ())) == 2 else 0
        found.add(whole / shape[how.dim] if shape[how.dim] else 0)
    size = found.pop() if len(found) == 1 else 0
    return int(size) if size >= 1 and size == int(size) else None
