"""Descriptions of files and folders of all kinds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.models import network_section
from sgm.config.load import load_config
from sgm.conversion.diffusers.from_sat import pipeline_of
from sgm.conversion.diffusers.names import network_to_diffusers
from sgm.conversion.inspection import LoraFacts, StateFacts, inspect_checkpoint, verify_checkpoint
from sgm.conversion.lora import export_lora
from sgm.conversion.trainers.sources import read_source
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import AdapterInfo
from sgm.weights.checkpoint import save_network
from sgm.weights.files import PREFIX
from tests.sgm.conversion.trainers.zero_files import write_state

ROOT = Path(__file__).parents[3]
TOY = ROOT / "assets" / "toy"
RELEASED = {
    "cogvideox_2b": ("CogVideoX-2B", "1.0"),
    "cogvideox_5b": ("CogVideoX-5B", "1.0"),
    "cogvideox_5b_i2v": ("CogVideoX-5B-I2V", "1.0"),
    "cogvideox1.5_5b": ("CogVideoX1.5-5B", "1.5"),
    "cogvideox1.5_5b_i2v": ("CogVideoX1.5-5B-I2V", "1.5"),
}
INFO = AdapterInfo(rank=4, alpha=2.0, layers=(0, 1), base="somewhere", base_digest="0")


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a sparse bfloat16 safetensors file of any size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligned, as the library writes it
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)


def released_state(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a released model with one layer, and the state of the whole: all layers have the shapes of the first."""
    section = network_section(name)
    num_layers = section["params"]["num_layers"]
    section["params"]["num_layers"] = 1
    with without_allocating():
        network = instantiate_from_config(section)
    state = {}
    for key, tensor in network.state_dict().items():
        in_layer = key.startswith(("transformer.layers.0.", "mixins.adaln_layer."))
        state |= {key.replace(".0.", f".{i}.", 1): tensor for i in range(num_layers if in_layer else 1)}
    return network, state


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_told_from_their_shapes(tmp_path, name):
    network, state = released_state(name)
    twin = network_to_diffusers(state, patch_size=network.patch_size, learned_positions=name == "cogvideox_5b_i2v")
    shapes = {
        "SAT network": {PREFIX + key: tuple(tensor.shape) for key, tensor in state.items()},
        "diffusers transformer": {key: tuple(tensor.meta().shape) for key, tensor in twin.items()},
    }
    for kind, own in shapes.items():
        write_hollow(tmp_path / "file.safetensors", own)
        found = inspect_checkpoint(tmp_path / "file.safetensors")
        assert (found.kind, found.model, found.generation) == (kind, *RELEASED[name])
        assert found.num_parameters == sum(map(math.prod, own.values())) == found.num_bytes // 2
        assert (found.num_tensors, found.dtypes) == (len(own), {"bfloat16": len(own)})
        assert found.architecture.has_ofs == (name == "cogvideox1.5_5b_i2v")
        has_table = name == "cogvideox_5b_i2v" or (name, kind) == ("cogvideox_2b", "SAT network")
        assert found.architecture.position_rows == (226 + 13 * 30 * 45 if has_table else None)


def test_the_toy():
    found = inspect_checkpoint(TOY / "transformer")
    assert (found.kind, found.model, found.generation) == ("SAT network", "toy", "1.0")
    assert found.iterations == ("5000",)
    assert inspect_checkpoint(TOY / "transformer_i2v").model == "toy I2V"
    assert inspect_checkpoint(TOY / "transformer1.5_i2v").model == "toy 1.5 I2V"
    assert inspect_checkpoint(TOY / "vae" / "3d-vae.pt").kind == "SAT autoencoder"
    found = inspect_checkpoint(TOY / "t5")
    assert (found.kind, found.dtypes) == ("T5 encoder", {"float32": found.num_tensors})


def adapters(width: int = 64) -> dict[str, torch.Tensor]:
    """Return LoRA of rank 4 on two layers, by the network's names."""
    result = {}
    for layer in INFO.layers:
        for module, count in (("query_key_value", 3), ("dense", 1)):
            for index in range(count):
                name = f"transformer.layers.{layer}.attention.{module}.matrix"
                result[f"{name}_A.{index}"] = torch.ones(4, width)
                result[f"{name}_B.{index}"] = torch.ones(width, 4)
    return result


@pytest.mark.parametrize(("width", "models"), [(64, 0), (128, 3), (1920, 1), (3072, 4)])
def test_adapters_of_sat_and_of_diffusers(tmp_path, width, models):
    save_network(tmp_path / "sat", 7, adapters(width), patch_size=2, adapters=INFO)
    export_lora(tmp_path / "sat", tmp_path / "diffusers")
    for name, kind, base in (("sat", "SAT adapters (LoRA)", "somewhere"), ("diffusers", "LoRA for diffusers", None)):
        found = inspect_checkpoint(tmp_path / name)
        assert found.kind == kind
        assert found.lora == LoraFacts(rank=4, alpha=2.0, layers=(0, 1), base=base)
        assert (found.num_tensors, len(found.candidates)) == (16, models)
    assert inspect_checkpoint(tmp_path / "sat").model == ("CogVideoX-2B" if width == 1920 else None)
    assert "rank 4, alpha 2, 2 layers, of somewhere" in inspect_checkpoint(tmp_path / "sat").table()


