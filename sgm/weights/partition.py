"""How the tensors of a network are partitioned for tensor parallelism, by their names; no process group is needed.

Column layers (queries, keys, values, the way into the MLP) divide their outputs, row layers (the way out of attention
and MLP) their inputs (Shoeybi et al. 2019, Megatron-LM; SAT's layers). Everything else is replicated. Files divide
alike: ``mp_rank_00_model_states``, ``mp_rank_01_...`` (docs/checkpoints.md).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from sgm.util import InputError


class Shard(NamedTuple):
    """One of `size` parts of a network, counted from zero."""

    index: int = 0
    size: int = 1


UNSHARDED = Shard()


class Partition(NamedTuple):
    """How a tensor is divided: along `dim`, where `stride` tensors of equal length stand one after the other.

    Every part has its share of each of them: of the queries, the keys and the values.
    """

    dim: int
    stride: int = 1


_LAYER = re.compile(r"(?:^|\.diffusion_model\.)transformer\.layers\.\d+\.(attention|mlp)\.(\w+)\.(?:original\.)?(.+)$")
_COLUMN = {"query_key_value": 3, "dense_h_to_4h": 1, "dense_h_to_4h_gate": 1}
_ROW = ("dense", "dense_4h_to_h")


def partition_of(name: str) -> Partition | None:
    """Return how a tensor of the network is divided, by its name with or without prefix; None where it stays whole."""
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
    """Return the shape of the whole tensor, one of whose `size` parts has `shape`."""
    how = partition_of(name)
    return tuple(n * size if how is not None and dim == how.dim else n for dim, n in enumerate(shape))


def take_shard(name: str, whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """Return a part of a tensor: a view, or a copy where it has several shares in it.

    Raises:
        InputError: the tensor cannot be divided evenly.
    """
    how = partition_of(name)
    if how is None or shard.size == 1:
        return whole
    if isinstance(whole, JoinedTensor):
        whole, shard = whole.covering(shard)
        if shard.size == 1:
            return whole
    if whole.shape[how.dim] % (how.stride * shard.size):
        raise InputError(f"{name} {tuple(whole.shape)} cannot be divided evenly into {shard.size} parts")
    shares = [section.chunk(shard.size, how.dim)[shard.index] for section in whole.chunk(how.stride, how.dim)]
    return shares[0] if how.stride == 1 else torch.cat(shares, how.dim)


def join_shards(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the whole tensor of all its parts, in order; the first of them where the tensor is not divided."""
    how = partition_of(name)
    if how is None or len(parts) == 1:
        return parts[0]
    sections = zip(*(part.chunk(how.stride, how.dim) for part in parts), strict=True)
    return torch.cat([share for section in sections for share in section], how.dim)


def num_shards(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return into how many parts the network is divided one of whose parts has these shapes; None if they do not tell.

    Attention is as wide as the hidden size, which stands whole on the other side of each matrix.
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


class JoinedTensor(torch.Tensor):
    """A divided tensor whose parts lie in several files: its shape costs nothing; every operation joins it anew.

    So what reads a mapped file tensor by tensor holds one whole tensor at a time, of several files too.
    """

    full_name: str
    parts: tuple[torch.Tensor, ...]

    @staticmethod
    def __new__(cls, name: str, parts: Iterable[torch.Tensor]) -> "JoinedTensor":
        """Join parts of the tensor `name`, in order."""
        parts = tuple(parts)
        shape = unsharded_shape(name, parts[0].shape, len(parts))
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].dtype)
        made.full_name, made.parts = name, parts
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Join the tensors among the arguments, then do what is asked for."""
        kwargs = kwargs or {}
        # What asks for shapes on the meta device reads no numbers.
        is_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        joined = partial(tree_map_only, JoinedTensor, partial(JoinedTensor.whole, is_meta=is_meta))
        return func(*joined(args), **joined(kwargs))

    def whole(self, *, is_meta: bool = False) -> torch.Tensor:
        """Return the whole tensor; on the meta device if `is_meta`."""
        return join_shards(self.full_name, [part.to("meta") if is_meta else part for part in self.parts])

    def covering(self, shard: Shard) -> tuple[torch.Tensor, Shard]:
        """Return of the parts no more than `shard` needs, joined, and which part of that it is."""
        held = len(self.parts)
        if held % shard.size == 0:
            each = held // shard.size
            return join_shards(self.full_name, self.parts[each * shard.index : each * (shard.index + 1)]), UNSHARDED
        if shard.size % held == 0:
            each = shard.size // held
            return self.parts[shard.index // each], Shard(shard.index % each, each)
        return join_shards(self.full_name, self.parts), shard
