"""Run a module on meta tensors: count live bytes, and the bytes sent by a rank.

Meta tensors have shapes and dtypes but no data, so the real code runs at full size without memory. Every copy made by
an operator is counted. Not counted: workspaces of kernels, buffers of NCCL, unused memory of the allocator. Attention
is a fused kernel that keeps one number for each query, unless a run asks for plain products.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeWork  # a completed transfer
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import sgm.distributed
from sgm.checks.cost import Cost, cost_of
from sgm.distributed import Mesh
from sgm.util import instantiate_from_config, without_allocating, without_compiler
from sgm.weights.offload import pinned_pieces
from sgm.weights.quantize import num_bytes, plain_parts

_COPY_INTO = torch.ops.aten.copy_.default
DEVICE = torch.device("meta")  # where the module runs
HOST = torch.device("cpu")  # its tensors are allocated, but never written, so that they take no memory
AXES = {"tensor": "layers", "sequence": "tokens", "cfg": "guidance", "context": "VAE"}  # names in reports


@dataclass(frozen=True)
class Usage:
    """Memory and traffic of a module on one rank.

    Attributes:
        weights: number of parameters.
        trained: number of trained parameters.
        peak: peak of the live bytes of other tensors, without gradients of weights.
        sent: name in `AXES` → bytes sent.
        result: bytes of the module's result.
        stored: bytes of the parameters, as they are stored.
        host: peak of the live bytes on `HOST`, as `pinned_bytes`.
        pinned: bytes of the frozen parameters in pinned memory, block by block; see `sgm.weights.offload`.
        kept: bytes of `peak` that blocks of a deep network keep for their backward pass, freed block by block.
        messages: name in `AXES` → number of transfers.
        cost: of the kernels.
    """

    weights: float
    trained: float = 0
    peak: float = 0
    sent: Mapping[str, float] = field(default_factory=dict)
    result: float = 0
    stored: float = 0
    host: float = 0
    pinned: float = 0
    kept: float = 0
    messages: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


def pinned_bytes(size: float) -> int:
    """Return what a tensor of `size` bytes takes in pinned memory: torch's allocator rounds to a power of two."""
    return 1 << (math.ceil(size) - 1).bit_length() if size > 0 else 0


_results: dict[Any, tuple[Any, Cost | None]] = {}  # call → its result, both as `_described`, and its cost


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Cost | None]:
    """Return ``operator(*args, **kwargs)`` and its cost; a call like an earlier one is not computed again.

    Torch finds the shapes of many results in Python, which takes milliseconds, and the layers of a network or VAE make
    the same calls again and again. Views share memory and are left to torch.
    """
    if operator is _COPY_INTO and args[1].is_meta:  # into host memory: it gets no values
        return args[0], cost_of(operator, args, kwargs, args[0])
    kind = _kind(operator)
    call = None if kind == "other" else _described((operator, *args, *kwargs.items()))
    if call is None:
        made = operator(*args, **kwargs)
        return made, cost_of(operator, args, kwargs, made)
    if (known := _results.get(call)) is not None:
        made, cost = known
        return _made_like(made) if kind == "makes" else kwargs.get("out", args[0]), cost
    made = operator(*args, **kwargs)
    cost = cost_of(operator, args, kwargs, made)
    if kind == "makes":
        is_alike = not _storages(made) & _storages((*args, *kwargs.values()))  # some views pretend to be none
    else:
        is_alike = call == _described((operator, *args, *kwargs.items()))  # an empty `out` is made larger
    if is_alike and (described := _described(made)) is not None:
        _results[call] = described, cost
    return made, cost


@cache
def _kind(operator: Any) -> Literal["makes", "writes", "other"]:
    """Return whether an operator makes new tensors, or writes its first argument or `out` and returns that."""
    schema = operator._schema
    if schema.is_mutable:
        plain = len(schema.returns) == 1 and torch.Tag.inplace_view not in operator.tags
        return "writes" if plain else "other"
    makes = all(str(result.type) == "Tensor" and result.alias_info is None for result in schema.returns)
    return "makes" if makes else "other"


def _storages(value: Any) -> set[int]:
    """Return the storages of all tensors in arguments or a result."""
    return {x.untyped_storage()._cdata for x in _tensors(value)}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _described(value: Any) -> Any:
    """Return what the shapes of a result depend on, of arguments or a result; None if not all tensors are meta ones."""
    if isinstance(value, torch.Tensor):
        is_plain = value.is_meta and type(value) in (torch.Tensor, nn.Parameter)
        return (value.shape, value.stride(), value.dtype) if is_plain else None
    if isinstance(value, (tuple, list)):
        parts = tuple(_described(part) for part in value)
        return None if None in parts else parts
    return type(value), value  # 1, 1.0 and True are equal


