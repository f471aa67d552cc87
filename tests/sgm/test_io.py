"""Atomic writes, and what killed writers leave: removed if its owner is dead, kept if it lives."""

import errno
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sgm.io
from sgm.config.load import load_config
from sgm.conversion.diffusers.to_sat import read_json
from sgm.conversion.inspection import inspect_checkpoint
from sgm.conversion.writing import check_new_folder, new_folder
from sgm.io import (
    JSONError,
    OutputError,
    WriteError,
    atomic_file,
    denied_text,
    lock_folder,
    parse_json,
    reason_of,
    remove_leftovers,
    require_own_json,
    require_writable,
    write_json,
)
from sgm.training import bad_clips, state
from sgm.util import InputError, RunError
from sgm.weights.checksums import header_checksums
from sgm.weights.files import read_entry, read_file
from sgm.weights.lora import foreign
from tools import load_cogvideox_lora


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test is a process that has written nothing yet."""
    monkeypatch.setattr(sgm.io, "_cleaned", set())


def writer(folder: Path, kind: str) -> tuple[int, int]:
    """Fork a process that stops in the middle of writing a file or folder; return its id and a pipe that it closes."""
    end, started = os.pipe()
    if pid := os.fork():
        os.close(started)
        assert os.read(end, 1) == b"1"
        return pid, end
    try:
        with atomic_file(folder / "out.json") if kind == "file" else new_folder(folder / "out.json") as temporary:
            (temporary if kind == "file" else temporary / "a").write_text("half")
            os.write(started, b"1")
            signal.pause()
    finally:
        os._exit(0)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_what_dead_writers_left_is_removed(tmp_path, kind):
    (tmp_path / ".out.user").write_text("not ours")
    pid, end = writer(tmp_path, kind)
    try:
        check_new_folder(tmp_path / "out.json")
        with atomic_file(tmp_path / "out.json") as temporary:
            temporary.write_text("whole")
        assert len(hidden(tmp_path)) == 2, "its owner lives"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(end)
    sgm.io._cleaned.clear()
    with atomic_file(tmp_path / "other.json") as temporary:
        temporary.write_text("whole")
    assert hidden(tmp_path) == [".out.user"]
    assert (tmp_path / "out.json").read_text() == "whole"


def test_a_hidden_folder_killed_between_its_steps_is_removed(tmp_path):
    (tmp_path / ".out.1-ab").mkdir()  # before it was locked
    (tmp_path / ".out.2-ab").mkdir()
    (tmp_path / ".out.2-ab" / "lock").touch()  # after its content was renamed to the output
    remove_leftovers(tmp_path)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("inner", "number", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "the disk is full (No space left on device)"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed"), errno.ENOSPC, "full"),
        (RunError("could not write x.mp4: ffmpeg ended with 228: av_interleaved_write_frame()"), errno.EDQUOT, "quota"),
        (OSError(errno.EROFS, "Read-only file system"), None, "the file system is read-only"),
        (OSError(errno.EFBIG, "File too large"), None, "it is too large for its file system; choose another folder"),
    ],
)
def test_a_failed_write_says_what_the_disk_says(tmp_path, monkeypatch, inner, number, said):
    monkeypatch.setattr(sgm.io, "_failure_of", lambda _: number)
    with pytest.raises(WriteError) as caught, atomic_file(tmp_path / "x.mp4"):
        raise inner
    message = str(caught.value)
    assert said in message and str(tmp_path / "x.mp4") in message
    assert "PytorchStreamWriter" not in message and "ffmpeg" not in message
    assert not list(tmp_path.iterdir())


def test_the_limit_of_files_is_found_by_writing_and_said_once(tmp_path, small_disk):
    said = "x: the limit of a file here is 10.0 kB; raise it \\(ulimit -f\\)$"
    with small_disk(10_000), pytest.raises(RunError, match=said) as caught, atomic_file(tmp_path / "x"):
        raise RuntimeError("hidden by a library")
    assert not isinstance(caught.value, WriteError), "another folder would not help"


def test_the_number_and_path_of_an_error_of_the_system_are_left_out(tmp_path):
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "latest").write_text("4")
    with pytest.raises(InputError, match="resume.json: No such file or directory; restore the file"):
        state._read_point(tmp_path)
    assert reason_of(ValueError("it is malformed")) == "it is malformed"


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match="could not write .*x: it is a folder; remove it"):
        write_json(tmp_path / "x", {})


def test_free_space_is_measured_without_the_failed_file(tmp_path):
    with pytest.raises(WriteError, match="the disk is full"), atomic_file(tmp_path / "x") as temporary:
        kept = temporary.open("wb", buffering=0)  # as a traceback keeps it
        kept.write(bytes(5000))
        raise OSError(errno.ENOSPC, "full")
    assert os.fstat(kept.fileno()).st_size == 0
    kept.close()


def test_a_file_that_may_not_be_written_is_wrong_input(tmp_path):
    with pytest.raises(WriteError, match="could not write .*x: .*you may not write there") as caught:
        with atomic_file(tmp_path / "x"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "y"))
    assert caught.value.exit_code == InputError.exit_code and not list(tmp_path.iterdir())
    assert denied_text(PermissionError("locked")) == "locked; ask the owner of the file for the right"


def test_what_another_process_takes_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock."""
    flock, taken = sgm.io.flock, []

    def remove_first(handle, *, wait=True):
        if not taken:
            (leftover,) = tmp_path.iterdir()
            leftover.unlink()
            taken.append(leftover)
        flock(handle, wait=wait)

    monkeypatch.setattr(sgm.io, "flock", remove_first)
    with atomic_file(tmp_path / "x") as temporary:
        assert temporary != taken[0]
        temporary.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole"


