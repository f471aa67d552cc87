"""Weights in eight bits: which layers hold them, how large they are, and how close the results."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from benchmarks.models import NetworkSize, build_network, network_section
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import is_adapter
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.lazy import compute
from sgm.weights.lora.merging import merge_adapters
from sgm.weights.partition import Shard
from sgm.weights.quantize import linear_layers, num_bytes, require_usable, store
from tests.marks import only

pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SIZE = NetworkSize(128, 4, 4, 64, latents=(2, 4, 6), text_length=3, text_hidden_size=8)
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, "lora_alpha": 40}}
FEWER_BITS = ("Int8Tensor", "FP8Tensor", "NF4Tensor")


def kinds(module: nn.Module) -> dict[str, str]:
    """Return the type of every parameter's tensor."""
    return {name: type(parameter.data).__name__ for name, parameter in module.named_parameters()}


def share(module: nn.Module) -> float:
    """Return the bytes of a module, in those of 16 bits a parameter."""
    return num_bytes([module]) / sum(2 * parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def output(network, latents=SIZE.latents, text=(3, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = next(network.time_embed.parameters()).dtype
    frames, height, width = latents
    x = torch.randn(2, frames, network.in_channels, height, width, generator=generator).to(dtype)
    context = torch.randn(2, *text, generator=generator).to(dtype)
    return network(x, torch.tensor([900, 300]), context).double().flatten()


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a, b, 0).item()


def loaded(section, folder: Path, storage=None, dtype=torch.bfloat16, **options):
    with without_allocating():
        network = instantiate_from_config(section)
    return network, load_network(network, folder, dtype=dtype, storage=storage, **options)


@pytest.mark.parametrize(
    ("storage", "size", "cosine", "most"),
    [("int8", "2.0", 0.9999, 0.55), ("fp8", "2.0", 0.9999, 0.55), ("nf4", "1.2", 0.998, 0.32)],
)
def test_the_toy_in_fewer_bits(storage, size, cosine, most):
    section = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "toy.yaml").model.network_config)
    plain, report = loaded(section, ROOT / "assets/toy/transformer")
    assert "linear layers" not in str(report)
    small, report = loaded(section, ROOT / "assets/toy/transformer", storage)
    assert f"30 linear layers in {storage} ({size} MB, in 16 bits 3.7 MB)" in str(report)
    assert close(output(small, (5, 8, 8), (16, 64)), output(plain, (5, 8, 8), (16, 64))) > cosine
    assert share(plain) == 1 and share(small) < most


@pytest.mark.parametrize("storage", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_linear_layers_of_the_blocks_are_touched(storage, dtype):
    network = build_network(network_section("cogvideox_5b", SIZE), dtype=dtype)
    before, values = output(network), {name: value.clone() for name, value in network.state_dict().items()}
    for layer in linear_layers(module for block in network.blocks for module in block):
        store(layer, storage)
    touched = {name for name, kind in kinds(network).items() if kind in FEWER_BITS}
    inside = ("transformer.layers.", "mixins.adaln_layer.adaLN_modulations.")
    matrices = {name for name, value in values.items() if name.startswith(inside) and value.ndim == 2}
    assert touched == matrices and len(touched) == 4 * 5
    rest = network.state_dict()
    assert all(torch.equal(rest[name], value) for name, value in values.items() if name not in touched)
    assert close(output(network), before) > 0.999 and share(network) < (0.33 if storage == "nf4" else 0.56)


def test_long_rows_of_large_numbers_do_not_overflow_in_float16():
    layer = nn.Linear(4096, 4, dtype=torch.float16)
    x = torch.full((1, 4096), 8.0, dtype=torch.float16)
    nn.init.constant_(layer.weight, 1.0)  # the integers are 127: their sum with x is 4 million
    store(layer, "int8")
    torch.testing.assert_close(layer(x), x.new_full((1, 4), 8 * 4096), rtol=0.01, atol=0)


@pytest.mark.parametrize("storage", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_stay_so(storage, dtype):
    """As those of the last block that scale and shift text, whose result no output depends on."""
    layer = torch.nn.Linear(64, 4, dtype=dtype)
    layer.weight.data[1] = 0
    x, bias = torch.ones(2, 64, dtype=dtype, requires_grad=True), layer.bias.data.clone()
    store(layer, storage)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(out[:, 1], bias[1].expand(2)) and out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("storage", only(["nf4"], ["int8", "fp8", "nf4"]))
def test_adapters_beside_and_merged_before(storage, tmp_path):
    section = network_section("cogvideox_5b", SIZE)
    section["params"]["modules"]["lora_config"] = LORA
    network = build_network(section)
    expected = output(network)
    tensors = network.state_dict()
    base = build_network(network_section("cogvideox_5b", SIZE))
    base.load_state_dict({name.replace(".original.", "."): x for name, x in tensors.items() if not is_adapter(name)})
    assert close(expected, output(base)) < 0.999, "these adapters change the output"
    save_network(tmp_path / "beside", 1, tensors, patch_size=2)
    merged = {name: compute(value) for name, value in merge_adapters(tensors, alpha=40).items()}
    save_network(tmp_path / "merged", 1, merged, patch_size=2)
    beside, report = loaded(section, tmp_path / "beside", storage, torch.float32)
    assert f"20 linear layers in {storage}" in str(report)
    assert all(
        (kind in FEWER_BITS) != is_adapter(name)
        for name, kind in kinds(beside).items()
        if ".attention." in name and not name.endswith("bias")
    )
    assert close(output(beside), expected) > 0.999
    own, _ = loaded(network_section("cogvideox_5b", SIZE), tmp_path / "merged", storage)
    assert close(output(own), expected) > (0.98 if storage == "nf4" else 0.999), "merged adapters are in fewer bits too"


def test_shards_of_a_network_are_refused(tmp_path):
    network = build_network(network_section("cogvideox_5b", SIZE))
    save_network(tmp_path, 1, network, patch_size=2)
    network.tensor_shard = Shard(0, 2)
    with pytest.raises(InputError, match="one of 2 shards"):
        load_network(network, tmp_path, storage="int8")


def test_what_cannot_be_used_is_refused(monkeypatch):
    require_usable("int8", CPU)
    with pytest.raises(InputError, match="torchao cannot store weights in fp8 on 'meta'"):
        monkeypatch.setattr("sgm.weights.quantize.store", lambda *_: torch.zeros(1, device="meta").item())
        require_usable("fp8", torch.device("meta"))
    monkeypatch.setattr("sgm.weights.quantize._is_installed", lambda package: False)
    with pytest.raises(InputError, match=r"int8 needs torchao, which is not installed: pip install '.*\[lowmem\]'"):
        require_usable("int8", CPU)
