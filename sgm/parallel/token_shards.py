"""How the tokens of one sample are divided among the ranks that share it, for the network's mixins.

Every rank has a part of the text and a part of the patches, in this order, and all weights. Where nothing is shared,
all of this does nothing. `sgm.parallel.sequence` says what holds for gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sgm.parallel.ring_attention import ring_attention
from sgm.parallel.sequence import Group, gather_sequence, group_size, shard_sizes, split_sequence, ulysses_attention
from sgm.util import InputError

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TokenShards:
    """The tokens of one sample, text first, and the ranks that share them.

    Attributes:
        num_text: L, text tokens of the sample.
        num_patches: N, patches of the sample.
        group: the ranks; None for one.
        ring: attend by passing keys and values around, rather than by dividing the heads; None where the heads decide.
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
        """Ranks that share the sample."""
        return group_size(self.group)

    @property
    def text_here(self) -> int:
        """Text tokens of this rank."""
        return self.num_text if self.group is None else shard_sizes(self.num_text, self.size)[dist.get_rank(self.group)]

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of (B, L, ...) or (B, N, ...), which all ranks have."""
        return split_sequence(x, self.group, 1)

    def whole(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the patches (B, N, ...) of all ranks."""
        return gather_sequence(patches, self.group, 1, self.num_patches)

    def rows(self, table: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's rows of a table over text and patches."""
        if self.size == 1:
            return table
        rank = dist.get_rank(self.group)
        parts = table.split((self.num_text, self.num_patches), dim)
        own = [part.split(shard_sizes(part.shape[dim], self.size), dim)[rank] for part in parts]
        return torch.cat(own, dim)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Attend to the tokens of all ranks.

        Args:
            q: (B, s, heads, head_dim), tokens of this rank, with positions applied.
            k: likewise.
            v: likewise.
            attention: what one rank does with all tokens.
        """
        if self.size == 1:
            return attention(q, k, v)
        text, patches = shard_sizes(self.num_text, self.size), shard_sizes(self.num_patches, self.size)
        lengths = [sum(pair) for pair in zip(text, patches, strict=True)]
        if self.ring or (self.ring is None and q.shape[2] < self.size):
            return ring_attention(q, k, v, self.group, lengths)
        return ulysses_attention(q, k, v, self.group, lengths, attention)
