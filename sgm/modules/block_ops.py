"""What a transformer block does beside products and attention, in few passes over its hidden states.

Text and patches have factors of their own: a function runs over all tokens with those of the patches, then over the
text, which is short, again. Nothing is split, and only the text is written twice. Under a compiler the functions are
plain expressions, since it fuses these with their neighbours.

On an accelerator a pass over the hidden states takes longer than its arithmetic. `benchmarks/traffic.py` counts them.

Legend: ``B`` samples, ``S = L + N`` tokens, ``L`` of text first, then ``N`` patches; ``D`` hidden size. Factors are
(B, 2, D): those of the patches, then those of the text. Without gradients, factors (1, 2, D) are those of all samples.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sgm.modules.compiled_ops import factors_of_tokens

Factors = torch.Tensor


class ModulatedNorm(nn.LayerNorm):
    """Layer norm with scale and shift of adaLN: its own weight and bias are multiplied into them."""

    def forward(  # noqa: D102
        self, x: torch.Tensor, scale: Factors | None = None, shift: Factors | None = None, num_text: int = 0
    ) -> torch.Tensor:
        if scale is None or shift is None:
            return super().forward(x)
        factor, addend = self.affine(scale, shift)
        return _Normalised.apply(x, factor.to(x.dtype), addend.to(x.dtype), num_text, self.eps)

    def affine(self, scale: Factors, shift: Factors) -> tuple[Factors, Factors]:
        """Return what normalised tokens are multiplied by, and what is added then."""
        # In float32, and rounded once: outputs in bfloat16 are closer to exact ones than those of a norm that is
        # scaled afterwards. These are small; norms of tokens are computed in float32 by torch itself.
        factor, addend = 1 + scale.float(), shift.float()
        if self.weight is not None:
            addend = addend if self.bias is None else torch.addcmul(addend, self.bias, factor)
            factor = self.weight * factor
        return factor, addend


def modulated_norm(norm: nn.Module, x: torch.Tensor, scale: Factors, shift: Factors, num_text: int) -> torch.Tensor:
    """Return norm(x)·(1 + scale) + shift of tokens (B, S, D)."""
    if isinstance(norm, ModulatedNorm):
        if not torch.compiler.is_compiling():
            return norm(x, scale, shift, num_text)
        factor, addend = norm.affine(scale, shift)
        normalised = nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
    else:
        factor, addend, normalised = 1 + scale, shift, norm(x)
    factor, addend = (factors_of_tokens(each, num_text, x.shape[1]) for each in (factor, addend))
    return torch.addcmul(addend, normalised, factor).to(x.dtype)


def normalised_heads(qkv: torch.Tensor, q_norm: nn.Module, k_norm: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return normalised queries and keys, and values, (B, S, heads, head_dim) each, of a (B, S, 3, heads, head_dim)."""
    q, k, v = qkv.unbind(2)
    norms = (q_norm, k_norm)
    # Norms of other classes, and those whose hooks bring their weights (ZeRO-3), are called.
    plain = all(type(norm) is nn.LayerNorm and not norm._forward_pre_hooks for norm in norms)
    eps: Any = q_norm.eps
    if not (torch.compiler.is_compiling() and plain and eps == k_norm.eps):
        return q_norm(q), k_norm(k), v
    # Both in one kernel; in float32 as torch's norm, whose copies the compiler leaves out.
    both = nn.functional.layer_norm(qkv[:, :, :2].float(), qkv.shape[-1:], eps=eps)
    if q_norm.elementwise_affine:
        weight, bias = (torch.stack((getattr(q_norm, name), getattr(k_norm, name))) for name in ("weight", "bias"))
        both = torch.addcmul(bias[:, None], both, weight[:, None])
    q, k = both.to(qkv.dtype).unbind(2)
    return q, k, v


def add_gated(x: torch.Tensor, branch: torch.Tensor, gate: Factors, num_text: int) -> torch.Tensor:
    """Return x + gate·branch of tokens (B, S, D); overwrites `branch` under `no_grad`."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x, branch, factors_of_tokens(gate, num_text, x.shape[1]))
    if torch.is_grad_enabled():
        return _AddGated.apply(x, branch, gate, num_text)
    for rows, part in ((slice(0, num_text), slice(1, 2)), (slice(num_text, None), slice(0, 1))):
        torch.addcmul(x[:, rows], branch[:, rows], gate[:, part], out=branch[:, rows])
    return branch


class _Normalised(torch.autograd.Function):
    """Layer norm of tokens, with a weight and bias for the text and one for the patches of every sample."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Factors, bias: Factors, num_text: int, eps: float) -> torch.Tensor:
        out, mean, rstd = _norm(x, weight, bias, num_text, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.num_text = num_text
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, shape, wanted = grads[0].contiguous(), x.shape[-1:], list(ctx.needs_input_grad[:3])
        tokens, factors = [], []
        for index in range(len(x)):
            for rows, part in ((slice(0, ctx.num_text), 1), (slice(ctx.num_text, None), 0)):
                place, own = (index, rows), (index, part)
                results = torch.ops.aten.native_layer_norm_backward(
                    grad[place], x[place], shape, mean[place], rstd[place], weight[own], bias[own], wanted
                )
                tokens.append(results[0])
                factors.append(results[1:])
        grad_x = torch.cat(tokens).view_as(x) if wanted[0] else None
        ordered = [factors[2 * index + 1 - part] for index in range(len(x)) for part in (0, 1)]
        of_factors = (
            torch.stack(of_one).view_as(weight) if is_wanted else None
            for of_one, is_wanted in zip(zip(*ordered, strict=True), wanted[1:], strict=True)
        )
        return grad_x, *of_factors, None, None


def _norm(x: torch.Tensor, weight: Factors, bias: Factors, num_text: int, eps: float) -> tuple[torch.Tensor, ...]:
    """Return normalised tokens, and their means and reciprocal deviations (B, S, 1)."""
    if len(weight) > 1:
        samples = zip(x.split(1), weight.split(1), bias.split(1), strict=True)
        results = [_norm(own, factors, addends, num_text, eps) for own, factors, addends in samples]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    of_patches, of_text = zip(weight[0], bias[0], strict=True)
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *of_patches, eps)
    if num_text:
        out[:, :num_text] = torch.native_layer_norm(x[:, :num_text], x.shape[-1:], *of_text, eps)[0]
    return out, mean, rstd


class _AddGated(torch.autograd.Function):
    """x + gate·branch: keeps the branch only for the gradient of a gate that is trained."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, branch: torch.Tensor, gate: Factors, num_text: int) -> torch.Tensor:
        _, needs_branch, needs_gate = ctx.needs_input_grad[:3]
        ctx.save_for_backward(branch if needs_gate else None, gate if needs_branch else None)
        ctx.num_text = num_text
        out = torch.addcmul(x, branch, gate[:, :1])
        if num_text:
            text = slice(0, num_text)
            out[:, text] = torch.addcmul(x[:, text], branch[:, text], gate[:, 1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        branch, gate = ctx.saved_tensors
        (grad,), num_text = grads, ctx.num_text
        grad_branch = grad_gate = None
        if gate is not None:
            grad_branch = grad * gate[:, :1]
            if num_text:
                grad_branch[:, :num_text] = grad[:, :num_text] * gate[:, 1:]
        if branch is not None:
            products = grad * branch
            grad_gate = torch.stack((products[:, num_text:].sum(1), products[:, :num_text].sum(1)), 1)
        return grad, grad_branch, grad_gate, None
