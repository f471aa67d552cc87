"""Conversion commands: output and failures."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import tools.convert_weight_deepspeed2hf as deepspeed2hf
import tools.convert_weight_hf2sat as hf2sat
import tools.convert_weight_sat2hf as sat2hf
from sgm.config.load import load_config
from sgm.conversion.family import shipped_file
from sgm.util import InputError
from sgm.weights.adapters import AdapterInfo
from sgm.weights.architecture import CONFIGS
from sgm.weights.checkpoint import save_network
from sgm.weights.files import find_weights, read_tensors, weights_digest
from tests.processes import ROOT, run

TOY = ["--base", str(ROOT / "configs" / "toy.yaml")]


@pytest.fixture
def sat(monkeypatch, tmp_path, capsys):
    """Return a function: run the command from the project's folder; gives exit code and all that was written."""
    monkeypatch.chdir(ROOT)

    def call(tool, *words):
        code = tool.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def nothing_in(folder: Path) -> bool:
    return not any(folder.iterdir())


def test_there_and_back(sat, tmp_path):
    code, text = sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe", "--verify", "--max_shard_size", "2MB")
    assert code == 0, text
    for part in ("transformer", "vae", "tokenizer", "scheduler"):
        assert f"{part}: largest difference " in text
    assert f"wrote {tmp_path / 'pipe'}: CogVideoXPipeline of transformer, vae, text_encoder, tokenizer" in text
    code, text = sat(hf2sat, "--model_path", tmp_path / "pipe", "--output_path", tmp_path / "sat")
    assert code == 0 and f"--base {tmp_path / 'sat' / 'model.yaml'}" in text, text
    first, second = (
        read_tensors(find_weights(top)) for top in (ROOT / "assets/toy/transformer", tmp_path / "sat/transformer")
    )
    assert all(torch.equal(first[name], second[name]) for name in second) and len(second) > len(first) - 2


@pytest.mark.thorough
def test_the_way_back_can_be_sampled(sat, tmp_path):
    sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe")
    sat(hf2sat, "--model_path", tmp_path / "pipe", "--output_path", tmp_path / "sat", "--dtype", "fp32")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves left\n")
    done = run(
        "sample_video.py",
        [
            *["--base", str(tmp_path / "sat" / "model.yaml"), f"args.input_file={prompts}", "args.input_type=txt"],
            *[f"args.output_dir={tmp_path / 'out'}", "args.num_steps=2"],
        ],
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out").glob("*/0/000000.mp4"))


def truncated(path: Path) -> None:
    path.write_bytes((ROOT / "assets/toy/vae/3d-vae.pt").read_bytes()[:5000])


def with_code(path: Path) -> None:
    torch.save({"module": {"a": torch.zeros(1)}, "more": os.system}, path)


def of_another_family(path: Path) -> None:
    shutil.copy(find_weights(ROOT / "assets/toy/transformer_i2v"), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated or damaged"),
        (with_code, "holds Python objects besides tensors"),
        (of_another_family, r"does not fit the configured network:"),
    ],
)
def test_bad_weights(sat, tmp_path, damage, message):
    damage(tmp_path / "bad.pt")
    (tmp_path / "outputs").mkdir()
    words = ["--transformer_ckpt_path", tmp_path / "bad.pt", "--output_path", tmp_path / "outputs" / "pipe"]
    code, text = sat(sat2hf, *TOY, *words)
    assert code == 2 and message in text, text
    assert nothing_in(tmp_path / "outputs")


def test_an_existing_output_is_refused_first(sat, tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "file").write_text("mine")
    for tool, words in ((sat2hf, ["--base", "nowhere.yaml"]), (hf2sat, ["--model_path", "nowhere"])):
        code, text = sat(tool, *words, "--output_path", tmp_path / "pipe")
        assert code == 2 and "exists already; nothing is overwritten" in text, text
    assert [path.name for path in (tmp_path / "pipe").iterdir()] == ["file"]


