"""Matrices in eight and in four bits, as tensors that move and save like others; see `sgm.weights.quantize`.

torchao has the base class, bitsandbytes computes NF4; imported with the first weight that is stored so.
"""

from typing import Any, ClassVar, Self

import torch
from torch.nn import functional
from torchao.utils import TorchAOBaseTensor

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_NF4_BLOCK = 64  # numbers with one scale


class QuantizedTensor(TorchAOBaseTensor):
    """A frozen matrix, of which ``dequantize()`` makes one of numbers in the dtype of the run whenever it is used."""


@QuantizedTensor.implements_torch_function(functional.linear)
def _linear(_: Any, __: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, bias = args if len(args) == 3 else (*args, kwargs.get("bias"))
    return functional.linear(x, weight.dequantize().to(x.dtype), bias)


class FP8Tensor(QuantizedTensor):
    """A matrix whose squares are e4m3 numbers: w = ±√|q| · scale of its row.

    e4m3 rounds to three bits after the leading one, whatever the magnitude, over more octaves than weights need: a root
    halves the relative error, and the octaves.

    Args:
        squares: with the signs of the matrix, float8_e4m3fn, of its shape (out, in).
        scales: float32 (out, 1).
        full_dtype: of the matrix as it is used.
    """

    tensor_data_names: ClassVar[list[str]] = ["squares", "scales"]
    tensor_attribute_names: ClassVar[list[str]] = ["full_dtype"]

    def __new__(cls, squares: torch.Tensor, scales: torch.Tensor, full_dtype: torch.dtype) -> Self:
        """Make the outer tensor, which has no numbers of its own."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, squares.shape, dtype=full_dtype, device=squares.device, requires_grad=False
        )
        return made

    def __init__(self, squares: torch.Tensor, scales: torch.Tensor, full_dtype: torch.dtype) -> None:
        super().__init__()
        self.squares, self.scales, self.full_dtype = squares, scales, full_dtype

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Store a matrix."""
        scales = weight.abs().amax(dim=1, keepdim=True).float() / _FP8_MAX**0.5
        scales.clamp_(min=torch.finfo(torch.float32).tiny)  # of rows of zeros
        roots = torch.div(weight, scales)
        return cls(roots.mul_(roots.abs()).to(torch.float8_e4m3fn), scales, weight.dtype)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix."""
        squares = self.squares.to(self.full_dtype)
        return squares.abs().sqrt_().mul_(self.scales).copysign_(squares)


class NF4Tensor(QuantizedTensor):
    """A matrix of `full_shape` in four bits.

    Args:
        packed: two numbers a byte, uint8 (elements / 2, 1).
        scales: largest magnitude of each block, float32 (elements / 64).
        code: the 16 numbers, float32.
        full_shape: of the matrix.
        full_dtype: of the matrix as it is used.
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
        from bitsandbytes.functional import get_4bit_type, quantize_4bit

        packed, state = quantize_4bit(weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
        code = get_4bit_type("nf4", device=weight.device, blocksize=_NF4_BLOCK)
        return cls(packed, state.absmax, code, tuple(weight.shape), weight.dtype)

    def dequantize(self) -> torch.Tensor:
        """Return the matrix."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            absmax=self.scales,
            shape=torch.Size(self.full_shape),
            code=self.code,
            blocksize=_NF4_BLOCK,
            quant_type="nf4",
            dtype=self.full_dtype,
        )
        return dequantize_4bit(self.packed, state)
