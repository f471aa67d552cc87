"""The command that reshards weights."""

from pathlib import Path

import pytest
import reshard_checkpoint
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sgm.weights.adapters import AdapterInfo
from sgm.weights.checkpoint import save_network
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import compute
from sgm.weights.partition import partition_of

ROOT = Path(__file__).parents[2]


FAMILIES = ["dit_t2v_2b", "dit_t2v_5b_lora"]


def reshard(load, save, size):
    return reshard_checkpoint.main(["--load", str(load), "--save", str(save), "--model_parallel_size", str(size)])


def contents(path):
    """Return tensors and everything else in one file."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            metadata = {
                name: text for name, text in file.metadata().items() if name not in ("xxh3", "finite", "format")
            }
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    content = torch.load(path, weights_only=True)
    return content.pop("module"), content


def assert_equal(one, other):
    (tensors, rest), (others, their_rest) = contents(one), contents(other)
    assert rest == their_rest and tensors.keys() == others.keys()
    assert all(t.dtype == others[n].dtype and torch.equal(t, others[n]) for n, t in tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_to_two_shards_and_back_changes_nothing(golden, tmp_path, capsys, family, suffix):
    source = tmp_path / "source" / "30" / f"mp_rank_00_model_states.{suffix}"
    source.parent.mkdir(parents=True)
    tensors = read_tensors(find_weights(golden / family / "transformer"))
    if suffix == "pt":
        torch.save({"module": tensors, "iteration": 30, "note": "kept"}, source)
    else:
        save_file(tensors, source, metadata={"note": "kept", "more": "[1]"})
    assert reshard(source.parent, tmp_path / "two", 2) == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["30", "latest"]
    shards = [contents(path)[0] for path in sorted((tmp_path / "two" / "30").iterdir())]
    assert len(shards) == 2 and f"mp_rank_01_model_states.{suffix}" in capsys.readouterr().out
    joined = read_tensors(find_weights(tmp_path / "two"))
    for name, tensor in tensors.items():
        assert shards[0][name].numel() * (2 if partition_of(name) else 1) == tensor.numel()
        assert torch.equal(compute(joined[name]), tensor)
    assert reshard(tmp_path / "two", tmp_path / "one", 1) == 0
    assert_equal(tmp_path / "one" / "30" / source.name, source)


def test_adapters_keep_their_description(tmp_path):
    name, matrices = "transformer.layers.1.attention.{}.matrix_{}.{}", {}
    for target, num in (("query_key_value", 3), ("dense", 1)):
        for index in range(num):
            matrices[name.format(target, "A", index)] = torch.randn(4, 16)
            matrices[name.format(target, "B", index)] = torch.randn(16, 4)
    info = AdapterInfo(rank=4, alpha=8, layers=(1,), base="base", base_digest="0")
    source = save_network(tmp_path / "source", 7, matrices, patch_size=2, adapters=info)
    assert reshard(tmp_path / "source", tmp_path / "four", 4) == 0
    assert contents(tmp_path / "four" / "7" / "mp_rank_03_model_states.pt")[1] == {"lora": info.to_entry()}
    assert reshard(tmp_path / "four", tmp_path / "two", 2) == 0
    assert reshard(tmp_path / "two", tmp_path / "one", 1) == 0
    assert_equal(tmp_path / "one" / "7" / source.name, source)


def test_impossible_numbers_and_other_files_are_refused_before_writing(golden, tmp_path, capsys):
    load = golden / "dit_t2v_2b" / "transformer"
    for size in (0, 3, 4):
        assert reshard(load, tmp_path / "out", size) == 2
        assert "2 heads in" in (message := capsys.readouterr().err) and "give one of 1, 2" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "latest").write_text("1")
    assert reshard(load, tmp_path / "full", 2) == 2
    assert "exists already" in capsys.readouterr().err
    torch.save({"module": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    assert reshard(tmp_path / "other.pt", tmp_path / "out", 2) == 2
    assert "holds no layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_with_different_replicated_tensors_are_not_joined(golden, tmp_path, capsys):
    assert reshard(golden / "dit_t2v_2b" / "transformer", tmp_path / "two", 2) == 0
    second = next((tmp_path / "two").glob("*/mp_rank_01*"))
    tensors, _ = contents(second)
    tensors["model.diffusion_model.time_embed.0.bias"] += 1
    (save_file if second.suffix == ".safetensors" else lambda t, p: torch.save({"module": t}, p))(tensors, second)
    assert reshard(tmp_path / "two", tmp_path / "one", 1) == 2
    assert "time_embed.0.bias, which is replicated, differs" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(("name", "written"), [("w.pth", "pt"), ("w.pt", "safetensors")])
def test_the_format_goes_by_the_content(golden, tmp_path, name, written):
    tensors = {
        name: compute(each) for name, each in read_tensors(find_weights(golden / FAMILIES[0] / "transformer")).items()
    }
    if written == "pt":
        torch.save({"module": tensors}, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    assert reshard(tmp_path / name, tmp_path / "out", 2) == 0
    assert find_weights(tmp_path / "out").suffix == f".{written}"
