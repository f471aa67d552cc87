"""Frozen weights that wait in host memory and are on the device while they are used.

A module comes and leaves as a whole, or its blocks pass through the device one by one: while a block runs, the next one
is copied beside it, from pinned memory and on a stream of its own. The weights are frozen, so that leaving frees the
copies and moves nothing back. Values are those of the host: results are bit-equal.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

_ALIGNMENT = 256  # bytes: of each tensor in pinned memory


@contextmanager
def without_frozen(module: nn.Module) -> Iterator[None]:
    """Context in which `module` has its trained parameters only: frozen ones are not moved, broadcast or sharded."""
    frozen = []
    for part in module.modules():
        held: dict[str, Any] = part._parameters
        for name, tensor in held.items():
            if tensor is not None and not tensor.requires_grad:
                frozen.append((held, name, tensor))
                held[name] = None
    try:
        yield
    finally:
        for held, name, tensor in frozen:
            held[name] = tensor


class Offload:
    """The frozen weights of a module in host memory, of which the device holds those in use.

    Args:
        module: its frozen weights are on the CPU; the others stay where they are.
        device: where it runs. A CPU gets copies as well, which saves nothing.
        blocks: the modules of each block, in the order in which they run; the device holds two blocks at most. Without
            blocks the whole module comes at once.
        backward: blocks run again in reverse order, in a backward pass.
        stays: what is outside of the blocks stays on the device after its use, except in the context of `leaving`.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        blocks: Sequence[Iterable[nn.Module]] = (),
        *,
        backward: bool = False,
        stays: bool = False,
    ) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        has_streams = accelerator is not None and accelerator.type == device.type
        stream = torch.Stream(device=device) if has_streams else None
        members = [[part for module in block for part in module.modules()] for block in blocks]
        inside = {part for block in members for part in block}
        self._rest = _Waiting([part for part in module.modules() if part not in inside], device, stream)
        self._blocks = [_Waiting(block, device, stream) for block in members]
        self._backward, self._last, self._stays = backward, -1, stays

    def __enter__(self) -> "Offload":
        """Bring everything outside of the blocks to the device."""
        self._rest.come()
        return self

    def __exit__(self, *_: object) -> None:
        """Free all copies, except those that stay."""
        for waiting in (*(() if self._stays else (self._rest,)), *self._blocks):
            waiting.leave()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Context in which others need the room: the weights leave, and do so again after each use."""
        stays, self._stays = self._stays, False
        self._rest.leave()
        try:
            yield
        finally:
            self._stays = stays

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Context in which a block is on the device, and the next one on its way."""
        self.bring(index)
        try:
            yield
        finally:
            self.free(index)

    def bring(self, index: int) -> None:
        """Begin the context of `block`."""
        self._blocks[index].come()
        following = self._following(index)
        if following is not None and following != index:
            self._blocks[following].start()
        self._last = index

    def _following(self, index: int) -> int | None:
        """Return the block after `index`: another pass may begin after the last one, or a backward pass at it."""
        num = len(self._blocks)
        if not self._backward:
            return (index + 1) % num
        reverse = index == self._last - 1 or index == self._last == num - 1
        found = index - 1 if reverse else index + 1
        return found if 0 <= found < num else None

    def free(self, index: int) -> None:
        """End the context of `block`."""
        self._blocks[index].leave()


class _Waiting:
    """The parameters and buffers of some modules, without those of other modules inside them.

    Args:
        modules: of which the tensors wait.
        device: where their copies go.
        stream: on which they are copied, from pinned memory; None copies at once.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, stream: torch.Stream | None) -> None:
        self._device, self._stream = device, stream
        self._places: list[tuple[dict[str, Any], str, torch.Tensor]] = []  # where the copies belong
        self._copies: dict[int, torch.Tensor] = {}  # id of a tensor of the host → its copy
        self._arrival: torch.Event | None = None
        named: list[dict[str, Any]] = [held for module in modules for held in (module._parameters, module._buffers)]
        for held in named:
            frozen = [name for name, tensor in held.items() if tensor is not None and not tensor.requires_grad]
            self._places += [(held, name, held[name]) for name in frozen]
        if stream is not None:
            waiting = {id(tensor): tensor for _, _, tensor in self._places}  # tied weights stay one tensor
            pinned = dict(zip(waiting, _pinned(list(waiting.values())), strict=True))
            self._places = [(held, name, pinned[id(tensor)]) for held, name, tensor in self._places]
            for held, name, tensor in self._places:
                held[name] = tensor

    def start(self) -> None:
        """Start to copy, unless that was done."""
        if self._copies:
            return
        pairs = []

        def make(part: torch.Tensor) -> torch.Tensor:
            copy = torch.empty_like(part, device=self._device)
            pairs.append((copy, part))
            return copy

        for host in {id(host): host for _, _, host in self._places}.values():
            self._copies[id(host)] = _mapped(host, make)
        if self._stream is not None:
            # Memory belongs to the stream that computes: work on it that used this memory before must have ended.
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream or nullcontext():
            for copy, part in pairs:
                copy.copy_(part, non_blocking=True)
        self._arrival = None if self._stream is None else self._stream.record_event()

    def come(self) -> None:
        """Put the copies into the modules."""
        self.start()
        self._wait()
        for held, name, host in self._places:
            held[name] = self._copies[id(host)]

    def leave(self) -> None:
        """Put the tensors of the host into the modules, and free the copies."""
        self._wait()
        for held, name, host in self._places:
            held[name] = host
        self._copies = {}

    def _wait(self) -> None:
        """Let the computing stream wait for the copies, before it uses them or their memory."""
        if self._arrival is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._arrival)
            self._arrival = None


def pinned_pieces(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Plan pinned memory for tensors of some bytes: the bytes of its pieces, and piece and first byte of each tensor.

    torch's allocator rounds what it pins to powers of two, which tensor by tensor would be up to twice the memory. So
    pieces are powers of two, up to a GiB, that are filled from the largest tensor to the smallest.
    """
    needed = [max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT for size in sizes]
    left, pieces, used, places = sum(needed), [], [], [(0, 0)] * len(needed)
    for index in sorted(range(len(needed)), key=lambda index: -needed[index]):
        size = needed[index]
        piece = next((number for number, total in enumerate(pieces) if used[number] + size <= total), len(pieces))
        if piece == len(pieces):
            pieces.append(max(1 << (size - 1).bit_length(), min(1 << (left.bit_length() - 1), 2**30)))
            used.append(0)
        places[index] = piece, used[piece]
        used[piece] += size
        left -= size
    return pieces, places


def _pinned(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies of tensors in pinned memory."""
    parts: list[torch.Tensor] = []
    for tensor in tensors:
        _mapped(tensor, lambda part: parts.append(part) or part)
    sizes, places = pinned_pieces([part.nbytes for part in parts])
    pieces, following = [_pinned_memory(size) for size in sizes], iter(places)

    def copied(part: torch.Tensor) -> torch.Tensor:
        piece, start = next(following)
        return pieces[piece][start : start + part.nbytes].view(part.dtype).view(part.shape).copy_(part)

    return [_mapped(tensor, copied) for tensor in tensors]


def _pinned_memory(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _mapped(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `function` to a tensor: to the integers and scales of one in eight bits (`sgm.weights.quantize`)."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(_mapped(tensor.data, function), requires_grad=False)
    if is_traceable_wrapper_subclass(tensor):
        return transform_subclass(tensor, lambda _, part: function(part))
    return function(tensor)
