"""One sample on several ranks: every rank holds a part of the tokens, and all weights.

Legend: ``B`` samples, ``S`` tokens of a sample (text and patches), ``s`` those of this rank, ``H`` heads, ``h`` those
of this rank, ``d`` channels of a head.

`split_sequence` gives every rank its part and `gather_sequence` joins the parts; in between only attention needs the
other ranks. `ulysses_attention` (Jacobs et al. 2023, DeepSpeed-Ulysses) exchanges tokens of all heads for all tokens of
some heads, and so needs a head per rank at least; `sgm.parallel.ring_attention` has no such limit.

All functions take the process group; with None, or a group of one rank, they do what one process does. Every rank of
the group must call them in the same order, and compute the same loss from what it gathered.

Gradients. Between `split_sequence` and `gather_sequence`, the gradient of a rank's part is that part of the gradient on
one rank, and a weight gets what this rank's tokens contribute: the SUM over the group is the gradient on one rank.
Before the one and after the other, every rank computes the same: gradients are whole and equal on all ranks, and a sum
would count them once per rank. What enters in between without `split_sequence`, and is the same on all ranks (the time
embedding, a slice of a position table), counts as in between, with the weights that it comes from. A network can thus
sum the gradients of all its weights alike if it splits its inputs before the first weight, and gathers after the last.

Why not `deepspeed.sequence.layer.DistributedAttention`: it takes uneven heads, but only tokens that the ranks share
evenly; text and patches of a video do not. Padding them would need masks, which the fast attention kernels refuse.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from sgm.util import InputError

Group = dist.ProcessGroup | None
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def shard_sizes(length: int, size: int) -> list[int]:
    """Divide `length` items over `size` ranks: as evenly as possible, the first ranks take what is left over."""
    each, left_over = divmod(length, size)
    return [each + (rank < left_over) for rank in range(size)]


def group_size(group: Group) -> int:
    """Return the number of ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def split_sequence(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """Keep this rank's part of a tensor that all ranks hold.

    Args:
        x: any shape; the same on every rank.
        group: the ranks that share the sample.
        dim: the dimension that is divided, by `shard_sizes`.

    Returns:
        A copy of the part, so that the whole can be freed. Its gradient comes back whole, to every rank.
    """
    return x if group_size(group) == 1 else _Split.apply(x, group, dim)


def gather_sequence(x: torch.Tensor, group: Group, dim: int, length: int) -> torch.Tensor:
    """Join the parts of all ranks.

    Args:
        x: the part of this rank, as `split_sequence` returns it.
        group: the ranks that share the sample.
        dim: the dimension that is divided.
        length: its size in the whole.

    Returns:
        The whole, on every rank. The part's gradient is its part of the whole gradient, equal on all ranks.
    """
    if group_size(group) == 1:
        return x
    sizes = shard_sizes(length, group_size(group))
    check_part(x, group, sizes, dim)
    return _Gather.apply(x, group, dim, sizes)


def ulysses_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, lengths: Sequence[int], attention: Attention
) -> torch.Tensor:
    """Attention over the tokens of all ranks, where each rank attends with some of the heads.

    Args:
        q: (B, s, H, d), the tokens of this rank; positions are already applied, as tokens are joined rank by rank.
        k: the same shape.
        v: the same shape.
        group: the ranks that share the sample.
        lengths: s of every rank.
        attention: q, k, v (B, S, h, d) → (B, S, h, d) over all tokens, in any order of the tokens.

    Returns:
        (B, s, H, d), in the dtype of q.

    Raises:
        InputError: there are more ranks than heads.
    """
    size, num_heads = group_size(group), q.shape[2]
    if size == 1:
        return attention(q, k.to(q.dtype), v.to(q.dtype))
    if num_heads < size:
        raise InputError(
            f"Ulysses attention gives each rank at least one head, and {num_heads} heads cannot serve {size} ranks; "
            "use ring attention, or fewer ranks for a sample"
        )
    check_part(q, group, lengths)
    tokens, heads = _Division(-3, lengths), _Division(-2, shard_sizes(num_heads, size))
    packed = torch.stack((q, k.to(q.dtype), v.to(q.dtype)))  # one collective for the three
    q, k, v = _Exchange.apply(packed, group, heads, tokens).unbind()
    return _Exchange.apply(attention(q, k, v), group, tokens, heads)


def check_part(x: torch.Tensor, group: Group, lengths: Sequence[int], dim: int = 1) -> None:
    """Hold this rank's part against the sizes of all parts, as a wrong size would let the other ranks wait forever.

    Raises:
        ValueError: there is not one size per rank, or this rank's is another.
    """
    rank, size = dist.get_rank(group), group_size(group)
    if len(lengths) != size or x.shape[dim] != lengths[rank]:
        raise ValueError(
            f"rank {rank} of {size} holds {x.shape[dim]} in dimension {dim} of {tuple(x.shape)}, but the sizes of all "
            f"parts are given as {list(lengths)}; give one per rank, as `shard_sizes` divides the whole"
        )


class _Division(NamedTuple):
    """How a dimension is divided over the ranks."""

    dim: int
    sizes: Sequence[int]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, shard_sizes(x.shape[dim], group_size(group))
        return x.split(ctx.sizes, dim)[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather(grads[0], ctx.group, ctx.dim, ctx.sizes), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return _gather(x, group, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].split(ctx.sizes, ctx.dim)[dist.get_rank(ctx.group)], None, None, None


def _gather(x: torch.Tensor, group: dist.ProcessGroup, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    # Not every backend gathers parts of different sizes. They differ by one at most.
    shape = list(x.shape)
    shape[dim] = max(sizes)
    filled = x.new_zeros(shape)
    filled.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = [torch.empty_like(filled) for _ in sizes]
    dist.all_gather(parts, filled, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, cut: _Division, joined: _Division) -> torch.Tensor:
        ctx.group, ctx.cut, ctx.joined = group, cut, joined
        return _exchange(x, group, cut, joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchange(grads[0], ctx.group, ctx.joined, ctx.cut), None, None, None


def _exchange(x: torch.Tensor, group: dist.ProcessGroup, cut: _Division, joined: _Division) -> torch.Tensor:
    """Cut a tensor along one dimension, a piece for every rank, and join what comes from the ranks along another."""
    pieces = x.split(list(cut.sizes), cut.dim)
    shapes = []
    for length in joined.sizes:
        shape = list(x.shape)
        shape[cut.dim], shape[joined.dim] = cut.sizes[dist.get_rank(group)], length
        shapes.append(shape)
    sent, received = [piece.numel() for piece in pieces], [math.prod(shape) for shape in shapes]
    incoming = x.new_empty(sum(received))
    dist.all_to_all_single(incoming, torch.cat([piece.flatten() for piece in pieces]), received, sent, group=group)
    parts = incoming.split(received)
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], joined.dim)