def _made_like(described: tuple[Any, ...]) -> Any:
    """Return what is `described`: a meta tensor, None for a gradient that is not needed, or a tuple of these."""
    if described == _described(None):
        return None
    if isinstance(described[0], torch.Size):
        return torch.empty_strided(*described[:2], dtype=described[2], device=DEVICE)
    return tuple(map(_made_like, described))


class LiveBytes(TorchDispatchMode):
    """Count the live bytes of storages that operators allocate.

    Args:
        host: device whose tensors stand for host memory, and are counted apart.

    Attributes:
        live: current bytes.
        peak: largest `live` so far.
        host: bytes in host memory, as `pinned_bytes`.
        host_peak: largest `host` so far.
        cost: of the kernels so far.
    """

    def __init__(self, host: torch.device | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.host = self.host_peak = 0
        self.cost = Cost()
        self._host = host
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operator asks torch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, cost = _run(func, args, kwargs or {})
        if cost is not None:
            self.cost = self.cost.plus(cost)
        given = None
        for x in _tensors(made):
            if (key := (storage := x.untyped_storage())._cdata) not in self._known:
                if given is None:  # weights were made before counting began, and results may be views of them
                    given = _storages((*args, *(kwargs or {}).values()))
                if key not in given:
                    self._add(x, storage, key)
        self.peak, self.host_peak = max(self.peak, self.live), max(self.host_peak, self.host)
        return made

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before."""
        for x in tensors:
            if (key := (storage := x.untyped_storage())._cdata) not in self._known:
                self._add(x, storage, key)
        self.peak = max(self.peak, self.live)

    def once(self, function: Callable[..., torch.Tensor], key_of: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        """Return `function`, run once for each key: a call with a known key takes and returns as much memory.

        A call that leaves more or less behind than its result is no such call, and the next one is run as well.
        """
        # key → bytes beside those before the call, the result's shape, and the cost
        known: dict[Any, tuple[int, dict[str, Any], Cost]] = {}

        def run(*args: Any) -> torch.Tensor:
            key, before, highest, spent = key_of(*args), self.live, self.peak, self.cost
            if key in known:
                more, like, cost = known[key]
                made = torch.empty(**like)
                self.cost = spent.plus(cost)
            else:
                self.peak = before
                made = function(*args)
                more = self.peak - before
                if self.live - before == made.untyped_storage().nbytes() == made.nbytes:
                    like = {"size": made.shape, "dtype": made.dtype, "device": made.device}
                    known[key] = more, like, self.cost.plus(spent, -1)
            self.peak = max(highest, before + more)
            return made

        return run

    def _add(self, x: torch.Tensor, storage: torch.UntypedStorage, key: int) -> None:
        self._known.add(key)
        place, size = ("host", pinned_bytes(storage.nbytes())) if x.device == self._host else ("live", storage.nbytes())
        setattr(self, place, getattr(self, place) + size)
        weakref.finalize(storage, self._forget, key, size, place)

    def _forget(self, key: int, size: int, place: str) -> None:
        self._known.discard(key)
        setattr(self, place, getattr(self, place) - size)


class CountingGroup(dist.ProcessGroup):
    """Mock process group without other ranks: counts the bytes sent by rank zero and receives nothing.

    Args:
        size: ranks.
        add: called with the bytes of each transfer.
    """

    def __init__(self, size: int, add: Callable[[float], None]) -> None:
        super().__init__(0, size)  # pyright: ignore[reportCallIssue] (torch's stub)
        self._num, self._add = size, add

    def allreduce(self, tensors: Any, *_: Any) -> Any:  # noqa: D102 (ProcessGroup's interface, like all below)
        self._add(2 * (self._num - 1) / self._num * sum(x.nbytes for x in tensors))  # ring all-reduce
        return FakeWork()

    def allgather(self, _: Any, tensors: Any, *__: Any) -> Any:  # noqa: D102
        self._add((self._num - 1) * sum(x.nbytes for x in tensors))
        return FakeWork()

    def alltoall_base(self, _: Any, tensor: Any, __: Any, sizes: Any, *___: Any) -> Any:  # noqa: D102
        own = sizes[0] / sum(sizes) if sizes else 1 / self._num
        self._add((1 - own) * tensor.nbytes)
        return FakeWork()

    all_to_all_single: Any = alltoall_base  # the name since torch 2.13

    def broadcast(self, tensors: Any, options: Any) -> Any:  # noqa: D102
        self._add((options.rootRank == 0) * sum(x.nbytes for x in tensors))
        return FakeWork()

    def send(self, tensors: Any, *_: Any) -> Any:  # noqa: D102
        self._add(sum(x.nbytes for x in tensors))
        return FakeWork()

    def recv(self, *_: Any) -> Any:  # noqa: D102
        return FakeWork()


@contextmanager
def simulated_ranks(mesh: Mesh) -> Iterator[tuple[Counter, Counter]]:
    """Context in which this process acts as the first rank of `mesh`; yields its bytes and transfers by axis."""
    sent: Counter = Counter()
    messages: Counter = Counter()

    def make_group(axis: str, size: int) -> dist.ProcessGroup:
        def add(num: float) -> None:
            sent.update({AXES[axis]: num})
            messages.update([AXES[axis]])

        return CountingGroup(size, add)

    with sgm.distributed.simulate(mesh, make_group):
        yield sent, messages


def build(section: Mapping[str, Any]) -> Any:
    """Build the object of a ``{target, params}`` section on the meta device."""
    with without_allocating():
        return instantiate_from_config(section)


def usage(
    module: Any,
    work: Callable[[Any], torch.Tensor],
    dtype: torch.dtype,
    mesh: Mesh,
    *,
    trained: frozenset[str] | None = None,
    prepare: Callable[[Any, LiveBytes], None] = lambda *_: None,
    fused_attention: bool = True,
) -> Usage:
    """Run `work` with a module on meta tensors and count memory and traffic.

    Args:
        module: built within `simulated_ranks(mesh)`, see `build`; gets weights in `dtype`.
        work: makes the inputs, runs the module, and returns its result; with `trained`, a backward pass follows.
        dtype: of the weights.
        mesh: sizes of the groups of ranks.
        trained: names of the trained parameters; None for a run without gradients.
        prepare: called with the module and the count, before anything is counted.
        fused_attention: False counts the scores of all pairs of tokens, as ``args.attention: math`` has them.
    """
    learned = trained or frozenset()
    with simulated_ranks(mesh) as (sent, messages), _fused_attention() if fused_attention else nullcontext():
        _set_weights(module, dtype, learned)
        module.train(trained is not None)
        live = LiveBytes(HOST)
        prepare(module, live)
        stored = num_bytes([module])
        pinned = _pinned_blocks(module)
        with live, torch.set_grad_enabled(trained is not None), without_compiler():
            out = work(module)
            result = out.nbytes
            if out.requires_grad:
                out.float().square().mean().backward()
    weights, num_trained = num_parameters(module, learned)
    return Usage(
        weights,
        num_trained,
        live.peak,
        dict(sent),
        result,
        stored,
        live.host_peak,
        pinned,
        messages=dict(messages),
        cost=live.cost,
    )


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Context in which attention on meta tensors is a fused kernel, for which torch has plain products there."""
    plain = functional.scaled_dot_product_attention

    def fused(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> torch.Tensor:
        more |= {"attn_mask": attn_mask}
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, **more)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _pinned_blocks(module: Any) -> int:
    """Return the bytes of the frozen parameters in pinned memory, if each block waits alone."""
    blocks = [nn.ModuleList(block) for block in getattr(module, "blocks", ()) if isinstance(block, list | tuple)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    found = 0
    for parameters in (rest, *(block.parameters() for block in blocks)):
        frozen = (parameter for parameter in parameters if not parameter.requires_grad)
        found += sum(pinned_pieces([part.nbytes for parameter in frozen for part in plain_parts(parameter)])[0])
    return found


def num_parameters(module: nn.Module, trained: frozenset[str]) -> tuple[int, int]:
    """Return the numbers of all parameters and of trained parameters."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in trained)


def _set_weights(module: nn.Module, dtype: torch.dtype, trained: frozenset[str]) -> None:
    """Replace weights and buffers by meta tensors of `dtype`."""
    for prefix, part in module.named_modules():
        for name, weight in part._parameters.items():
            if weight is None:
                continue
            learns = f"{prefix}.{name}".lstrip(".") in trained
            new = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=DEVICE), requires_grad=learns)
            if learns:  # gradients are counted with the optimizer state
                new.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=kind, device=DEVICE)
