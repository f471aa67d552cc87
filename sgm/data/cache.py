"""Cache of encoder outputs on disk; docs/precomputing.md describes the files.

A folder has up to four kinds of results: ``latents``, mean and log-variance of clips; ``images`` and ``controls``,
likewise of the first images of image-to-video and of control clips; ``text``, embeddings of captions. Each kind has a
description, ``latents.json``, and shards, ``latents-00000.safetensors``. The description is written first and assigns
results to shards. Shards are written atomically: a kind is complete when no shard is missing, and its bytes are
independent of interruptions and of the number of processes.

The header of a shard says which one it is, and has a checksum of every result. Sizes and headers of all shards are
checked when a cache is opened, and results when they are read.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sgm.data.cache_folder import CacheFolder, LocalFolder, cache_folder
from sgm.data.contents import Contents
from sgm.data.remote.folder import RemoteFolder, remove, upload
from sgm.data.remote.store import Store
from sgm.data.rows import ClipFile, listed
from sgm.io import as_unicode, parse_json, reason_of, write_json
from sgm.log import get_logger
from sgm.util import PRECISIONS, InputError, RunError
from sgm.weights.checksums import Checksums, header_checksums, safetensors_checksums, write_safetensors
from sgm.weights.stored import finite_problem

logger = get_logger(__name__)

Kind = Literal["latents", "images", "controls", "text"]
KINDS: tuple[Kind, ...] = ("latents", "images", "controls", "text")
SHARD_BYTES = 256 * 10**6
TOOL = "tools/prepare_dataset.py"
_REWRITE = f"the same command of {TOOL} writes it again"
_FORMAT = 4  # increment when the files change; how frames are chosen is in the source, `decode.READER`
_MISSING = "it is missing"
_MEANWHILE = "its file was replaced while it was encoded"
_STAMPS = "files"  # in the header of a shard: a list, in the order of its keys
_OPEN_SHARDS = 16  # per process; each costs a file handle and its header


@dataclass(frozen=True)
class Description:
    """The contents of a cache of one kind."""

    kind: Kind
    dtype: str  # of the stored tensors: fp16, bf16 or fp32
    source: Mapping[str, Any]  # all inputs of the results; "precision" is the encoder's
    shards: tuple[tuple[str, ...], ...]  # keys of the results of each shard, in order: captions, or from `ClipKeys`
    shapes: tuple[str | None, ...] = ()  # FxHxW of each clip in the order of the keys, None if unreadable; () for text
    left_out: tuple[str, ...] = ()  # keys of clips that fit no bucket

    def keys(self) -> Iterator[str]:
        """Yield all keys, in order."""
        return itertools.chain.from_iterable(self.shards)

    def shape_of(self) -> dict[str, str | None]:
        """Return the shape of each clip by its key."""
        return dict(zip(self.keys(), self.shapes, strict=True)) if self.shapes else {}

    def shard(self, number: int) -> str:
        """Return the file name of a shard."""
        return f"{self.kind}-{number:05d}.safetensors"

    def failed(self, number: int) -> str:
        """Return the file name of the failures of a shard; most shards have none."""
        return f"{self.kind}-{number:05d}.failed.json"

    def identity(self, number: int) -> str:
        """Return the digest of all that a shard depends on; it is in its header."""
        content = [self.kind, number, self.dtype, self.source, self.shards[number]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def problems(self, folder: CacheFolder) -> dict[int, str]:
        """Return number → problem of the shards that `folder` lacks, or whose size or header is wrong."""
        folder.among(map(self.shard, range(len(self.shards))))
        found = {number: self.problem(folder, number) for number in range(len(self.shards))}
        return {number: problem for number, problem in found.items() if problem}

    def problem(self, folder: CacheFolder, number: int) -> str:
        """Return why a shard in `folder` cannot be used, by its size and header; empty if it can."""
        name = self.shard(number)
        try:
            self.checksums(number, folder.header(name), folder.size(name))
        except FileNotFoundError:
            return _MISSING
        except RunError:  # it cannot be had now
            raise
        except (OSError, ValueError) as error:
            return str(error) or type(error).__name__
        return ""

    def checksums(self, number: int, raw: bytes, there: int) -> Checksums:
        """Return the checksums of a shard, a file of `there` bytes with the header `raw`.

        Raises:
            ValueError: it is not this shard.
        """
        try:
            checksums = header_checksums(raw)
            header = parse_json(raw)
            metadata = header.pop("__metadata__", {})
            size = 8 + len(raw) + max((each["data_offsets"][1] for each in header.values()), default=0)
            is_this = metadata.get("shard") == self.identity(number)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(str(error) or type(error).__name__) from error
        if there != size:
            raise ValueError(f"it has {there:,} bytes, and its header says {size:,}")
        if checksums is None or not is_this:
            raise ValueError("it is another shard, or was not written by this tool")
        return checksums

    def changed(self, folder: CacheFolder, contents: Contents) -> dict[int, list[str]]:
        """Return number → keys of results whose files were replaced since a shard was written."""
        stamps = {number: self.stamps(folder, number) for number in range(len(self.shards))}
        changed = {*contents.changed({key: stamp for shard in stamps.values() for key, stamp in shard.items()})}
        found = {number: [key for key in shard if key in changed] for number, shard in stamps.items()}
        return {number: keys for number, keys in found.items() if keys}

    def stamps(self, folder: CacheFolder, number: int) -> dict[str, str]:
        """Return key → stamp of `Contents` of the results of a shard; none if it is missing, or has none."""
        try:
            given = parse_json(folder.header(self.shard(number))).get("__metadata__", {}).get(_STAMPS, "[]")
            return dict(zip(self.shards[number], _LIST.validate_json(given), strict=False))
        except (OSError, ValueError, AttributeError):  # what is wrong with it is said by `problem`
            return {}

    def missing(self, folder: Path) -> list[int]:
        """Return the numbers of shards that `folder` does not have, or whose size or header is wrong."""
        return list(self.problems(LocalFolder(folder)))

    def unfinished(self, folder: Path, *, verify: bool = False, contents: Contents | None = None) -> list[int]:
        """Return the numbers of shards to write.

        Those are missing, have failures, with `contents` results of files that were replaced, or with `verify` damaged
        results.
        """
        here, numbers = LocalFolder(folder), range(len(self.shards))
        missing, there = self.problems(here), here.among(map(self.failed, numbers))
        failed = {number for number in numbers if self.failed(number) in there}
        damaged = {
            number
            for number in numbers
            if verify and number not in failed.union(missing)
            if len(read_shard(folder, self, number)) < len(self.shards[number])
        }
        changed = {} if contents is None else self.changed(here, contents)
        return sorted(failed.union(missing, damaged, changed))

    def failures(self, folder: CacheFolder) -> dict[str, str]:
        """Return key → reason of the failures in `folder`.

        Raises:
            InputError: a file of failures is damaged.
        """
        failures: dict[str, str] = {}
        there = folder.among(map(self.failed, range(len(self.shards))))
        for number in range(len(self.shards)):
            if (name := self.failed(number)) in there:
                try:
                    failures |= _FAILURES.validate_json(folder.read(name))
                except (OSError, ValueError) as error:
                    raise InputError(f"{folder / name} cannot be read: {_reason(error)}; {_REWRITE}") from error
        return failures


_VERSION, _FAILURES, _LIST = TypeAdapter(dict[str, Any]), TypeAdapter(dict[str, str]), TypeAdapter(list[str])
_DESCRIPTION = TypeAdapter(Description)


def divide(keys: Sequence[str], sizes: Sequence[int], shard_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Group results of `sizes` bytes into shards of up to `shard_bytes`, in order; a larger one gets its own shard."""
    shards: list[list[str]] = []
    filled = shard_bytes + 1
    for key, size in zip(keys, sizes, strict=True):
        if filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return tuple(map(tuple, shards))


