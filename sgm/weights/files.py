"""Weights files: found, told from each other, and read without running what is in them.

The SAT layout is described in docs/checkpoints.md.
"""

import contextlib
import hashlib
import json
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sgm.util import InputError
from sgm.weights.partition import JoinedTensor, num_shards, partition_of

WEIGHTS = "mp_rank_00_model_states"
SHARD_NAME = re.compile(r"mp_rank_(\d{2,})_model_states\.(pt|safetensors)")

_CURE = "copy or download it again and compare its size with the source"
_DIGEST_ELEMENTS = 1024
CONTAINERS = ("module", "state_dict")  # of tensors, in files of torch.save


def find_weights(load: str | Path) -> Path:
    """Return the weights file that `load` means.

    Args:
        load: a file, a folder with ``latest``, or the folder of one iteration. Of a network in several parts it is
            the first one's, which stands for all.

    Raises:
        InputError: there is none; the message names what is there and what to do.
    """
    load = Path(load)
    if load.is_file():
        return load
    if not load.is_dir():
        raise InputError(f"there is no checkpoint at {load}; give a weights file, or the folder that holds 'latest'")
    for suffix in (".pt", ".safetensors"):
        if (load / (WEIGHTS + suffix)).is_file():
            return load / (WEIGHTS + suffix)
    if others := sorted(path.name for path in load.iterdir() if SHARD_NAME.fullmatch(path.name)):
        raise InputError(f"{load} has {', '.join(others)} and lacks the first part, {WEIGHTS}.pt; {_CURE}")
    return _latest_weights(load)


def shard_name(index: int, file_format: str) -> str:
    """Return the name of the file of a part: ``mp_rank_00_model_states.pt``."""
    return f"mp_rank_{index:02d}_model_states.{file_format}"


def shard_files(path: Path) -> list[Path]:
    """Return the files of a network that lies in several parts, in order, `path` being the first; otherwise `path`.

    Raises:
        InputError: `path` is another part than the first, or a part between is missing.
    """
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    if int(match[1]):
        raise InputError(f"{path} is one of several parts of a network; give their folder: {path.parent}")
    found = {int(m[1]): p for p in path.parent.iterdir() if (m := SHARD_NAME.fullmatch(p.name)) and m[2] == match[2]}
    _require_shards(path, found.keys(), max(found) + 1)
    return [found[index] for index in sorted(found)]


def _require_shards(path: Path, found: Collection[int], size: int) -> None:
    if missing := [f"mp_rank_{index:02d}" for index in range(size) if index not in found]:
        raise InputError(f"{path.parent} holds a network in {size} parts and lacks {', '.join(missing)}; {_CURE}")
    if len(found) > size:
        raise InputError(
            f"{path.parent} holds {len(found)} files of parts, and {path.name} is one of {size}; remove the files of "
            "the other run"
        )


