"""Linear layers of the network: zero at first, in an embedding, and plain ones in the place of SAT's."""

from torch import nn

from sgm.util import prepare_import, without_allocating
from sgm.weights.partition import Shard

prepare_import()

from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a zero-initialised linear layer: an untrained block is the identity."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def embedding_mlp(in_features: int, dim: int) -> nn.Sequential:
    """Return the two layers after a sinusoidal embedding: (B, in_features) → (B, dim)."""
    return nn.Sequential(nn.Linear(in_features, dim), nn.SiLU(), nn.Linear(dim, dim))


def use_plain_linears(transformer: nn.Module, shard: Shard) -> None:
    """Put `nn.Linear`, which libraries recognise, in the place of SAT's layers unless they are sharded."""
    for parent in list(transformer.modules()) if shard.size == 1 else ():
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                with without_allocating():
                    plain = nn.Linear(layer.input_size, layer.output_size, bias=layer.bias is not None)
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(parent, name, plain)
