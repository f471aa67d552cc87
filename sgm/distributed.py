"""The one owner of process groups.

A single process needs no launcher and opens no port; under ``torchrun`` the groups follow its environment. Nothing
else in this project creates or stores a group.
"""

import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sgm.log import quiet_dependencies
from sgm.util import InputError, default


def prepare_import() -> None:
    """Call before SAT or DeepSpeed is imported: choose DeepSpeed's device as torch does, and keep both quiet."""
    quiet_dependencies()
    os.environ.setdefault("DS_ACCELERATOR", device().type)


def prepare_deepspeed() -> None:
    """Call before DeepSpeed makes an engine: on a CPU it would first compile a C++ extension, which gloo replaces."""
    prepare_import()
    import deepspeed.ops

    # DeepSpeed's ZeRO calls collectives by names that torch has renamed: a line for each call, hundreds a minute.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ


def world_size() -> int:
    """Return the number of processes that the launcher started, also before `initialize`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many neighbouring ranks work on one sample together; every other neighbour has samples of its own.

    With 2 of 4 ranks, ranks 0 and 1 share one sample, ranks 2 and 3 the next.

    Attributes:
        context: ranks that share a video in the VAE (``cp_size``).
        sequence: ranks that share the tokens of a sample in the DiT (``sequence_parallel_size``).
    """

    context: int = 1
    sequence: int = 1

    @property
    def ranks(self) -> int:
        """Ranks that work on one sample."""
        return max(self.context, self.sequence)

    def check(self) -> None:
        """Hold the sizes against the number of processes, before anything is started.

        Raises:
            InputError: they do not fit; says which would.
        """
        sizes = {"model.first_stage_config.params.cp_size": self.context, "args.sequence_parallel_size": self.sequence}
        for name, size in sizes.items():
            if size < 1 or world_size() % size:
                legal = [str(n) for n in range(1, world_size() + 1) if world_size() % n == 0]
                raise InputError(
                    f"{name}={size} ranks cannot share a sample among {world_size()} processes; legal are "
                    f"{', '.join(legal)}, or start another number of processes with torchrun --nproc_per_node"
                )
        if len({size for size in sizes.values() if size > 1}) > 1:
            given = " and ".join(f"{name}={size}" for name, size in sizes.items())
            raise InputError(
                f"{given} differ; the same ranks share a sample in both: set them equal, or one of them to 1"
            )


_mesh = Mesh()
# Of this rank: number of ranks → the group of that many first ones of those that share a sample with it; None where it
# is not one of them. Short videos have less pieces than there are ranks.
_sample_groups: dict[int, Any] = {}


def initialize(*, model_parallel_size: int = 1, mesh: Mesh | None = None) -> None:
    """Create the process groups once; later calls check that they ask for the same.

    Args:
        model_parallel_size: ranks that share one copy of the DiT; 1 in this version.
        mesh: what ranks share; None leaves it as it is.

    Raises:
        InputError: a size is not supported, does not fit the number of processes, or differs from that of before.
    """
    if model_parallel_size != 1:
        raise InputError(
            f"model_parallel_size={model_parallel_size}: the DiT runs on one rank in this version; "
            "set model_parallel_size: 1"
        )
    if mesh is not None:
        mesh.check()
        if _sample_groups and mesh != _mesh:
            raise InputError(f"ranks share {_mesh} in this process already, and {mesh} is asked for; start another one")
    prepare_import()
    from sat import mpu

    # DeepSpeed asks for it even where there is one process.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        if is_launched():
            if torch.accelerator.is_available():
                torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(dist.get_default_backend_for_device(device()))
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
            backend = dist.get_default_backend_for_device(device())
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))  # SAT guesses, loudly, without it
        mpu.initialize_model_parallel(model_parallel_size)
    if mesh is not None and mesh.ranks > 1 and not _sample_groups:
        _make_sample_groups(mesh)


def _make_sample_groups(mesh: Mesh) -> None:
    """Make the groups of all ranks: every process has to take part in making each."""
    global _mesh
    _mesh = mesh
    for start in range(0, dist.get_world_size(), mesh.ranks):
        for num in range(1 if mesh.context > 1 else mesh.ranks, mesh.ranks + 1):
            ranks = list(range(start, start + num))
            group: Any = dist.new_group(ranks)
            if start <= dist.get_rank() < start + mesh.ranks:
                _sample_groups[num] = group if dist.get_rank() in ranks else None


def context_parallel_size() -> int:
    """Number of ranks that share one video in the VAE with this one, itself included."""
    return _mesh.context


def context_group(num: int | None = None) -> Any:
    """Return the group of the first `num` ranks that share a video with this one, all of them if None.

    None where this rank is not one of them, and where nothing is shared.
    """
    return _sample_groups.get(default(num, _mesh.context)) if _mesh.context > 1 else None


def sequence_group() -> Any:
    """Return the group of the ranks that share the tokens of a sample with this one; None where nothing is shared."""
    return _sample_groups.get(_mesh.sequence) if _mesh.sequence > 1 else None


def sample_rank() -> int:
    """Index of this process among those that work on one sample; the first one writes it."""
    return dist.get_rank() % _mesh.ranks if dist.is_initialized() else 0


def from_sample_first(value: Any) -> Any:
    """Return what the first of the ranks that share a sample passed: a tensor of the same shape, or a small object."""
    group = _sample_groups.get(_mesh.ranks)
    if group is None:
        return value
    source = dist.get_process_group_ranks(group)[0]
    if isinstance(value, torch.Tensor):
        value = value.contiguous()
        dist.broadcast(value, source, group=group)
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def shutdown() -> None:
    """Destroy the process groups, so that a rank that ends does not leave its peers waiting."""
    global _mesh
    _mesh = Mesh()
    _sample_groups.clear()
    if dist.is_initialized():
        from sat import mpu

        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        deepspeed_comm = sys.modules.get("deepspeed.comm")
        if deepspeed_comm is not None and deepspeed_comm.is_initialized():
            deepspeed_comm.destroy_process_group()  # ends torch's groups, and forgets its own handles on them
        else:
            dist.destroy_process_group()


def data_parallel_rank() -> int:
    """Index of this process among those that work on different samples."""
    return dist.get_rank() // _mesh.ranks if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Number of processes that work on different samples; those that share one count once."""
    return dist.get_world_size() // _mesh.ranks if dist.is_initialized() else 1


def _is_shared() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks."""
    if _is_shared():
        dist.barrier()


def reduce_over_ranks(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Replace `tensor`, in place, by its sum over all ranks, or by the largest value of each element."""
    if _is_shared():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def from_rank_zero(value: Any) -> Any:
    """Return what rank zero passed, a small object, on every rank."""
    box = [value]
    if _is_shared():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Return what each rank passed, small objects, on every rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if _is_shared():
        dist.all_gather_object(values, value)
    return values


def device() -> torch.device:
    """Return the device of this process: its accelerator where there is one, otherwise the CPU."""
    # A build with accelerator support names its device type even where no device is present.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
