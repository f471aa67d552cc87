import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgm.conversion.diffusers.to_sat import read_stored
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.lora_extract import extract_lora
from sgm.conversion.trainers.sources import read_source
from sgm.io import atomic_file
from sgm.modules.encoders.t5_folder import T5Folder
from sgm.util import InputError, RunError
from sgm.weights import read_ahead
from sgm.weights.files import find_weights, read_entry, read_names, read_tensors, weights_digest
from sgm.weights.lazy import LazyTensor, compute
from sgm.weights.lora.files import read_any_lora
from sgm.weights.lora.foreign import find_lora
from sgm.weights.partition import Shard, partition_of, take_shard

TRANSFORMER = Path(__file__).parents[2] / "data" / "golden" / "dit_t2v_2b" / "transformer"


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch ran-code",))


@pytest.mark.parametrize(
    "find",
    [
        *(find_weights, find_lora, read_any_lora, read_source, read_stored, inspect_checkpoint),
        lambda path: extract_lora(path, path, "x", rank=1),
    ],
)
def test_weights_behind_a_url_are_told_from_missing_ones(find):
    """Without its password, also where the path was made one of files, which leaves one slash."""
    for url in ("https://me:secret@host/x.pt", Path("https://me:secret@host/x.pt")):
        said = r"^https://\*\*\*@host/x.pt is a URL, and weights are read from files; download it"
        with pytest.raises(InputError, match=said):
            find(url)


@pytest.mark.parametrize(
    "find",
    [
        find_weights,
        find_lora,
        read_any_lora,
        read_source,
        read_stored,
        inspect_checkpoint,
        lambda f: T5Folder(f).check(),
    ],
)
def test_of_a_cache_of_downloads_its_snapshots_are_named(find, tmp_path):
    for name in ("blobs", "snapshots/0f"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match=f"cache of downloads, not a model; .*: {tmp_path}/snapshots/0f$"):
        find(T5Folder(tmp_path) if find is T5Folder.check else tmp_path)


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "x.json"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("all")
        assert not path.exists()
    assert path.read_text() == "all" and os.listdir(path.parent) == ["x.json"]


def test_a_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    with atomic_file(tmp_path / "x.safetensors") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)  # private mode, 0600
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("broken"), TypeError("broken")])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises((type(error), RunError)), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_full_disk_is_told_with_path_need_and_free_space(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(RunError, match=r"could not write .*x\.bin.*it needs 5\.0 kB") as caught:
        with atomic_file(path, need_bytes=5000):
            raise OSError(errno.ENOSPC, "full")
    assert "free there" in str(caught.value) and "another folder" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not write"), atomic_file(tmp_path / "file" / "x.txt") as temporary:
        temporary.write_text("all")


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    script = (
        "import os, signal, sys; from sgm.io import atomic_file\n"
        "with atomic_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(bytes(100)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["x.bin"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_run_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="permissions"), atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("all")


def test_a_folder_with_latest_an_iteration_and_a_file_mean_the_same():
    file = TRANSFORMER / "1000" / "mp_rank_00_model_states.pt"
    assert find_weights(TRANSFORMER) == find_weights(str(file.parent)) == find_weights(file) == file


def test_latest_may_end_with_a_newline_and_safetensors_may_stand_for_the_pt(tmp_path):
    (tmp_path / "latest").write_text(" 7\n")
    (tmp_path / "7").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "7" / "mp_rank_00_model_states.safetensors")
    assert find_weights(tmp_path) == tmp_path / "7" / "mp_rank_00_model_states.safetensors"


def make_iterations(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "mp_rank_00_model_states.pt").touch()


def test_a_missing_latest_names_the_iterations_and_the_command_that_makes_it(tmp_path):
    make_iterations(tmp_path, "500", "1000")
    with pytest.raises(InputError) as caught:
        find_weights(tmp_path)
    assert "iterations here: 500, 1000" in str(caught.value)
    assert f"echo 1000 > {tmp_path / 'latest'}" in str(caught.value)


def test_a_folder_without_anything_tells_the_layout(tmp_path):
    with pytest.raises(InputError, match="no file 'latest'.*<iteration>/mp_rank_00_model_states.pt"):
        find_weights(tmp_path)


def test_the_parent_of_the_transformer_folder_names_it(tmp_path):
    (tmp_path / "transformer").mkdir()
    with pytest.raises(InputError, match=re.escape(f"give {tmp_path / 'transformer'}")):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("latest", "message"),
    [
        ("2000", "names the folder '2000', which does not exist"),
        ("9" * 5000, "names the folder '9+ ... 9+', which does not exist"),
        ("", "is empty"),
        ("bare", "bare has no mp_rank_00"),
    ],
    ids=["2000", "long", "empty", "bare"],
)
def test_a_latest_that_leads_nowhere_names_what_is_there(tmp_path, latest, message):
    make_iterations(tmp_path, "1000")
    (tmp_path / "bare").mkdir()
    (tmp_path / "latest").write_text(latest)
    with pytest.raises(InputError, match=message + ".*iterations here: 1000;"):
        find_weights(tmp_path)


