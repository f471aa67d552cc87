"""Names and layouts of SAT and of diffusers, both ways, without files."""

import pytest
import torch

from benchmarks.models import build_network, build_vae, network_section, vae_section
from sgm.conversion.diffusers.names import (
    autoencoder_from_diffusers,
    autoencoder_to_diffusers,
    network_from_diffusers,
    network_to_diffusers,
)
from sgm.util import InputError
from sgm.weights.lazy import LazyTensor
from tests.sgm.conversion.conftest import FAMILIES, SIZE

RECOMPUTED = {"mixins.pos_embed.pos_embedding", "transformer.position_embeddings.weight"}


def there_and_back(network, learned):
    state = network.state_dict()
    there = network_to_diffusers(state, patch_size=network.patch_size, learned_positions=learned)
    made = {name: tensor.compute() for name, tensor in there.items()}
    return state, made, {name: tensor.compute() for name, tensor in network_from_diffusers(made).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_network_comes_back_bit_by_bit(family, dtype):
    network = build_network(network_section(family, SIZE), dtype=dtype)
    learned = family == "cogvideox_5b_i2v"
    state, made, back = there_and_back(network, learned)
    assert ("patch_embed.pos_embedding" in made) == learned
    assert state.keys() - back.keys() <= RECOMPUTED and not back.keys() - state.keys()
    assert ("mixins.pos_embed.pos_embedding" in back) == learned
    for name, tensor in back.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.reshape(state[name].shape), state[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_projection_has_the_released_shapes(family):
    network = build_network(network_section(family, SIZE))
    _, made, back = there_and_back(network, False)
    channels, temporal = network.in_channels, network.patch_size[0]
    shape = (SIZE.hidden_size, channels, 2, 2) if temporal == 1 else (SIZE.hidden_size, channels * temporal * 4)
    assert made["patch_embed.proj.weight"].shape == shape == back["mixins.patch_embed.proj.weight"].shape


def test_the_number_of_layers_and_their_order_do_not_matter():
    params = network_section("cogvideox_5b", SIZE)
    params["params"]["num_layers"] = 11
    network = build_network(params)
    state = dict(reversed(network.state_dict().items()))
    there = network_to_diffusers(state, patch_size=network.patch_size, learned_positions=False)
    layer = torch.equal(
        there["transformer_blocks.10.attn1.to_k.weight"].compute(),
        state["transformer.layers.10.attention.query_key_value.weight"][64:128],
    )
    assert layer and sum(name.startswith("transformer_blocks.10.") for name in there) == 24


def test_unknown_tensors_are_refused():
    with pytest.raises(InputError, match=r"no counterpart in diffusers: transformer\.layers\.0\.cross\.weight"):
        network_to_diffusers(
            {"transformer.layers.0.cross.weight": torch.zeros(1)}, patch_size=(1, 2, 2), learned_positions=False
        )
    with pytest.raises(InputError, match=r"no counterpart in SAT: .*lora_A\.weight"):
        network_from_diffusers({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)})


def test_a_query_without_its_key_is_refused():
    tensors = {f"transformer_blocks.0.attn1.to_{part}.bias": torch.zeros(4) for part in "qv"}
    with pytest.raises(InputError, match=r"lacks transformer_blocks\.0\.attn1\.to_k\.bias"):
        network_from_diffusers(tensors)


def test_autoencoder_names_are_a_bijection():
    state = build_vae(vae_section("cogvideox_5b", ch=32, num_res_blocks=2)).state_dict()
    there = autoencoder_to_diffusers(state)
    assert len(set(there.values())) == len(state)
    assert autoencoder_from_diffusers(there.values()) == {theirs: ours for ours, theirs in there.items()}
    assert there["decoder.up.3.block.0.conv1.conv.weight"] == "decoder.up_blocks.0.resnets.0.conv1.conv.weight"
    assert there["encoder.mid.block_2.norm1.weight"] == "encoder.mid_block.resnets.1.norm1.weight"


def test_lazy_tensors_know_shape_and_dtype_without_numbers():
    source = torch.arange(12.0).reshape(3, 4)
    lazy = LazyTensor((LazyTensor((source, source), lambda a, b: torch.cat((a, b))),), lambda t: t.mT, torch.float16)
    assert lazy.meta().is_meta and lazy.meta().shape == (4, 6) and lazy.meta().dtype == torch.float16
    assert torch.equal(lazy.compute(), torch.cat((source, source)).T.half()) and lazy.compute().is_contiguous()
    assert LazyTensor((torch.arange(3),), to_dtype=torch.float16).compute().dtype == torch.int64
