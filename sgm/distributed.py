"""The one owner of process groups.

A single process needs no launcher and opens no port; under ``torchrun`` the groups follow its environment. Nothing
else in this project creates or stores a group.
"""

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from sgm.log import quiet_dependencies
from sgm.util import InputError


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


def initialize(*, model_parallel_size: int = 1) -> None:
    """Create the process groups once; later calls check that they ask for the same.

    Args:
        model_parallel_size: ranks that share one copy of the DiT; 1 in this version.

    Raises:
        InputError: the size is not supported.
    """
    if model_parallel_size != 1:
        raise InputError(
            f"model_parallel_size={model_parallel_size}: the DiT runs on one rank in this version; "
            "set model_parallel_size: 1"
        )
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


def shutdown() -> None:
    """Destroy the process groups, so that a rank that ends does not leave its peers waiting."""
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
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Number of processes that work on different samples."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if data_parallel_size() > 1:
        dist.barrier()


def reduce_over_ranks(tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """Replace `tensor`, in place, by its sum over the data-parallel ranks, or by the largest value of each element."""
    if data_parallel_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor


def from_rank_zero(value: Any) -> Any:
    """Return what rank zero passed, a small object, on every rank."""
    box = [value]
    if data_parallel_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Return what each rank passed, small objects, on every rank."""
    values = [value] * data_parallel_size()
    if data_parallel_size() > 1:
        dist.all_gather_object(values, value)
    return values


def device() -> torch.device:
    """Return the device of this process: its accelerator where there is one, otherwise the CPU."""
    # A build with accelerator support names its device type even where no device is present.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