def test_a_pipe_and_tensors_without_values_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is no file, but a pipe, socket or device"):
        find_weights(tmp_path / "pipe")
    torch.save({"module": {"a": torch.ones(2), "b": torch.ones(2, device="meta")}}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match="meta.pt holds no values of b: it was saved from the meta device"):
        read_tensors(tmp_path / "meta.pt")
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"module": {"a": torch.ones(2), "b": ragged}}, tmp_path / "nested.pt")
    with pytest.raises(InputError, match="nested.pt: b is a nested tensor"):
        read_tensors(tmp_path / "nested.pt")


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at .*nowhere"):
        find_weights(tmp_path / "nowhere")


NUMBERS = {
    "attention.query_key_value.weight": torch.arange(96.0).view(12, 8)[:, :4],
    "attention.query_key_value.bias": torch.arange(12.0),
    "attention.dense.weight": torch.arange(16.0).view(4, 4),
    "attention.dense.bias": torch.arange(4.0),
    "mlp.dense_h_to_4h.weight": torch.arange(64.0).view(16, 4),
    "mlp.dense_4h_to_h.weight": torch.arange(64.0).view(4, 16),
}
WHOLE = {f"model.diffusion_model.transformer.layers.0.{name}": tensor for name, tensor in NUMBERS.items()}


def write_shards(folder, size, *, suffix="pt", whole=WHOLE, entry=None):
    """Write the shards of a layer of hidden size 4, as SAT does."""
    for index in range(size):
        part = {name: take_shard(name, tensor, Shard(index, size)).contiguous() for name, tensor in whole.items()}
        path = folder / f"mp_rank_{index:02d}_model_states.{suffix}"
        if suffix == "safetensors":
            save_file(part, path, metadata={"lora": json.dumps(entry)})
        else:
            torch.save({"module": part, "lora": entry}, path)
    return folder / f"mp_rank_00_model_states.{suffix}"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_first_shard_stands_for_all(tmp_path, suffix):
    (tmp_path / "whole").mkdir()
    alone = write_shards(tmp_path / "whole", 1, suffix=suffix)
    path = write_shards(tmp_path, 2, suffix=suffix, entry={"rank": 4})
    assert find_weights(tmp_path) == path and read_entry(path, "lora") == {"rank": 4}
    tensors = read_tensors(path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in WHOLE.items()}
    assert all(torch.equal(compute(tensors[name]), tensor) for name, tensor in WHOLE.items())
    divided = {name for name, tensor in tensors.items() if isinstance(tensor, LazyTensor)}
    assert divided == {name for name in WHOLE if partition_of(name)}, "the others are mapped, not joined"
    assert weights_digest(path) == weights_digest(alone)


