"""Context parallelism of the VAE: a clip is sharded along time over the ranks of a group.

Shapes: ``B C T H W``. A clip is split into consecutive pieces; piece i is on rank i mod W of W ranks. So
the first frame is on rank 0, and all ranks work on neighbouring pieces at the same time, layer by layer. Two ways to
split:

- one piece per chunk (decoding; encoding in chunks): W chunks at a time, in rounds. A rank needs more memory than
  one process would: it joins a layer's pieces before the exchange. Norm statistics are per chunk, so only the frames
  before a chunk are exchanged.
- one piece per rank (encoding a whole clip): norm statistics cover all frames, so means and variances are all-gathered.

Every causal convolution needs the ``kernel − 1`` frames before its piece: the last frames of its input on the previous
rank. All ranks send and receive at the same layer in the same order, reversed in the backward pass.

Gradients: every rank computes the same loss from the whole result. The gradient of the input is then complete on every
rank; gradients of weights must be summed over the group.

Why not `torch.distributed._functional_collectives`: it has no differentiable send and receive between neighbours, and
gathers pieces of one size only.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sgm.parallel.sequence import sum_gradients
from vae_modules.compiled_norms import CompiledNorms
from vae_modules.layers import (
    MAX_ELEMENTS,
    CausalConv3d,
    Pieces,
    Stream,
    normalizer,
    pooled_moments,
)


class Neighbours:
    """The previous and next rank in the ring of a group.

    Args:
        group: the context parallel group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        self.before, self.after = ranks[self.rank - 1], ranks[(self.rank + 1) % self.size]

    def exchange(
        self, *, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int
    ) -> torch.Tensor | None:
        """Send one tensor while receiving into another; either may be None. Return the received one."""
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, send.contiguous(), to, self.group))
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, source, self.group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return receive


class _Extend(torch.autograd.Function):
    """Prepend the frames before a piece; send its last frames to the next rank. See `SharedStream.extend`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor | None, piece: "Piece", num: int):
        peers = piece.neighbours
        ctx.piece, ctx.num, ctx.has_kept = piece, num, kept is not None
        ctx.early = x.shape[2] >= num  # the frames to send do not include received ones
        buffer = x.new_empty((*x.shape[:2], num, *x.shape[3:])) if piece.receives else None
        tail = x[:, :, -num:] if ctx.early and piece.sends else None
        received = peers.exchange(send=tail, to=peers.after, receive=buffer, source=peers.before)
        if kept is not None:
            head = kept
        elif piece.is_first:
            head = x[:, :, :1].expand(-1, -1, num, -1, -1)
        else:
            assert received is not None, "a piece that is not the first one has one before it"
            head = received
        whole = torch.cat((head, x), dim=2)
        if piece.sends and not ctx.early:
            peers.exchange(send=whole[:, :, -num:], to=peers.after, receive=None, source=peers.before)
        # Rank 0 keeps what it received for its next piece.
        return whole, received if peers.rank == 0 else None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_kept: torch.Tensor | None):
        piece, num = ctx.piece, ctx.num
        peers = piece.neighbours
        grad = grad.clone()
        shape = (*grad.shape[:2], num, *grad.shape[3:])
        buffer = grad.new_empty(shape) if piece.sends else None
        back = None
        if piece.receives and peers.rank == 0:
            back = grad.new_zeros(shape) if grad_kept is None else grad_kept
        elif piece.receives and ctx.early:
            back = grad[:, :, :num]
        tail = peers.exchange(send=back, to=peers.before, receive=buffer, source=peers.after)
        if tail is not None:
            grad[:, :, -num:] += tail
        if piece.receives and back is None:
            peers.exchange(send=grad[:, :, :num], to=peers.before, receive=None, source=peers.after)
        head, grad = grad[:, :, :num], grad[:, :, num:].contiguous()
        if piece.is_first:
            grad[:, :, 0] += head.sum(2)
        return grad, head.contiguous() if ctx.has_kept else None, None, None


class Piece:
    """Position of a piece in its clip.

    Args:
        neighbours: the ring of ranks.
        index: index of the piece.
        num: number of pieces.
    """

    def __init__(self, neighbours: Neighbours, index: int, num: int) -> None:
        self.neighbours = neighbours
        self.is_first = index == 0
        self.sends = index + 1 < num
        # Rank 0 receives for its next piece, the others for this one.
        self.receives = index > 0 if neighbours.rank > 0 else index + neighbours.size < num


class SharedStream(Stream):
    """State of one pass over a context parallel clip.

    Args:
        group: the ranks with a piece.
        shares_norms: whether norm statistics cover the pieces of all ranks.
        max_elements: see `Stream`.
        compiled: see `Stream`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        shares_norms: bool,
        max_elements: int = MAX_ELEMENTS,
        compiled: CompiledNorms | None = None,
    ) -> None:
        super().__init__(max_elements, compiled)
        self._neighbours = Neighbours(group)
        self._shares_norms = shares_norms
        self._piece = Piece(self._neighbours, 0, 1)
        self._kept: dict[nn.Module, torch.Tensor] = {}

    def begin_piece(self, index: int, num: int) -> None:
        """Start piece `index` of `num`; all ranks of a round call it together."""
        self._piece = Piece(self._neighbours, index, num)
        self.begin_chunk(is_first=index == 0, is_last=index == num - 1)

    def convolve(self, layer: CausalConv3d, x: Iterable[torch.Tensor]) -> Pieces:
        """Apply a causal convolution; the clip's first frame repeats before the clip."""
        if not layer.history:
            return super().convolve(layer, x)
        parts = list(x)
        lengths = [part.shape[2] for part in parts]
        own = torch.cat(parts, dim=2)
        parts.clear()
        whole, kept = _Extend.apply(own, self._kept.pop(layer, None), self._piece, layer.history)
        if kept is not None:
            self._kept[layer] = kept
        bounds = zip(itertools.accumulate(lengths, initial=0), lengths, strict=False)
        return [
            layer.conv(whole[:, :, start : start + length + layer.history], repeats=self._piece.is_first and not start)
            for start, length in bounds
        ]

    def group_norm(self, norm: nn.GroupNorm, x: Pieces) -> Callable[[torch.Tensor], torch.Tensor]:
        """Normalise by the frames of a rank's piece, or with `shares_norms` by those of all ranks together."""
        if not self._shares_norms:
            return super().group_norm(norm, x)
        return normalizer(*self.factors(norm, x))

    def moments(self, norm: nn.GroupNorm, x: Pieces) -> torch.Tensor:
        """Return the moments of a rank's piece, or with `shares_norms` of those of all ranks together."""
        own = super().moments(norm, x)
        return pooled_moments(_gather_statistics(own, self._neighbours.group)) if self._shares_norms else own