def test_a_full_disk(sat, tmp_path, monkeypatch, small_disk):
    with small_disk(1_000_000):
        code, text = sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe")
    assert code == 2 and re.search(r"could not write \S*/pipe/[^.]\S*: it needs .*; raise it \(ulimit -f\)\n", text), (
        text
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, text = sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe")
    assert code == 2 and "1.0 kB are free there" in text, text
    assert nothing_in(tmp_path)


def test_other_pipelines_and_nothing_at_all(sat, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    code, text = sat(hf2sat, "--model_path", tmp_path / "flux", "--output_path", tmp_path / "sat")
    assert code == 2 and "is a FluxPipeline; only CogVideoX is converted" in text
    code, text = sat(hf2sat, "--output_path", tmp_path / "sat")
    assert code == 2 and "there is nothing to convert" in text
    code, text = sat(hf2sat, "--transformer_path", tmp_path / "none", "--output_path", tmp_path / "sat")
    assert code == 2 and f"there is nothing at {tmp_path / 'none'}" in text
    assert not (tmp_path / "sat").exists()


def test_without_diffusers_verification_is_refused_before_work(sat, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, text = sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe", "--verify")
    assert code == 2 and "pip install -e '.[diffusers]'" in text, text
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("script", ["convert_weight_sat2hf", "convert_weight_hf2sat"])
def test_help_says_how(script, capsys):
    with pytest.raises(SystemExit) as ended:
        {"convert_weight_sat2hf": sat2hf, "convert_weight_hf2sat": hf2sat}[script].main(["--help"])
    assert ended.value.code == 0
    assert f"python tools/{script}.py" in capsys.readouterr().out


def test_the_model_is_recognised_without_base(sat, tmp_path, caplog):
    """From SAT weights, from adapters by their base, and from a file of diffusers without a config.json."""
    pipe, alone = tmp_path / "pipe", tmp_path / "alone"
    transformer = ["--transformer_ckpt_path", "assets/toy_land", "--without", "vae", "text_encoder", "tokenizer"]
    code, text = sat(sat2hf, *transformer, "--output_path", pipe)
    assert code == 0 and "recognised as toy" in text + caplog.text, text
    alone.mkdir()
    shutil.copy(pipe / "transformer/diffusion_pytorch_model.safetensors", alone)
    file = alone / "diffusion_pytorch_model.safetensors"
    code, text = sat(hf2sat, "--transformer_path", file, "--output_path", tmp_path / "sat")
    assert code == 0, text
    known = load_config([ROOT / "configs/toy.yaml"], mode="inference")
    found = load_config([tmp_path / "sat/model.yaml"], mode="inference")
    assert found.model["network_config"] == known.model["network_config"]
    code, text = sat(deepspeed2hf, "--checkpoint_path", file, "--to", "sat", "--output_path", tmp_path / "other")
    assert code == 0, text
    assert "Give weights with --transformer_ckpt_path" in sat(sat2hf, "--output_path", tmp_path / "none")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--without", *sat2hf.PARTS], "leaves nothing to convert"),
        (["--style", "comfyui", "--without", "transformer"], "leaves nothing to convert"),
        (["--style", "comfyui", "--vae_ckpt_path", "x"], "--vae_ckpt_path has no effect without vae"),
        (["--without", "transformer", "--title", "x"], "--title has no effect without transformer"),
        (["--without", "transformer", "--fold_image_scale"], "--fold_image_scale has no effect without transformer"),
        (["--without", "transformer", "--lora", "keep"], "--lora keep has no effect without transformer"),
        (["--lora", "keep", "--without", "vae"], "assets/toy/transformer holds no adapters; leave it out"),
    ],
)
def test_options_without_effect_are_refused(sat, tmp_path, words, said):
    code, text = sat(sat2hf, *TOY, "--output_path", tmp_path / "pipe", *words)
    assert code == 2 and said in text, text
    assert nothing_in(tmp_path)


def test_parts_of_diffusers_that_are_not_converted(sat, tmp_path, caplog):
    """Options for them are refused; they are not said to be written; a folder that is missing is said."""
    pipe, other = tmp_path / "pipe", ["--output_path", tmp_path / "other"]
    sat(sat2hf, *TOY, "--output_path", pipe)
    for words, said in (
        (["--vae_path", pipe / "vae", "--dtype", "bf16"], "--dtype has no effect without transformer"),
        (["--model_path", pipe, "--without", "vae", "--vae_path", "x"], "--vae_path has no effect without vae"),
        (["--model_path", pipe, "--without", "tokenizer"], "--without tokenizer has no effect"),
    ):
        code, text = sat(hf2sat, *words, *other)
        assert code == 2 and said in text, text
    shutil.rmtree(pipe / "vae")
    code, text = sat(hf2sat, "--model_path", pipe, "--without", "text_encoder", *other)
    assert code == 0 and "other: scheduler, transformer\n" in text, text
    assert "names vae, and there is no such folder" in text + caplog.text


def test_a_base_that_was_moved_is_named(sat, tmp_path):
    base = ROOT / "assets/toy/transformer"
    name = "transformer.layers.0.attention.dense.matrix"
    tensors = {f"{name}_A.0": torch.ones(2, 128), f"{name}_B.0": torch.ones(128, 2)}
    name = name.replace("dense", "query_key_value")
    tensors |= {
        f"{name}_{side}.{n}": tensors[f"{name.replace('query_key_value', 'dense')}_{side}.0"].clone()
        for side in "AB"
        for n in range(3)
    }
    digest = weights_digest(find_weights(base))
    info = AdapterInfo(rank=2, alpha=1.0, layers=(0,), base="moved/away", base_digest=digest)
    save_network(tmp_path / "lora", 1, tensors, patch_size=None, adapters=info)
    words = ["--transformer_ckpt_path", tmp_path / "lora", "--output_path", tmp_path / "pipe"]
    words += ["--without", "vae", "text_encoder", "tokenizer"]
    code, text = sat(sat2hf, *words)
    assert code == 2 and "say where it is with args.base=<folder or file>" in text, text
    code, text = sat(sat2hf, f"args.base={base}", *words)
    assert code == 0, text


@pytest.mark.parametrize("name", [name for name in CONFIGS.values()])
def test_every_shipped_family_is_recognised(name):
    key = next(shape for shape, config in CONFIGS.items() if config == name)
    width, layers, channels, patch = key
    volume = 4 * patch
    proj = (width, channels, 2, 2) if patch == 1 else (width, channels * volume)
    sizes = {"patch_embed.proj.weight": proj, "proj_out.weight": (16 * volume, width)}
    sizes |= {f"transformer_blocks.{n}.attn1.to_q.weight": (width, width) for n in range(layers)}
    tensors = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    assert shipped_file(tensors, "x").name == f"{name}.yaml"
    del tensors["transformer_blocks.0.attn1.to_q.weight"]
    with pytest.raises(InputError, match="no shipped model has this shape; give its YAML with --base"):
        shipped_file(tensors, "x")
