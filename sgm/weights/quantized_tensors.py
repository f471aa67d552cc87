"""A weight in the four bits of NF4, as a tensor that moves and saves like others; see `sgm.weights.quantize`.

torchao has the base class, bitsandbytes the numbers. Imported when the first weight is stored.
"""

from typing import Any, ClassVar, Self

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from torch.nn import functional
from torchao.utils import TorchAOBaseTensor

BLOCK = 64  # numbers with one scale


class NF4Tensor(TorchAOBaseTensor):
    """A frozen matrix of `shape` and `dtype`.

    Args:
        packed: two numbers a byte, uint8 (elements / 2, 1).
        scales: largest magnitude of each block, float32 (elements / 64).
        code: the 16 numbers, float32.
        shape: of the matrix.
        dtype: of the matrix as it is used.
    """

    tensor_data_names: ClassVar[list[str]] = ["packed", "scales", "code"]
    tensor_attribute_names: ClassVar[list[str]] = ["full_shape", "full_dtype"]

    def __new__(
        cls, packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor, full_shape: Any, full_dtype: torch.dtype
    ) -> Self:
        """Make the outer tensor, which has no numbers of its own."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, full_shape, dtype=full_dtype, device=packed.device, requires_grad=False
        )
        return made

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor, full_shape: Any, full_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.packed, self.scales, self.code = packed, scales, code
        self.full_shape, self.full_dtype = full_shape, full_dtype

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Store a matrix."""
        packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        code = get_4bit_type("nf4", device=weight.device, blocksize=BLOCK)
        return cls(packed, state.absmax, code, tuple(weight.shape), weight.dtype)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix."""
        state = QuantState(
            absmax=self.scales,
            shape=torch.Size(self.full_shape),
            code=self.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.full_dtype,
        )
        return dequantize_4bit(self.packed, state)


@NF4Tensor.implements_torch_function(functional.linear)
def _linear(_: Any, __: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, bias = args if len(args) == 3 else (*args, kwargs.get("bias"))
    return functional.linear(x, weight.dequantize().to(x.dtype), bias)
