"""Find and read weights files without executing code in them.

The SAT layout is described in docs/checkpoints.md.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open

from sgm.config.values import shortened
from sgm.io import parse_json, refusing_denied, require_local
from sgm.log import get_logger, warn_once
from sgm.util import InputError, nearest_path
from sgm.weights.checksums import (
    FINITE,
    KEY,
    OLD_KEY,
    CheckedArchive,
    Checksums,
    damaged_entry,
    safetensors_checksums,
    zip_checksums,
)
from sgm.weights.lazy import LazyTensor, Tensors, peek
from sgm.weights.partition import join_lazily, num_shards, partition_of
from sgm.weights.stored import StoredTensor, checked_ahead, is_dense, kind_problem, store_safetensors, store_zip

logger = get_logger(__name__)

PREFIX = "model.diffusion_model."  # prefix of network tensor names
WEIGHTS = "mp_rank_00_model_states"
SHARD_NAME = re.compile(r"mp_rank_(\d{2,})_model_states\.(pt|safetensors)")

_CURE = "copy or download it again and compare its size with the source"
_OBJECTS_CURE = (
    "ask for the weights as safetensors, or, if you trust the file, save its tensors alone in a script of your own"
)
_DIGEST_ELEMENTS = 1024
_QUICK = 1 << 27  # archives of this size are compared with their CRC-32 in less than 0.1 s
CONTAINERS = ("module", "state_dict")  # keys that hold the tensors in torch.save files

_T = TypeVar("_T")

# As the format names them.
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def find_weights(load: str | Path) -> Path:
    """Resolve `load` to a weights file.

    Args:
        load: a file, a folder with ``latest``, or the folder of one iteration. For a sharded network, the file of
            the first shard is returned and represents all.

    Raises:
        InputError: there is none; the message lists existing files and advice.
    """
    require_local(load)
    load = Path(load)
    if load.is_file():
        return load
    if load.exists() and not load.is_dir():
        raise InputError(f"{load} is no file, but a pipe, socket or device; give a weights file")
    if not load.is_dir():
        cure = "give a weights file, or the folder that holds 'latest'"
        raise InputError(f"there is no checkpoint at {load}{nearest_path(load)}; {cure}")
    for suffix in (".pt", ".safetensors"):
        if (load / (WEIGHTS + suffix)).is_file():
            return load / (WEIGHTS + suffix)
    if others := sorted(path.name for path in load.iterdir() if SHARD_NAME.fullmatch(path.name)):
        raise InputError(f"{load} has {', '.join(others)} and lacks the first shard, {WEIGHTS}.pt; {_CURE}")
    return _latest_weights(load)


def shard_name(index: int, file_format: str) -> str:
    """Return the file name of a shard: ``mp_rank_00_model_states.pt``."""
    return f"mp_rank_{index:02d}_model_states.{file_format}"


def shard_files(path: Path) -> list[Path]:
    """Return the files of all shards of a network, in order, from the first; only `path` if it is not sharded.

    Raises:
        InputError: `path` is not the first shard, or a shard in between is missing.
    """
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    if int(match[1]):
        raise InputError(f"{path} is one of several shards of a network; give their folder: {path.parent}")
    found = {int(m[1]): p for p in path.parent.iterdir() if (m := SHARD_NAME.fullmatch(p.name)) and m[2] == match[2]}
    _require_shards(path, found.keys(), max(found) + 1)
    return [found[index] for index in sorted(found)]


def _require_shards(path: Path, found: Collection[int], size: int) -> None:
    if missing := [f"mp_rank_{index:02d}" for index in range(size) if index not in found]:
        raise InputError(f"{path.parent} holds a network in {size} shards and lacks {', '.join(missing)}; {_CURE}")
    if len(found) > size:
        raise InputError(
            f"{path.parent} holds {len(found)} shards, and {path.name} is one of {size}; remove the files of the other "
            "run"
        )


def _latest_weights(folder: Path) -> Path:
    """Resolve ``latest``."""
    names = {file.parent.name for file in folder.glob(f"*/{WEIGHTS}.*") if not file.parent.name.startswith(".")}
    iterations = sorted(names, key=lambda name: (name.isdigit(), len(name), name))  # 1000-ema, then 500, then 1000
    present = f"; iterations here: {', '.join(iterations)}" if iterations else "; there is no iteration folder"
    latest = folder / "latest"
    if not latest.is_file():
        if iterations:
            cure = f"name the one to load: echo {iterations[-1]} > {latest}"
        elif (folder / "transformer").is_dir():
            cure = f"give {folder / 'transformer'}"
        elif runs := sorted(path.parent.name for path in folder.glob("*/latest")):
            cure = f"its folders have: give {folder}/ and one of {', '.join(runs[-5:])}"
        elif any(folder.glob("pytorch_lora_weights*.safetensors")):
            cure = f"it holds a LoRA for diffusers: set args.load to the model, and args.loras=[{{path: {folder}}}]"
        else:
            cure = f"expected {folder}/<iteration>/{WEIGHTS}.pt and a file 'latest' with <iteration> in it"
        raise InputError(f"{folder} has no file 'latest'{present}; {cure}")
    name = latest.read_text(encoding="utf-8-sig", errors="replace").strip()
    if not name or not os.path.isdir(folder / name):  # a Path raises errors of names that are too long
        problem = f"names the folder '{shortened(name)}', which does not exist" if name else "is empty"
        raise InputError(f"{latest} {problem}{present}; write the name of an iteration folder into it")
    if name not in iterations:
        raise InputError(f"{folder / name} has no {WEIGHTS}.pt or .safetensors{present}; complete it, or edit {latest}")
    return find_weights(folder / name)


def once_a_version(read: Callable[[Path], _T]) -> Callable[[Path], _T]:
    """Let `read` be called once for each content of a weights file and its shards, told by inode, size and time.

    The start of a run asks for names, adapters and digest of the same files again and again. What `read` returns must
    not change, and holds no tensors.
    """

    @functools.lru_cache(maxsize=16)
    def of_version(path: Path, _: tuple[tuple[int, ...], ...]) -> _T:
        return read(path)

    @functools.wraps(read)
    def remembered(path: Path) -> _T:
        try:
            found = [file.stat() for file in shard_files(path)]
        except OSError:  # which `read` reports
            return read(path)
        return of_version(path, tuple((x.st_dev, x.st_ino, x.st_size, x.st_mtime_ns) for x in found))

    return remembered


def read_names(path: str | Path) -> frozenset[str]:
    """Return the names of the tensors of a network; `path` is its file, or the first shard.

    Raises:
        InputError: as :func:`read_tensors`.
    """
    return _names(Path(path))


@once_a_version
def _names(path: Path) -> frozenset[str]:
    return frozenset(read_tensors(path))


def read_tensors(path: str | Path) -> Tensors:
    """Read the tensors of a network for their names and shapes; `path` is its file, or the first shard.

    Sharded tensors are returned as :class:`~sgm.weights.lazy.LazyTensor`, which concatenates the shards each time it
    is computed; all others are tensors, see :func:`read_file`.

    Raises:
        InputError: a file is missing, damaged, or holds more than tensors; or shards are missing or do not belong
            together.
    """
    return _joined(Path(path), [read_file(file) for file in shard_files(Path(path))])


def read_weights(path: str | Path, *, quick: bool = False) -> dict[str, LazyTensor]:
    """Read the tensors of a network to use their values: as `read_tensors`, and checked when they are computed.

    Args:
        path: the file, or the first shard.
        quick: leave out the comparison of large archives of others with their CRC-32, which takes as long as loading
            them; `verify_file` compares them.

    Raises:
        InputError: as `read_tensors`; computing a tensor raises it for damaged, not finite or other than
            floating-point values.
    """
    return _joined(Path(path), [_read_stored(file, quick=quick) for file in shard_files(Path(path))])


def check_values(*paths: Path) -> None:
    """Check all values of weights files that another library reads.

    Raises:
        InputError: as computing a tensor of `read_weights` does.
    """
    tensors = [tensor for path in paths for tensor in _read_stored(path).values()]
    with checked_ahead(tensors):
        for tensor in tensors:
            tensor.check()


def verify_file(path: Path) -> bool:
    """Compare all bytes of a file of torch.save or safetensors, of any content, with its checksums.

    Returns:
        Whether it has checksums.

    Raises:
        InputError: it is damaged, or holds weights that are not finite; the message names every tensor.
    """
    size, head = _read_head(path)
    entry, checksums = "", None
    if _is_safetensors(path, head):
        with _safetensors_errors(path, size):
            checksums = safetensors_checksums(path)
    elif head.startswith(b"PK"):
        with _torch_errors(path, size):
            checksums = zip_checksums(path)
            entry = damaged_entry(path)
    problems = [f"{path}: its entry {entry} is damaged: its bytes changed (checksum)"] if entry else []
    try:
        # The bytes of an archive are compared above, and again only to name the tensors of a damaged one.
        tensors = [*_read_stored(path, compare=bool(entry) or _is_safetensors(path, head)).values()]
    except InputError:
        if _is_safetensors(path, head):
            raise
        tensors = []  # a training state, of which only the bytes are compared
    with checked_ahead(tensors):
        for tensor in tensors:
            problem = tensor.problem() if tensor.dtype.is_floating_point else tensor.changed()
            problems += [f"{path}: {tensor.name} {problem}"] if problem else []
    if problems:
        raise InputError("\n".join(problems))
    return checksums is not None


def _joined(path: Path, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = shards[0]
    size = num_shards({name: tensor.shape for name, tensor in first.items()})
    if size is not None and SHARD_NAME.fullmatch(path.name):
        _require_shards(path, range(len(shards)), size)
    if len(shards) == 1:
        return dict(first)
    for index, shard in enumerate(shards):
        _require_same_shapes(path, index, first, shard)
    return {
        name: tensor if partition_of(name) is None else join_lazily(name, [shard[name] for shard in shards])
        for name, tensor in first.items()
    }


def read_shards(path: str | Path) -> list[dict[str, StoredTensor]]:
    """Read the tensors of each shard of a network, not concatenated, to use their values."""
    return [_read_stored(file) for file in shard_files(Path(path))]


def _read_stored(path: Path, *, compare: bool = True, quick: bool = False) -> dict[str, StoredTensor]:
    """Read the tensors of one file with its checksums, if `compare` is set and it has any; `quick`: as there."""
    size, head = _read_head(path)
    if _is_safetensors(path, head):
        tensors = read_file(path)
        with _safetensors_errors(path, size):
            return store_safetensors(path, tensors, safetensors_checksums(path))
    content, checksums = _read_torch(path, size, head)
    if not compare or (quick and size > _QUICK and checksums is not None and checksums.key == OLD_KEY):
        checksums = None
    return store_zip(path, _tensors_of(content, path), checksums)


def _require_same_shapes(path: Path, index: int, first: Mapping[str, Any], shard: Mapping[str, Any]) -> None:
    """Refuse a shard whose names or shapes differ from those of the first one."""
    if shard.keys() != first.keys():
        name = min(shard.keys() ^ first.keys())
        raise InputError(f"the shards in {path.parent} do not belong together: not all of them hold {name}; {_CURE}")
    for name, tensor in first.items():
        if shard[name].shape != tensor.shape:
            raise InputError(
                f"the shards in {path.parent} do not belong together: {name} has the shape {tuple(tensor.shape)} in "
                f"mp_rank_00 and {tuple(shard[name].shape)} in mp_rank_{index:02d}; {_CURE}"
            )


def read_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of one ``.pt`` or ``.safetensors`` file, by name, on the CPU.

    The tensors are memory-mapped, except in the torch.save format before version 1.6. For
    ``{"module": {...}}`` and ``{"state_dict": {...}}`` the inner mapping is returned. Only tensors are unpickled.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors.
    """
    path = Path(path)
    size, head = _read_head(path)
    if _is_safetensors(path, head):
        with _safetensors_errors(path, size):
            return _mapped_safetensors(path, size)
    return _tensors_of(_read_torch(path, size, head)[0], path)


