"""Which tensor is divided how; ranks that compute with the parts are in tests/shared_layers.py."""

import pytest
import torch

from sgm.util import InputError
from sgm.weights.partition import Division, JoinedTensor, Part, division, join, num_parts, take, whole_shape

LAYER = "transformer.layers.3."
QKV = LAYER + "attention.query_key_value.weight"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("attention.query_key_value.weight", Division(0, 3)),
        ("attention.query_key_value.original.bias", Division(0, 3)),
        ("attention.query_key_value.matrix_A.2", None),
        ("attention.query_key_value.matrix_B.2", Division(0)),
        ("attention.dense.original.weight", Division(1)),
        ("attention.dense.bias", None),
        ("attention.dense.matrix_A.0", Division(1)),
        ("attention.dense.matrix_B.0", None),
        ("mlp.dense_h_to_4h.bias", Division(0)),
        ("mlp.dense_h_to_4h_gate.weight", Division(0)),
        ("mlp.dense_4h_to_h.weight", Division(1)),
        ("mlp.dense_4h_to_h.bias", None),
        ("input_layernorm.weight", None),
    ],
)
def test_names_tell_how_a_tensor_is_divided(prefix, name, expected):
    assert division(prefix + LAYER + name) == expected
    assert division("encoder." + LAYER + name) is None, "another network"


def test_every_part_has_its_share_of_queries_keys_and_values():
    whole = torch.arange(12)[:, None] * torch.ones(1, 4)
    parts = [take(QKV, whole, Part(index, 2)) for index in range(2)]
    assert parts[0][:, 0].tolist() == [0, 1, 4, 5, 8, 9] and parts[1][:, 0].tolist() == [2, 3, 6, 7, 10, 11]
    assert torch.equal(join(QKV, parts), whole) and whole_shape(QKV, parts[0].shape, 2) == (12, 4)
    with pytest.raises(InputError, match="cannot be divided evenly into 3 parts"):
        take(QKV, whole, Part(0, 3))


@pytest.mark.parametrize("name", [QKV, LAYER + "mlp.dense_4h_to_h.weight", LAYER + "attention.dense.bias"])
@pytest.mark.parametrize("held", [1, 2, 4, 3])
@pytest.mark.parametrize("wanted", [1, 2, 4, 6])
def test_any_number_of_parts_serves_any_number_of_ranks(name, held, wanted):
    whole = torch.randn(36, 24)
    joined = JoinedTensor(name, [take(name, whole, Part(index, held)) for index in range(held)])
    joined = joined if division(name) else whole
    for index in range(wanted):
        assert torch.equal(take(name, joined, Part(index, wanted)), take(name, whole, Part(index, wanted)))


def test_a_joined_tensor_is_used_like_any_other_and_reads_no_more_than_it_needs():
    whole = torch.randn(12, 4).half()
    joined = JoinedTensor(QKV, [take(QKV, whole, Part(index, 2)) for index in range(2)])
    assert joined.shape == (12, 4) and joined.dtype == torch.float16 and joined.nbytes == whole.nbytes
    assert torch.equal(joined.float() * 2, whole.float() * 2) and torch.equal(
        torch.cat([joined, whole]), whole.repeat(2, 1)
    )
    assert type(joined.detach()) is torch.Tensor and joined.to("meta").shape == (12, 4)
    broken = JoinedTensor(QKV, [torch.zeros(6, 4), torch.zeros(6, 5)])
    assert torch.equal(take(QKV, broken, Part(0, 2)), torch.zeros(6, 4)), "the other part is not read"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shapes_tell_into_how_many_parts_a_network_is_divided(size):
    wide = {"attention.query_key_value.weight": (24, 8), "attention.dense.weight": (8, 8), "mlp.x.weight": (3, 5)}
    lora = {
        f"attention.{target}.matrix_{m}.0": shape
        for target in ("query_key_value", "dense")
        for m, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    for shapes in (wide, lora, wide | lora):
        whole = {LAYER + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert num_parts({name: take(name, tensor, Part(0, size)).shape for name, tensor in whole.items()}) == size
    assert num_parts({"encoder.weight": (3, 4)}) is None
