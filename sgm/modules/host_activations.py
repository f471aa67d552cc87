"""Tensors that autograd saves for the backward pass wait in host memory, and come back when it needs them.

Memory is copied once, whatever views of it are saved. Copies are exact, so gradients are bit-equal. On an accelerator
they run on a stream of their own, to and from pinned memory, while the network computes: in the backward pass, which
runs through the tensors in reverse, earlier tensors are on their way while a later one is used.
"""

import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sgm.util import default

SMALLEST = 2**20  # bytes; smaller tensors stay, since a copy takes its time whatever its size


class HostActivations:
    """Context in which what is saved for the backward pass goes to host memory, except weights and small tensors.

    With checkpointed blocks these are the inputs of the blocks.

    Args:
        device: of the network. On a CPU copies are made as well, which saves nothing.
        host: where tensors wait; for estimates any device whose memory is not counted.
        smallest: bytes from which on a tensor goes; `SMALLEST` unless given.
    """

    def __init__(self, device: torch.device, host: torch.device, *, smallest: int | None = None) -> None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        has_streams = accelerator is not None and accelerator.type == device.type
        self._device, self._host, self._smallest = device, host, default(smallest, SMALLEST)
        self._stream = torch.Stream(device=device) if has_streams else None
        self._gone: dict[int, tuple[int, weakref.ref[_Waiting]]] = {}  # storage → version of its values, copy
        self._leaving: deque[tuple[Any, torch.UntypedStorage]] = deque()  # on the way, and not yet to be reused
        self._order: list[weakref.ref[_Waiting]] = []
        self._largest = 0
        self._hooks: Any = None

    def __enter__(self) -> "HostActivations":
        """Begin a forward pass."""
        self._order = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End the forward pass; its graph keeps the copies."""
        self._hooks.__exit__(*error)
        self._finish_leaving(0)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not self._goes(tensor):
            return tensor
        storage = tensor.untyped_storage()
        version, known = self._gone.get(storage._cdata, (None, None))
        waiting = None if known is None or version != tensor._version else known()
        if waiting is None:
            waiting = self._send(tensor, storage)
            self._gone[storage._cdata] = tensor._version, weakref.ref(waiting)
            weakref.finalize(storage, self._gone.pop, storage._cdata, None).atexit = False
        return waiting, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def _goes(self, tensor: torch.Tensor) -> bool:
        if tensor.device != self._device or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return False
        if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:  # stored weights
            return False
        return tensor.untyped_storage().nbytes() >= self._smallest and not (tensor.is_conj() or tensor.is_neg())

    def _send(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> "_Waiting":
        size = storage.nbytes()
        self._largest = max(self._largest, size)
        whole = tensor.detach().as_strided((size // tensor.element_size(),), (1,), 0)
        host = torch.empty_like(whole, device=self._host, pin_memory=self._stream is not None)
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream or nullcontext():
            host.copy_(whole, non_blocking=True)
        if self._stream is not None:
            self._leaving.append((self._stream.record_event(), storage))
            self._finish_leaving(2 * self._largest)
        waiting = _Waiting(host, self._device, self._stream, self._order)
        self._order.append(weakref.ref(waiting))
        return waiting

    def _finish_leaving(self, room: int) -> None:
        """Let memory go, once copied, until no more than `room` bytes are on the way."""
        size = sum(storage.nbytes() for _, storage in self._leaving)
        while self._leaving and size > room:
            event, storage = self._leaving.popleft()
            size -= storage.nbytes()
            torch.accelerator.current_stream(self._device).wait_event(event)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        waiting, dtype, offset, size, stride = packed
        whole = waiting.come()
        _start(waiting.earlier(), self._largest)
        return whole.view(dtype).as_strided(size, stride, offset)


class _Waiting:
    """The values of a storage in host memory, and from the first use on a copy of them on the device.

    Args:
        host: all elements of the storage.
        device: of the copy.
        stream: that copies; None copies at once.
        order: of the copies of a forward pass, of which this becomes the last.
    """

    def __init__(
        self, host: torch.Tensor, device: torch.device, stream: Any, order: list["weakref.ref[_Waiting]"]
    ) -> None:
        self._host, self._device, self._stream = host, device, stream
        self._order, self._number = order, len(order)
        self._copy: torch.Tensor | None = None
        self._arrival: Any = None

    def earlier(self) -> Iterable["_Waiting"]:
        """Yield what the forward pass saved before this, the last first, and is still needed."""
        for number in range(self._number - 1, -1, -1):
            if (waiting := self._order[number]()) is not None:
                yield waiting

    def start(self) -> int:
        """Start to copy to the device, unless that was done; return the number of bytes."""
        if self._copy is None:
            self._copy = torch.empty_like(self._host, device=self._device, pin_memory=False)
            if self._stream is not None:
                # Memory belongs to the stream that computes: work on it that used this memory must have ended.
                self._stream.wait_stream(torch.accelerator.current_stream(self._device))
            with self._stream or nullcontext():
                self._copy.copy_(self._host, non_blocking=True)
            self._arrival = None if self._stream is None else self._stream.record_event()
        return self._copy.nbytes

    def come(self) -> torch.Tensor:
        """Return the copy on the device."""
        self.start()
        self._wait()
        assert self._copy is not None
        return self._copy

    def _wait(self) -> None:
        if self._arrival is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._arrival)
            self._arrival = None

    def __del__(self) -> None:
        """Let the computing stream wait before it reuses the memory of a copy that nobody took."""
        self._wait()


def _start(waiting: Iterable[_Waiting], room: int) -> None:
    """Start to copy up to `room` bytes."""
    for each in waiting:
        room -= each.start()
        if room <= 0:
            return