def _latest_weights(folder: Path) -> Path:
    """Follow ``latest``."""
    names = {file.parent.name for file in folder.glob(f"*/{WEIGHTS}.*") if not file.parent.name.startswith(".")}
    iterations = sorted(names, key=lambda name: (name.isdigit(), len(name), name))  # 1000-ema, then 500, then 1000
    present = f"; iterations here: {', '.join(iterations)}" if iterations else "; there is no iteration folder"
    latest = folder / "latest"
    if not latest.is_file():
        if iterations:
            cure = f"name the one to load: echo {iterations[-1]} > {latest}"
        elif (folder / "transformer").is_dir():
            cure = f"give {folder / 'transformer'}"
        else:
            cure = f"expected {folder}/<iteration>/{WEIGHTS}.pt and a file 'latest' with <iteration> in it"
        raise InputError(f"{folder} has no file 'latest'{present}; {cure}")
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or not (folder / name).is_dir():
        problem = f"names the folder '{name}', which does not exist" if name else "is empty"
        raise InputError(f"{latest} {problem}{present}; write the name of an iteration folder into it")
    if name not in iterations:
        raise InputError(f"{folder / name} has no {WEIGHTS}.pt or .safetensors{present}; complete it, or edit {latest}")
    return find_weights(folder / name)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a ``.pt`` or ``.safetensors`` file, by name, on the CPU.

    The tensors are memory-mapped: a tensor costs memory when it is first used. Only files in the format that
    torch.save wrote before version 1.6 are read at once. Of ``{"module": {...}}`` and ``{"state_dict": {...}}`` the
    inner mapping is returned. Nothing but tensors is ever unpickled.

    The first of several parts stands for all (``mp_rank_00``, ``mp_rank_01``, ...): divided tensors are then whole ones
    that are joined whenever something is done with them, one at a time, see :class:`JoinedTensor`.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors; parts are missing or do not
            belong together.
    """
    parts = read_shards(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in parts[0].items()}
    size = num_shards(shapes) if SHARD_NAME.fullmatch(Path(path).name) else None
    if size is not None:
        _require_shards(Path(path), range(len(parts)), size)
    if len(parts) == 1:
        return parts[0]
    for index, part in enumerate(parts):
        _require_same_shapes(Path(path), index, shapes, part)
    divided = {name for name in shapes if partition_of(name) is not None}
    return {
        name: JoinedTensor(name, [part[name] for part in parts]) if name in divided else tensor
        for name, tensor in parts[0].items()
    }


def read_shards(path: str | Path) -> list[dict[str, torch.Tensor]]:
    """Read the tensors of each part of a network by themselves, as they lie in the files; see `read_tensors`."""
    return [_read_file(file) for file in shard_files(Path(path))]


def _require_same_shapes(
    path: Path, index: int, shapes: Mapping[str, tuple[int, ...]], part: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a part that does not belong to the first one: all have the same names and shapes."""
    if part.keys() != shapes.keys():
        name = min(part.keys() ^ shapes.keys())
        raise InputError(f"the parts in {path.parent} do not belong together: not all of them hold {name}; {_CURE}")
    for name, shape in shapes.items():
        if tuple(part[name].shape) != shape:
            raise InputError(
                f"the parts in {path.parent} do not belong together: {name} has the shape {shape} in mp_rank_00 and "
                f"{tuple(part[name].shape)} in mp_rank_{index:02d}; {_CURE}"
            )


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one file."""
    size, head = _look_into(path)
    if _is_safetensors(path, head):
        with _safetensors_errors(path, size):
            return load_file(path, device="cpu")
    return _tensors_of(_read_torch(path, size, head), path)


def read_entry(path: str | Path, key: str) -> Any:
    """Return what a weights file holds under `key` beside its tensors; None where there is nothing.

    In a ``.pt`` file that is an entry of the outermost mapping, made of plain values; in a ``.safetensors`` file it is
    JSON in the metadata of the header.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors and plain values; or parts of a
            network differ in it.
    """
    first, *others = [_read_entry(file, key) for file in shard_files(Path(path))]
    for index, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f"the parts in {Path(path).parent} do not belong together: their entries '{key}' differ, {first} in "
                f"mp_rank_00 and {other} in mp_rank_{index:02d}; {_CURE}"
            )
    return first


def _read_entry(path: Path, key: str) -> Any:
    size, head = _look_into(path)
    if _is_safetensors(path, head):
        text = read_metadata(path).get(key)
        with _safetensors_errors(path, size):
            return None if text is None else json.loads(text)
    content = _read_torch(path, size, head)
    return content.get(key) if isinstance(content, dict) else None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata in the header of a ``.safetensors`` file; empty for other files.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = Path(path)
    size, head = _look_into(path)
    if not _is_safetensors(path, head):
        return {}
    with _safetensors_errors(path, size), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def weights_digest(path: str | Path) -> str:
    """Return a SHA-256 in hexadecimal that tells the weights of one file from those of another.

    It covers the names, dtypes and shapes of all tensors and up to 1,024 evenly spaced elements of each, whatever the
    order and the file format. So it finds another model, another stage of a training (which moves nearly every
    element) and another precision, having read a small part of the file. It does not find a change of elements in
    between: it replaces neither a comparison of whole files nor a signature.

    Raises:
        InputError: the file cannot be read, see :func:`read_tensors`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.reshape(-1)
        num = min(len(flat), _DIGEST_ELEMENTS)
        if num:
            positions = torch.arange(num) * (len(flat) - 1) // max(num - 1, 1)
            digest.update(flat[positions].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _look_into(path: Path) -> tuple[int, bytes]:
    """Return the size and the first bytes of a file that may hold weights."""
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
    return size, head


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or head[8:9] == b"{"


@contextlib.contextmanager
def _safetensors_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
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
    for key in CONTAINERS:
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
