import json
from pathlib import Path

import inspect_checkpoint
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


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


def test_verify_reads_all_bytes_and_names_what_changed(tmp_path, capsys):
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    content = {"module": {"model.diffusion_model.transformer.layers.0.attention.dense.weight": values}}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"exp_avg": values * 2}}, tmp_path / "optim_states.pt")  # of others
    save_file({"x": values}, tmp_path / "other.safetensors")
    assert inspect_checkpoint.main([str(tmp_path), "--verify"]) == 0
    assert "  verified    2 files match their checksums; 1 have none" in capsys.readouterr().out
    for name, factor, said in (
        ("mp_rank_00_model_states.pt", 1, "transformer.layers.0.attention.dense.weight is damaged"),
        ("optim_states.pt", 2, "optim_states/data/0 is damaged"),
    ):
        data = bytearray((tmp_path / name).read_bytes())
        data[data.index((values * factor).numpy().tobytes()) + 7] ^= 4
        (tmp_path / name).write_bytes(data)
        assert inspect_checkpoint.main([str(tmp_path)]) == 0, "without --verify only headers are read"
        assert inspect_checkpoint.main([str(tmp_path), "--verify", "--json"]) == 2
        assert said in capsys.readouterr().err


def test_the_folder_of_a_converted_model_is_described(tmp_path, capsys):
    (tmp_path / "model.yaml").write_text("model: {}\n")
    for name, target in {"transformer": TOY, "vae": Path(VAE).parent, "t5": ROOT / "assets/toy/t5"}.items():
        (tmp_path / name).symlink_to(target)
    assert inspect_checkpoint.main([str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["model"]) == ("model in the SAT layout", "toy")
    assert [part["kind"] for part in found["parts"]] == ["SAT network", "SAT autoencoder", "T5 encoder"]
