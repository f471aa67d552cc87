"""Load the resume state of another number of ranks, or of other tensor parallel shards, into a DeepSpeed engine.

DeepSpeed saves what each rank holds, as vectors of float32 weights and of each tensor of the optimizer's state:

- stages 1 and 2: the parameters of a group one after another, aligned to 2·W elements, in W slices, one per rank;
- stage 3: of each parameter of a group ceil(numel / W) elements, the r-th such piece on rank r.

So a saved state is a function (parameter, elements) → values, and each rank computes from it the vectors that it would
have saved itself. Files are memory-mapped: of those of other ranks, only the needed elements are read. With tensor
parallelism this holds for each shard of the layers; shards of another number are joined and divided again. At stage 0
every rank holds everything, and only tensor parallel shards can differ.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from sgm.conversion.trainers.zero import OPTIMIZER, PART_FILE, PARTITIONS
from sgm.util import InputError
from sgm.weights.files import shard_name
from sgm.weights.partition import Shard, join_shards, partition_of, take_shard, unsharded_shape

Shapes = Mapping[str, torch.Size]  # by name, in the order of the vectors

CURE = "restore it, or start a new run with args.resume=none (args.load may name the run folder)"
_PADDINGS = "param_alignment_paddings"
_WEIGHTS = None  # as a key of the optimizer's state: the float32 weights themselves


class Span(NamedTuple):
    """Elements of a parameter in a vector: `count` from `start` of the flattened parameter lie from `at` on."""

    name: str
    start: int
    count: int
    at: int


@dataclass(frozen=True)
class Vector:
    """What a rank holds of a group of parameters.

    Attributes:
        length: number of elements, with padding.
        names: of all parameters in the group.
        spans: the elements that are in the vector.
    """

    length: int
    names: tuple[str, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Layout:
    """How the trained parameters are divided over ranks.

    Attributes:
        stage: ZeRO stage, 1 to 3.
        world: ranks over which ZeRO divides them.
        shard: tensor parallel shard.
        groups: shapes of the parameters of each vector.
        paddings: at stages 1 and 2, unused elements after each parameter of each group.
        optimizer_groups: at stage 3, the parameter group of each vector; elsewhere each has its own.
    """

    stage: int
    world: int
    shard: Shard
    groups: tuple[Shapes, ...]
    paddings: tuple[tuple[int, ...], ...] = ()
    optimizer_groups: tuple[int, ...] = ()

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Shapes of all parameters."""
        return {name: shape for group in self.groups for name, shape in group.items()}

    @functools.cached_property
    def _begins(self) -> list[dict[str, int]]:
        """Where each parameter of each group begins, and under "" where the last one ends.

        That is in the slices of all ranks one after another at stages 1 and 2, and in the vector of a rank at stage 3.
        """
        paddings = self.paddings or tuple((0,) * len(group) for group in self.groups)
        found = []
        for group, padding in zip(self.groups, paddings, strict=True):
            sizes = [self._share(name) if self.stage == 3 else shape.numel() for name, shape in group.items()]
            used = [size + unused for size, unused in zip(sizes, padding, strict=True)]
            found.append(dict(zip((*group, ""), itertools.accumulate(used, initial=0), strict=True)))
        return found

    @functools.cached_property
    def numbers(self) -> Mapping[str, int]:
        """Number of the vector that has elements of each parameter."""
        return {name: number for number, group in enumerate(self.groups) for name in group}

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the vectors, which are the same on all ranks."""
        ends = [begins[""] for begins in self._begins]
        return tuple(ends) if self.stage == 3 else tuple(2 * math.ceil(end / (2 * self.world)) for end in ends)

    def _share(self, name: str) -> int:
        """Elements of a parameter on each rank but the last ones, at stage 3."""
        return math.ceil(self.shapes[name].numel() / self.world)

    def vectors(self, rank: int) -> list[Vector]:
        """Return the vectors of a rank."""
        held = [tuple(span for name in group if (span := self.span(name, rank)) is not None) for group in self.groups]
        return [
            Vector(length, tuple(group), spans)
            for length, group, spans in zip(self.lengths, self.groups, held, strict=True)
        ]

    def span(self, name: str, rank: int) -> Span | None:
        """Return the elements of a parameter that a rank holds; None if it holds none."""
        number, size = self.numbers[name], self.shapes[name].numel()
        begin, length = self._begins[number][name], self.lengths[number]
        if self.stage == 3:
            start = rank * self._share(name)
            count = min(self._share(name), size - start)
            return Span(name, start, count, begin) if count > 0 else None
        first = rank * length
        low, high = max(begin, first), min(begin + size, first + length)
        return Span(name, low - begin, high - low, low - first) if low < high else None

    def holders(self, span: Span) -> range:
        """Return the ranks that hold elements of a span."""
        number = self.numbers[span.name]
        if self.stage == 3:
            first, each = span.start, self._share(span.name)
        else:
            first, each = self._begins[number][span.name] + span.start, self.lengths[number]
        return range(first // each, (first + span.count - 1) // each + 1)


class _SavedShard:
    """The state of one tensor parallel shard, written by all ranks that hold it."""

    def __init__(self, state: "SavedState", index: int) -> None:
        self._folder, self._stage, self._read = state.folder, state.stage, state.read
        found = [match for name in state.files if (match := PART_FILE.fullmatch(name)) and int(match[2]) == index]
        self._files = {int(match[1]): match[0] for match in found if match[3] == "optim"}
        models = {int(match[1]): match[0] for match in found if match[3] == "model"}
        self.model: dict[str, Any] = self._read(models.get(0, shard_name(index, "pt")))
        if self._stage == 0:
            return
        world = len(self._files)
        counts = self.partition(0)["partition_count"] if 0 in self._files else None
        if {*(counts if isinstance(counts, list) else [counts])} != {world}:
            raise InputError(
                f"{self._folder} is divided over {counts} ranks, and has the files of {world}: groups of ZeRO other "
                f"than all ranks can only be resumed as they are; {CURE}"
            )
        self.layout = Layout(
            stage=self._stage,
            world=world,
            shard=Shard(index, state.size),
            groups=tuple({n: torch.Size(shape) for n, shape in group.items()} for group in self.model["param_shapes"]),
            paddings=tuple(tuple(each) for each in self.partition(0).get(_PADDINGS, ())),
        )
        # Of the ranks that are asked for: a new rank needs the files of few old ones.
        self._vectors = functools.cache(self.layout.vectors)

    def partition(self, rank: int) -> dict[str, Any]:
        """Return what the ZeRO optimizer of a rank saved."""
        return self._read(self._files[rank])["optimizer_state_dict"]

    def base(self, rank: int) -> dict[str, Any]:
        """Return the state of the torch optimizer of a rank."""
        return self.partition(rank)[OPTIMIZER[self._stage]]

    def states_of(self, span: Span) -> Iterator[dict[str, Any]]:
        """Yield the optimizer's states of the vectors that hold elements of a span; empty before the first step.

        Raises:
            InputError: a tensor in them is for more or fewer elements than the vector has.
        """
        for rank in self.layout.holders(span):
            yield self._checked_state(rank, self.layout.numbers[span.name])

    def _checked_state(self, rank: int, number: int) -> dict[str, Any]:
        state, length = self.base(rank)["state"].get(number, {}), self.layout.lengths[number]
        for key, value in state.items():
            shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            nested = not isinstance(value, torch.Tensor) and any(shapes)
            if nested or any(shape not in ((), (length,)) for shape in shapes):
                raise InputError(
                    f"{self._folder}: the optimizer's {key} has tensors of shapes {shapes[:3]} for {length} weights of "
                    "a rank, not a value per weight, and cannot be divided over other ranks; resume with as many ranks "
                    f"as before, {self.layout.world * self.layout.shard.size}, and their settings, or start a new run "
                    "with args.resume=none"
                )
        return state

    def whole_state(self, group: int, name: str) -> dict[str, Any]:
        """Return the state of a parameter in `sgm.training.optim.whole.WholeMatrices`, where it is kept whole."""
        rank = self.layout.holders(Span(name, 0, 1, 0))[0]
        held = [span.name for span in self._vectors(rank)[group].spans]
        return self.base(rank)["inner"][group]["state"].get(held.index(name), {})

    def elements(self, name: str, key: str | None, start: int, count: int) -> torch.Tensor:
        """Return elements of a flattened parameter: its weights, or a tensor `key` of the optimizer's state."""
        found, number = [], self.layout.numbers[name]
        for rank in self.layout.holders(Span(name, start, count, 0)):
            span = self.layout.span(name, rank)
            assert span is not None, "it holds elements"
            low, high = max(start, span.start), min(start + count, span.start + span.count)
            at = span.at + low - span.start
            found.append(self._vector(rank, number, key)[at : at + high - low])
        values = torch.cat(found)
        if len(values) != count:
            raise InputError(f"{self._folder} holds too few elements of {name}; {CURE}")
        return values

    def _vector(self, rank: int, number: int, key: str | None) -> torch.Tensor:
        if key is _WEIGHTS:
            return self.partition(rank)[PARTITIONS[self._stage]][number].detach()
        value = self.base(rank)["state"][number][key]
        return value if value.dim() else value.expand(self.layout.lengths[number])


