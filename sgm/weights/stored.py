"""Tensors of weights files, checked when their values are first used.

Names, shapes and dtypes come from headers; values are checked for three things:

| check | finds |
|---|---|
| kind | integers, booleans or complex numbers in the place of weights |
| checksum | bits that changed since the file was written; see `sgm.weights.checksums` |
| finiteness | NaN and infinity, unless the file says that there were none and the checksum is right |

`StoredTensor.copy_to` checks what it copies while it is in the processor's cache, which costs least; loading does so in
a second thread, right behind. Where tensors are used otherwise, `checked_ahead` checks the next ones in threads.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from sgm.util import InputError
from sgm.weights.checksums import (
    DTYPES,
    PIECE,
    Checksums,
    Watched,
    all_finite,
    extremes,
    overflow_problem,
    pieces,
)
from sgm.weights.lazy import AnyTensor, LazyTensor, Tensors

_CURE = "copy or download it again from its source, or take an earlier checkpoint"
_CHANGED = f"is damaged: its bytes changed after it was written (checksum); {_CURE}"
_THREADS = 4  # more than a disk delivers


class Once:
    """A check that the first thread runs; others wait for its result."""

    def __init__(self, check: Callable[[], str]) -> None:
        self._check, self._lock = check, threading.Lock()
        self._result: str | None = None

    def __call__(self, check: Callable[[], str] | None = None) -> str:
        """Return the result: a problem, or an empty string. `check` replaces the check, if that has not run yet."""
        with self._lock:
            if self._result is None:
                self._result = (check or self._check)()
            return self._result


_UNKNOWN = Once(str)  # no checksum was written


@dataclass(frozen=True, kw_only=True)
class StoredTensor(LazyTensor):
    """A memory-mapped tensor of a weights file, whose values are checked before they are returned.

    Attributes:
        path: the file.
        name: its name there.
        changed: returns that its bytes changed since they were written; empty if they did not, or it is unknown.
        problem: returns what is wrong with its values; empty if nothing is.
        place: its place in `checksums`; None if other tensors share its bytes, or no checksum was written.
        checksums: those of the file.
    """

    path: Path
    name: str
    changed: Once
    problem: Once
    place: str | int | None = None
    checksums: Checksums | None = None

    @property
    def values(self) -> torch.Tensor:
        """The tensor in the file, unchecked."""
        (tensor,) = self.sources
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return self.values.dtype if self.to_dtype is None else super().dtype

    def compute(self) -> torch.Tensor:
        """Return the values.

        Raises:
            InputError: they are damaged, not finite, or not floating-point numbers.
        """
        self.check()
        return super().compute()

    def copy_to(self, target: torch.Tensor, beside: Executor | None = None) -> None:
        """Copy the values to a contiguous tensor of any dtype and device.

        Args:
            target: the tensor.
            beside: a second thread that checks what is copied, right behind; None checks in this one.

        Raises:
            InputError: as `compute`; or a value is out of the range of the dtype of `target`.
        """
        copied = False

        def copy() -> str:
            nonlocal copied
            copied = True
            return self._copy_and_check(target, beside)

        if self.to_dtype is None and not kind_problem(self.values):
            self.problem(copy)
        self.check()
        if not copied:
            target.copy_(self._cast(self.values))
        require_in_range(f"{self.path}: {self.name}", self.values, target)

    def _copy_and_check(self, target: torch.Tensor, beside: Executor | None) -> str:
        def copied() -> Iterator[torch.Tensor]:
            flat, start = target.reshape(-1), 0
            as_they_are = target.is_cpu and target.dtype == self.values.dtype
            for part in pieces(self.values):
                place = flat[start : start + len(part)]
                if as_they_are:  # torch would wake its threads for every piece, which costs more than copying it
                    np.copyto(place.view(torch.uint8).numpy(), part.view(torch.uint8).numpy())
                else:
                    place.copy_(part)
                start += len(part)
                yield part

        def check(parts: Iterable[torch.Tensor]) -> str:
            known = self.checksums is not None and self.checksums.finite
            watched = parts if known else Watched(parts)
            if self.checksums is not None and self.place is not None:
                problem = "" if self.checksums.fit_pieces(self.place, watched) else _CHANGED
            else:
                problem = self.changed()
                for _ in watched:
                    pass
            if problem or not isinstance(watched, Watched) or watched.finite():
                return problem
            return finite_problem(self.values)

        if beside is None or self.values.nbytes <= PIECE:
            return check(copied())
        handed: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        problem = beside.submit(check, iter(handed.get, None))
        try:
            for part in copied():
                handed.put(part)
        finally:  # or the thread would wait for ever
            handed.put(None)
        return problem.result()

    def of_any_kind(self) -> "StoredTensor":
        """Return the tensor for a buffer of other than floating-point numbers: only its bytes are checked."""
        return replace(self, problem=self.changed)

    def check(self) -> None:
        """Raise the InputError that `compute` would raise."""
        if problem := self.problem():
            raise InputError(f"{self.path}: {self.name} {problem}")


def store_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], checksums: Checksums | None
) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file; without `checksums`, bytes are not compared."""

    def changed(name: str) -> Once:
        return _UNKNOWN if checksums is None else Once(partial(_changed, tensors[name], name, checksums))

    return {
        name: _stored(path, name, tensor, changed(name), checksums, None if checksums is None else name)
        for name, tensor in tensors.items()
    }


