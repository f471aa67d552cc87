"""Sequence parallelism: the tokens of a sample are sharded over ranks; weights are replicated.

Legend: ``B`` samples, ``S`` tokens of a sample (text and patches), ``s`` tokens of this rank, ``H`` heads, ``h`` heads
of this rank, ``d`` channels of a head.

`split_sequence` keeps a rank's shard, `gather_sequence` all-gathers the shards, and in between only attention
communicates. `ulysses_attention` (Jacobs et al. 2023, DeepSpeed-Ulysses) exchanges tokens of all heads for all tokens
of some heads, so it needs at least one head per rank; `sgm.parallel.ring_attention` has no such limit.

All functions take the process group; with None, or a group of one rank, they do not communicate. Every rank of the
group must call them in the same order, and compute the same loss from the gathered tensor.

Gradients. Between `split_sequence` and `gather_sequence`, the gradient of a shard is that slice of the one-rank
gradient, and a weight gets the contribution of this rank's tokens: the SUM over the group is the one-rank gradient.
Outside of this region every rank computes the same: gradients are complete and equal on all ranks, and must not be
summed. Replicated tensors that enter the region without `split_sequence` (the time embedding, a slice of a position
table) belong to it, with the weights that produce them. So a network can sum the gradients of all its weights if it
splits its inputs before the first weight and gathers after the last.

Why not `torch.distributed._functional_collectives`: gathering there sums gradients where a slice is right, takes shards
of one size only, and its differentiable functions are private and renamed between releases (those of
`torch.distributed.nn.functional` are deprecated). Why not DTensor: it shards 5 tokens over 4 ranks as 2, 2, 1, 0, and
ring attention needs a token on every rank. Why not `deepspeed.sequence.layer.DistributedAttention`: it takes uneven
heads, but only even shards of tokens; padding would need masks, which the fast attention kernels refuse.
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
    """Shard `length` items over `size` ranks as evenly as possible; the first ranks get the remainder."""
    each, left_over = divmod(length, size)
    return [each + (rank < left_over) for rank in range(size)]


def group_size(group: Group) -> int:
    """Return the number of ranks in a group; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def sum_gradients(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return `x`, whose gradient is all-reduced (summed) over the group in the backward pass.

    Args:
        x: any shape; requires a gradient on all ranks of the group or on none.
        group: the ranks.
    """
    if not x.requires_grad or group_size(group) == 1:
        return x

    def all_reduced(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    x = x.view_as(x)  # the hook applies only to this use of x
    x.register_hook(all_reduced)
    return x


def split_sequence(x: torch.Tensor, group: Group, dim: int = 1) -> torch.Tensor:
    """Return this rank's shard of a replicated tensor.

    Args:
        x: any shape; the same on every rank.
        group: the sequence parallel group.
        dim: the sharded dimension, see `shard_sizes`.

    Returns:
        A copy of the shard, so that `x` can be freed. The gradient of `x` is complete on every rank.
    """
    if group_size(group) == 1:
        return x
    shards = sum_gradients(x, group).split(shard_sizes(x.shape[dim], group_size(group)), dim)
    return shards[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


def gather_sequence(x: torch.Tensor, group: Group, dim: int, length: int) -> torch.Tensor:
    """All-gather the shards of all ranks.

    Args:
        x: the shard of this rank, as `split_sequence` returns it.
        group: the sequence parallel group.
        dim: the sharded dimension.
        length: its full size.

    Returns:
        The unsharded tensor, on every rank. The gradient of the shard is a slice of this rank's gradient of it.

    Raises:
        ValueError: `x` does not have the size of this rank's shard of `length`.
    """
    if group_size(group) == 1:
        return x
    sizes = shard_sizes(length, group_size(group))
    check_shard(x, group, sizes, dim)
    # Not every backend all-gathers uneven shards. Sizes differ by at most one.
    shape = list(x.shape)
    shape[dim] = max(sizes)
    padded = x.new_zeros(shape)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x.detach())
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    shards = [shard.narrow(dim, 0, size) for shard, size in zip(gathered, sizes, strict=True)]
    shards[dist.get_rank(group)] = x  # the one through which gradients flow
    return torch.cat(shards, dim)


def ulysses_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, lengths: Sequence[int], attention: Attention
) -> torch.Tensor:
    """Attention over the tokens of all ranks; each rank computes some of the heads.

    Args:
        q: (B, s, H, d), the tokens of this rank, with positions applied; tokens are concatenated in rank order.
        k: the same shape.
        v: the same shape.
        group: the sequence parallel group.
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
    check_shard(q, group, lengths)
    tokens, heads = _Sharding(-3, lengths), _Sharding(-2, shard_sizes(num_heads, size))
    packed = torch.stack((q, k.to(q.dtype), v.to(q.dtype)))  # one collective instead of three
    q, k, v = _AllToAll.apply(packed, group, heads, tokens).unbind()
    return _AllToAll.apply(attention(q, k, v), group, tokens, heads)


def check_shard(x: torch.Tensor, group: Group, lengths: Sequence[int], dim: int = 1) -> None:
    """Check this rank's shard against the sizes of all shards: a wrong size would block the other ranks forever.

    Raises:
        ValueError: not one size per rank, or this rank's shard has another size.
    """
    rank, size = dist.get_rank(group), group_size(group)
    if len(lengths) != size or x.shape[dim] != lengths[rank]:
        raise ValueError(
            f"rank {rank} of {size} holds {x.shape[dim]} in dimension {dim} of {tuple(x.shape)}, but the sizes of all "
            f"shards are given as {list(lengths)}; give one per rank, see `shard_sizes`"
        )


class _Sharding(NamedTuple):
    """Sizes of the shards of a dimension, by rank."""

    dim: int
    sizes: Sequence[int]


class _AllToAll(torch.autograd.Function):
    """Shard one dimension, unshard another; reversed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, shard: _Sharding, join: _Sharding) -> torch.Tensor:
        ctx.group, ctx.shard, ctx.join = group, shard, join
        return _all_to_all(x, group, shard, join)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_to_all(grads[0], ctx.group, ctx.join, ctx.shard), None, None, None


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup, shard: _Sharding, join: _Sharding) -> torch.Tensor:
    """All-to-all: shard along one dimension, concatenate along another."""
    outgoing = x.split(list(shard.sizes), shard.dim)
    shapes = []
    for length in join.sizes:
        shape = list(x.shape)
        shape[shard.dim], shape[join.dim] = shard.sizes[dist.get_rank(group)], length
        shapes.append(shape)
    sent, received = [piece.numel() for piece in outgoing], [math.prod(shape) for shape in shapes]
    incoming = x.new_empty(sum(received))
    dist.all_to_all_single(incoming, torch.cat([piece.flatten() for piece in outgoing]), received, sent, group=group)
    shards = incoming.split(received)
    return torch.cat([piece.view(shape) for piece, shape in zip(shards, shapes, strict=True)], join.dim)