def test_missing_shards_are_named(tmp_path):
    path = write_shards(tmp_path, 4)
    (tmp_path / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(InputError, match="in 4 shards and lacks mp_rank_02; copy"):
        read_tensors(path)
    (tmp_path / "mp_rank_03_model_states.pt").unlink()  # the shapes give the number of shards
    with pytest.raises(InputError, match="in 4 shards and lacks mp_rank_02, mp_rank_03; copy"):
        read_tensors(path)
    with pytest.raises(InputError, match="one of several shards.*give their folder"):
        read_tensors(tmp_path / "mp_rank_01_model_states.pt")
    path.unlink()
    with pytest.raises(InputError, match="has mp_rank_01_model_states.pt and lacks the first shard"):
        find_weights(tmp_path)


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    path = write_shards(tmp_path, 2)
    name = "model.diffusion_model.transformer.layers.0.mlp.dense_h_to_4h.weight"
    second = tmp_path / "mp_rank_01_model_states.pt"
    part = torch.load(second, weights_only=True)["module"]
    for other, message in (
        ({**part, name: torch.zeros(4, 4)}, r"dense_h_to_4h.weight has the shape \(8, 4\) in mp_rank_00 and \(4, 4\)"),
        ({n: t for n, t in part.items() if n != name}, "not all of them hold .*dense_h_to_4h.weight"),
    ):
        torch.save({"module": other}, second)
        with pytest.raises(InputError, match=message):
            read_tensors(path)
    torch.save({"module": part, "lora": {"rank": 8}}, second)
    with pytest.raises(InputError, match="entries 'lora' differ, None in mp_rank_00 and .*8.* in mp_rank_01"):
        read_entry(path, "lora")
    torch.save({"module": part}, tmp_path / "mp_rank_02_model_states.pt")
    with pytest.raises(InputError, match="holds 3 shards, and .* is one of 2"):
        read_tensors(path)


def test_a_moving_average_or_a_hidden_folder_is_not_proposed_as_the_newest(tmp_path):
    make_iterations(tmp_path, "500", "1000", "1000-ema", ".2000")
    with pytest.raises(InputError, match="iterations here: 1000-ema, 500, 1000;.*echo 1000 >"):
        find_weights(tmp_path)
    assert find_weights(tmp_path / "1000-ema").parent.name == "1000-ema"


@pytest.mark.parametrize("container", ["module", "state_dict", None])
def test_both_containers_and_a_bare_mapping_are_read(tmp_path, container):
    tensors = {"a": torch.randn(3), "b": torch.arange(4).bfloat16()}
    torch.save({container: tensors} if container else tensors, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        back = read_tensors(tmp_path / name)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the list of mappings that Linux has")
def test_a_torch_file_is_memory_mapped(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"module": {"a": torch.zeros(1000)}}, path)
    with open("/proc/self/maps") as maps:
        assert str(path) not in maps.read()
    tensors = read_tensors(path)
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read(), "the file is not mapped"
    assert tensors["a"].sum() == 0


def test_the_old_format_without_zip_is_read(tmp_path):
    torch.save({"module": {"a": torch.ones(3)}}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "x.pt")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_torch_file_is_told_with_its_size(tmp_path, zipped, kept):
    path = tmp_path / "x.pt"
    torch.save({"module": {"a": torch.randn(1000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=rf"x\.pt \({path.stat().st_size:,} bytes\) is .*damaged.*again"):
        read_tensors(path)


@pytest.mark.parametrize("kept", [4, 20, 1000])
def test_a_truncated_safetensors_file_is_told_with_its_size(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"\({kept:,} bytes\) is truncated or damaged.*again"):
        read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": RunsCode()}, "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="could run code.*refused.*posix.system"):
        read_tensors("x.pt")
    assert not os.path.exists("ran-code")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<html>404</html>", "not a file of torch.save"),
    ],
)
def test_what_is_not_a_checkpoint_is_named(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"module": {"a": 1}}, "not tensors: a"),
        ({"epoch": 3}, "not tensors: epoch"),
        ([torch.ones(1)], "holds no tensors by name; give"),
        ({}, "holds no tensors by name; give"),
        ({"module": {}}, "holds no tensors by name; give"),
        (None, "holds no tensors by name; give"),
    ],
)
def test_content_without_named_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=said):
        read_tensors(tmp_path / "x.pt")


def test_an_empty_archive_is_said_to_be_none_of_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w"):
        pass
    with pytest.raises(InputError, match="is truncated or damaged: it is an archive, and torch.save did not write it"):
        read_tensors(tmp_path / "x.pt")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nothing.pt"):
        read_tensors(tmp_path / "nothing.pt")


def test_what_stands_beside_the_tensors_is_read_from_both_formats(tmp_path):
    tensors, entry = {"a": torch.ones(2)}, {"rank": 4, "layers": [0, 1], "base": "x"}
    torch.save({"module": tensors, "lora": entry}, tmp_path / "x.pt")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora": json.dumps(entry)})
    for name in ("x.pt", "x.safetensors"):
        assert read_entry(tmp_path / name, "lora") == entry
        assert read_entry(tmp_path / name, "other") is None
        assert list(read_tensors(tmp_path / name)) == ["a"]


def test_an_entry_that_is_no_json_is_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"lora": "{"})
    with pytest.raises(InputError, match=r"the entry 'lora' of its header, line 1: is not JSON"):
        read_entry(tmp_path / "x.safetensors", "lora")