def begin(folder: Path, description: Description, *, name: str = "--out") -> None:
    """Write the description of a cache, or check it against the existing one; `name` is the option of the folder.

    Raises:
        InputError: the folder has a different cache; the message lists the differences.
        RunError: the folder cannot be written to.
    """
    path = folder / f"{description.kind}.json"
    if not path.is_file():
        write_json(path, {"format": _FORMAT, **dataclasses.asdict(description)})
        return
    if found := changes(read_description(LocalFolder(folder), description.kind), description):
        cure = f"name another folder with {name}, or remove this one"
        raise InputError(f"{path} belongs to a cache with other settings or data; {cure}:\n{listed(found)}")


def changes(before: Description, after: Description) -> list[str]:
    """Return a line for each difference of two descriptions of a kind; none if they are of the same cache."""
    if before == after:
        return []
    found = differences({**before.source, "dtype": before.dtype}, {**after.source, "dtype": after.dtype})
    if not found:
        old, new = set(before.keys()), set(after.keys())
        found = [f"new: {key}" for key in sorted(new - old)] + [f"gone: {key}" for key in sorted(old - new)]
    found = found or differences(before.shape_of(), after.shape_of())
    return found or ["the results are in another order, or in shards of another size (--shard_mb)"]


def write_shard(
    folder: Path,
    description: Description,
    number: int,
    results: Iterable[torch.Tensor | str],
    contents: Contents | None = None,
) -> dict[str, str]:
    """Write a shard atomically, replacing an earlier one; return key → reason of the failures.

    Args:
        folder: of the cache.
        description: of this kind.
        number: of the shard.
        results: a tensor, or the reason of a failure, for each key in order.
        contents: of the files of clips; their stamps are recorded, and those replaced since are failures.

    Raises:
        RunError: it could not be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    failures: dict[str, str] = {}
    metadata, keys, stamps = {"shard": description.identity(number)}, description.shards[number], {}
    if contents is not None:
        stamps = contents.stamps(keys)
        metadata[_STAMPS] = json.dumps([*stamps.values()])
    for place, (key, result) in enumerate(zip(keys, results, strict=True)):
        if isinstance(result, str):
            failures[key] = as_unicode(result)
            continue
        stored = result.detach().to(PRECISIONS[description.dtype]).cpu()
        if torch.isfinite(stored).all():
            tensors[f"{place:06d}"] = stored
        else:
            failures[key] = f"its encoding is not finite in {description.dtype}"
    for key in contents.changed(stamps) if contents is not None else ():
        tensors.pop(f"{keys.index(key):06d}", None)
        failures[key] = _MEANWHILE
    path, failed = folder / description.shard(number), folder / description.failed(number)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path} cannot be replaced: {error.strerror}; remove it") from error
    if failures:  # before the shard, whose existence marks completion
        write_json(failed, failures)
    else:
        failed.unlink(missing_ok=True)
    write_safetensors(path, tensors, metadata=metadata)
    return failures


def read_shard(
    folder: Path, description: Description, number: int, contents: Contents | None = None
) -> dict[str, torch.Tensor]:
    """Return key → result of a shard in the stored dtype; none if the file is missing.

    Damaged results are left out, and with `contents` those whose files were replaced.
    """
    path, here = folder / description.shard(number), LocalFolder(folder)
    if description.problem(here, number):
        return {}
    changed = [] if contents is None else contents.changed(description.stamps(here, number))
    checksums = safetensors_checksums(path) or Checksums({})
    return {
        key: tensor
        for place, tensor in load_file(path).items()
        if (key := description.shards[number][int(place)]) not in changed
        if checksums.fit(place, tensor) and not finite_problem(tensor)
    }


def read_description(folder: CacheFolder, kind: Kind) -> Description:
    """Read the description of one kind.

    Raises:
        InputError: it is missing, damaged or of another version.
    """
    name = f"{kind}.json"
    path = folder / name
    try:
        text = folder.read(name)
        written = _VERSION.validate_json(text).get("format")
        if written != _FORMAT:
            raise ValueError(f"it has the format {written}, and this version reads {_FORMAT}")
        found = _DESCRIPTION.validate_json(text)
        if (wrong := found.source.get("precision")) not in PRECISIONS or (wrong := found.dtype) not in PRECISIONS:
            raise ValueError(f"it has the precision {wrong}, expected one of {', '.join(PRECISIONS)}")
        if found.kind != kind:
            raise ValueError(f"it describes {found.kind}, not {kind}")
        if found.shapes and len(found.shapes) != sum(map(len, found.shards)):
            raise ValueError(f"{len(found.shapes)} shapes of {sum(map(len, found.shards))} clips")
        return found
    except FileNotFoundError as error:
        there = [other for other in KINDS if has_kind(folder, other)]
        found = f"it holds {', '.join(there)} only" if there else "it is no folder that this tool wrote"
        raise InputError(f"'{folder}' has no {name}: {found}; {TOOL} makes it") from error
    except RunError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; remove it: {_REWRITE}") from error


class CachedTensors(Mapping[str, torch.Tensor]):
    """Key → result of one kind, in the precision of the encoder.

    Each process memory-maps a shard on first use.

    Args:
        folder: of the cache, or its URL.
        kind: of results.
        store: that keeps what is read from a URL; None is that of the user's cache.

    Attributes:
        failures: key → reason of failed results, which are not in the mapping.
        shapes: key → FxHxW of the clips.

    Raises:
        InputError: the cache is missing or incomplete.
    """

    def __init__(self, folder: str | Path, kind: Kind, *, store: Store | None = None) -> None:
        self.folder = cache_folder(folder, store)
        self.description = read_description(self.folder, kind)
        problems, num = self.description.problems(self.folder), len(self.description.shards)
        missing = [number for number, problem in problems.items() if problem == _MISSING]
        if missing:
            raise InputError(
                f"'{self.folder}' is not finished: {len(missing)} of {num} shards of {kind} are missing, first "
                f"{self.description.shard(missing[0])}; the same command of {TOOL} goes on where it ended"
            )
        for number, problem in problems.items():
            raise InputError(
                f"{self.folder / self.description.shard(number)} is damaged: {problem}; the same command of {TOOL} "
                "writes it again"
            )
        self.failures = self.description.failures(self.folder)
        self.shapes = self.description.shape_of()
        self._places = {
            key: (number, place)
            for number, shard in enumerate(self.description.shards)
            for place, key in enumerate(shard)
            if key not in self.failures
        }
        self._dtype = PRECISIONS[self.description.source["precision"]]
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._opening = threading.Lock()  # of threads that read ahead

    def __getitem__(self, key: str) -> torch.Tensor:
        """Return a result.

        Raises:
            KeyError: unknown or failed.
            RunError: it is damaged or not finite.
        """
        number, place = self._places[key]
        path = self.folder / self.description.shard(number)
        try:
            with self._opening:
                file, checksums = self._opened(number)
            tensor = file.get_tensor(f"{place:06d}")
            problem = "" if checksums.fit(f"{place:06d}", tensor) else "is damaged: its bytes changed (checksum)"
        except RunError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            problem = f"cannot be read: {reason_of(error)}"
        if problem := problem or finite_problem(tensor, cure="encode it anew"):
            raise RunError(
                f"{path}: the cached {self.description.kind} of '{key}': this {problem}; run {TOOL} --verify "
                "with the same configuration, which writes damaged results again"
            )
        return tensor.to(self._dtype)

    def _opened(self, number: int) -> Any:
        """Return the tensors and the checksums of a shard."""
        if number not in self._open:
            name = self.description.shard(number)
            raw = self.folder.header(name)
            checksums = self.description.checksums(number, raw, self.folder.size(name))  # it may be another by now
            self._open[number] = self.folder.tensors(name, raw), checksums
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    @property
    def is_remote(self) -> bool:
        """Whether results are read from afar."""
        return self.folder.is_remote

    def prefetch(self, key: str) -> None:
        """Read a result from afar, so that it is here when it is asked for; failures are left to that."""
        if self.is_remote and key in self._places:
            number, place = self._places[key]
            try:
                with self._opening:
                    tensors, _ = self._opened(number)
            except (RunError, OSError, ValueError):
                return
            tensors.prefetch(f"{place:06d}")

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without open files; a worker process opens its own."""
        return {**self.__dict__, "_open": OrderedDict(), "_opening": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle, with a lock of its own."""
        self.__dict__.update(state, _opening=threading.Lock())

    def require(self, keys: Iterable[str], source: Mapping[str, Any]) -> None:
        """Check that this cache matches the current run.

        Args:
            keys: keys of all results that training needs.
            source: all inputs of the results in this run.

        Raises:
            InputError: it does not; the message lists the differences.
        """
        found = differences(self.description.source, source)
        if not found:
            known = {*self.description.keys(), *self.description.left_out}
            absent = [key for key in dict.fromkeys(keys) if key not in known]
            is_clip = self.description.kind != "text"
            by_name = {_without_size(key): key for key in known} if absent and is_clip else {}
            for key in absent:
                other = by_name.get(_without_size(key))
                found.append(f"{key}: not in the cache" + (f", which has {other}" if other else ""))
        if found:
            kind = self.description.kind
            raise InputError(
                f"the {kind} in '{self.folder}' were made with other settings or data; run {TOOL} with the present "
                f"configuration and data, and another --out:\n{listed(found)}"
            )

    def changed(self, contents: Contents) -> list[str]:
        """Return the keys of results whose files hold something else than what was encoded."""
        return [key for keys in self.description.changed(self.folder, contents).values() for key in keys]

    def require_contents(self, contents: Contents) -> None:
        """Check that the files of clips hold what was encoded; warn if the cache does not record it.

        Raises:
            InputError: they were replaced; the message lists them.
        """
        if replaced := self.changed(contents):
            raise InputError(
                f"clips were replaced since their {self.description.kind} in '{self.folder}' were made; the same "
                f"command of {TOOL} encodes them again:\n{listed(replaced)}"
            )
        first = next(self.description.keys(), None)
        recorded = self.description.stamps(self.folder, 0)
        if first is not None and not recorded.get(first) and contents.stamps([first])[first]:
            found = f"the {self.description.kind} in '{self.folder}' do not record what the files of clips held"
            logger.warning("%s: a clip that was replaced by one of the same size is not noticed", found)


def _reason(error: Exception) -> str:
    """Return the first fault that pydantic found, or the message of another error."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}" if place else fault["msg"]


def differences(cached: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line for each value that differs: its name, the cached and the current value."""
    lines = []
    for name in dict.fromkeys((*cached, *now)):
        before, after = cached.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: cache {_shown(before)}, now {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[1:13]}..." if re.fullmatch(r'"[0-9a-f]{64}"', text) else text


class ClipKeys:
    """Keys of clips in a cache: path from the data folder, and file size.

    The data folder may move; a replaced clip is detected.

    Args:
        folder: of the data set, or its URL: the same clips have the same keys afar.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = folder if isinstance(folder, str) else folder.absolute()
        self._name = folder.rpartition("/")[2] if isinstance(folder, str) else folder.resolve().name
        self._sizes: dict[Path, int] = {}

    def __call__(self, clip: ClipFile, part: ClipFile | None = None) -> str:
        """Return the key of a clip, or of its first image or its control.

        Raises:
            InputError: a file does not exist.
        """
        key = f"{self._name}/{self._entry(clip)}"
        return as_unicode(key if part is None else f"{key} with {self._entry(part)}")

    def _entry(self, file: ClipFile) -> str:
        if isinstance(self._folder, str):
            path = str(file).removeprefix(f"{self._folder}/")
        else:
            path = os.path.relpath(Path(str(file)).absolute(), self._folder)
        try:
            return f"{Path(path).as_posix()}, {self._size(file)} bytes"
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}; restore it, or remove the clip") from error

    def _size(self, file: ClipFile) -> int:
        if isinstance(file, Path):
            return file.stat().st_size
        if (size := getattr(file, "size", None)) is not None:
            return size
        container = file.container  # a table has no cell sizes
        if container not in self._sizes:
            parts = [path for path in container.rglob("*") if path.is_file() and not path.name.startswith(".")]
            self._sizes[container] = sum(path.stat().st_size for path in parts)
        return self._sizes[container]


def _without_size(key: str) -> str:
    return re.sub(r", \d+ bytes", "", key)


def has_kind(folder: CacheFolder, kind: Kind) -> bool:
    """Return whether a cache has results of a kind."""
    return bool(folder.among([f"{kind}.json"]))


def upload_cache(folder: Path, there: RemoteFolder, descriptions: Sequence[Description]) -> int:
    """Copy a finished cache to a folder afar, descriptions last; return the number of files that were not there.

    Raises:
        RemoteError: it cannot be written.
    """
    here, numbers = LocalFolder(folder), [(each, number) for each in descriptions for number in range(len(each.shards))]
    shards = [each.shard(number) for each, number in numbers]
    failed = [each.failed(number) for each, number in numbers]
    left = here.among(failed)

    def same(name: str) -> bool:
        if name not in shards:
            return there.read(name) == here.read(name)
        return there.size(name) == here.size(name) and there.header(name) == here.header(name)  # it has checksums

    num = upload(folder, there, [shards, sorted(left)], same)
    remove(there, {*failed} - left)  # of an earlier copy, whose clips were repaired since
    return num + upload(folder, there, [[f"{each.kind}.json" for each in descriptions]], same)
