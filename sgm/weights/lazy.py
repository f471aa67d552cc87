"""Tensors that are made when they are written, so that a conversion never holds a whole model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class LazyTensor:
    """What a function makes of other tensors, which may lie mapped in a file; shape and dtype cost nothing.

    Attributes:
        sources: the tensors, themselves made when they are needed or there already.
        make: the function, of tensors alone: it runs on the meta device too.
        to_dtype: the dtype of the result, that of `make` if None; tensors that are not floating-point keep theirs.
    """

    sources: tuple["torch.Tensor | LazyTensor", ...]
    make: Callable[..., torch.Tensor] = _same
    to_dtype: torch.dtype | None = None

    def meta(self) -> torch.Tensor:
        """Return the result without its numbers, on the meta device."""
        metas = (source.meta() if isinstance(source, LazyTensor) else source.to("meta") for source in self.sources)
        return self._cast(self.make(*metas))

    def compute(self) -> torch.Tensor:
        """Return the result on the CPU, contiguous; where nothing is to be done, that is the source itself."""
        made = (source.compute() if isinstance(source, LazyTensor) else source for source in self.sources)
        return self._cast(self.make(*made)).contiguous()

    def cast(self, dtype: torch.dtype | None) -> Self:
        """Return the same with another dtype; None leaves it."""
        return self if dtype is None else replace(self, to_dtype=dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.to_dtype is None or not tensor.is_floating_point() else tensor.to(self.to_dtype)


Tensors = Mapping[str, torch.Tensor | LazyTensor]


def num_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """Return the size of the results together."""
    return sum(tensor.meta().nbytes for tensor in tensors.values())
