"""Lazy tensors: load and convert without holding a whole model in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch


def _identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class LazyTensor:
    """A function of other tensors, usually memory-mapped; shape and dtype are known without computing it.

    Attributes:
        sources: the arguments of `make`; lazy ones are computed first.
        make: the function. It must run on the meta device too.
        to_dtype: dtype of the result; None keeps that of `make`. Only floating-point results are cast.
    """

    sources: tuple["torch.Tensor | LazyTensor", ...]
    make: Callable[..., torch.Tensor] = _identity
    to_dtype: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the result."""
        return self.meta().shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return self.meta().dtype

    def meta(self) -> torch.Tensor:
        """Return the result on the meta device."""
        metas = (source.meta() if isinstance(source, LazyTensor) else source.to("meta") for source in self.sources)
        return self._cast(self.make(*metas))

    def compute(self) -> torch.Tensor:
        """Return the result on the CPU, contiguous; the source itself if nothing changes."""
        return self._cast(self.make(*map(compute, self.sources))).contiguous()

    def peek(self) -> torch.Tensor:
        """Return what `compute` would, without checking values of files."""
        return self._cast(self.make(*map(peek, self.sources)))

    def cast(self, dtype: torch.dtype | None) -> Self:
        """Return the same tensor in another dtype; None keeps it."""
        return self if dtype is None else replace(self, to_dtype=dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.to_dtype is None or not tensor.is_floating_point() else tensor.to(self.to_dtype)


AnyTensor = torch.Tensor | LazyTensor
Tensors = Mapping[str, AnyTensor]


def compute(tensor: AnyTensor) -> torch.Tensor:
    """Return a tensor, computed if it is lazy."""
    return tensor.compute() if isinstance(tensor, LazyTensor) else tensor


def peek(tensor: AnyTensor) -> torch.Tensor:
    """Return a tensor, computed without the checks of `sgm.weights.stored`: for names and fingerprints, not for use."""
    return tensor.peek() if isinstance(tensor, LazyTensor) else tensor


def meta(tensor: AnyTensor) -> torch.Tensor:
    """Return a tensor with the same shape and dtype, without computing it."""
    return tensor.meta() if isinstance(tensor, LazyTensor) else tensor


def num_bytes(tensors: Tensors) -> int:
    """Return the total size of all tensors in bytes."""
    return sum(meta(tensor).nbytes for tensor in tensors.values())