def test_adapters_of_peft(tmp_path):
    module = "base_model.model.transformer_blocks.1.attn1.to_q"
    tensors = {f"{module}.lora_A.weight": torch.ones(8, 64), f"{module}.lora_B.weight": torch.ones(64, 8)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "zai-org/CogVideoX-5b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path)
    assert found.kind == "LoRA of PEFT"
    assert found.lora == LoraFacts(rank=8, alpha=16.0, layers=(1,), base="zai-org/CogVideoX-5b")


def test_alpha_in_tensors_of_their_own(tmp_path):
    module = "transformer.transformer_blocks.0.attn1.to_k"
    tensors = {f"{module}.lora.down.weight": torch.ones(8, 64), f"{module}.lora.up.weight": torch.ones(64, 8)}
    save_file(tensors | {f"{module}.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    assert inspect_checkpoint(tmp_path / "lora.safetensors").lora.alpha == 4
    save_file(tensors, tmp_path / "lora.safetensors")
    assert inspect_checkpoint(tmp_path / "lora.safetensors").lora.alpha is None


@pytest.mark.parametrize(("alpha", "common"), [(4.0, None), (8.0, 8.0)])
def test_the_alpha_of_a_module_without_one_is_its_rank(tmp_path, alpha, common):
    tensors = {"transformer.transformer_blocks.0.attn1.to_k.alpha": torch.tensor(alpha)}
    for part in ("to_k", "to_q"):
        module = f"transformer.transformer_blocks.0.attn1.{part}"
        tensors |= {f"{module}.lora_A.weight": torch.ones(8, 64), f"{module}.lora_B.weight": torch.ones(64, 8)}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert inspect_checkpoint(tmp_path / "lora.safetensors").lora.alpha == common


def test_a_network_with_its_adapters(golden):
    found = inspect_checkpoint(golden / "dit_t2v_5b_lora" / "transformer")
    assert (found.kind, found.model, found.generation) == ("SAT network with LoRA", None, "1.0")
    assert found.lora == LoraFacts(rank=4, alpha=None, layers=(0, 1), base=None)
    assert "none of the shipped ones (generation 1.0)" in found.table()


def test_a_pipeline_of_diffusers(family, tmp_path):
    config = load_config([family("cogvideox_2b")], ["args.input_type=cli"], mode="inference")
    pipeline_of(config).write(tmp_path / "pipeline", max_shard_size="200KB")
    found = inspect_checkpoint(tmp_path / "pipeline")
    kinds = ["diffusers transformer", "diffusers autoencoder", "T5 encoder"]
    assert found.kind == "diffusers pipeline (CogVideoXPipeline)"
    assert [part.kind for part in found.parts] == kinds
    assert found.num_parameters == sum(part.num_parameters for part in found.parts) > 0
    assert set(found.dtypes) == {"float16", "float32"}
    for part, kind in zip(("transformer", "vae", "text_encoder"), kinds, strict=True):
        assert inspect_checkpoint(tmp_path / "pipeline" / part).kind == kind
    shutil.move(tmp_path / "pipeline" / "vae", tmp_path / "shared")
    (tmp_path / "pipeline" / "vae").symlink_to(tmp_path / "shared")
    (tmp_path / "shared" / "up").symlink_to(tmp_path / "pipeline")
    num = sum(1 for top in ("pipeline", "shared") for _ in (tmp_path / top).rglob("*.safetensors"))
    assert verify_checkpoint(tmp_path / "pipeline") == {"with_checksums": num, "without": 0}
    next((tmp_path / "shared").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="pipeline/vae.*lacks|vae should hold one set of weights"):
        inspect_checkpoint(tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": [None, None]}))  # saved without one
    assert [part.kind for part in inspect_checkpoint(tmp_path / "pipeline").parts] == [kinds[0], kinds[2]]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_and_its_state(tmp_path, stage):
    save_network(tmp_path, 65, adapters(), patch_size=2, adapters=INFO, latest=False)
    save_network(tmp_path, 70, adapters(), patch_size=2, adapters=INFO)
    named = {PREFIX + name: tensor for name, tensor in adapters().items()}
    write_state(tmp_path / "resume" / "70", [named], stage=stage, world=2)
    (tmp_path / "resume" / "latest").write_text("70")
    found = inspect_checkpoint(tmp_path)
    assert (found.kind, found.iterations, found.num_tensors) == ("run folder", ("65", "70"), 16)
    weights, state = found.parts
    assert (weights.kind, weights.lora.alpha) == ("SAT adapters (LoRA)", 2.0)
    assert (state.kind, state.dtypes) == ("ZeRO state", {"bfloat16": 16})
    assert state.state == StateFacts(zero_stage=stage, ranks=2, iteration=70, ema=False)
    assert inspect_checkpoint(tmp_path / "resume").state == state.state
    part = next((tmp_path / "resume" / "70").glob("*pp_rank_1*optim*"))
    with pytest.raises(InputError, match="is a part of a ZeRO state"):
        inspect_checkpoint(part)
    part.unlink()
    with pytest.raises(InputError, match="lacks zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        inspect_checkpoint(tmp_path)


def test_a_state_without_zero(tmp_path):
    named = {PREFIX + name: tensor for name, tensor in adapters().items()}
    content = {"module": named, "param_shapes": None, "global_steps": 5, "dp_world_size": 4, "optimizer": {}}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    found = inspect_checkpoint(tmp_path)
    assert (found.kind, found.num_tensors) == ("training state", 16)
    assert found.state == StateFacts(zero_stage=0, ranks=4, iteration=5, ema=None)


@pytest.mark.parametrize("steps", ["x", [1]])
def test_a_state_without_zero_counts_its_steps(tmp_path, steps):
    torch.save({"module": {"a": torch.ones(1)}, "global_steps": steps}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="global_steps or dp_world_size is no whole number"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../..", "../../r" * 1000, "x" * 5000, "/tmp", "7\0"])
def test_the_state_of_a_run_is_in_its_folder(tmp_path, name):
    save_network(tmp_path, 70, adapters(), patch_size=2, adapters=INFO)
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "latest").write_text(name)
    for read in (inspect_checkpoint, read_source):
        with pytest.raises(InputError, match="resume/latest (holds|names) '.*beside it; correct it"):
            read(tmp_path)


LORA = "transformer.transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize(
    ("alpha", "said"),
    [
        (torch.ones(2), r"alpha has the shape \(2,\); expected one number"),
        (torch.ones(0), r"alpha has the shape \(0,\); expected one number"),
        (torch.tensor(1j), "expected one number"),
    ],
)
def test_alphas_of_lora_that_are_no_numbers(tmp_path, alpha, said):
    tensors = {f"{LORA}.lora_A.weight": torch.ones(8, 64), f"{LORA}.lora_B.weight": torch.ones(64, 8)}
    torch.save(tensors | {f"{LORA}.alpha": alpha}, tmp_path / "lora.bin")
    with pytest.raises(InputError, match=said):
        inspect_checkpoint(tmp_path / "lora.bin")


@pytest.mark.parametrize("header", [[1], "a", 3, *({"lora_alpha": value} for value in ([1], "abc", 10**400))])
def test_descriptions_of_lora_that_are_none(tmp_path, header):
    tensors = {f"{LORA}.lora_A.weight": torch.ones(8, 64), f"{LORA}.lora_B.weight": torch.ones(64, 8)}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(InputError, match=r"lora.safetensors: .*its header \(lora_adapter_metadata\).*; expected"):
        inspect_checkpoint(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "name",
    [f"{LORA}.lora_A.weight", f"{PREFIX}transformer.layers.0.attention.query_key_value.matrix_A.0"],
)
@pytest.mark.parametrize("shape", [(), (8,)])
def test_matrices_of_lora_that_are_none(tmp_path, name, shape):
    torch.save({name: torch.ones(shape), name.replace("_A", "_B"): torch.ones(64, 8)}, tmp_path / "lora.pt")
    with pytest.raises(InputError, match=r"_A.*has the shape \(.*\), expected a matrix"):
        inspect_checkpoint(tmp_path / "lora.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates quantized tensors
def test_tensors_of_any_kind_are_counted(tmp_path):
    name = "transformer_blocks.0.norm1.linear.weight"
    odd = {name: torch.ones(3).to_sparse(), "b": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}
    torch.save({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2)} | odd, tmp_path / "t5.pt")
    found = inspect_checkpoint(tmp_path / "t5.pt")
    assert (found.num_parameters, found.num_bytes) == (9, 8 + 12 + 4) and found.table(tensors=True)


class Foreign:
    pass


def write(content: bytes):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is nothing at"),
        (lambda path: path.mkdir(), "should hold one set of weights; found: none"),
        (write(b""), "is empty"),
        (write(b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        (write(b"PK\x03\x04 and nothing more"), "truncated or damaged"),
        (write(b"a text"), "is not a file of torch.save or safetensors"),
        (lambda path: save_file({"down.0.weight": torch.ones(2)}, path), "no CogVideoX transformer.*'down.0.weight'"),
        (lambda path: save_file({"transformer_blocks.0.ff_context.weight": torch.ones(2)}, path), "no counterpart"),
        (lambda path: torch.save({"module": {"a": Foreign()}}, path), "could run code"),
        (lambda path: torch.save({"epoch": 3}, path), "not tensors: epoch"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, make, said):
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(InputError, match=said) as caught:
        inspect_checkpoint(path)
    assert "weights.pt" in str(caught.value)


def test_what_the_system_refuses_is_an_input_error():
    with pytest.raises(InputError, match="cannot be read: .*too long"):
        inspect_checkpoint("x" * 5000)


def test_an_adapter_without_its_weights_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="has an adapter_config.json and no adapter_model file"):
        inspect_checkpoint(tmp_path)
