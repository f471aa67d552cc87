"""Linear layers and factors of tokens in the form of which a compiler makes fast code.

On a CPU, sums over tokens take long in generated code, which reads a few columns at a time, and a product takes little;
and products with a bias begin by writing it to all rows of the output. On an accelerator neither is so.

Legend: ``B`` samples, ``S`` tokens, ``L`` of text first; ``D`` hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def compiles_for_cpu(x: torch.Tensor) -> bool:
    """Whether this is traced by a compiler that makes code for the CPU that has `x`."""
    return torch.compiler.is_compiling() and x.is_cpu


def is_plain(linear: nn.Module) -> bool:
    """Whether this is a linear layer of torch's own class, without hooks such as those of ZeRO-3."""
    return type(linear) is nn.Linear and not (linear._forward_pre_hooks or linear._forward_hooks)


def apply_linear(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return linear(x); under a compiler for CPUs the bias is added by the kernel that reads the product."""
    if not (compiles_for_cpu(x) and is_plain(linear) and linear.bias is not None):
        return linear(x)
    out = F.linear(x, linear.weight)
    bias = linear.bias.to(out.dtype)  # of another one under autocast
    return out + _Rows.apply(bias[None], 0, out.numel() // len(bias)).view_as(out)


def factors_of_tokens(factors: torch.Tensor, num_text: int, num_tokens: int) -> torch.Tensor:
    """Return the factor of every token (B, S, D), for a compiler.

    Args:
        factors: (B, 2, D): those of the patches, then those of the text.
        num_text: L.
        num_tokens: S.
    """
    return (_Rows.apply if compiles_for_cpu(factors) else _rows)(factors, num_text, num_tokens)


def _rows(factors: torch.Tensor, num_text: int, num_tokens: int) -> torch.Tensor:
    if not num_text:
        return factors[..., :1, :].expand(*factors.shape[:-2], num_tokens, -1)
    # Chosen in the kernel that uses it: a compiler for CPUs writes a joined tensor of all tokens to memory.
    is_text = torch.arange(num_tokens, device=factors.device)[:, None] < num_text
    return torch.where(is_text, factors[..., 1:, :], factors[..., :1, :])


class _Rows(torch.autograd.Function):
    """`_rows` of (…, K, D), with a product as gradient."""

    @staticmethod
    def forward(ctx: Any, factors: torch.Tensor, num_text: int, num_tokens: int) -> torch.Tensor:
        ctx.num_text, ctx.num_factors = num_text, factors.shape[-2]
        return _rows(factors, num_text, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        is_text = torch.arange(grad.shape[-2], device=grad.device) < ctx.num_text
        members = torch.stack((~is_text, is_text)[: ctx.num_factors]).to(grad.dtype)
        return members @ grad, None, None