class SavedState:
    """A saved state, from which any rank of any number of ranks can compute its own.

    Args:
        folder: of the state.
        files: names of its files.
        stage: its ZeRO stage.
        size: its number of tensor parallel shards.
        read: path → content of a file, with memory-mapped tensors.

    Raises:
        InputError: files are missing or contradict each other.
    """

    def __init__(
        self, folder: Path, files: Sequence[str], *, stage: int, size: int, read: Callable[[Path], Any]
    ) -> None:
        self.folder, self.files, self.stage, self.size = folder, tuple(files), stage, size
        self.read = functools.cache(lambda name: read(folder / name))
        self.shards = [_SavedShard(self, index) for index in range(size)]

    @property
    def model(self) -> Mapping[str, Any]:
        """Counters and learning rate, the same in all shards."""
        return self.shards[0].model

    def require_divisible(self, zero: Mapping[str, Any]) -> None:
        """Check that the optimizer's state can be divided over other ranks.

        Args:
            zero: the ``zero_optimization`` section of the run that resumes.

        Raises:
            InputError: it cannot.
        """
        for name in ("offload_optimizer", "offload_param"):
            if (zero.get(name) or {}).get("device") == "nvme":
                raise InputError(
                    f"deepspeed.zero_optimization.{name}.device is nvme, and the state in {self.folder} is to be "
                    "divided over other ranks, which files on a local disk cannot be; resume with device: cpu once"
                )
        for group in self.shards[0].layout.groups if self.stage else ():
            next(self.shards[0].states_of(Span(next(iter(group)), 0, 1, 0)))  # of a vector, which is enough

    def module(self, shard: Shard) -> dict[str, torch.Tensor]:
        """Return the tensors of the module as the ranks of a shard hold them; at stage 3 its buffers alone."""
        first = self.model
        names = first["buffer_names"] if self.stage == 3 else first["module"]
        return {
            name: self._resharded(name, [own.model["module"][name] for own in self.shards], shard) for name in names
        }

    def _resharded(self, name: str, tensors: Sequence[torch.Tensor], shard: Shard) -> torch.Tensor:
        """Return a shard of a tensor of which all saved shards are given."""
        if len(tensors) == shard.size:
            return tensors[shard.index]
        return take_shard(name, join_shards(name, tensors), shard)

    def unsharded(self, names: Sequence[str], shard: Shard) -> dict[str, Any]:
        """Return the state of the torch optimizer at stage 0.

        Args:
            names: of the parameters, in the order of the optimizer.
            shard: to return.

        Raises:
            InputError: other parameters were trained.
        """
        trained = self.model["module"].keys() - set(self.model["buffer_names"])
        if trained != set(names):
            differ = ", ".join(sorted(trained ^ set(names))[:3])
            raise InputError(f"{self.folder} was written by a run that trained other parameters: {differ}; {CURE}")
        states = [own.model["optimizer"]["state"] for own in self.shards]

        def resharded(index: int, name: str, key: str) -> Any:
            values = [state[index][key] for state in states]
            is_tensor = isinstance(values[0], torch.Tensor) and values[0].dim() > 0
            return _copied(self._resharded(name, values, shard) if is_tensor else values[0])

        state = {
            index: {key: resharded(index, name, key) for key in states[0].get(index, ())}
            for index, name in enumerate(names)
        }
        return {"state": state, "param_groups": _copied(self.model["optimizer"]["param_groups"])}

    def partition(self, layout: Layout, rank: int) -> dict[str, Any]:
        """Return what the ZeRO optimizer of a rank would have saved with this layout.

        Raises:
            InputError: other parameters were trained, or the state cannot be divided.
        """
        self._require_same_parameters(layout)
        vectors, shard = layout.vectors(rank), layout.shard
        saved, base = self.shards[0].partition(0), self.shards[0].base(0)
        states = {number: self._state(vector, shard) for number, vector in enumerate(vectors)}
        kept = {name: value for name, value in saved.items() if name != _PADDINGS}
        return {
            **kept,
            PARTITIONS[self.stage]: [self._filled(vector, _WEIGHTS, torch.float32, shard) for vector in vectors],
            OPTIMIZER[self.stage]: {
                **base,
                "state": {number: state for number, state in states.items() if state},
                "param_groups": _with_params(base["param_groups"], layout),
                **({"inner": self._inner(vectors)} if "inner" in base else {}),
            },
            "partition_count": [layout.world] * len(vectors) if self.stage < 3 else layout.world,
            **({_PADDINGS: [*map(list, layout.paddings)]} if layout.paddings else {}),
        }

    def _require_same_parameters(self, layout: Layout) -> None:
        saved, size = self.shards[0].layout, self.size
        for name in saved.shapes.keys() | layout.shapes.keys():
            then, now = saved.shapes.get(name), layout.shapes.get(name)
            if None in (then, now) or (
                unsharded_shape(name, then or (), size) != unsharded_shape(name, now or (), layout.shard.size)
            ):
                raise InputError(
                    f"{self.folder} was written by a run that trained {name} with shape {then and tuple(then)}, and "
                    f"this one trains it with {now and tuple(now)}; {CURE}"
                )

    def _state(self, vector: Vector, shard: Shard) -> dict[str, Any]:
        """Return the optimizer's state of a vector.

        What is not a value per element is the same on all ranks. Some optimizers keep one number for a vector of zeros,
        which the others have as values.
        """
        own = self.shards[0]
        spans = vector.spans or (Span(vector.names[0], 0, 1, 0),)
        if self.size != shard.size:  # elements of other shards count differently
            spans = [Span(span.name, 0, own.layout.shapes[span.name].numel(), 0) for span in spans]
        states = [state for span in spans for state in own.states_of(span)]
        result = {}
        for key in states[0]:
            tensors = [state[key] for state in states if isinstance(state[key], torch.Tensor)]
            by_element = next((tensor for tensor in tensors if tensor.dim() > 0), None)
            if by_element is None:
                result[key] = _copied(states[0][key])
            else:
                result[key] = self._filled(vector, key, by_element.dtype, shard)
        return result

    def _filled(self, vector: Vector, key: str | None, dtype: torch.dtype, shard: Shard) -> torch.Tensor:
        values = torch.zeros(vector.length, dtype=dtype)
        for span in vector.spans:
            values[span.at : span.at + span.count] = self._elements(span, key, shard)
        return values

    def _elements(self, span: Span, key: str | None, shard: Shard) -> torch.Tensor:
        name, same = span.name, self.size == shard.size
        if same or partition_of(name) is None:
            return self.shards[shard.index if same else 0].elements(name, key, span.start, span.count)
        shapes = [own.layout.shapes[name] for own in self.shards]
        parts = [
            own.elements(name, key, 0, shape.numel()).view(shape)
            for own, shape in zip(self.shards, shapes, strict=True)
        ]
        return self._resharded(name, parts, shard).flatten()[span.start : span.start + span.count]

    def _inner(self, vectors: Sequence[Vector]) -> list[dict[str, Any]]:
        """Return the states of the optimizers in `WholeMatrices`; a vector of padding has a stand-in without state."""
        own = self.shards[0]
        result = []
        for number, vector in enumerate(vectors):
            held = [own.whole_state(number, span.name) for span in vector.spans]
            groups = own.base(0)["inner"][number]["param_groups"]
            (group,) = groups
            result.append(
                {
                    "state": {index: _copied(state) for index, state in enumerate(held) if state},
                    "param_groups": [{**group, "params": list(range(max(1, len(held))))}],
                }
            )
        return result


