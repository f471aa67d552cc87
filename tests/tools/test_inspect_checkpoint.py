import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import inspect_checkpoint  # noqa: E402

TOY, VAE = str(ROOT / "assets/toy/transformer"), str(ROOT / "assets/toy/vae/3d-vae.pt")
KEYS = (
    "path kind model candidates generation num_tensors num_parameters num_bytes dtypes architecture lora state "
    "iterations parts"
).split()


def test_a_table_for_each_path(capsys):
    assert inspect_checkpoint.main([TOY, VAE]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[:3] == [TOY, "  kind        SAT network", "  model       toy (generation 1.0)"]
    assert "  parameters  1,852,096 in 125 tensors, 3.7 MB" in first
    assert second.splitlines()[:3] == [VAE, "  kind        SAT autoencoder", "  precision   float16"]


def test_json_has_the_same_keys_for_everything(capsys):
    assert inspect_checkpoint.main([TOY, VAE, "--json"]) == 0
    network, vae = json.loads(capsys.readouterr().out)
    assert list(network) == list(vae) == KEYS
    assert (network["model"], network["architecture"]["num_layers"], vae["architecture"]) == ("toy", 6, None)


@pytest.mark.parametrize("as_json", [False, True])
def test_tensors(tmp_path, capsys, as_json):
    path = tmp_path / "lora.safetensors"
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({name: torch.ones(2, 3, dtype=torch.bfloat16)}, path)
    assert inspect_checkpoint.main([str(path), "--tensors", *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)[0]["tensors"] == {name: {"shape": [2, 3], "dtype": "bfloat16"}}
    else:
        assert f"    {name}  bfloat16  [2, 3]" in out


def test_all_paths_are_reported_and_one_failure_ends_with_2(tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("no weights")
    assert inspect_checkpoint.main([str(text), TOY, "nowhere"]) == 2
    captured = capsys.readouterr()
    assert "SAT network" in captured.out
    assert f"{text} (10 bytes) is not a file of torch.save or safetensors" in captured.err
    assert "there is nothing at nowhere" in captured.err
    assert inspect_checkpoint.main([str(text), TOY, "--json"]) == 2
    failed, good = json.loads(capsys.readouterr().out)
    assert failed.keys() == {"path", "error"}
    assert good["kind"] == "SAT network"
