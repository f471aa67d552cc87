"""Saves that training does not wait for: copies in host memory, written by a thread of each rank.

Training waits while its state is copied. Then the thread writes the copies, and tells rank zero through the store of
the process groups that its files are complete; that of rank zero makes the checkpoint the newest when all are. Threads
have no collectives, which could meet those of training in another order on another rank.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import sgm.distributed
from sgm.log import get_logger
from sgm.util import RunError

SETTLE_S = 30  # seconds for the other ranks to finish a save, when training has failed

logger = get_logger(__name__)


class HostMemory:
    """Copies of tensors in host memory, which the next save overwrites.

    Memory that is new to a process takes several times as long to write to, and page-locked memory, into which
    accelerators copy, even longer to get. So it is kept.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self._used: list[tuple[tuple[int, bool], torch.UntypedStorage]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all copies, those to be overwritten included."""
        kept = [(key, storage) for key, storages in self._free.items() for storage in storages]
        return sum(storage.nbytes() for _, storage in [*kept, *self._used])

    def release(self) -> None:
        """Let the next copies overwrite the former ones."""
        for key, storage in self._used:
            self._free.setdefault(key, []).append(storage)
        self._used.clear()

    def copy(self, content: Any) -> Any:
        """Return a copy of nested dictionaries and sequences with their tensors; files of both are equal.

        Tensors that share memory share it in the copy.
        """
        return self._copy(content, {}, {})

    def copy_dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor without the rest of the memory that it is a view of."""
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(self._take(tensor.nbytes, pinned=tensor.device.type != "cpu"))
        return copied.view(tensor.size()).copy_(tensor.detach())

    def _copy(self, content: Any, copies: dict[int, Any], storages: dict[int, torch.UntypedStorage]) -> Any:
        def inner(value: Any) -> Any:
            return self._copy(value, copies, storages)

        if id(content) not in copies:  # ids stay those of these objects, which `content` holds
            if isinstance(content, torch.Tensor):
                copied: Any = self._copy_tensor(content, copies, storages)
            elif type(content) in (list, tuple):
                copied = type(content)(map(inner, content))
            elif isinstance(content, Mapping):
                copied = copy.copy(content)
                for key, value in content.items():
                    copied[key] = inner(value)  # pyright: ignore[reportIndexIssue] (states have dictionaries)
            else:
                copied = copy.deepcopy(content)
            copies[id(content)] = copied
        return copies[id(content)]

    def _copy_tensor(
        self, tensor: torch.Tensor, copies: dict[int, Any], storages: dict[int, torch.UntypedStorage]
    ) -> torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):  # of an optimizer that stores fewer bits
            names, context = tensor.__tensor_flatten__()
            inner = {name: self._copy(getattr(tensor, name), copies, storages) for name in names}
            return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
        source = tensor.untyped_storage()
        if source._cdata not in storages:
            storage = self._take(source.nbytes(), pinned=source.device.type != "cpu")
            storages[source._cdata] = storage.copy_(source)
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(storages[source._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        copied = nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied
        for mark, value in vars(tensor).items():  # written to files as well; DeepSpeed's ZeRO 3 has some
            setattr(copied, mark, self._copy(value, copies, storages))
        return copied.requires_grad_(tensor.requires_grad)

    def _take(self, nbytes: int, *, pinned: bool) -> torch.UntypedStorage:
        """Return memory for a copy, page-locked for one from an accelerator."""
        key = nbytes, pinned
        free = self._free.get(key)
        storage = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        self._used.append((key, storage))
        return storage


class BackgroundSave:
    """A save that is being written; all ranks start it after the same iteration.

    Args:
        iteration: that is saved.
        write: writes the files of this rank, and returns their names.
        publish: on rank zero, gets the names of all files, and makes the checkpoint the newest.
        undo: on rank zero, removes what was written if a rank failed.
    """

    def __init__(
        self,
        iteration: int,
        *,
        write: Callable[[], Sequence[str]],
        publish: Callable[[set[str]], None],
        undo: Callable[[], None],
    ) -> None:
        self.iteration = iteration
        self._write, self._publish, self._undo = write, publish, undo
        self._error: Exception | None = None  # of this rank
        self._said = ""  # the message of the rank that failed first
        self._written, self._cancelled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"save {iteration}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether all ranks have written their files, and the checkpoint is the newest, or it failed."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it is known to have failed, on any rank."""
        return self.done and bool(self._said)

    def wait(self) -> None:
        """Wait for its end on all ranks.

        Raises:
            RunError: it failed, on this rank or another one.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._said:
            raise RunError(self._said)

    def wait_after_failure(self) -> None:
        """Wait for this rank's files, and a while for those of others, some of which may be lost."""
        self._written.wait()
        self._thread.join(SETTLE_S)

    def cancel(self) -> None:
        """End it after the file that is being written; the checkpoint does not become the newest."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        """Thread: write, then agree with the other ranks."""
        report: dict[str, Any] = {}
        try:
            report["files"] = list(self._write())
        except Exception as error:  # raised by the main thread
            self._error = error
            report["error"] = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        self._written.set()
        try:
            self._said = sgm.distributed.settle(report, self._decide, self._cancelled)
        except Exception as error:
            self._error = self._error or error
            self._said = f"{type(error).__name__}: {error}"

    def _decide(self, reports: Sequence[Mapping[str, Any]]) -> str:
        """On rank zero, make the checkpoint the newest; return why that failed, else an empty string."""
        said = ""
        for rank, report in enumerate(reports):
            if "error" in report and not said:
                said = report["error"] if len(reports) == 1 else f"rank {rank}: {report['error']}"
        if not said:
            try:
                self._publish({name for report in reports for name in report["files"]})
            except Exception as error:
                self._error = error
                said = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        if said:
            with contextlib.suppress(OSError):
                self._undo()
        return said
