"""Read DeepSpeed's ZeRO states: find the files of a state and assemble their partitions to tensors.

::

    TAG/mp_rank_00_model_states.pt                           stages 1, 2: the module in its precision; shapes
    TAG/zero_pp_rank_<r>_mp_rank_00_model_states.pt          stage 3: shapes; partitions of frozen parameters
    TAG/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   rank r's partition of float32 weights, optimizer state

The weights are partitioned over W ranks. In stages 1 and 2 every parameter group is flattened to one vector,
split into W partitions; its end is padded to a multiple of 2·W, and the file may omit the padding. In stage 3 every
parameter is split into W partitions of ceil(numel / W), the last padded; rank r has the r-th partition of every
parameter, concatenated. No process group is started, and no DeepSpeed class is loaded.
"""

import contextlib
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sgm.util import InputError
from sgm.weights.checksums import Checksums, zip_checksums
from sgm.weights.files import WEIGHTS, read_entry
from sgm.weights.lazy import LazyTensor
from sgm.weights.stored import StoredTensor, is_dense, require_weights, store_zip

MODEL_FILE = f"{WEIGHTS}.pt"
PART_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?(model|optim)_states\.pt")

_CURE = "copy the whole folder again, with the files of all ranks and machines"
PARTITIONS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
OPTIMIZER = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}

Partitions = Sequence[Sequence[LazyTensor]]  # by rank, then by group

_Size: Any = Annotated[int, Field(ge=0, le=1 << 40)]
_Shapes: Any = dict[str, tuple[_Size, ...] | list[_Size]]
_Ranks: Any = Annotated[int, Field(ge=1, le=100_000)]
# What is read of the files of models and of optimizers, besides the partitions.
_MODEL = {
    "param_shapes": list[_Shapes],
    "module": dict[str, torch.Tensor],
    "buffer_names": list[str] | tuple[str, ...] | None,
    "shared_params": dict[str, str] | None,
    "frozen_param_shapes": _Shapes | None,
    "global_steps": _Size | None,
}
_OPTIMIZER = {
    "partition_count": _Ranks | list[_Ranks],
    "zero_stage": int | None,
    "param_alignment_paddings": list[list[_Size]] | None,
}