def _mapped_safetensors(path: Path, size: int) -> dict[str, torch.Tensor]:
    """Map the tensors of a safetensors file, of which nothing but the header is read.

    `safe_open(...).get_tensor` has the system read every tensor that it returns, also where only its shape is wanted.
    """
    with safe_open(path, framework="pt") as file:  # checks the header, and that its offsets fill the file
        names = file.keys()
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header: Any = parse_json(content.read(length).decode())
        offsets = {name: [8 + length + offset for offset in header[name]["data_offsets"]] for name in names}
        known = (name for name in names if header[name]["dtype"] in _SAFETENSORS_DTYPES)
        dtypes = {name: _SAFETENSORS_DTYPES[header[name]["dtype"]] for name in known}
        # A dtype that only the library knows, or a writer that does not align tensors.
        if len(dtypes) < len(names) or any(offsets[name][0] % dtype.itemsize for name, dtype in dtypes.items()):
            return {name: file.get_tensor(name) for name in names}
    mapping: Any = torch.UntypedStorage.from_file(str(path), False, size)
    whole = torch.empty(0, dtype=torch.uint8).set_(mapping)
    return {
        name: whole[begin:end].view(dtypes[name]).view(header[name]["shape"]) for name, (begin, end) in offsets.items()
    }


def read_entry(path: str | Path, key: str) -> Any:
    """Return the extra entry `key` of a weights file; None if missing.

    In a ``.pt`` file it is an entry of the outermost mapping with plain values; in a ``.safetensors`` file, JSON in the
    header metadata.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors and plain values; or shards
            differ in it.
    """
    first, *others = [_read_entry(file, key) for file in shard_files(Path(path))]
    for index, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f"the shards in {Path(path).parent} do not belong together: their entries '{key}' differ, {first} in "
                f"mp_rank_00 and {other} in mp_rank_{index:02d}; {_CURE}"
            )
    return first


