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
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        blocks: Sequence[Iterable[nn.Module]] = (),
        *,
        backward: bool = False,
    ) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        has_streams = accelerator is not None and accelerator.type == device.type
        stream = torch.Stream(device=device) if has_streams else None
        members = [[part for module in block for part in module.modules()] for block in blocks]
        inside = {part for block in members for part in block}
        self._rest = _Waiting([part for part in module.modules() if part not in inside], device, stream)
        self._blocks = [_Waiting(block, device, stream) for block in members]
        self._backward, self._last = backward, -1

    def __enter__(self) -> "Offload":
        """Bring everything outside of the blocks to the device."""
        self._rest.come()
        return self

    def __exit__(self, *_: object) -> None:
        """Free all copies."""
        for waiting in (self._rest, *self._blocks):
            waiting.leave()

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
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # tied weights stay one tensor
        for named in (named for module in modules for named in (module._parameters, module._buffers)):
            held: dict[str, Any] = named
            for name, tensor in held.items():
                if tensor is not None and not tensor.requires_grad:
                    if id(tensor) not in seen:
                        seen[id(tensor)] = (
                            tensor,
                            tensor if stream is None else _mapped(tensor, torch.Tensor.pin_memory),
                        )
                    held[name] = seen[id(tensor)][1]
                    self._places.append((held, name, held[name]))

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


def _mapped(tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply `function` to a tensor: to the integers and scales of one in eight bits (`sgm.weights.quantize`)."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(_mapped(tensor.data, function), requires_grad=False)
    if is_traceable_wrapper_subclass(tensor):
        return transform_subclass(tensor, lambda _, part: function(part))
    return function(tensor)