class _Unread:
    """Placeholder for an object of DeepSpeed whose content is not needed."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_OBJECTS = [
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Unread, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class ZeroState:
    """A state of ZeRO stage 1, 2 or 3; its tensors are memory-mapped.

    Attributes:
        folder: folder of its files.
        stage: ZeRO stage.
        world_size: ranks that wrote it.
        iteration: optimizer steps done.
        shapes: of the trained parameters by name, group by group, in the order of the vectors.
        paddings: unused elements after each parameter in the vectors, group by group.
        dtypes: of the module's tensors in training, by name.
        rest: frozen parameters and buffers, if they were saved.
        shared: tied parameters: name → name under which it is saved.
        weights: partitions of the float32 weights; of a schedule-free optimizer, its average, as a run saves them.
        averages: partitions of the moving averages of `sgm.training.optim.average.keep_average`; None without averages.
    """

    folder: Path
    stage: int
    world_size: int
    iteration: int
    shapes: tuple[Mapping[str, torch.Size], ...]
    paddings: tuple[tuple[int, ...], ...]
    dtypes: Mapping[str, torch.dtype]
    rest: Mapping[str, LazyTensor]
    shared: Mapping[str, str]
    weights: Partitions
    averages: Partitions | None

    def tensors(self, *, dtype: torch.dtype | None = None, ema: bool = False) -> dict[str, LazyTensor]:
        """Return all tensors by the module's names, as lazy tensors.

        Args:
            dtype: of floating-point tensors; None uses each tensor's training dtype.
            ema: moving averages instead of the trained weights.

        Raises:
            InputError: there are no averages.
        """
        if ema and self.averages is None:
            raise InputError(
                f"{self.folder}: the optimizer's state holds no moving average of the weights: the run had no "
                "args.ema_decay, or has not made a step, or another trainer wrote it; convert without --ema"
            )
        parts = self.averages if ema and self.averages is not None else self.weights
        trained = dict(self._whole(parts) if self.stage == 3 else self._flat(parts))
        result = {name: tensor.cast(dtype or self.dtypes.get(name)) for name, tensor in trained.items()}
        result |= {name: tensor.cast(dtype) for name, tensor in self.rest.items()}
        return result | {name: result[other] for name, other in self.shared.items() if other in result}

    def _flat(self, parts: Partitions) -> Iterator[tuple[str, LazyTensor]]:
        """Yield the tensors of stages 1 and 2."""
        for group, shapes in enumerate(self.shapes):
            partitions, start = [rank[group] for rank in parts], 0
            for (name, shape), padding in zip(shapes.items(), self.paddings[group], strict=True):
                pieces = _cut(partitions, start, shape.numel())
                yield name, LazyTensor(pieces, _shaped(self.folder, name, shape))
                start += shape.numel() + padding

    def _whole(self, parts: Partitions) -> Iterator[tuple[str, LazyTensor]]:
        """Yield the tensors of stage 3."""
        start = 0
        for name, shape in _joined(self.shapes).items():
            share = math.ceil(shape.numel() / self.world_size)
            pieces = tuple(piece for rank in parts for piece in _cut(rank, start, share))
            yield name, LazyTensor(pieces, _shaped(self.folder, name, shape))
            start += share


@dataclass(frozen=True)
class _Elementwise(LazyTensor):
    """A function of vectors, element by element: a piece of it needs the same pieces of these alone."""


def _cut(parts: Sequence[LazyTensor], start: int, count: int) -> tuple[LazyTensor, ...]:
    """Return the pieces of a partitioned vector that hold `count` elements from `start`, of at least one partition."""
    pieces, begin = [], 0
    for part in parts:
        size = len(part.meta())
        first, last = max(start - begin, 0), min(start + count - begin, size)
        if first < last or (not pieces and part is parts[-1]):
            pieces.append(_piece(part, slice(first, max(first, last))))
        begin += size
    return tuple(pieces)


def _piece(part: LazyTensor, where: slice) -> LazyTensor:
    if isinstance(part, _Elementwise):
        return LazyTensor(tuple(LazyTensor((source,), itemgetter(where)) for source in part.sources), part.make)
    return LazyTensor((part,), itemgetter(where))


def _shaped(folder: Path, name: str, shape: torch.Size) -> Callable[..., torch.Tensor]:
    """Return a function that concatenates partitions, drops their padding, and reshapes and checks the result."""

    def shaped(*parts: torch.Tensor) -> torch.Tensor:
        whole = (parts[0] if len(parts) == 1 else torch.cat(parts))[: shape.numel()].view(shape)
        if not whole.is_meta:
            require_weights(folder, [(name, whole)])
        return whole

    return shaped


def _joined(groups: Sequence[Mapping[str, torch.Size]]) -> dict[str, torch.Size]:
    return {name: shape for shapes in groups for name, shape in shapes.items()}


def deepspeed_objects() -> Any:
    """Return a context in which DeepSpeed objects in files are skipped."""
    return torch.serialization.safe_globals(_OBJECTS)


def read_state_entries(path: Path, *keys: str) -> list[Any]:
    """Read entries of a DeepSpeed file; None for missing ones.

    Raises:
        InputError: it cannot be read, or holds objects that could run code.
    """
    with deepspeed_objects():
        return [read_entry(path, key) for key in keys]


def is_zero_state(folder: Path) -> bool:
    """Whether a folder holds files of ZeRO stages 1 to 3, even if some are missing.

    Raises:
        InputError: a file in it cannot be read.
    """
    if any(PART_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return True
    model = folder / MODEL_FILE
    return model.is_file() and read_state_entries(model, "param_shapes")[0] is not None


def read_zero_state(folder: Path) -> ZeroState:
    """Read names and shapes of a state; tensors stay memory-mapped.

    Raises:
        InputError: files are missing, damaged, or from different states.
    """
    optim, model = _files(folder, "optim"), _files(folder, "model")
    if not optim:
        raise InputError(f"{folder} lacks the files zero_pp_rank_<rank>_mp_rank_00_optim_states.pt; {_CURE}")
    states = {}
    for rank, path in optim.items():
        (states[rank],) = read_state_entries(path, "optimizer_state_dict")
        if not isinstance(states[rank], dict) or "partition_count" not in states[rank]:
            raise InputError(f"{path} holds no state of a ZeRO optimizer; {_CURE}")
        _require_fit(path, states[rank], _OPTIMIZER)
    stage, world_size = _stage_and_ranks(folder, states, optim)
    first = model[0] if stage == 3 and 0 in model else folder / MODEL_FILE
    kinds = {"optim": optim} | ({"model": model} if stage == 3 else {})
    missing = [_name(kind, rank) for kind, found in kinds.items() for rank in range(world_size) if rank not in found]
    missing += [] if stage == 3 or first.is_file() else [MODEL_FILE]
    if missing:
        raise InputError(
            f"{folder} was written by {world_size} ranks at stage {stage}, and lacks {', '.join(missing)}; {_CURE}"
        )
    entries = dict(zip(_MODEL, read_state_entries(first, *_MODEL), strict=True))
    shapes, module, buffers, shared, frozen, iteration = entries.values()
    if not isinstance(shapes, list) or not isinstance(module, dict):
        raise InputError(f"{first} does not say which parameters ZeRO trained (param_shapes); {_CURE}")
    _require_fit(first, entries, _MODEL)
    groups = [_weights(optim[rank], states[rank], stage) for rank in range(world_size)]
    _require_same_step(optim, states, stage)
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    if [len(each) for each in paddings] != [len(group) for group in shapes]:
        raise InputError(f"{optim[0]} is that of other parameters (param_alignment_paddings); {_CURE}")
    state = ZeroState(
        folder=folder,
        stage=stage,
        world_size=world_size,
        iteration=iteration or 0,
        shapes=tuple({name: torch.Size(shape) for name, shape in group.items()} for group in shapes),
        paddings=tuple(tuple(group) for group in paddings),
        dtypes={name: tensor.dtype for name, tensor in module.items()},
        rest=_frozen(frozen or {}, [model[rank] for rank in range(world_size)] if stage == 3 else [first])
        | _buffers(first, {name: module[name].detach() for name in buffers or () if name in module}),
        shared=shared or {},
        weights=groups,
        averages=_averages({optim[rank]: states[rank] for rank in range(world_size)}, stage, len(groups[0])),
    )
    for parts in (state.weights, state.averages):
        if parts is not None:
            _check_sizes(state, parts)
    return state


def _require_fit(path: Path, entries: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise InputError for the first entry of a file that is not as DeepSpeed writes it."""
    for name, hint in hints.items():
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
            adapter.validate_python(entries.get(name))
        except ValidationError as error:
            raise InputError(f"{path}: its entry '{name}' is not as DeepSpeed writes it; {_CURE}") from error