def _read_entry(path: Path, key: str) -> Any:
    size, head = _read_head(path)
    if _is_safetensors(path, head):
        text = read_metadata(path).get(key)
        try:
            return None if text is None else parse_json(text)
        except ValueError as error:
            raise InputError(f"{path}: the entry '{key}' of its header, {error}; save it again") from error
    content, _ = _read_torch(path, size, head)
    return content.get(key) if isinstance(content, dict) else None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata in the header of a ``.safetensors`` file without its checksums; empty for other files.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = Path(path)
    size, head = _read_head(path)
    if not _is_safetensors(path, head):
        return {}
    with _safetensors_errors(path, size), safe_open(path, framework="pt") as file:
        return {name: text for name, text in (file.metadata() or {}).items() if name not in (KEY, OLD_KEY, FINITE)}


def run_config(file: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that saved a weights file, from the folder above its own; None without one.

    A file there that is no configuration of a run is warned of.
    """
    path = file.absolute().parent.parent / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return config if config["model"]["network_config"]["params"]["hidden_size"] else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        warn_once(logger, [f"{path} is no configuration of a run, and is not read: {error}"])
        return None


def trained_scaling(file: Path) -> str | None:
    """Return the ``args.time_scaling`` of the run that saved a weights file; None without one, or without a run."""
    return scaling_of(run_config(file))


def scaling_of(config: Mapping[str, Any] | None) -> str | None:
    """Return the ``args.time_scaling`` of the configuration of a run."""
    args = (config or {}).get("args")
    return args.get("time_scaling") if isinstance(args, dict) else None


def weights_digest(path: str | Path) -> str:
    """Return a SHA-256 in hexadecimal of names, dtypes, shapes and up to 1,024 evenly spaced elements of each tensor.

    It is independent of order, file format and sharding, differs between models, precisions and training steps, and
    reads only a small part of the file. Changes between the sampled elements are not detected: it replaces neither a
    comparison of whole files nor a signature.

    Raises:
        InputError: the file cannot be read, see :func:`read_tensors`.
    """
    return _digest(Path(path))


@once_a_version
def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path).items()):
        for source in (tensor,) if isinstance(tensor, torch.Tensor) else tensor.sources:
            if isinstance(source, torch.Tensor) and not is_dense(source):
                raise InputError(f"{path}: {name} {kind_problem(source)}")
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = peek(tensor).reshape(-1)
        num = min(len(flat), _DIGEST_ELEMENTS)
        if num:
            positions = torch.arange(num) * (len(flat) - 1) // max(num - 1, 1)
            digest.update(flat[positions].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_head(path: Path) -> tuple[int, bytes]:
    """Return the size and the first bytes of a weights file."""
    try:
        with refusing_denied():
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError(f"{path} is no file, but a folder, pipe, socket or device; give a weights file")
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


def file_format(path: Path) -> Literal["pt", "safetensors"]:
    """Return the format of a weights file, by its content.

    Raises:
        InputError: there is no such file, or it is empty.
    """
    return "safetensors" if _is_safetensors(path, _read_head(path)[1]) else "pt"


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or head[8:9] == b"{"


@contextlib.contextmanager
def _safetensors_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} ({size:,} bytes) is truncated or damaged: {error}; {_CURE}") from error


def _read_torch(path: Path, size: int, head: bytes) -> tuple[object, Checksums | None]:
    """Unpickle a file of torch.save: a zip archive, or the older bare pickle, which cannot be memory-mapped.

    Also return its `zip_checksums`, which compares names and plain values.
    """
    is_zip = head.startswith(b"PK")
    if not is_zip and not head.startswith(b"\x80"):
        raise InputError(f"{path} ({size:,} bytes) is not a file of torch.save or safetensors; {_CURE}")
    with _torch_errors(path, size):
        checksums = zip_checksums(path) if is_zip else None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), checksums


def read_state_file(path: str | Path, map_location: Any, *, cure: str) -> tuple[Any, bool]:
    """Read the content of a file of torch.save, and compare all its bytes with its checksums meanwhile.

    Args:
        path: the file.
        map_location: as for torch.load.
        cure: the end of messages.

    Returns:
        The content, and whether it is known that its values are finite.

    Raises:
        InputError: there is no such file, it is damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    size, head = _read_head(path)
    with _torch_errors(path, size, cure, cure):
        if not head.startswith(b"PK"):
            return torch.load(path, map_location=map_location, weights_only=True), False
        with CheckedArchive(path) as archive:
            content = torch.load(archive, map_location=map_location, weights_only=True)
            if entry := archive.damaged_entry():
                raise zipfile.BadZipFile(f"the bytes of {entry} changed after they were written (checksum)")
    return content, archive.finite


def map_state_file(path: str | Path, *, cure: str) -> Any:
    """Return the content of a file of torch.save with memory-mapped tensors, whose bytes are not checked.

    Raises:
        InputError: as `read_state_file`.
    """
    path = Path(path)
    size, _ = _read_head(path)
    with _torch_errors(path, size, cure, cure):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@contextlib.contextmanager
def _torch_errors(path: Path, size: int, cure: str = _CURE, objects_cure: str = _OBJECTS_CURE) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's message advises to switch the guard off.
        found = re.search(r"GLOBAL (\S+)|(Unsupported \w+ \S+)", str(error))
        if found is None:
            raise InputError(f"{path} ({size:,} bytes) is damaged and cannot be unpickled; {cure}") from error
        raise InputError(
            f"{path} holds Python objects besides tensors, which could run code, and is refused: "
            f"{found[1] or found[2]}; {objects_cure}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0].split(". ")[0]
        if any(known in reason for known in ("hasRecord(", "archive does not contain", "mmap can only be used")):
            reason = "it is an archive, and torch.save did not write it, or not all of it"
        raise InputError(f"{path} ({size:,} bytes) is truncated or damaged: {reason}; {cure}") from error


def _tensors_of(content: object, path: Path) -> dict[str, torch.Tensor]:
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no tensors by name; give a checkpoint file")
    if wrong := [name for name in content if not isinstance(name, str)]:
        raise InputError(f"{path} holds tensors by other keys than names, e.g. {wrong[0]}; give a checkpoint file")
    if empty := [name for name, value in content.items() if isinstance(value, torch.Tensor) and value.is_meta]:
        raise InputError(
            f"{path} holds no values of {empty[0]}: it was saved from the meta device; save loaded weights"
        )
    if nested := [name for name, value in content.items() if isinstance(value, torch.Tensor) and value.is_nested]:
        raise InputError(f"{path}: {nested[0]} is a nested tensor, and weights are dense ones; save them as such")
    wrong = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise InputError(
            f'{path} should hold {{"module": {{name: tensor}}}} or {{"state_dict": {{name: tensor}}}}; '
            f"not tensors: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )
    return content