def _copied(value: Any) -> Any:
    """Return a value with contiguous tensors in memory: those of a file may go with it, and a shard may be a view."""
    copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    return pytree.tree_map_only(torch.Tensor, copy, value)


def _with_params(groups: Sequence[Mapping[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """Return the groups of the torch optimizer with the numbers of their vectors."""
    numbers = layout.optimizer_groups or tuple(range(len(layout.groups)))
    return [
        {**_copied(group), "params": [vector for vector, own in enumerate(numbers) if own == number]}
        for number, group in enumerate(groups)
    ]


def layout_of(engine: Any, *, world: int, shard: Shard) -> Layout:
    """Return how a DeepSpeed engine at ZeRO stage 1, 2 or 3 divides its parameters.

    Args:
        engine: of DeepSpeed.
        world: ranks over which ZeRO divides them.
        shard: tensor parallel shard of this rank.

    Raises:
        InputError: its optimizer is none of those that this module knows.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    counts = getattr(optimizer, "partition_count", None)
    is_known = hasattr(optimizer, "sub_group_to_group_id" if stage == 3 else "round_robin_bit16_groups")
    if not is_known or {*(counts if isinstance(counts, list) else [counts])} != {world}:
        raise InputError(
            f"DeepSpeed divides this run over {counts} of {world} ranks with {type(optimizer).__name__}, and only the "
            "division over all ranks can be resumed on another number of ranks; remove "
            "deepspeed.zero_optimization.mics_shard_size and deepspeed.data_types, or start on as many ranks as before"
        )
    groups = engine._get_zero_param_shapes()  # what DeepSpeed saves as param_shapes
    of_vectors = range(len(groups))
    return Layout(
        stage=stage,
        world=world,
        shard=shard,
        groups=tuple({name: torch.Size(shape) for name, shape in group.items()} for group in groups),
        paddings=tuple(tuple(each) for each in getattr(optimizer, "round_robin_bit16_padding", ())),
        optimizer_groups=tuple(optimizer.sub_group_to_group_id[i] for i in of_vectors) if stage == 3 else (),
    )


def load_repartitioned(engine: Any, saved: SavedState, *, rank: int, world: int, shard: Shard) -> None:
    """Load a state of other ranks into a new DeepSpeed engine. Collective: all ranks call it.

    Args:
        engine: of DeepSpeed.
        saved: the state.
        rank: of this process among those over which ZeRO divides the state.
        world: their number.
        shard: tensor parallel shard of this process.

    Raises:
        InputError: the state does not fit.
    """
    stage, optimizer = saved.stage, engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # weights that stay whole are divided too
    engine.load_module_state_dict({"module": saved.module(shard)}, strict=False)
    if stage == 0:
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.load_state_dict(saved.unsharded(order, shard))
    else:
        own = saved.partition(layout_of(engine, world=world, shard=shard), rank)
        states = [*[None] * rank, own]
        optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    engine.lr_scheduler.load_state_dict(saved.model["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.model[name])
