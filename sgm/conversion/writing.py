"""Write the output of a conversion: files of one tensor at a time, folders atomically."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from sgm.io import (
    OutputError,
    WriteError,
    hidden_folder,
    readable_size,
    remove_leftovers,
    require_writable,
    write_json,
)
from sgm.util import InputError, RunError
from sgm.weights.adapters import ENTRY, AdapterInfo
from sgm.weights.architecture import PATCH_WEIGHT
from sgm.weights.checkpoint import released_patch, write_latest, write_tensors
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import PREFIX, WEIGHTS
from sgm.weights.lazy import LazyTensor, num_bytes
from sgm.weights.stored import checked_ahead


def require_use(given: Mapping[str, tuple[object, Sequence[str]]], parts: Collection[str]) -> None:
    """Refuse options without effect.

    Args:
        given: option → its value, and the components that it is for.
        parts: the components that are converted.

    Raises:
        InputError: a value is given for components that are left out.
    """
    for option, (value, users) in given.items():
        if value and not {*users} & {*parts}:
            raise InputError(f"{option} has no effect without {' or '.join(users)}; leave it out, or convert that too")


@contextlib.contextmanager
def new_folder(folder: str | Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a folder hidden beside `folder`, renamed to `folder` after the block; removed if the block fails.

    Args:
        folder: to create; it may exist if it is empty.
        need_bytes: size of the output.

    Raises:
        OutputError: `folder` exists, cannot be written to, or the disk is too small.
    """
    folder = resolved(folder)
    check_new_folder(folder, need_bytes=need_bytes)
    parents = [path for path in folder.parents if not path.exists()]
    try:
        with hidden_folder(folder) as temporary:
            yield temporary
            if folder.is_dir():
                folder.rmdir()
            temporary.rename(folder)
    except (RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{folder} was written by another process meanwhile; choose another folder") from error
        if isinstance(error, RunError) and error.__cause__ is None:
            raise  # not about files
        # Another process filled the disk. The message is about the folder that was asked for, not the hidden one.
        said = re.sub(rf"{re.escape(str(folder.parent))}/\.[^/;]*/{re.escape(folder.name)}", str(folder), str(error))
        kind = OutputError if isinstance(error, WriteError | OSError) else InputError
        raise kind(said if isinstance(error, RunError) else f"could not write {folder}: {said}") from error
    finally:
        with contextlib.suppress(OSError):  # not empty: success
            for path in parents:
                path.rmdir()


def resolved(folder: str | Path) -> Path:
    """Return the folder to create, where a link to it points."""
    return Path(os.path.realpath(folder))


def check_new_folder(folder: str | Path, *, need_bytes: int = 0) -> None:
    """Raise the OutputError that `new_folder` would raise; remove what killed conversions left beside `folder`."""
    folder = resolved(folder)
    remove_leftovers(folder.parent)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} exists already; nothing is overwritten: remove it, or choose another folder")
    require_writable(folder)
    existing = next(path for path in folder.parents if path.is_dir())
    free = shutil.disk_usage(existing).free
    if need_bytes > free:
        raise OutputError(
            f"{folder} needs {readable_size(need_bytes)}, and {readable_size(free)} are free there; free some space, "
            "or choose another folder"
        )


def write_network(
    folder: Path,
    iteration: int,
    tensors: Mapping[str, LazyTensor],
    *,
    file_format: Literal["pt", "safetensors"],
    patch_size: int | Sequence[int] | None = None,
    adapters: AdapterInfo | None = None,
) -> None:
    """Write a network, or only adapters, in the SAT layout with ``latest``.

    Args:
        folder: gets the files.
        iteration: name of the iteration folder.
        tensors: by the network's own names.
        file_format: ``"safetensors"`` is written with one tensor in memory at a time, ``"pt"`` with all.
        patch_size: reshapes the patch projection to its released shape; None keeps its shape.
        adapters: see :func:`sgm.weights.checkpoint.save_network`.
    """
    if patch_size is not None and PATCH_WEIGHT in tensors:
        tensors = {**tensors, PATCH_WEIGHT: LazyTensor((tensors[PATCH_WEIGHT],), partial(released_patch, patch_size))}
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    entries = {} if adapters is None else {ENTRY: adapters.to_entry()}
    path = folder / str(iteration) / f"{WEIGHTS}.{file_format}"
    with checked_ahead(named.values()):
        if file_format == "pt":
            write_tensors(path, "module", {name: tensor.compute() for name, tensor in named.items()}, entries)
        else:
            write_safetensors(path, named, metadata={name: json.dumps(entry) for name, entry in entries.items()})
    write_latest(folder, iteration)


def write_shards(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    stem: str,
    max_shard_size: str | int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as ``<stem>.safetensors``, or as shards of at most `max_shard_size` with an index.

    Args:
        folder: gets the files.
        tensors: by name.
        stem: ``diffusion_pytorch_model`` for diffusers, ``model`` for transformers.
        max_shard_size: in bytes, or as ``"5GB"``.
        metadata: for the header of every file.

    Raises:
        RunError: the disk is full or the folder cannot be written to.
    """
    pattern = stem + "{suffix}.safetensors"
    metas = {name: tensors[name].meta() for name in sorted(tensors)}  # independent of the input order
    split = split_torch_state_dict_into_shards(metas, filename_pattern=pattern, max_shard_size=max_shard_size)
    for name, names in tqdm(split.filename_to_tensors.items(), desc=folder.name, leave=False, disable=None):
        own = {each: tensors[each] for each in names}
        with checked_ahead(own.values()):
            write_safetensors(folder / name, own, metadata=metadata)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def total_bytes(*parts: Mapping[str, LazyTensor]) -> int:
    """Return the size of `parts` on disk, including headers and small files."""
    return sum(num_bytes(part) for part in parts) + (1 << 20)
