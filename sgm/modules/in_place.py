"""In-place functions for the largest tensors of network and VAE: under `no_grad` they overwrite their input.

Compilers plan memory by themselves.

Legend: ``S = L + N`` tokens, ``L`` of text first, then ``N`` patches; ``D`` hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Tanh-approximated GELU; overwrites its input under `no_grad`."""
    in_place = not torch.is_grad_enabled()
    return torch.ops.aten.gelu_(x, approximate="tanh") if in_place else F.gelu(x, approximate="tanh")


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU; overwrites its input under `no_grad`."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def multiply_add(
    x: torch.Tensor, factors: Sequence[torch.Tensor], addends: Sequence[torch.Tensor], num_text: int
) -> torch.Tensor:
    """Return x·factor + addend (B, S, D), with one factor and addend for the text and one for the patches.

    Args:
        x: (B, S, D); overwritten under `no_grad`.
        factors: two of (B, 1, D).
        addends: (B, 1, D) or (B, L, D), and (B, 1, D) or (B, N, D).
        num_text: L.
    """
    parts = text_and_patches(x, num_text)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # compilers refuse views as `out`
        return torch.cat([torch.addcmul(c, a, b) for a, b, c in zip(parts, factors, addends, strict=True)], dim=1)
    for a, b, c in zip(parts, factors, addends, strict=True):
        torch.addcmul(c, a, b, out=a)
    return x


def text_and_patches(tokens: torch.Tensor, num_text: int) -> tuple[torch.Tensor, ...]:
    """Split (B, S, D) into views of text and patches."""
    # Not two slices: their backward pass would allocate zero-filled gradients.
    return tokens.split((num_text, tokens.shape[1] - num_text), dim=1)
