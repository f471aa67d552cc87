"""Reshard the weights of a network for another number of tensor parallel ranks."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgm.conversion.writing import check_new_folder, new_folder
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.adapters import ENTRY
from sgm.weights.checkpoint import write_latest, write_tensors
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import (
    CONTAINERS,
    SHARD_NAME,
    file_format,
    find_weights,
    read_entry,
    read_metadata,
    read_shards,
    read_weights,
    shard_name,
)
from sgm.weights.lazy import LazyTensor, Tensors, compute, meta
from sgm.weights.partition import Shard, partition_of, take_shard
from sgm.weights.stored import checked_ahead, require_floating

logger = get_logger(__name__)

_HEAD_NORM = ".query_layernorm_list."


def reshard_checkpoint(path: str | Path, folder: str | Path, *, size: int) -> list[Path]:
    """Write a network or its adapters in `size` shards, with one shard in memory at a time.

    Names, values and extra entries are unchanged.

    Args:
        path: as for :func:`sgm.weights.files.find_weights`, in any number of shards.
        folder: to create; output ``<iteration>/mp_rank_XX_model_states.*`` and ``latest``.
        size: number of shards.

    Returns:
        The files.

    Raises:
        InputError: the weights cannot be read or sharded evenly, their shards contradict each other, or the folder
            exists or cannot be written to.
    """
    check_new_folder(folder)
    file = find_weights(path)
    whole = read_weights(file)
    require_floating(whole)
    _require_divisible(file, whole, size)
    _require_equal(file, read_shards(file))
    iteration = file.parent.name if SHARD_NAME.fullmatch(file.name) else "1"
    relative = [Path(iteration) / shard_name(index, file_format(file)) for index in range(size)]
    need_bytes = sum(meta(tensor).nbytes * (1 if partition_of(name) else size) for name, tensor in whole.items())
    extras = _extras(file)
    with new_folder(folder, need_bytes=need_bytes) as temporary:
        for index, name in enumerate(relative):
            _write_shard(temporary / name, whole, Shard(index, size), extras)
        write_latest(temporary, iteration)
    logger.info("%s: %d tensors in %d shards", file, len(whole), size)
    return [Path(folder) / name for name in relative]


def _require_divisible(file: Path, whole: Tensors, size: int) -> None:
    """Refuse a number of shards that does not divide the tensors evenly."""
    divided = {name: how for name in whole if (how := partition_of(name)) is not None}
    if not divided:
        raise InputError(f"{file} holds no layers of a transformer in the SAT layout; give its weights")
    common = math.gcd(*(whole[name].shape[how.dim] // how.stride for name, how in divided.items()))
    head = next((tensor.shape[0] for name, tensor in whole.items() if _HEAD_NORM in name), None)
    unit = "channels"
    if head is not None and common % head == 0:  # heads stay whole; their size is unknown for adapters alone
        common, unit = common // head, "heads"
    if size < 1 or common % size:
        legal = ", ".join(str(n) for n in range(1, min(common, 64) + 1) if common % n == 0)
        raise InputError(
            f"--model_parallel_size is {size}, and {common} {unit} in {file} cannot be divided evenly; give one of "
            f"{legal}"
        )


def _require_equal(file: Path, shards: Sequence[Mapping[str, LazyTensor]]) -> None:
    """Refuse shards with different replicated tensors: they come from different runs, or from ranks that diverged."""
    for name, first in shards[0].items():
        if partition_of(name) is None:
            for index, other in enumerate(shards[1:], start=1):
                if other[name].dtype != first.dtype or not torch.equal(compute(other[name]), compute(first)):
                    raise InputError(
                        f"the shards in {file.parent} do not belong together: {name}, which is replicated, differs "
                        f"between mp_rank_00 and mp_rank_{index:02d}; give the files of one run"
                    )


def _extras(file: Path) -> dict[str, Any]:
    """Return the extra entries of the first file, or its header metadata."""
    read_entry(file, ENTRY)  # raises if the shards describe their adapters differently
    if file_format(file) == "safetensors":
        return dict(read_metadata(file))
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {key: value for key, value in content.items() if key not in CONTAINERS and content.keys() & CONTAINERS}


def _write_shard(path: Path, whole: Tensors, shard: Shard, extras: Mapping[str, Any]) -> None:
    with checked_ahead(whole.values() if shard.size == 1 else ()):
        tensors = {name: take_shard(name, tensor, shard) for name, tensor in whole.items()}
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata=extras)
    else:
        write_tensors(path, "module", tensors, extras)
