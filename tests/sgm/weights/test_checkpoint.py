import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from sgm.util import InputError, RunError, instantiate_from_config, without_allocating
from sgm.weights.adapters import AdapterInfo, is_adapter
from sgm.weights.checkpoint import (
    load_autoencoder,
    load_network,
    released_layout,
    save_autoencoder,
    save_network,
    write_latest,
)
from sgm.weights.files import find_weights, read_tensors, weights_digest
from sgm.weights.match import match_network
from tests.marks import only, thorough

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
PATCH_WEIGHT = "model.diffusion_model.mixins.patch_embed.proj.weight"
FAMILIES = ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"]


def golden(family):
    return GOLDEN / family / "transformer"


def section(family, *, lora_rank=None):
    config = OmegaConf.to_container(OmegaConf.load(GOLDEN / family / "model.yaml").model.network_config)
    if lora_rank:
        lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora_rank}}
        config["params"]["modules"]["lora_config"] = lora
    elif lora_rank == 0:
        del config["params"]["modules"]["lora_config"]
    return config


def build(family, *, lora_rank=None, allocate=True):
    config = section(family, lora_rank=lora_rank)
    if allocate:
        return instantiate_from_config(config).eval()
    with without_allocating():
        return instantiate_from_config(config).eval()


def run(network, family):
    io = load_file(GOLDEN / family / "io.safetensors")
    x = torch.cat((io["latents"], io["concat"]), dim=2) if "concat" in io else io["latents"]
    with torch.no_grad():
        return network(x, io["timesteps"], io["context"]), io["output"]