def _gather_statistics(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather (...) → (W, ...). Each rank normalises its own frames with them, so gradients are summed."""
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x.detach().contiguous(), group=group)
    gathered[dist.get_rank(group)] = x  # the one through which gradients flow
    return sum_gradients(torch.stack(gathered), group)


def gather_pieces(
    own: Sequence[torch.Tensor],
    lengths: Sequence[int],
    group: dist.ProcessGroup,
    *,
    like: torch.Tensor,
    anchor: torch.Tensor,
    everywhere: bool,
) -> torch.Tensor:
    """Gather the pieces of all ranks and concatenate them along time.

    Args:
        own: the pieces of this rank, in order.
        lengths: frames of all pieces, in order; piece i belongs to rank i mod W.
        group: the ranks.
        like: (B, C, 0, H, W) in the dtype and on the device of the pieces.
        anchor: an input of the pieces; lets ranks without a piece take part in the backward pass.
        everywhere: whether all ranks get the whole clip; otherwise only rank 0, and the others get 0 frames.
    """
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    mine, joined = iter(own), [like + anchor[:, :, :0].sum().to(like.dtype)]
    to_all = everywhere or torch.is_grad_enabled()  # for gradients, which are all-reduced below
    for index, length in enumerate(lengths):
        owner = index % len(ranks)
        if owner == rank:
            piece = next(mine)
        elif to_all or rank == 0:
            piece = like.new_empty((*like.shape[:2], length, *like.shape[3:]))
        else:
            continue
        buffer = piece.detach().contiguous()
        if to_all:
            dist.broadcast(buffer, ranks[owner], group=group)
        elif rank > 0:
            dist.send(buffer, ranks[0], group=group)
            continue
        elif owner > 0:
            dist.recv(buffer, ranks[owner], group=group)
        joined.append(piece if owner == rank else buffer)
    whole = torch.cat(joined, dim=2)
    if everywhere:
        return whole
    whole = sum_gradients(whole, group)
    return whole if rank == 0 else whole[:, :, :0]
