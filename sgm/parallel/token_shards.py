"""The tokens of a sample, sharded over the sequence parallel group; used by the network's mixins.

Every rank has a shard of the text followed by a shard of the patches; weights are replicated. With one rank, nothing
is sharded or sent. For gradients see `sgm.parallel.sequence`.
"""

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo

from sgm.parallel.attention import torch_attention
from sgm.parallel.ring_attention import ring_attention
from sgm.parallel.sequence import (
    Attention,
    Group,
    gather_sequence,
    group_size,
    shard_sizes,
    split_sequence,
    ulysses_attention,
)
from sgm.util import InputError


class TokenShards:
    """Tokens of a sample, text first, on each rank of its sequence parallel group; computed once per forward pass.

    Args:
        num_text: L, text tokens of the sample.
        num_patches: N, patches of the sample.
        group: the ranks; None for one.
        ring: True for ring attention, False for Ulysses, None for Ulysses if there are enough heads.
        attention: that of one rank, see `ulysses_attention`; ring attention has its own.

    Attributes:
        size: sequence parallel size.
        rank: this rank in the group.
        num_local_text: text tokens of this rank.
        lengths: tokens of every rank.
    """

    def __init__(
        self,
        num_text: int,
        num_patches: int,
        group: Group = None,
        ring: bool | None = None,
        attention: Attention = torch_attention,
    ) -> None:
        self.num_text, self.num_patches, self.group, self.ring = num_text, num_patches, group, ring
        self.attention = attention
        self.size = group_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if min(num_text, num_patches) < self.size > 1:
            raise InputError(
                f"{num_text} text tokens and {num_patches} patches cannot be shared by {self.size} ranks; "
                "set args.sequence_parallel_size to a smaller number"
            )
        text, patches = shard_sizes(num_text, self.size), shard_sizes(num_patches, self.size)
        self.num_local_text = text[self.rank]
        self.lengths = [sum(pair) for pair in zip(text, patches, strict=True)]

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the replicated tensor (B, L, ...) or (B, N, ...)."""
        return split_sequence(x, self.group, 1)

    def gather(self, patches: torch.Tensor) -> torch.Tensor:
        """All-gather the patches of all ranks: (B, n, ...) → (B, N, ...)."""
        return gather_sequence(patches, self.group, 1, self.num_patches)

    def shard_table(self, table: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's rows of a table over all text tokens and patches, without communication."""
        if self.size == 1:
            return table
        parts = table.split((self.num_text, self.num_patches), dim)
        return torch.cat([part.split(shard_sizes(part.shape[dim], self.size), dim)[self.rank] for part in parts], dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's tokens over the tokens of all ranks.

        Args:
            q: (B, s, heads, head_dim), with positions applied.
            k: the same shape.
            v: the same shape.
        """
        if self.size == 1:
            return self.attention(q, k, v)
        return _attend_over_ranks(q, k, v, self)


# A compiler would break its graph at every collective, and compile what lies between two of them.
@_disable_dynamo  # torch.compiler.disable would import the compiler now
def _attend_over_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: TokenShards) -> torch.Tensor:
    if tokens.ring or (tokens.ring is None and q.shape[2] < tokens.size):
        return ring_attention(q, k, v, tokens.group, tokens.lengths)
    return ulysses_attention(q, k, v, tokens.group, tokens.lengths, tokens.attention)
