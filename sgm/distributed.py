"""The one owner of process groups.

A single process needs no launcher and opens no port; under ``torchrun`` the groups follow its environment. Nothing
else in this project creates or stores a group.
"""

import os

import torch
import torch.distributed as dist

from sgm.log import quiet_dependencies
from sgm.util import InputError


def prepare_import() -> None:
    """Call before SAT or DeepSpeed is imported: choose DeepSpeed's device as torch does, and keep both quiet."""
    quiet_dependencies()
    os.environ.setdefault("DS_ACCELERATOR", device().type)


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


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

    if not dist.is_initialized():
        if is_launched():
            if torch.accelerator.is_available():
                torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(dist.get_default_backend_for_device(device()))
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] (documented, not exported)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not mpu.model_parallel_is_initialized():
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(dist.get_world_size()))  # SAT guesses, loudly, without it
        mpu.initialize_model_parallel(model_parallel_size)


def shutdown() -> None:
    """Destroy the process groups, so that a rank that ends does not leave its peers waiting."""
    if dist.is_initialized():
        from sat import mpu

        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        dist.destroy_process_group()


def data_parallel_rank() -> int:
    """Index of this process among those that work on different samples."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Number of processes that work on different samples."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Return the device of this process: its accelerator where there is one, otherwise the CPU."""
    # A build with accelerator support names its device type even where no device is present.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