def test_an_error_that_is_not_of_the_disk_stays(tmp_path):
    with pytest.raises(RunError, match="numbers differ") as caught, atomic_file(tmp_path / "x"):
        raise RunError("numbers differ")
    assert not isinstance(caught.value, WriteError)


@pytest.mark.parametrize(
    ("denied", "asked", "said"),
    [
        ("a", "a/b/c", "you may not enter the folder {}/a (right 'x')"),
        ("a/b/c", "a/b/c", "{}/a/b/c: you may not read this file (right 'r')"),
        ("a/b", "a/b/new", "{}/a/b: you may not write there (right 'w')"),
    ],
)
def test_a_missing_right_is_named(tmp_path, monkeypatch, denied, asked, said):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    allowed = {"a": os.F_OK, "a/b/c": os.F_OK, "a/b": os.R_OK | os.X_OK}[denied]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / denied or not mode & ~allowed)
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / asked))
    assert said.format(tmp_path) in denied_text(error)
    if denied == "a/b/c":  # in every reader of weights

        def refuse(path: Path, *words: object) -> None:
            raise error

        monkeypatch.setattr(Path, "open", refuse)
        for read in (read_file, inspect_checkpoint, lambda path: load_config([path], mode="inference")):
            with pytest.raises(InputError, match=re.escape(said.format(tmp_path))):
                read(tmp_path / asked)


def test_a_folder_is_locked_to_one_process(tmp_path):
    lock = lock_folder(tmp_path, cure="wait")
    assert lock is not None
    with pytest.raises(InputError, match=f"is in use by process {os.getpid()} .* or wait"):
        lock_folder(tmp_path, cure="wait")
    lock.close()
    again = lock_folder(tmp_path, cure="wait")
    assert again is not None
    again.close()


def test_a_lock_that_is_replaced_or_denied_is_no_lock(tmp_path, monkeypatch):
    def replace(handle, *, wait):
        (tmp_path / sgm.io.LOCK).unlink()
        (tmp_path / sgm.io.LOCK).write_text("7")

    def deny(handle, *, wait):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / sgm.io.LOCK))

    for fault, said in ((replace, "is in use by process 7 .* or wait"), (deny, "you may not write there")):
        monkeypatch.setattr(sgm.io, "flock", fault)
        with pytest.raises(InputError, match=said):
            lock_folder(tmp_path, cure="wait")


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sgm.io, "fcntl", None)
    assert lock_folder(tmp_path, cure="wait") is None and "cannot be locked" in caplog.text


