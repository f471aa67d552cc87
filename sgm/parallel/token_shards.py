"""The tokens of a sample, sharded over the sequence parallel group; used by the network's mixins.

Every rank has a shard of the text followed by a shard of the patches; weights are replicated. With one rank, nothing
is sharded or sent. For gradients see `sgm.parallel.sequence`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

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


@dataclass(frozen=True)
class TokenShards:
    """Token counts of a sample, text first, and its sequence parallel group.

    Attributes:
        num_text: L, text tokens of the sample.
        num_patches: N, patches of the sample.
        group: the ranks; None for one.
        ring: True for ring attention, False for Ulysses, None for Ulysses if there are enough heads.
    """

    num_text: int
    num_patches: int
    group: Group = None
    ring: bool | None = None

    def __post_init__(self) -> None:
        if min(self.num_text, self.num_patches) < self.size > 1:
            raise InputError(
                f"{self.num_text} text tokens and {self.num_patches} patches cannot be shared by {self.size} ranks; "
                "set args.sequence_parallel_size to a smaller number"
            )

    @property
    def size(self) -> int:
        """Sequence parallel size."""
        return group_size(self.group)

    @property
    def num_local_text(self) -> int:
        """Text tokens of this rank."""
        return self.num_text if self.group is None else shard_sizes(self.num_text, self.size)[dist.get_rank(self.group)]

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
        rank = dist.get_rank(self.group)
        parts = table.split((self.num_text, self.num_patches), dim)
        return torch.cat([part.split(shard_sizes(part.shape[dim], self.size), dim)[rank] for part in parts], dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Attention of this rank's tokens over the tokens of all ranks.

        Args:
            q: (B, s, heads, head_dim), with positions applied.
            k: the same shape.
            v: the same shape.
            attention: the attention of one rank, see `ulysses_attention`.
        """
        if self.size == 1:
            return attention(q, k, v)
        text, patches = shard_sizes(self.num_text, self.size), shard_sizes(self.num_patches, self.size)
        lengths = [sum(pair) for pair in zip(text, patches, strict=True)]
        if self.ring or (self.ring is None and q.shape[2] < self.size):
            return ring_attention(q, k, v, self.group, lengths)
        return ulysses_attention(q, k, v, self.group, lengths, attention)