def store_zip(path: Path, tensors: Mapping[str, torch.Tensor], checksums: Checksums | None) -> dict[str, StoredTensor]:
    """Return the tensors of a file of torch.save.

    Args:
        path: the file.
        tensors: by name.
        checksums: by the size of storages; without them, bytes are not compared.
    """
    checks: dict[int, Once] = {}  # by storage, since several tensors may be views of one

    def changed(tensor: torch.Tensor) -> Once:
        if checksums is None or not is_dense(tensor):
            return _UNKNOWN
        storage = tensor.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        check = Once(partial(_changed, whole, storage.nbytes(), checksums))
        return checks.setdefault(storage.data_ptr(), check)

    def place(tensor: torch.Tensor, check: Once) -> int | None:
        alone = check is not _UNKNOWN and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor.nbytes if alone else None

    stored = {}
    for name, tensor in tensors.items():
        check = changed(tensor)
        stored[name] = _stored(path, name, tensor, check, checksums, place(tensor, check))
    return stored


def _stored(
    path: Path, name: str, tensor: torch.Tensor, changed: Once, checksums: Checksums | None, place: str | int | None
) -> StoredTensor:
    known = checksums is not None and checksums.finite
    check = Once(lambda: kind_problem(tensor) or changed() or ("" if known else finite_problem(tensor)))
    return StoredTensor(
        (tensor,), path=path, name=name, changed=changed, problem=check, place=place, checksums=checksums
    )


def _changed(tensor: torch.Tensor, place: str | int, checksums: Checksums) -> str:
    """Return that the bytes of a tensor do not have the checksum of `place`; empty if they do."""
    return "" if checksums.fit(place, tensor) else _CHANGED


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its elements one by one, neither sparse nor quantized."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def kind_problem(tensor: torch.Tensor, cure: str = "get them in fp16, bf16 or fp32") -> str:
    """Return why a tensor of this kind cannot be weights; empty if it can. Needs no values."""
    if not is_dense(tensor):
        kind = "is quantized" if tensor.is_quantized else "is sparse"
    elif tensor.dtype in DTYPES and tensor.is_floating_point():
        return ""
    elif tensor.is_floating_point():
        kind = "is in four bits, or holds scales"
    else:
        kind = "is complex" if tensor.is_complex() else "is boolean" if tensor.dtype == torch.bool else "holds integers"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} ({dtype}), and weights are dense floating-point numbers; {cure}"


def finite_problem(tensor: torch.Tensor, cure: str = _CURE) -> str:
    """Return which values of a floating-point tensor are not finite; empty if all are."""
    if tensor.numel() == 0:
        return ""
    # Sums are fastest; they may overflow.
    if all_finite(pieces(tensor)) or all(map(torch.isfinite, extremes(tensor))):
        return ""
    wide = tensor.to(torch.bfloat16) if tensor.element_size() == 1 else tensor  # float8 has few functions
    wrong = (~torch.isfinite(wide)).nonzero()
    first, place = wide[tuple(wrong[0])].item(), ", ".join(map(str, wrong[0].tolist()))
    return (
        f"is not finite: {len(wrong):,} of {wide.numel():,} values are NaN or infinite, the first ({first}) at "
        f"[{place}]; the training that wrote it failed, or the file is damaged; {cure}"
    )


def require_in_range(source: str, tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Raise InputError if a copy has infinity for a number of `tensor`, the finite tensor of `source`."""
    both_float = tensor.is_floating_point() and copy.is_floating_point()
    # float32 holds hardly more than bfloat16, and is not looked at again.
    if both_float and torch.finfo(copy.dtype).max < torch.finfo(tensor.dtype).max / 2:
        cure = "load it in bf16 or fp32"
        if problem := overflow_problem(copy, lambda: tensor, cure):
            raise InputError(f"{source} {problem}")


def require_floating(tensors: Tensors) -> None:
    """Raise InputError for the first tensor of a kind that cannot be weights; values are not read."""
    for tensor in tensors.values():
        for stored in _sources(tensor):
            if problem := kind_problem(stored.values):
                raise InputError(f"{stored.path}: {stored.name} {problem}")


def require_weights(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, finite: bool = False, cure: str = _CURE
) -> None:
    """Raise InputError for the first tensor of the file `path`, already read, that cannot be weights.

    `finite`: whether it is known that its values are finite.
    """
    for name, tensor in tensors:
        if problem := kind_problem(tensor, cure) or ("" if finite else finite_problem(tensor, cure)):
            raise InputError(f"{path}: {name} {problem}")


@contextlib.contextmanager
def checked_ahead(tensors: Iterable[AnyTensor]) -> Iterator[None]:
    """Check the values of `tensors` in threads during the block, which computes them in the same order."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        for tensor in tensors:
            for stored in _sources(tensor):
                pool.submit(stored.problem)
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def source_of(name: str, tensor: AnyTensor) -> str:
    """Return the first file that a tensor is computed from, and the name there, for messages; `name` without any."""
    return next((f"{stored.path}: {stored.name}" for stored in _sources(tensor)), name)


def _sources(tensor: AnyTensor) -> Iterator[StoredTensor]:
    """Yield the tensors of files that a tensor is computed from."""
    if isinstance(tensor, StoredTensor):
        yield tensor
    elif isinstance(tensor, LazyTensor):
        for source in tensor.sources:
            yield from _sources(source)
