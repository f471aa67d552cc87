"""Functions for the largest tensors of network and VAE: in place under `no_grad`, in pieces with gradients.

Compilers plan memory by themselves.

Legend: ``B`` samples, ``S`` tokens, ``D`` hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

TOKENS_OF_A_PIECE = 4096  # enough to keep an accelerator busy


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Tanh-approximated GELU; overwrites its input under `no_grad`."""
    in_place = not torch.is_grad_enabled()
    return torch.ops.aten.gelu_(x, approximate="tanh") if in_place else F.gelu(x, approximate="tanh")


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU; overwrites its input under `no_grad`."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


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
