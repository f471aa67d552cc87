"""Real trainings at every ZeRO stage against their saved weights, and checkpoints of other trainers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import save_file

from benchmarks.diffusers_peer import network_peer
from sgm.conversion.trainers.consolidate import convert
from sgm.conversion.trainers.sources import read_source
from sgm.util import InputError, instantiate_from_config
from sgm.weights.adapters import read_adapter_info
from sgm.weights.checkpoint import load_network
from sgm.weights.files import find_weights, read_tensors
from tests.marks import thorough
from tests.processes import asked, only_run, train_all
from tests.sgm.conversion.trainers.zero_files import require_equal, write_state

ROOT = Path(__file__).parents[4]
sys.path.insert(0, str(ROOT / "tools"))

import convert_weight_deepspeed2hf as tool  # noqa: E402

MODELS = {"lora": "dit_t2v_5b_lora", "full": "dit_t2v_2b"}
# Three ranks: few parameters of these networks have a multiple of 3 elements.
WORLD, ITERS = 3, 2
PARTS = {2: ["round_robin_gradients=true"], 3: ["stage3_param_persistence_threshold=0", "sub_group_size=3000"]}
RUNS = {
    ("lora", 2, "fp32"): PARTS[2],
    ("lora", 3, "bf16"): PARTS[3],
    ("full", 0, "bf16"): [],
    ("full", 1, "bf16"): [],
    ("full", 2, "fp32"): [],
    ("full", 3, "fp32"): PARTS[3],
}
LORA, FULL = ("lora", 3, "bf16"), ("full", 2, "fp32")
QUICK = [LORA, FULL]


def marked(keys):
    return [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in keys]


def training_yaml(name: str, folder: Path) -> str:
    """Write the YAML that trains a golden network for two steps on the toy's clips."""
    clips, fixed = [str(ROOT / "assets" / "toy")], name == "dit_t2v_2b"
    content = {
        "args": {
            "mode": "finetune",
            "train_data": clips,
            "valid_data": clips,
            "num_workers": 0,
            "auto_warmup_iters": 0,
            "warmup": 0.0,
            "train_iters": ITERS,
            "ema_decay": 0.9,
        },
        "model": {"latent_input": False},
        "data": {
            "target": "data_video.SFTDataset",
            "params": {
                "video_size": [64, 96] if fixed else [16, 32],
                "fps": 8,
                "max_num_frames": 5,
                "skip_frms_num": 0,
            },
        },
        "deepspeed": {"train_micro_batch_size_per_gpu": 1, "optimizer": {"params": {"lr": 1e-3}}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="session")
def runs(request, tiny_model, tmp_path_factory):
    """Return a function: (kind, stage, precision) → run folder."""
    top = tmp_path_factory.mktemp("zero")

    def folder(kind, stage, precision):
        return top / f"{kind}-{stage}-{precision}"

    jobs = []
    for key in dict.fromkeys([*QUICK, *(key for (key,) in asked(request, "key"))]):
        name, more = MODELS[key[0]], RUNS[key]
        zero = [f"deepspeed.zero_optimization.{each}" for each in (f"stage={key[1]}", *more)]
        overrides = [f"model.precision={key[2]}", f"args.save={folder(*key)}", *zero]
        jobs.append({"bases": [str(tiny_model(name)), training_yaml(name, top)], "overrides": overrides})
    train_all(jobs, top, WORLD)
    return lambda *key: only_run(folder(*key))


def saved(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_weights(path))


@pytest.mark.parametrize("key", marked(RUNS))
@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_weights_are_those_that_the_run_saved(runs, tmp_path, key, file_format):
    run, out = runs(*key), tmp_path / "out"
    state = run / "resume" / str(ITERS)
    convert(state if file_format == "pt" else run, out, to="sat", file_format=file_format)
    assert (out / "latest").read_text() == f"{ITERS}\n"
    assert find_weights(out).name == f"mp_rank_00_model_states.{file_format}"
    require_equal(saved(out), saved(run))
    before = saved(ROOT / "tests/data/golden" / MODELS[key[0]] / "transformer")
    trained = [name for name, tensor in saved(out).items() if not torch.equal(tensor, before[name].to(tensor.dtype))]
    assert len(trained) > 10, "training moved the weights"
    assert read_adapter_info(out) == read_adapter_info(run)
    assert (read_adapter_info(out) is not None) == (key[0] == "lora")


@pytest.mark.parametrize("key", marked(key for key in RUNS if key[1]))
def test_averages_are_those_that_the_run_saved(runs, tmp_path, key):
    run = runs(*key)
    convert(run, tmp_path / "out", to="sat", ema=True)
    averages, weights = saved(tmp_path / "out"), saved(run)
    require_equal(averages, saved(run / f"{ITERS}-ema"))
    assert any(not torch.equal(averages[name], weights[name]) for name in weights)


def test_float32_weights_are_more_than_those_of_training(runs, tmp_path):
    run = runs(*LORA)
    convert(run, tmp_path / "out", to="sat", dtype=torch.float32)
    masters, weights = saved(tmp_path / "out"), saved(run)
    require_equal({name: tensor.bfloat16() for name, tensor in masters.items()}, weights)
    assert any(not torch.equal(tensor, weights[name].float()) for name, tensor in masters.items())


@pytest.mark.parametrize("key", marked([LORA, FULL, ("lora", 2, "fp32"), ("full", 3, "fp32")]))
def test_what_was_not_trained_comes_from_the_base_where_the_weights_are_gone(runs, tmp_path, key):
    run = shutil.copytree(runs(*key), tmp_path / "run", ignore=shutil.ignore_patterns("2-ema", "tensorboard"))
    weights, info = saved(run), read_adapter_info(run)
    shutil.rmtree(run / str(ITERS))
    convert(run / "resume" / str(ITERS), tmp_path / "out", to="sat")
    require_equal(saved(tmp_path / "out"), weights)
    assert read_adapter_info(tmp_path / "out") == info
    point = run / "resume" / str(ITERS) / "resume.json"
    point.write_text(json.dumps(json.loads(point.read_text()) | {"base_digest": "0"}))
    with pytest.raises(InputError, match="has changed since"):
        read_source(run)
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match="neither exists"):
        read_source(run)