def digest_of(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save({"module": tensors}, path)
    return weights_digest(path)


def test_a_digest_of_what_cannot_be_weights_is_refused_by_name(tmp_path):
    torch.save({"module": {"a": torch.ones(2), "b": torch.eye(3).to_sparse()}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x.pt: b is sparse \(float32\), and weights are dense"):
        weights_digest(tmp_path / "x.pt")


def test_a_digest_does_not_depend_on_format_and_order(tmp_path):
    tensors = {"a": torch.randn(7, 300), "b": torch.arange(3), "c": torch.zeros(0), "d": torch.tensor(2.0).bfloat16()}
    digests = {digest_of(tmp_path / name, tensors) for name in ("x.pt", "x.safetensors")}
    digests.add(digest_of(tmp_path / "y.pt", dict(reversed(tensors.items()))))
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_a_digest_depends_on_names_dtypes_shapes_and_values(tmp_path):
    values = torch.randn(5000)
    variants = [{"a": values}, {"b": values}, {"a": values.double()}, {"a": values.view(50, 100)}, {"a": values * 1.01}]
    for index in (0, 4999):  # first and last elements are sampled
        variants.append({"a": values.clone()})
        variants[-1]["a"][index] += 1
    digests = [digest_of(tmp_path / "x.pt", variant) for variant in variants]
    assert len(set(digests)) == len(variants)


@pytest.mark.parametrize("gap", [0, 1])
def test_safetensors_of_every_dtype_are_mapped(tmp_path, gap):
    """Also where a writer did not align them."""
    dtypes = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.complex64, torch.uint16, torch.int32]
    wanted = {f"t{i}": torch.arange(1, 7).view(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    save_file(wanted, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little") + gap
    (tmp_path / "a.safetensors").write_bytes(
        length.to_bytes(8, "little") + content[8 : length - gap + 8] + b" " * gap + content[length - gap + 8 :]
    )
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(
            found[name].view(torch.uint8), tensor.view(torch.uint8)
        ), name


def test_a_dtype_that_only_the_library_knows_is_read(tmp_path):
    rare = torch.ones(4).to(torch.float8_e5m2fnuz)
    save_file({"rare": rare, "usual": torch.ones(2)}, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    assert found["rare"].dtype == rare.dtype and torch.equal(found["usual"], torch.ones(2))


def test_names_and_digest_are_those_of_the_file_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    before = read_names(path), weights_digest(path)
    with monkeypatch.context() as patched:
        patched.setattr("sgm.weights.files.read_file", lambda _: pytest.fail("the file was read again"))
        assert (read_names(path), weights_digest(path)) == before
    save_file({"b": torch.ones(2)}, path)
    assert read_names(path) == {"b"} and weights_digest(path) != before[1]
    path.unlink()
    with pytest.raises(InputError, match="cannot read"):
        read_names(path)


@pytest.mark.parametrize(
    ("content", "reads"),
    [("MemFree: 1 kB\nMemAvailable:   100 kB\n", True), ("MemAvailable: 2 kB\n", False), ("", False)],
)
def test_files_are_read_ahead_where_there_is_room(tmp_path, monkeypatch, content, reads):
    (tmp_path / "meminfo").write_text(content)
    (tmp_path / "weights.pt").write_bytes(b"x" * 2000)
    started = []
    monkeypatch.setattr(read_ahead, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(read_ahead, "_read", lambda files, stop: started.extend(files))
    with read_ahead.reading_ahead([tmp_path / "weights.pt"]):
        pass
    assert started == [tmp_path / "weights.pt"] * reads
    with read_ahead.reading_ahead([tmp_path / "missing"]):  # reported by the one who loads it
        pass


def test_reading_ahead_ends_with_the_file_or_when_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"x" * 10)
    monkeypatch.setattr(read_ahead, "_PIECE", 4)
    asked = []

    class Stop(threading.Event):
        def is_set(self):
            asked.append(1)
            return len(asked) == 4

    files = [tmp_path / "missing.pt", tmp_path / "weights.pt"]
    read_ahead._read(files, Stop())
    assert len(asked) == 3, "pieces of 4, 4 and 2 bytes"
    read_ahead._read(files, Stop())
    assert len(asked) == 4


def test_a_folder_above_weights_or_of_a_lora_for_diffusers_is_recognised(tmp_path):
    for name in ("run-1", "run-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "latest").write_text("1")
    with pytest.raises(InputError, match="its folders have: give .*runs/ and one of run-1, run-2"):
        find_weights(tmp_path / "runs")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").write_text("")
    with pytest.raises(InputError, match=r"a LoRA for diffusers: .* args.loras=\[{path: .*lora}\]"):
        find_weights(tmp_path / "lora")


def test_latest_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "mp_rank_00_model_states.pt").write_text("")
    (tmp_path / "latest").write_bytes(b"\xef\xbb\xbf4\r\n")
    assert find_weights(tmp_path).parent.name == "4"
