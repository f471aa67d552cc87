"""The typed ``transformer_args`` section of the network."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sgm.config.values import AtLeast0, Positive, Width
from sgm.util import InputError, nearest, without_ineffective


@dataclass(frozen=True)
class TransformerArgs:
    """The ``transformer_args`` section, for SAT's transformer.

    Attributes:
        checkpoint_activations: recompute each block's activations in the backward pass; a number: of the first blocks.
        checkpoint_skip_layers: blocks at the end that are not recomputed; a number of blocks comes before it.
        max_sequence_length: rows of SAT's own position table; stored in these checkpoints, unused.
        layernorm_epsilon: epsilon of the blocks' norms.
        skip_init: do not initialise the transformer's linear layers; weights are loaded later.
        vocab_size: no effect; there is no word embedding.
    """

    checkpoint_activations: bool | AtLeast0 = False
    checkpoint_skip_layers: AtLeast0 = 0
    max_sequence_length: Width = 64
    layernorm_epsilon: Positive = 1e-5
    skip_init: bool = False
    vocab_size: int = 1

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> "TransformerArgs":
        """Check the section's keys and values.

        Raises:
            InputError: an unknown key, or a value that the block does not support.
        """
        known = [field.name for field in fields(cls)]
        section = without_ineffective(cls, section)
        for name in section:
            if name not in known:
                raise InputError(f"network_config.params.transformer_args.{name} is unknown{nearest(name, known)}")
        return cls(**section)

    def recomputed_blocks(self, depth: int) -> int:
        """Return how many of the `depth` blocks are recomputed: the first ones.

        Raises:
            InputError: there are fewer blocks.
        """
        given = self.checkpoint_activations
        if isinstance(given, bool):
            return max(depth - self.checkpoint_skip_layers, 0) * given
        if given > depth:
            raise InputError(f"checkpoint_activations={given}: the network has {depth} blocks; give true for all")
        return given
