"""Values of any structure, taken apart into bytes and tensors: a backend sends tensors from where they lie."""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch


def pack(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """Return a value as bytes, and the tensors that were in it."""
    packer = _Packer()
    packer.dump(value)
    return packer.file.getvalue(), packer.tensors


def unpack(packed: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """Return the value that `pack` took apart; only for bytes of this job's own processes, since it unpickles them."""
    return _Unpacker(packed, tensors).load()


class _Packer(pickle.Pickler):
    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.tensors: list[torch.Tensor] = []
        super().__init__(self.file)

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, packed: bytes, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(packed))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> torch.Tensor:
        return self._tensors[pid]