def rewritten(tmp_path, family, change):
    """Apply `change` to the tensors of a golden checkpoint and save it as a single file."""
    tensors = dict(read_tensors(find_weights(golden(family))))
    change(tensors)
    torch.save({"module": tensors}, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


class Tiny(nn.Module):
    """Network tensors relevant to the key policy."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.mixins = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Linear(16, 8, dtype=dtype)})})
        self.transformer = nn.ModuleDict({"position_embeddings": nn.Embedding(4, 8, dtype=dtype)})
        self.register_buffer("counter", torch.arange(3))


# --- Loading a network.


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_checkpoints_load_and_give_the_reference_output(family):
    network = build(family, allocate=False)
    report = load_network(network, golden(family))
    output, expected = run(network, family)
    assert (output - expected).abs().max() <= 2e-5
    assert report.num_tensors == len(network.state_dict()) and report.file_dtype == "float32"
    assert not report.new_adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_built_without_memory_equals_one_built_with_it(family):
    real, fake = build(family), build(family, allocate=False)
    assert all(parameter.is_meta for parameter in fake.parameters())
    trained = {name: parameter.requires_grad for name, parameter in real.named_parameters()}
    assert not all(trained.values()), "position tables are not trained"
    load_network(real, golden(family))
    load_network(fake, golden(family))
    expected = dict(real.named_parameters())
    for name, parameter in fake.named_parameters():
        assert not parameter.is_meta, name
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad == trained[name], name
        assert parameter.is_contiguous()
    assert fake.state_dict().keys() == real.state_dict().keys()
    assert torch.equal(run(fake, family)[0], run(real, family)[0])


def test_marks_of_tensor_parallel_parameters_survive():
    network = build("dit_t2v_5b_lora")
    marked = {name: vars(parameter) for name, parameter in network.named_parameters() if vars(parameter)}
    assert any(name.endswith("matrix_B.0") for name in marked), "the adapters carry a mark"
    load_network(network, golden("dit_t2v_5b_lora"))
    for name, parameter in network.named_parameters():
        assert vars(parameter) == marked.get(name, {}), name


def test_released_extras_are_dropped_and_counted(tmp_path):
    def change(tensors):
        tensors["first_stage_model.encoder.conv_in.conv.weight"] = torch.ones(1)
        tensors["conditioner.embedders.0.x"] = torch.ones(1)
        tensors["model.diffusion_model.transformer.word_embeddings.weight"] = torch.ones(1, 64)

    report = load_network(build("dit_i2v_5b"), rewritten(tmp_path, "dit_i2v_5b", change))
    assert {reason: len(names) for reason, names in report.dropped.items()} == {
        "tensors of other parts": 2,
        "recomputed tables": 2,
        "unused tables": 1,
    }
    line = str(report)
    assert "\n" not in line and "left out 2 tensors of other parts" in line and "changed.pt" in line


def test_the_unused_position_table_may_be_absent_or_of_another_length(tmp_path):
    name = "transformer.position_embeddings.weight"
    path = rewritten(tmp_path, "dit_i2v_5b", lambda tensors: tensors.pop("model.diffusion_model." + name))
    network = build("dit_i2v_5b", allocate=False)
    load_network(network, path)
    assert torch.equal(network.get_parameter(name), torch.zeros(64, 64))

    def longer(tensors):
        tensors["model.diffusion_model." + name] = torch.ones(100, 64)

    report = load_network(build("dit_i2v_5b"), rewritten(tmp_path, "dit_i2v_5b", longer))
    assert report.dropped["unused tables"] == (name,)


def test_a_file_with_the_unused_table_loads_into_a_network_without_it(tmp_path):
    def change(tensors):
        tensors["model.diffusion_model.transformer.position_embeddings.weight"] = torch.ones(64, 64)

    network = build("dit_t2v_2b")
    load_network(network, rewritten(tmp_path, "dit_t2v_2b", change))
    assert (run(network, "dit_t2v_2b")[0] - run(network, "dit_t2v_2b")[1]).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["dit_t2v_2b", "dit_i2v_5b"])
def test_both_layouts_of_the_patch_projection_give_the_same_output(tmp_path, family):
    def change(tensors):
        assert tensors[PATCH_WEIGHT].ndim == 4
        tensors[PATCH_WEIGHT] = tensors[PATCH_WEIGHT].flatten(1)

    conv, linear = build(family), build(family)
    load_network(conv, golden(family))
    load_network(linear, rewritten(tmp_path, family, change))
    assert torch.equal(run(conv, family)[0], run(linear, family)[0])


def test_a_network_that_holds_the_conv_shape_takes_either(tmp_path):
    tiny = Tiny()
    weight = torch.randn(8, 16)
    proj = tiny.mixins["patch_embed"]["proj"]
    save_network(tmp_path, 1, tiny.state_dict() | {"mixins.patch_embed.proj.weight": weight}, patch_size=[1, 2, 2])
    proj.weight = nn.Parameter(torch.zeros(8, 4, 2, 2))
    load_network(tiny, tmp_path)
    assert torch.equal(proj.weight, weight.view(8, 4, 2, 2))


def test_safetensors_load_like_the_pt(tmp_path):
    save_file(read_tensors(find_weights(golden("dit_t2v_2b"))), tmp_path / "weights.safetensors")
    network = build("dit_t2v_2b", allocate=False)
    load_network(network, tmp_path / "weights.safetensors")
    output, expected = run(network, "dit_t2v_2b")
    assert (output - expected).abs().max() <= 2e-5


def test_dtype_applies_to_floating_point_and_each_parameter_keeps_its_own_without_it(tmp_path):
    save_network(tmp_path, 1, Tiny().double(), patch_size=2)
    tiny = Tiny(torch.float16)
    report = load_network(tiny, tmp_path)
    assert tiny.transformer["position_embeddings"].weight.dtype == torch.float16
    assert tiny.counter.dtype == torch.int64 and report.file_dtype == "float64 and int64"
    load_network(tiny, tmp_path, dtype=torch.bfloat16)
    assert tiny.transformer["position_embeddings"].weight.dtype == torch.bfloat16
    assert tiny.counter.dtype == torch.int64 and tiny.counter.tolist() == [0, 1, 2]


def test_parameters_do_not_depend_on_the_file_after_loading(tmp_path):
    path = save_network(tmp_path, 1, Tiny(), patch_size=2)
    tiny = Tiny()
    load_network(tiny, path)
    before = tiny.mixins["patch_embed"]["proj"].weight.clone()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tiny.mixins["patch_embed"]["proj"].weight, before)


def test_a_table_that_no_checkpoint_fills_is_reported(tmp_path):
    save_network(tmp_path, 1, Tiny(), patch_size=2)
    with without_allocating():
        tiny = Tiny()
        tiny.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(RunError, match="not filled by the checkpoint: table"):
        load_network(tiny, tmp_path)


# --- Mismatches.


def test_a_checkpoint_of_another_architecture_names_tensor_shapes_and_both_architectures():
    network = build("dit_i2v_5b")
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    with pytest.raises(InputError) as caught:
        load_network(network, golden("dit_t2v_2b"))
    message = str(caught.value)
    assert "mixins.patch_embed.proj.weight has the shape (64, 16, 2, 2) in the file, expected (64, 128)" in message
    assert "file holds: hidden size 64, 2 layers, 16 input channels, temporal patch 1" in message
    assert "mp_rank_00_model_states.pt does not fit" in message
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def test_released_shapes_name_the_configuration_that_fits(tmp_path):
    tensors = {"mixins.patch_embed.proj.weight": torch.zeros(1920, 16, 2, 2)}
    tensors |= {f"transformer.layers.{i}.x": torch.zeros(1) for i in range(30)}
    torch.save({"module": released_layout(tensors, 2)}, tmp_path / "2b.pt")
    with pytest.raises(InputError, match="use configs/cogvideox_2b.yaml"):
        load_network(build("dit_t2v_2b", allocate=False), tmp_path / "2b.pt")


def test_a_missing_tensor_is_named_with_its_shape(tmp_path):
    name = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    path = rewritten(tmp_path, "dit_t2v_2b", lambda tensors: tensors.pop("model.diffusion_model." + name))
    with pytest.raises(InputError, match=re.escape(f"{name} (64,) is missing")):
        load_network(build("dit_t2v_2b"), path)


def test_an_unexpected_tensor_is_named_with_its_shape(tmp_path):
    def change(tensors):
        tensors["model.diffusion_model.transformer.layers.0.extra"] = torch.ones(2, 3)

    with pytest.raises(InputError, match=re.escape("transformer.layers.0.extra (2, 3) is unexpected")):
        load_network(build("dit_t2v_2b"), rewritten(tmp_path, "dit_t2v_2b", change))


def test_many_mismatches_are_shortened(tmp_path):
    def change(tensors):
        for i in range(200):
            tensors[f"model.diffusion_model.extra.{i}"] = torch.ones(1)

    with pytest.raises(InputError, match="and 196 more of this kind") as caught:
        load_network(build("dit_t2v_2b"), rewritten(tmp_path, "dit_t2v_2b", change))
    assert len(str(caught.value).splitlines()) < 12


def test_a_position_table_of_another_size_says_what_its_rows_are():
    config = section("dit_t2v_2b")
    config["params"]["num_frames"] = 9
    with pytest.raises(InputError, match=r"pos_embedding has the shape \(1, 126, 64\)") as caught:
        load_network(instantiate_from_config(config), golden("dit_t2v_2b"))
    assert "rows of a position table" in str(caught.value) and "latent_height" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "diffusers layout"),
        ("encoder.conv_in.conv.weight", "ckpt_path"),
        ("something.else", "SAT layout"),
    ],
)
def test_a_file_without_a_network_says_what_it_may_be(tmp_path, name, message):
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        load_network(Tiny(), tmp_path / "x.safetensors")


def test_a_truncated_checkpoint_is_refused_before_the_network_is_touched(tmp_path):
    shutil.copytree(golden("dit_t2v_2b"), tmp_path / "copy")
    path = find_weights(tmp_path / "copy")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"\(100,000 bytes\) is truncated or damaged"):
        load_network(build("dit_t2v_2b"), tmp_path / "copy")


# --- LoRA.


def test_a_base_checkpoint_loads_under_lora_without_changing_the_output():
    base, lora = build("dit_i2v_5b"), build("dit_i2v_5b", lora_rank=4, allocate=False)
    load_network(base, golden("dit_i2v_5b"))
    report = load_network(lora, golden("dit_i2v_5b"), generator=torch.Generator().manual_seed(3))
    assert len(report.new_adapters) == 2 * 2 * (3 + 1)
    assert "initialised 16 LoRA matrices" in str(report)
    assert torch.allclose(run(lora, "dit_i2v_5b")[0], run(base, "dit_i2v_5b")[0], atol=1e-6)
    for name in report.new_adapters:
        matrix = lora.get_parameter(name)
        assert matrix.requires_grad
        if ".matrix_A." in name:
            assert 0 < matrix.abs().max() <= 1 / 64**0.5, "uniform within 1/sqrt(fan-in) for a = sqrt(5)"
        else:
            assert not matrix.any()


def test_fresh_adapters_depend_on_the_generator_alone():
    networks = []
    for seed, dtype in ((3, None), (3, torch.float32), (4, None)):
        network = build("dit_i2v_5b", lora_rank=4)
        load_network(network, golden("dit_i2v_5b"), dtype=dtype, generator=torch.Generator().manual_seed(seed))
        networks.append(network.state_dict()["transformer.layers.1.attention.query_key_value.matrix_A.2"])
    assert torch.equal(networks[0], networks[1]) and not torch.equal(networks[0], networks[2])


def test_a_base_checkpoint_may_be_refused_under_lora():
    with pytest.raises(InputError, match="holds no LoRA, but the configuration has a lora_config"):
        load_network(build("dit_i2v_5b", lora_rank=4), golden("dit_i2v_5b"), allow_missing_adapters=False)


def test_a_lora_checkpoint_needs_a_lora_configuration():
    with pytest.raises(InputError, match=r"holds LoRA matrices \(rank 4\).*no lora_config"):
        load_network(build("dit_t2v_5b_lora", lora_rank=0), golden("dit_t2v_5b_lora"))


def test_a_lora_of_another_rank_shows_both_ranks():
    with pytest.raises(
        InputError, match=r"matrix_A.0 has the shape \(4, 64\) in the file, expected \(8, 64\)"
    ) as caught:
        load_network(build("dit_t2v_5b_lora", lora_rank=8), golden("dit_t2v_5b_lora"))
    assert "LoRA of rank 8" in str(caught.value) and "LoRA of rank 4" in str(caught.value)


def test_a_part_of_the_adapters_is_not_enough(tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "layers.1." in name and "matrix_" in name]:
            del tensors[name]

    with pytest.raises(InputError, match=r"layers.1.attention.*matrix_A.0 \(4, 64\) is missing"):
        load_network(build("dit_t2v_5b_lora"), rewritten(tmp_path, "dit_t2v_5b_lora", change))


def save_adapters(folder, *, base, rank=4, alpha=2.0, fill=0.1, **options):
    """Save adapters with every B filled with `fill` on a base; return their network."""
    network = build("dit_i2v_5b", lora_rank=rank)
    load_network(network, base, generator=torch.Generator().manual_seed(0))
    for name, parameter in network.named_parameters():
        if ".matrix_B." in name:
            nn.init.constant_(parameter, fill)
    tensors = {name: tensor for name, tensor in network.state_dict().items() if is_adapter(name)}
    info = AdapterInfo(
        rank=rank, alpha=alpha, layers=(0, 1), base=str(base), base_digest=weights_digest(find_weights(base))
    )
    save_network(folder, 5, tensors, patch_size=network.patch_size, adapters=info, **options)
    return network


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_adapters_alone_load_on_top_of_their_base(tmp_path, file_format):
    trained = save_adapters(tmp_path, base=golden("dit_i2v_5b"), file_format=file_format)
    network = build("dit_i2v_5b", lora_rank=4, allocate=False)
    report = load_network(network, tmp_path)
    assert report.base == find_weights(golden("dit_i2v_5b")) and report.path == find_weights(tmp_path)
    assert report.num_tensors == len(network.state_dict()) and not report.warnings and not report.new_adapters
    assert f"on the base {report.base}" in str(report)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert set(read_tensors(report.path)) == {
        f"model.diffusion_model.{name}" for name in trained.state_dict() if "matrix_" in name
    }


def test_adapters_replace_those_of_a_base_that_has_some(tmp_path):
    first = save_adapters(tmp_path / "first", base=golden("dit_i2v_5b"), fill=0.3)
    save_network(tmp_path / "whole", 1, first, patch_size=first.patch_size)
    trained = save_adapters(tmp_path / "second", base=tmp_path / "whole", fill=0.7)
    network = build("dit_i2v_5b", lora_rank=4, allocate=False)
    load_network(network, tmp_path / "second")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_a_matrix_that_the_file_lacks_is_not_taken_from_the_base(tmp_path):
    network = save_adapters(tmp_path / "first", base=golden("dit_i2v_5b"))
    save_network(tmp_path / "whole", 1, network, patch_size=network.patch_size)
    save_adapters(tmp_path / "second", base=tmp_path / "whole")
    content = torch.load(find_weights(tmp_path / "second"), weights_only=True)
    name = "transformer.layers.1.attention.dense.matrix_B.0"
    del content["module"]["model.diffusion_model." + name]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(InputError, match=re.escape(f"{name} (64, 4) is missing")):
        load_network(build("dit_i2v_5b", lora_rank=4, allocate=False), tmp_path / "less.pt")


def test_a_base_may_be_named_where_none_is_found(tmp_path):
    shutil.copytree(golden("dit_i2v_5b"), tmp_path / "base")
    save_adapters(tmp_path / "run", base=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    network = build("dit_i2v_5b", lora_rank=4, allocate=False)
    for attempt in (match_network, load_network):
        with pytest.raises(InputError, match="args.base="):
            attempt(network, tmp_path / "run")
        attempt(network, tmp_path / "run", base=tmp_path / "moved")


def test_adapters_alone_need_a_network_with_lora(tmp_path):
    save_adapters(tmp_path, base=golden("dit_i2v_5b"))
    with pytest.raises(InputError, match=r"no lora_config; add one with {r: 4, lora_alpha: 2, layer_range: \[0, 1\]}"):
        load_network(build("dit_i2v_5b"), tmp_path)


def test_adapters_alone_are_checked_as_strictly(tmp_path):
    save_adapters(tmp_path, base=golden("dit_i2v_5b"))
    network = build("dit_i2v_5b", lora_rank=8, allocate=False)
    for attempt in (match_network, load_network):
        with pytest.raises(
            InputError, match=r"on the base .*does not fit[^$]*\(4, 64\) in the file, expected \(8, 64\)"
        ):
            attempt(network, tmp_path)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_adapters_without_effect_are_told(tmp_path):
    save_adapters(tmp_path, base=golden("dit_i2v_5b"), fill=0.0)
    (warning,) = load_network(build("dit_i2v_5b", lora_rank=4), tmp_path).warnings
    assert "no effect" in warning and str(find_weights(tmp_path)) in warning
    assert not load_network(build("dit_t2v_5b_lora"), golden("dit_t2v_5b_lora")).warnings


def test_tensors_that_a_file_lacks_keep_their_values_where_that_is_allowed(tmp_path):
    name = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    path = rewritten(tmp_path, "dit_t2v_2b", lambda tensors: tensors.pop("model.diffusion_model." + name))
    network = build("dit_t2v_2b")
    nn.init.constant_(network.get_parameter(name), 0.5)
    report = load_network(network, path, allow_missing=True, dtype=torch.bfloat16)
    assert report.missing == (name,) and name in report.warnings[0]
    assert network.get_parameter(name).eq(0.5).all() and network.get_parameter(name).dtype == torch.bfloat16
    fake = build("dit_t2v_2b", allocate=False)
    match_network(fake, path, allow_missing=True)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_network(fake, path, allow_missing=True)
    with pytest.raises(InputError, match="is missing"):
        match_network(fake, path)


def test_other_shapes_are_never_allowed(tmp_path):
    def change(tensors):
        tensors["model.diffusion_model.transformer.final_layernorm.bias"] = torch.ones(3)

    with pytest.raises(InputError, match=r"final_layernorm.bias has the shape \(3,\)"):
        load_network(build("dit_t2v_2b"), rewritten(tmp_path, "dit_t2v_2b", change), allow_missing=True)


# --- Saving.


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
@pytest.mark.parametrize("family", only(["dit_t2v_1.5", "dit_t2v_5b_lora"], FAMILIES))
def test_saved_and_loaded_is_bit_identical_and_keeps_the_released_layout(tmp_path, family, file_format):
    network = build(family)
    load_network(network, golden(family))
    path = save_network(tmp_path, 1000, network, patch_size=network.patch_size, file_format=file_format)
    assert path == tmp_path / "1000" / f"mp_rank_00_model_states.{file_format}" == find_weights(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["1000", "latest"] and os.listdir(path.parent) == [path.name]
    saved, released = read_tensors(path), read_tensors(find_weights(golden(family)))
    assert saved.keys() == {name for name in released if "freqs_" not in name}
    for name, tensor in saved.items():
        assert tensor.shape == released[name].shape and torch.equal(tensor, released[name]), name
    again = build(family, allocate=False)
    load_network(again, tmp_path)
    assert torch.equal(run(again, family)[0], run(network, family)[0])


def test_the_pt_is_a_mapping_under_module_and_holds_no_more_than_its_tensors(tmp_path):
    whole = torch.zeros(1000, 16)
    path = save_network(tmp_path, 1, {"mixins.patch_embed.proj.weight": whole[:8]}, patch_size=2)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["module"] and content["module"][PATCH_WEIGHT].shape == (8, 4, 2, 2)
    assert path.stat().st_size < 5000


def test_a_temporal_patch_of_two_stays_linear():
    weight = torch.randn(8, 4 * 2 * 2 * 2)
    layout = released_layout({"mixins.patch_embed.proj.weight": weight, "time_embed.0.bias": weight[0]}, [2, 2, 2])
    assert torch.equal(layout[PATCH_WEIGHT], weight)
    assert list(layout)[1] == "model.diffusion_model.time_embed.0.bias"


def test_latest_moves_to_the_newest_and_one_iteration_has_one_format(tmp_path):
    save_network(tmp_path, 1, Tiny(), patch_size=2)
    save_network(tmp_path, 2, Tiny(), patch_size=2)
    assert (tmp_path / "latest").read_text().strip() == "2"
    path = save_network(tmp_path, 2, Tiny(), patch_size=2, file_format="safetensors")
    assert find_weights(tmp_path) == path and find_weights(tmp_path / "1").suffix == ".pt"


def test_a_full_disk_leaves_latest_and_no_half_written_file(tmp_path, small_disk):
    save_network(tmp_path, 1, Tiny(), patch_size=2)
    for file_format in ("pt", "safetensors"):
        message = r"could not write .*2.mp_rank_00.*it needs [\d.,]+ (bytes|kB), the limit of a file"
        with pytest.raises(RunError, match=message), small_disk(500):
            save_network(tmp_path, 2, Tiny(), patch_size=2, file_format=file_format)
    assert (tmp_path / "latest").read_text().strip() == "1" and os.listdir(tmp_path / "2") == []


def test_latest_moves_only_after_the_weights_are_on_the_disk(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), real_sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(Path(to).name), real_replace(self, to))[1])
    save_network(tmp_path, 1, Tiny(), patch_size=2)
    assert events == ["fsync", "mp_rank_00_model_states.pt", "fsync", "fsync", "latest", "fsync"]


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_weights_that_are_not_finite_are_saved_by_a_training_alone(tmp_path, file_format):
    tensors = Tiny().state_dict() | {"mixins.patch_embed.proj.weight": torch.full((2, 2), float("nan"))}
    save_network(tmp_path / "run", 1, tensors, patch_size=None, file_format=file_format, any_values=True)
    assert find_weights(tmp_path / "run").is_file()
    with pytest.raises(InputError, match=r"mp_rank_00.* is not written: .*patch_embed.proj.weight has values out of"):
        save_network(tmp_path / "out", 1, tensors, patch_size=None, file_format=file_format)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_latest_may_wait(tmp_path):
    save_network(tmp_path, 1, Tiny(), patch_size=2)
    save_network(tmp_path, 2, Tiny(), patch_size=2, latest=False)
    assert find_weights(tmp_path).parent.name == "1"
    write_latest(tmp_path, 2)
    assert find_weights(tmp_path).parent.name == "2"


def test_what_could_not_be_loaded_again_is_not_written(tmp_path):
    tensors = {"transformer.layers.1.attention.dense.matrix_A.0": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match="pass `adapters`"):
        save_network(tmp_path, 1, tensors, patch_size=2)
    for rank, layers in ((8, (1,)), (4, (0, 1))):
        info = AdapterInfo(rank=rank, alpha=1, layers=layers, base="x", base_digest="0")
        with pytest.raises(ValueError, match=r"its matrices have rank 4 on \[1\]"):
            save_network(tmp_path, 1, tensors, patch_size=2, adapters=info)
    assert not os.listdir(tmp_path)


# --- The autoencoder.


def build_vae(*, allocate=True):
    config = OmegaConf.to_container(OmegaConf.load(GOLDEN / "vae" / "first_stage.yaml"))
    config = config.get("first_stage_config", config)
    if allocate:
        return instantiate_from_config(config).eval()
    with without_allocating():
        return instantiate_from_config(config).eval()


def test_the_golden_autoencoder_loads_without_its_loss_and_decodes_like_the_reference():
    vae = build_vae(allocate=False)
    report = load_autoencoder(vae, GOLDEN / "vae" / "3d-vae.pt", dtype=torch.float32)
    assert report.dropped == {"ignored tensors": ("loss.logvar",)} and report.file_dtype == "float16"
    assert report.num_tensors == len(vae.state_dict()) == 244
    io = load_file(GOLDEN / "vae" / "io.safetensors")
    with torch.no_grad():
        assert (vae.decode(io["latents.3"]) - io["decoded.3"]).abs().max() <= 2e-5


@pytest.mark.parametrize("name", ["vae.pt", thorough("vae.safetensors")])
def test_a_saved_autoencoder_loads_bit_identical(tmp_path, name):
    vae, again = build_vae(), build_vae(allocate=False)
    load_autoencoder(vae, GOLDEN / "vae" / "3d-vae.pt")
    path = save_autoencoder(tmp_path / name, vae)
    load_autoencoder(again, path)
    for key, tensor in vae.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    if name.endswith(".pt"):
        assert list(torch.load(path, weights_only=True)) == ["state_dict"]


def test_an_autoencoder_is_checked_as_strictly(tmp_path):
    content = read_tensors(GOLDEN / "vae" / "3d-vae.pt")
    name = "encoder.conv_in.conv.weight"
    torch.save({"state_dict": content | {name: torch.zeros(8, 3, 3, 3, 3)}}, tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"encoder.conv_in.conv.weight has the shape \(8, 3, 3, 3, 3\) in the file, expected"
    ):
        load_autoencoder(build_vae(allocate=False), tmp_path / "x.pt")
    torch.save({"state_dict": content | {"teacher.x": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="teacher.x .* is unexpected"):
        load_autoencoder(build_vae(allocate=False), tmp_path / "x.pt")
    assert load_autoencoder(build_vae(allocate=False), tmp_path / "x.pt", ignore_keys=["teacher"]).num_tensors == 244
    with pytest.raises(InputError, match="is a folder"):
        load_autoencoder(build_vae(allocate=False), tmp_path)


# --- The documentation.


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    shutil.copytree(golden("dit_i2v_5b"), tmp_path / "transformer")
    monkeypatch.chdir(tmp_path)
    exec(code, {"network_config": section("dit_i2v_5b")})
    assert find_weights("copy") == Path("copy/1000/mp_rank_00_model_states.safetensors")
