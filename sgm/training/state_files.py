"""The files of a resume state: read with checks, and written by DeepSpeed's engine."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgm.io import atomic_file
from sgm.training.repartition import CURE
from sgm.util import InputError, default
from sgm.weights.checksums import save_torch
from sgm.weights.files import map_state_file, read_state_file
from sgm.weights.stored import require_weights

# What the files of DeepSpeed hold, by the end of their names, and where its optimizers keep float32 weights.
_CONTENTS = {"model_states.pt": "module", "optim_states.pt": "optimizer_state_dict"}
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat")


def write_state_file(path: Path, content: Any) -> None:
    """Write a file of the state.

    Raises:
        RunError: it cannot be written.
    """
    with atomic_file(path) as temporary:
        save_torch(content, temporary)


def read_mapped(path: Path) -> Any:
    """Load a file of the state with memory-mapped tensors, whose bytes are not checked."""
    with _deepspeed_objects():
        return map_state_file(path, cure=CURE)


def read_checked(path: Path, map_location: Any) -> Any:
    """Load a file of the state with ``weights_only``; all its bytes are checked."""
    try:
        with _deepspeed_objects():
            content, finite = read_state_file(path, map_location, cure=CURE)
        require_weights(path, _weights_of(path, content), finite=finite, cure=CURE)
    except InputError as error:
        raise InputError(f"the resume state cannot be used: {error}") from error
    return content


def _weights_of(path: Path, content: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the weights in a file of DeepSpeed: those of the module, and the float32 masters.

    Raises:
        InputError: it is no such file, or that of something else than its name says.
    """
    needed = next((key for ending, key in _CONTENTS.items() if path.name.endswith(ending)), None)
    if not isinstance(content, Mapping) or needed not in (None, *content):
        raise InputError(f"{path} holds something else than its name says; {CURE}")
    module, state = content.get("module"), default(content.get("optimizer_state_dict"), content.get("optimizer"))
    for name, value in (("module", module), ("optimizer", state)):
        if not isinstance(value, Mapping | None):
            raise InputError(f"{path}: its {name} is no mapping; {CURE}")
    named = [*(module or {}).items()]
    for key in _MASTERS:
        groups = (state or {}).get(key)
        for index, group in enumerate(_listed(() if groups is None else groups)):
            named += [(f"{key}[{index}]", part) for part in _listed(group)]
    if wrong := [name for name, value in named if not isinstance(value, torch.Tensor)]:
        raise InputError(f"{path}: its {wrong[0]} is no tensor; {CURE}")
    return named


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def rng_state() -> dict[str, Any]:
    """Return the states of this rank's random generators."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_rng(path: Path) -> None:
    """Set the random generators to the states in a file.

    Raises:
        InputError: it is damaged, or holds something else.
    """
    state = read_checked(path, torch.device("cpu"))
    try:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if "accelerator" in state and torch.accelerator.is_available():
            torch.get_device_module().set_rng_state(state["accelerator"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"the resume state cannot be used: {path} does not hold the states of this rank's random generators; {CURE}"
        ) from error


def checkpoint_engine(save: Callable[[Path, Any], None] = write_state_file) -> Any:
    """Return a DeepSpeed checkpoint engine that reads with ``weights_only``, and writes with `save`."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            save(Path(path), _with_plain_stage(state_dict))

        def load(self, path: str, map_location: Any = None) -> Any:
            return read_checked(Path(path), map_location)

    return SafeCheckpointEngine()


def _with_plain_stage(content: Any) -> Any:
    """Return a state whose ZeRO stage is a number: Python 3.11.2 pickles it by `getattr`, which is refused."""
    optimizer = content.get("optimizer_state_dict")
    if not isinstance(optimizer, Mapping) or "zero_stage" not in optimizer:
        return content
    return {**content, "optimizer_state_dict": {**optimizer, "zero_stage": int(optimizer["zero_stage"])}}


def _deepspeed_objects() -> Any:
    """Return a context in which files may hold the objects of DeepSpeed's states."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
