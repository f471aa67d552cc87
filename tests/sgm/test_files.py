import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgm.files import atomic_file, read_tensors
from sgm.util import InputError, RunError


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch ran-code",))


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "x.json"
    with atomic_file(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("all")
        assert not path.exists()
    assert path.read_text() == "all" and os.listdir(path.parent) == ["x.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("broken"), TypeError("broken")])
def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises((type(error), RunError)), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_a_full_disk_is_told_with_path_need_and_free_space(tmp_path, small_disk):
    path = tmp_path / "x.bin"
    with pytest.raises(RunError, match=r"could not write .*x\.bin.*it needs 5\.0 kB") as caught:
        with small_disk(1000), atomic_file(path, need_bytes=5000) as temporary:
            temporary.write_bytes(bytes(5000))
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
        "import os, signal, sys; from sgm.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(bytes(100)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["x.bin"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_run_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="permissions"), atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("all")


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


@pytest.mark.parametrize("content", [{"module": {"a": 1}}, {"epoch": 3}, [torch.ones(1)], {}])
def test_content_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="tensor"):
        read_tensors(tmp_path / "x.pt")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nothing.pt"):
        read_tensors(tmp_path / "nothing.pt")
