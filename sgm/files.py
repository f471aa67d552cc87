"""Files: written atomically, and files of tensors read without running what is in them."""

import contextlib
import os
import pickle
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sgm.util import InputError, RunError

_CURE = "copy or download it again and compare its size with the source"


@contextlib.contextmanager
def atomic_file(path: str | Path, *, need_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, the file is flushed to disk and takes the name `path`.

    Whatever happens inside, `path` is either what it was or complete, and the temporary file is gone. The temporary
    name is hidden and keeps the suffix, from which many writers take the format. Missing folders are made.

    Args:
        path: the file to write or replace.
        need_bytes: the size that it will have, if known, for the message when the disk is full.

    Raises:
        RunError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (InputError, RunError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise RunError(_write_failure(path, error, need_bytes)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems open folders
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failure(path: Path, error: Exception, need_bytes: int | None) -> str:
    """Return the message for a file that could not be written: what is needed and what is free."""
    existing = next((p for p in path.parents if p.is_dir()), Path("."))
    needs = f"it needs {_size(need_bytes)}, " if need_bytes else ""
    return (
        f"could not write {path}: {error}; {needs}{_size(shutil.disk_usage(existing).free)} are free there; "
        "free some space, correct the permissions, or choose another folder"
    )


def _size(num_bytes: int) -> str:
    """Return a size that people can read, e.g. ``"11.2 GB"``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.pt`` or ``.safetensors`` file, by name, on the CPU.

    The tensors are memory-mapped: a tensor costs memory when it is first used. Only files in the format that
    torch.save wrote before version 1.6 are read at once. Of ``{"module": {...}}`` and ``{"state_dict": {...}}`` the
    inner mapping is returned. Nothing but tensors is ever unpickled.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; correct the path") from error
    if size == 0:
        raise InputError(f"{path} is empty (0 bytes); {_CURE}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer of {size} bytes, not the weights; run: git lfs pull")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, size)
    return _tensors_of(_read_torch(path, size, head), path)


def _read_safetensors(path: Path, size: int) -> dict[str, torch.Tensor]:
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} ({size:,} bytes) is truncated or damaged: {error}; {_CURE}") from error


def _read_torch(path: Path, size: int, head: bytes) -> object:
    """Unpickle a file of torch.save: a zip archive, or the older bare pickle, which cannot be memory-mapped."""
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(b"\x80"):
        raise InputError(f"{path} ({size:,} bytes) is not a file of torch.save or safetensors; {_CURE}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "")
        if not found:
            raise InputError(f"{path} ({size:,} bytes) is damaged and cannot be unpickled; {_CURE}") from error
        raise InputError(
            f"{path} holds Python objects besides tensors, which could run code, and is refused: {found} Ask for the "
            "weights as safetensors; if you trust the file, save its tensors alone in a script of your own"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0].split(". ")[0]
        raise InputError(f"{path} ({size:,} bytes) is truncated or damaged: {reason}; {_CURE}") from error


def _tensors_of(content: object, path: Path) -> dict[str, torch.Tensor]:
    for key in ("module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no tensors by name but a {type(content).__name__}; give a checkpoint file")
    wrong = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise InputError(
            f'{path} should hold {{"module": {{name: tensor}}}} or {{"state_dict": {{name: tensor}}}}; '
            f"not tensors: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )
    return content