def test_a_run_becomes_a_transformer_of_diffusers(runs, tiny_model, tmp_path):
    run, out, base = runs(*FULL), tmp_path / "out", tiny_model("dit_t2v_2b")
    words = ["--checkpoint_path", str(run), "--output_path", str(out), "--to", "diffusers", "--base", str(base)]
    assert tool.main([*words, "--max_shard_size", "200KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 2, "several files"
    peer = CogVideoXTransformer3DModel.from_pretrained(out, local_files_only=True)
    network = instantiate_from_config(yaml.safe_load(base.read_text())["model"]["network_config"])
    load_network(network, run)
    require_equal(peer.state_dict(), network_peer(network).state_dict())
    plain = tmp_path / "without_base"
    convert(run, plain, to="diffusers")
    assert [path.name for path in plain.iterdir()] == ["diffusion_pytorch_model.safetensors"]
    require_equal(read_tensors(next(plain.iterdir())), read_sharded(out))


def read_sharded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in read_tensors(path).items()}


def test_adapters_are_no_transformer_of_diffusers(runs, tmp_path, capsys):
    run, out = runs(*LORA), tmp_path / "out"
    assert tool.main(["--checkpoint_path", str(run), "--output_path", str(out), "--to", "diffusers"]) == 2
    assert "tools/export_sat_lora_weight.py" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_points_of_a_schedule_free_optimizer_without_zero_are_refused(tmp_path):
    state = tmp_path / "run" / "resume" / "5"
    shutil.copytree(find_weights(ROOT / "tests/data/golden/dit_t2v_2b/transformer").parent, state)
    (state / "resume.json").write_text(json.dumps({"zero_stage": 0, "optimizer": "schedulefree.AdamWScheduleFree"}))
    with pytest.raises(InputError, match="their average, its result, is in .*run/5: convert that"):
        read_source(state)


# Checkpoints of other trainers.

TABLE, UNUSED = "mixins.pos_embed.pos_embedding", "transformer.position_embeddings.weight"


def network_of(base: Path, load: Path | None = None):
    """Return the network of a model YAML with its weights, or others, in float32."""
    content = yaml.safe_load(base.read_text())
    network = instantiate_from_config(content["model"]["network_config"])
    load_network(network, load or content["args"]["load"])
    return network


def require_same_network(found, wanted):
    """Compare networks; one from diffusers has a computed position table and no unused tables."""
    found, wanted = found.state_dict(), wanted.state_dict()
    if TABLE in wanted:
        torch.testing.assert_close(found.pop(TABLE), wanted.pop(TABLE), rtol=0, atol=5e-4)  # float16 in the file
    found.pop(UNUSED, None)
    wanted.pop(UNUSED, None)
    require_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "stage", "prefix"),
    [
        ("cogvideox_2b", 2, "module."),
        thorough("cogvideox_5b_i2v", 3, "module.transformer."),
        thorough("cogvideox1.5_5b", 1, ""),
        ("cogvideox1.5_5b_i2v", 3, "transformer."),
    ],
)
def test_a_state_with_names_of_diffusers(family, tmp_path, name, stage, prefix):
    base = family(name)
    network = network_of(base)
    peer = network_peer(network, spatial_interpolation=1.875 if name == "cogvideox_2b" else 1.0)
    state = {prefix + key: tensor for key, tensor in peer.state_dict().items()}
    if prefix:
        state["vae.conv.weight"] = torch.zeros(3)
    frozen = {key: state.pop(key) for key in list(state)[:5]}
    groups = [{key: t for key, t in state.items() if (t.ndim > 1) == is_matrix} for is_matrix in (True, False)]
    folder = tmp_path / "checkpoint"
    write_state(folder / "tag", groups, stage=stage, frozen=frozen, bf16="bf16_")
    (folder / "latest").write_text("tag")
    convert(folder, tmp_path / "sat", to="sat", base=[str(base)], dtype=torch.float32)
    assert (tmp_path / "sat" / "latest").read_text() == "70\n"
    require_same_network(network_of(base, tmp_path / "sat"), network)
    convert(folder / "tag", tmp_path / "diffusers", to="diffusers", base=[str(base)], dtype=torch.float32)
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "diffusers", local_files_only=True)
    require_equal(loaded.state_dict(), peer.state_dict())