def test_the_name_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    long = "x" * 300
    with pytest.raises(OutputError, match=f"'b/{long}/c.mp4' in '{tmp_path}/new' cannot be written to: File name too"):
        require_writable(tmp_path / "new", "a/c.mp4", f"b/{long}/c.mp4")
    with pytest.raises(OutputError, match=f"'{tmp_path}/{long}' cannot be written to: File name too"):
        require_writable(tmp_path / long, "a/c.mp4")
    (tmp_path / "b").touch()
    with pytest.raises(OutputError, match=f"'{tmp_path}/b' cannot be written to: {tmp_path}/b is a file"):
        require_writable(tmp_path, "a/c.mp4", "b/c.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(
            OutputError, match=f"'{tmp_path}/new' cannot be written to: you may not write to {tmp_path}"
        ):
            require_writable(tmp_path / "new")
    probed = []
    monkeypatch.setattr(sgm.io, "_probe", lambda *folders: probed.append(folders))
    require_writable(tmp_path / "new", *(f"{number}/c.mp4" for number in range(5)))
    assert probed == [(tmp_path / "new", tmp_path)]


def _header(path: Path) -> object:
    save_file({"a": torch.zeros(1)}, path.with_suffix(".safetensors"), metadata={"lora": path.read_text()})
    return read_entry(path.with_suffix(".safetensors"), "lora")


def _peft(path: Path) -> object:
    save_file({"a": torch.zeros(1)}, path.with_name("lora.safetensors"))
    return list(foreign._configs(path.with_name("lora.safetensors")))


READERS = {
    "config.json": read_json,
    "model_index.json": load_cogvideox_lora._json,
    "adapter_config.json": _peft,
    "header.json": _header,
    "bad_clips.json": lambda path: bad_clips._read(path.parent),
    "shard.safetensors": lambda path: header_checksums(b'{"__metadata__": {}, "a": ' + path.read_bytes() + b"}"),
}


def test_a_folder_or_a_file_of_others_is_not_replaced_by_json(tmp_path):
    (tmp_path / "own.json").write_text(' {"clips": []}')
    (tmp_path / "other.json").write_text('{"rows": [{"clips": 1}]}')
    for name in ("own.json", "new.json"):
        require_own_json(tmp_path / name, "clips")
    with pytest.raises(InputError, match="other.json exists and was not written by this command; name another"):
        require_own_json(tmp_path / "other.json", "clips")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        require_own_json(tmp_path, "clips")


def test_json_that_is_not_utf_8_names_line_and_byte():
    with pytest.raises(JSONError, match=r"line 2: is not UTF-8 text \(byte 12\)"):
        parse_json(b'{"a": "b",\n"' + b'\xff": 1}')


@pytest.mark.parametrize(("text", "fault"), [("[" * 5000 + "]" * 5000, "nests lists"), ("9" * 5000, "5,000 digits")])
@pytest.mark.parametrize("name", READERS)
def test_json_that_python_refuses_is_refused_by_its_fault(tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"line 1: .*{fault}"):
        READERS[name](tmp_path / name)


def test_the_digest_of_a_large_file_sees_both_ends_and_pieces_between(tmp_path):
    path, content = tmp_path / "a", bytearray(1 << 23)
    path.write_bytes(content)
    digest = partial(sgm.io.content_digest, whole=1 << 12, ends=1 << 10)
    seen = {digest(path)}
    for place in (0, 1023, 1024, 5 << 20, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        seen.add(digest(path))
    assert len(seen) == 6
    path.write_bytes(content + b"0")
    assert digest(path) not in seen, "the size counts"
    path.with_name("b").write_bytes(path.read_bytes())
    assert digest(path.with_name("b")) == digest(path), "the name does not"
