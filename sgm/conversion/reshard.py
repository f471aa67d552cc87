"""The weights of a network, divided anew into as many parts as ranks share its layers; see sgm.parallel.tensor."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sgm.conversion.writing import check_new_folder, new_folder
from sgm.io import atomic_file
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.adapters import ENTRY
from sgm.weights.checkpoint import owned, write_latest
from sgm.weights.files import (
    CONTAINERS,
    SHARD_NAME,
    find_weights,
    read_entry,
    read_metadata,
    read_shards,
    read_tensors,
    shard_name,
)
from sgm.weights.partition import Shard, partition_of, take_shard

logger = get_logger(__name__)

_HEAD_NORM = ".query_layernorm_list."


def reshard_checkpoint(path: str | Path, folder: str | Path, *, size: int) -> list[Path]:
    """Write a network or its adapters in `size` parts. One part at a time is in memory.

    Names, shapes but for the partition, numbers, and what the files hold beside tensors stay as they are.

    Args:
        path: what :func:`sgm.weights.files.find_weights` understands, in any number of parts.
        folder: to be made: gets ``<iteration>/mp_rank_XX_model_states.*`` and ``latest``.
        size: parts.

    Returns:
        The files.

    Raises:
        InputError: the weights cannot be read or so divided, their parts contradict each other, or the folder exists or
            cannot be written to.
    """
    check_new_folder(folder)
    file = find_weights(path)
    whole = read_tensors(file)
    _require_divisible(file, whole, size)
    _require_equal(file, read_shards(file))
    iteration = file.parent.name if SHARD_NAME.fullmatch(file.name) else "1"
    relative = [Path(iteration) / shard_name(index, file.suffix.removeprefix(".")) for index in range(size)]
    need_bytes = sum(tensor.nbytes * (1 if partition_of(name) else size) for name, tensor in whole.items())
    extras = _extras(file)
    with new_folder(folder, need_bytes=need_bytes) as temporary:
        for index, name in enumerate(relative):
            _write_part(temporary / name, whole, Shard(index, size), extras)
        write_latest(temporary, iteration)
    logger.info("%s: %d tensors in %d parts", file, len(whole), size)
    return [Path(folder) / name for name in relative]


def _require_divisible(file: Path, whole: Mapping[str, torch.Tensor], size: int) -> None:
    """Refuse a number of parts that does not fit, before anything is written."""
    divided = {name: how for name in whole if (how := partition_of(name)) is not None}
    if not divided:
        raise InputError(f"{file} holds no layers of a transformer in the SAT layout; give its weights")
    common = math.gcd(*(whole[name].shape[how.dim] // how.stride for name, how in divided.items()))
    head = next((tensor.shape[0] for name, tensor in whole.items() if _HEAD_NORM in name), None)
    unit = "channels"
    if head is not None and common % head == 0:  # heads stay whole; adapters alone do not tell their size
        common, unit = common // head, "heads"
    if size < 1 or common % size:
        legal = ", ".join(str(n) for n in range(1, min(common, 64) + 1) if common % n == 0)
        raise InputError(
            f"--model_parallel_size is {size}, and {common} {unit} in {file} cannot be shared out evenly; give one of "
            f"{legal}"
        )


def _require_equal(file: Path, parts: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Refuse parts whose undivided tensors differ: they come from different runs, or from ranks that drifted apart."""
    for name, first in parts[0].items():
        if partition_of(name) is None:
            for index, other in enumerate(parts[1:], start=1):
                if other[name].dtype != first.dtype or not torch.equal(other[name], first):
                    raise InputError(
                        f"the parts in {file.parent} do not belong together: {name}, which is not divided, differs "
                        f"between mp_rank_00 and mp_rank_{index:02d}; give the files of one run"
                    )


def _extras(file: Path) -> dict[str, Any]:
    """Return what the first file holds beside tensors, as it lies there: entries, or the metadata of the header."""
    read_entry(file, ENTRY)  # all parts must say the same about their adapters
    if file.suffix == ".safetensors":
        return dict(read_metadata(file))
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {key: value for key, value in content.items() if key not in CONTAINERS and content.keys() & CONTAINERS}


def _write_part(path: Path, whole: Mapping[str, torch.Tensor], shard: Shard, extras: Mapping[str, Any]) -> None:
    tensors = {name: owned(take_shard(name, tensor, shard)) for name, tensor in whole.items()}
    with atomic_file(path, need_bytes=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata=dict(extras) or None)
        else:
            torch.save({"module": tensors, **extras}, temporary)