def shard(tensors: dict[str, torch.Tensor], folder: Path, suffix: str) -> None:
    """Write tensors in two files and their index."""
    names = list(tensors)
    folder.mkdir()
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"part-{number}-of-2.{suffix}"
        own = {name: tensors[name].contiguous() for name in part}
        save_file(own, file) if suffix == "safetensors" else torch.save(own, file)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / f"pytorch_model.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files(family, tmp_path, suffix):
    base = family("cogvideox_5b_i2v")
    network = network_of(base)
    peer = network_peer(network)
    folder = tmp_path / "shards"
    shard({f"module.{name}": t.bfloat16() for name, t in peer.state_dict().items()}, folder, suffix)
    index = next(folder.glob("*.index.json"))
    convert(index, tmp_path / "sat", to="sat")  # the learned table identifies the model: no --base
    assert {tensor.dtype for tensor in saved(tmp_path / "sat").values()} == {torch.bfloat16}
    require_same_network(network_of(base, tmp_path / "sat"), network)
    (folder / "config.json").write_text(peer.to_json_string())
    convert(folder, tmp_path / "diffusers", to="diffusers", max_shard_size="100KB")
    loaded = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "diffusers", local_files_only=True)
    assert loaded.config.sample_width == peer.config.sample_width
    require_equal(loaded.state_dict(), peer.state_dict())
    next(folder.glob("part-2*")).unlink()
    with pytest.raises(InputError, match="lacks part-2-of-2"):
        read_source(folder)


def test_a_checkpoint_in_the_sat_layout(family, tmp_path):
    base = family("cogvideox1.5_5b")
    source = yaml.safe_load(base.read_text())["args"]["load"]
    convert(source, tmp_path / "diffusers", to="diffusers", base=[str(base)])
    convert(tmp_path / "diffusers", tmp_path / "sat", to="sat", file_format="safetensors")  # by its config.json
    require_same_network(network_of(base, tmp_path / "sat"), network_of(base))


def test_what_is_no_whole_network_is_refused(family, tmp_path):
    base, out = family("cogvideox_5b"), tmp_path / "out"
    state = network_peer(network_of(base)).state_dict()
    write_state(tmp_path / "part", [{name: t for name, t in state.items() if "attn1.to_out" not in name}])
    with pytest.raises(InputError, match=r"lacks transformer.layers.0.attention.dense.weight.*exclude_frozen"):
        convert(tmp_path / "part", out, to="diffusers")
    write_state(tmp_path / "whole", [state])
    with pytest.raises(InputError, match="say whether its positions are rotary"):
        convert(tmp_path / "whole", out, to="sat")
    with pytest.raises(InputError, match="do not fit the configuration"):
        convert(tmp_path / "whole", out, to="sat", base=[str(family("cogvideox_5b_i2v"))])
    write_state(tmp_path / "other", [{"down.weight": torch.zeros(3)}])
    with pytest.raises(InputError, match="holds no CogVideoX transformer.*'down.weight'"):
        convert(tmp_path / "other", out, to="sat")
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "sat", "--max_shard_size", "1GB"], "--max_shard_size has no effect"),
        (["--to", "diffusers", "--file_format", "pt"], "--file_format is for the SAT layout"),
        (["--to", "sat", "--ema"], "is not a ZeRO state"),
        (["--to", "sat", "--checkpoint_path", "nowhere"], "cannot read nowhere"),
    ],
)
def test_wrong_options_end_with_2_and_write_nothing(family, tmp_path, capsys, words, said):
    load = yaml.safe_load(family("cogvideox_5b").read_text())["args"]["load"]
    assert tool.main(["--checkpoint_path", load, "--output_path", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
