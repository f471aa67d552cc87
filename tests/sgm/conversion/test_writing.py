"""Files written tensor by tensor, and folders written atomically."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sgm.conversion.writing import check_new_folder, new_folder, write_shards
from sgm.util import InputError, RunError
from sgm.weights.checksums import write_safetensors
from sgm.weights.lazy import LazyTensor

TENSORS = {
    "half": torch.randn(3, generator=torch.Generator().manual_seed(0)).half(),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "view": torch.arange(12.0).reshape(3, 4)[:, 1],
    "bf16": torch.ones(5, dtype=torch.bfloat16),
    "index": torch.arange(3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 2),
}


def lazily(tensors):
    return {name: LazyTensor((tensor,)) for name, tensor in tensors.items()}


def test_the_file_is_what_the_library_reads(tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    write_safetensors(path, lazily(TENSORS), metadata={"key": "value"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert {**file.metadata(), "xxh3": ""} == {"format": "pt", "key": "value", "xxh3": "", "finite": "1"}


def test_shards_keep_their_size_and_have_an_index(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    write_shards(tmp_path, lazily(tensors), stem="model", max_shard_size="1KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    assert sorted(index["weight_map"]) == sorted(tensors)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    write_shards(tmp_path, lazily(TENSORS), stem="model", max_shard_size="5GB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path, small_disk):
    big = {"t": torch.zeros(100_000)}
    with small_disk(10_000), pytest.raises(RunError, match=r"it needs 400\.2 kB, the limit of a file here is 10\.0 kB"):
        write_safetensors(tmp_path / "file.safetensors", lazily(big))
    with (
        small_disk(10_000),
        pytest.raises(InputError, match=f"write {tmp_path}/x/file.safetensors: it needs"),
        new_folder(tmp_path / "x") as new,
    ):
        write_safetensors(new / "file.safetensors", lazily(big))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_process_wrote_meanwhile(tmp_path):
    with pytest.raises(InputError, match="out was written by another process meanwhile"), new_folder(tmp_path / "out"):
        (tmp_path / "out" / "a").mkdir(parents=True)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as new:
        (new / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "1"


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RunError, match="numbers differ"), new_folder(tmp_path / "a" / "b" / "out") as new:
        (new / "a").write_text("1")
        raise RunError("numbers differ")
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_empty_folder_or_to_none_is_written_through(tmp_path):
    (tmp_path / "far" / "empty").mkdir(parents=True)
    for name in ("empty", "none"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
        check_new_folder(tmp_path / name)
        with new_folder(tmp_path / name) as new:
            (new / "a").write_text("1")
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / name / "a").read_text() == "1"
        with pytest.raises(InputError, match=f"far/{name} exists already"):
            check_new_folder(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "far", "none"]
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["empty", "none"]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="/a"):
        check_new_folder(tmp_path / "a")


def test_a_way_through_a_folder_that_is_not_there_leaves_no_folder(tmp_path):
    with new_folder(tmp_path / "new" / ".." / "out") as new:
        (new / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as new:
        (new / "a").write_text("1")
    for place in (tmp_path / "out", tmp_path / "out" / "a"):
        with pytest.raises(InputError, match="exists already"), new_folder(place):
            pass
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_too_small_a_disk_is_refused_before_writing(tmp_path):
    with pytest.raises(InputError, match=r"needs 1000000\.0 TB, and .* are free"):
        with new_folder(tmp_path / "out", need_bytes=10**18):
            pytest.fail("it should not start")
    assert not list(tmp_path.iterdir())
