"""Sharding of tensors; tests/shared_layers.py runs ranks with shards."""

import pytest
import torch

from sgm.util import InputError
from sgm.weights.partition import (
    Partition,
    Shard,
    join_lazily,
    join_shards,
    num_shards,
    partition_of,
    take_shard,
    unsharded_shape,
)

LAYER = "transformer.layers.3."
QKV = LAYER + "attention.query_key_value.weight"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention.query_key_value.weight", Partition(0, 3)),
        ("attention.query_key_value.original.bias", Partition(0, 3)),
        ("attention.query_key_value.matrix_A.2", None),
        ("attention.query_key_value.matrix_B.2", Partition(0)),
        ("attention.dense.original.weight", Partition(1)),
        ("attention.dense.bias", None),
        ("attention.dense.matrix_A.0", Partition(1)),
        ("attention.dense.matrix_B.0", None),
        ("mlp.dense_h_to_4h.bias", Partition(0)),
        ("mlp.dense_h_to_4h_gate.weight", Partition(0)),
        ("mlp.dense_4h_to_h.weight", Partition(1)),
        ("mlp.dense_4h_to_h.bias", None),
        ("input_layernorm.weight", None),
    ],
)
def test_names_tell_how_a_tensor_is_divided(prefix, name, expected):
    assert partition_of(prefix + LAYER + name) == expected
    assert partition_of("encoder." + LAYER + name) is None, "another network"


def test_every_shard_has_a_slice_of_queries_keys_and_values():
    whole = torch.arange(12)[:, None] * torch.ones(1, 4)
    shards = [take_shard(QKV, whole, Shard(index, 2)) for index in range(2)]
    assert shards[0][:, 0].tolist() == [0, 1, 4, 5, 8, 9] and shards[1][:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert torch.equal(join_shards(QKV, shards), whole) and unsharded_shape(QKV, shards[0].shape, 2) == (12, 4)
    with pytest.raises(InputError, match="cannot be divided evenly into 3 shards"):
        take_shard(QKV, whole, Shard(0, 3))


@pytest.mark.parametrize("name", [QKV, LAYER + "mlp.dense_4h_to_h.weight", LAYER + "attention.dense.bias"])
@pytest.mark.parametrize("stored", [1, 2, 4, 3])
@pytest.mark.parametrize("wanted", [1, 2, 4, 6])
def test_any_number_of_shards_serves_any_number_of_ranks(name, stored, wanted):
    whole = torch.randn(36, 24)
    joined = join_lazily(name, [take_shard(name, whole, Shard(index, stored)) for index in range(stored)])
    joined = joined if partition_of(name) else whole
    for index in range(wanted):
        assert torch.equal(
            take_shard(name, joined, Shard(index, wanted)), take_shard(name, whole, Shard(index, wanted))
        )


def test_a_sharded_tensor_is_joined_when_computed_and_reads_no_more_than_it_needs():
    whole = torch.randn(12, 4).half()
    joined = join_lazily(QKV, [take_shard(QKV, whole, Shard(index, 2)) for index in range(2)])
    assert joined.shape == (12, 4) and joined.dtype == torch.float16 and joined.meta().nbytes == whole.nbytes
    assert torch.equal(joined.compute(), whole) and torch.equal(joined.cast(torch.float32).compute(), whole.float())
    assert joined.meta().is_meta and joined.meta().shape == (12, 4)
    broken = join_lazily(QKV, [torch.zeros(6, 4), torch.zeros(6, 5)])
    assert torch.equal(take_shard(QKV, broken, Shard(0, 2)), torch.zeros(6, 4)), "the other shard is not read"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shapes_tell_the_number_of_shards(size):
    wide = {"attention.query_key_value.weight": (24, 8), "attention.dense.weight": (8, 8), "mlp.x.weight": (3, 5)}
    lora = {
        f"attention.{target}.matrix_{m}.0": shape
        for target in ("query_key_value", "dense")
        for m, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    for shapes in (wide, lora, wide | lora):
        whole = {LAYER + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert (
            num_shards({name: take_shard(name, tensor, Shard(0, size)).shape for name, tensor in whole.items()}) == size
        )
    assert num_shards({"encoder.weight": (3, 4)}) is None