def _require_dense(path: Path, tensors: Mapping[str, Any], *, vectors: bool = False) -> None:
    for name, tensor in tensors.items():
        if not (isinstance(tensor, torch.Tensor) and is_dense(tensor)) or (vectors and tensor.ndim != 1):
            raise InputError(f"{path}: {name} is no dense {'vector' if vectors else 'tensor'}; {_CURE}")


def _stored(path: Path, label: str, parts: Sequence[torch.Tensor]) -> list[StoredTensor]:
    """Return tensors of a file, whose bytes are checked when they are computed; their padding may hold any values."""
    named = {f"{label}[{index}]": part for index, part in enumerate(parts)}
    _require_dense(path, named, vectors=True)
    named = {name: part.detach() for name, part in named.items()}
    return [tensor.of_any_kind() for tensor in store_zip(path, named, _checksums(path)).values()]


def _buffers(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Return the buffers of a module, which may be integers."""
    _require_dense(path, tensors)
    stored = store_zip(path, tensors, _checksums(path))
    return {name: each if each.dtype.is_floating_point else each.of_any_kind() for name, each in stored.items()}


def _checksums(path: Path) -> Checksums | None:
    return zip_checksums(path) if zipfile.is_zipfile(path) else None


def _files(folder: Path, kind: str) -> dict[int, Path]:
    """Return the files of one kind by rank."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = PART_FILE.fullmatch(path.name)
        if path.name == MODEL_FILE.replace("00", "01") or (match and int(match[2]) > 0):
            raise InputError(f"{folder} was written by a tensor-parallel run ({path.name}), which cannot be read")
        if match and match[3] == kind:
            if int(match[1]) in found:
                raise InputError(f"{folder} mixes two states: {found[int(match[1])].name} and {path.name}; keep one")
            found[int(match[1])] = path
    return found


def _name(kind: str, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"


def _stage_and_ranks(
    folder: Path, states: Mapping[int, Mapping[str, Any]], files: Mapping[int, Path]
) -> tuple[int, int]:
    """Return the ZeRO stage and the number of ranks, which must be the same in all files."""
    found = {}
    for rank, state in states.items():
        count = state["partition_count"]
        counts = set(count) if isinstance(count, list) else {count}
        # The bfloat16 optimizer of older DeepSpeed records no stage; its files have the stage-1 layout.
        stage = state.get("zero_stage", 1)
        if len(counts) != 1 or not isinstance(state.get(PARTITIONS.get(stage, "")), list):
            raise InputError(
                f"{files[rank]} has ZeRO stage {stage} and {sorted(counts)} parts, expected stage 1, 2 or 3, and as "
                "many parts of every group; expert parallelism and weights swapped to NVMe cannot be read"
            )
        found.setdefault((stage, counts.pop()), []).append(files[rank].name)
    surplus = [files[rank].name for rank in files if rank >= max(world for _, world in found)]
    if len(found) > 1 or surplus:
        listed = "; ".join(
            f"stage {stage} of {world} ranks: {', '.join(names)}" for (stage, world), names in found.items()
        )
        raise InputError(
            f"{folder} mixes the files of several states ({listed}); remove those that do not belong there"
        )
    return next(iter(found))


def _frozen(shapes: Mapping[str, torch.Size], files: Sequence[Path]) -> dict[str, LazyTensor]:
    """Return the frozen parameters that were saved; stage 3 partitions them over all files."""
    if not shapes:
        return {}
    fragments = [read_state_entries(path, "frozen_param_fragments")[0] or {} for path in files]
    for path, fragment in zip(files, fragments, strict=True):
        lacking = [name for name in shapes if not isinstance(fragment, dict) or name not in fragment]
        if lacking:
            raise InputError(f"{path} lacks the frozen parameter {lacking[0]}; {_CURE}")
        _require_dense(path, {name: fragment[name] for name in shapes})
    for name, shape in shapes.items():
        if sum(fragment[name].numel() for fragment in fragments) < math.prod(shape):
            raise InputError(
                f"{files[0].parent}: the partitions of {name} do not fill its shape {tuple(shape)}; {_CURE}"
            )
    folder = files[0].parent
    stored = [
        store_zip(path, {name: fragment[name].detach() for name in shapes}, _checksums(path))
        for path, fragment in zip(files, fragments, strict=True)
    ]
    return {
        name: LazyTensor(
            tuple(LazyTensor((own[name].of_any_kind(),), torch.flatten) for own in stored),
            _shaped(folder, name, torch.Size(shape)),
        )
        for name, shape in shapes.items()
    }


def _weights(path: Path, state: Mapping[str, Any], stage: int) -> list[LazyTensor]:
    """Return the float32 weights of a rank, by group.

    A schedule-free optimizer (Defazio et al., arXiv:2405.15682) trains at points y between its average x and its
    iterates z. Its result is x, and the state holds y and z: x = y + (1 − 1/β)·(z − y).
    """
    weights: list[LazyTensor] = [*_stored(path, "weights", state[PARTITIONS[stage]])]
    optimizer = state.get(OPTIMIZER[stage])
    if not isinstance(optimizer, dict):
        return weights
    try:
        for number, group in enumerate(optimizer.get("param_groups", ())):
            if group.get("train_mode") and "z" in (found := optimizer["state"].get(number, {})):
                beta = group["betas"][0] if "betas" in group else group["momentum"]
                (iterate,) = _stored(path, f"z of group {number}", [found["z"]])
                weights[number] = _Elementwise((weights[number], iterate), partial(_average_of, weight=1 - 1 / beta))
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: the state of its optimizer is not as torch writes it; {_CURE}") from error
    return weights


def _require_same_step(files: Mapping[int, Path], states: Mapping[int, Mapping[str, Any]], stage: int) -> None:
    """Refuse the files of ranks whose optimizers have made different numbers of steps."""
    found: dict[int, Path] = {}
    for rank, state in states.items():
        optimizer = state.get(OPTIMIZER[stage])
        by_group = optimizer.get("state") if isinstance(optimizer, dict) else None
        groups = by_group.values() if isinstance(by_group, dict) else ()
        steps = [each["step"] for each in groups if isinstance(each, dict) and "step" in each]
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # an optimizer of another kind, or none
            found.setdefault(max(int(step) for step in steps), files[rank])
    if len(found) > 1:
        listed = ", ".join(f"{path.name} of step {step}" for step, path in found.items())
        raise InputError(f"{files[0].parent} mixes the files of several saves: {listed}; {_CURE}")


def _average_of(point: torch.Tensor, iterate: torch.Tensor, *, weight: float) -> torch.Tensor:
    used = min(len(point), len(iterate))  # one of them may lack the padding at the end
    return point[:used].lerp(iterate[:used], weight)


def _averages(states: Mapping[Path, Mapping[str, Any]], stage: int, num_groups: int) -> Partitions | None:
    """Return the partitions of the moving averages; None if one is missing."""
    parts = []
    for path, state in states.items():
        optimizer = state.get(OPTIMIZER[stage])
        by_group = optimizer.get("state", {}) if isinstance(optimizer, dict) else {}
        found = [by_group.get(group) for group in range(num_groups)] if isinstance(by_group, dict) else []
        own = [each["ema"] for each in found if isinstance(each, dict) and each.get("ema") is not None]
        if len(own) < num_groups:
            return None
        parts.append(_stored(path, "averages", own))
    return parts


def _check_sizes(state: ZeroState, parts: Partitions) -> None:
    """Refuse vectors whose lengths do not match their parameters."""
    world, expected, found = state.world_size, [], []
    if state.stage == 3:
        share = sum(math.ceil(shape.numel() / world) for shape in _joined(state.shapes).values())
        found, expected, slack = [sum(math.prod(part.shape) for part in rank) for rank in parts], [share] * world, 1
    elif {len(rank) for rank in parts} != {len(state.shapes)}:
        raise InputError(f"{state.folder} has other groups of weights than of names; {_CURE}")
    else:
        found = [sum(math.prod(rank[group].shape) for rank in parts) for group in range(len(state.shapes))]
        for shapes, paddings in zip(state.shapes, state.paddings, strict=True):
            expected.append(sum(shape.numel() for shape in shapes.values()) + sum(paddings))
        slack = 2 * world
    if not all(least <= length < least + slack for length, least in zip(found, expected, strict=True)):
        raise InputError(
            f"{state.folder} has partitions of {found} elements, and its parameters have {expected}; its files "
            f"are damaged, or of several states: {_CURE}"
        )
