"""Functions for the largest tensors of network and VAE: in place under `no_grad`, else in pieces, or not kept.

Compilers plan memory by themselves.

Legend: ``B`` samples, ``S`` tokens, ``D`` hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sgm.modules.compiled_ops import apply_linear, is_plain

TOKENS_OF_A_PIECE = 4096  # enough to keep an accelerator busy
# Of the tanh-approximated GELU (Hendrycks & Gimpel 2016), x·sigmoid(linear·x + cubic·x³).
_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Tanh-approximated GELU; overwrites its input under `no_grad`."""
    if torch.compiler.is_compiling():
        # (1 + tanh(a)) / 2 = sigmoid(2·a), and a compiler's sigmoid takes half as long as its tanh on a CPU.
        return x * torch.sigmoid(x * (_GELU_LINEAR + _GELU_CUBIC * x.square()))
    in_place = not torch.is_grad_enabled()
    return torch.ops.aten.gelu_(x, approximate="tanh") if in_place else F.gelu(x, approximate="tanh")


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU; overwrites its input under `no_grad`."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def linear_after_gelu(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return linear(gelu(x)); of a layer that is trained, x is kept for the backward pass, and gelu(x) computed again.

    Plain layers alone are known well enough: adapters, shards and hooks, such as those of ZeRO-3, have their own ways,
    and so has autocast, which casts weights.
    """
    device = x.device.type
    is_known = is_plain(linear) and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
    if not is_known or not (torch.is_grad_enabled() and linear.weight.requires_grad) or torch.compiler.is_compiling():
        return apply_linear(linear, gelu(x))
    return _LinearAfterGelu.apply(x, linear.weight, linear.bias)


class _LinearAfterGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)
        of_x = of_weight = None
        if needs_weight:
            of_weight = grad.T @ F.gelu(x, approximate="tanh").flatten(0, -2)
        if needs_x:
            of_x = (grad @ weight).view_as(x)
            torch.ops.aten.gelu_backward.grad_input(of_x, x, approximate="tanh", grad_input=of_x)
        return of_x, of_weight, grad.sum(0) if needs_bias else None


def in_pieces(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return function(x) of tokens (B, S, D), which it treats one by one; piece by piece if gradients are recorded.

    Inner tensors of an MLP are four times as large as `x`, and its backward pass has two of them beside the saved one.

    Args:
        module: with the weights of `function`. Only frozen ones take pieces: gradients of each would be rounded.
        function: (B, s, D) → (B, s, D).
        x: (B, S, D).
    """
    records = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    is_long = x.shape[0] * x.shape[1] > TOKENS_OF_A_PIECE
    if not (records and is_long) or any(parameter.requires_grad for parameter in module.parameters()):
        return function(x)
    return torch.cat([function(piece) for piece in x.split(max(TOKENS_OF_A_PIECE // x.shape[0], 1), dim=1)], dim=1)
