"""The transformer block as functions of its modules: run as they are, or compiled once for all blocks.

A compiled block is one graph. Nothing in it depends on the number of the block, a prompt, a step or a branch of
guidance. Where ranks share tokens, attention communicates; where its output is kept, it is replaced; and a kernel of a
package need not be one that torch can trace. Then it stays outside: two graphs, before and after it.

Legend: ``B`` samples, ``S`` tokens, ``L`` of text first, then ``N`` patches; ``D`` hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sgm.modules.block_ops import add_gated, modulated_norm, normalised_heads
from sgm.modules.compiled_ops import apply_linear
from sgm.modules.in_place import gelu, in_pieces, linear_after_gelu
from sgm.parallel.attention import is_traceable


def transformer_block(x: torch.Tensor, *, attention_fn: Callable, hook_args: dict[str, Any], **given: Any) -> Any:
    """Run a block: tokens (B, S, D) → (B, S, D), without text (B, N, D).

    Args:
        x: tokens.
        attention_fn: q, k, v (B, S, heads, head_dim) → the same shape.
        hook_args: for `attention_fn`; with ``silu_emb`` (B, E) or (1, E) and ``num_text``.
        given: the modules, see `before_attention`; ``keeps_text``, see `after_attention`; and ``around_attention``,
            which makes a context of attention, or None.
    """
    return _around(before_attention, after_attention, x, attention_fn, hook_args, **given)


def _around(
    before: Callable, after: Callable, x: torch.Tensor, attention_fn: Callable, hook_args: dict[str, Any], **given: Any
) -> torch.Tensor:
    layer, keeps_text, num_text = given["layer"], given["keeps_text"], hook_args["num_text"]
    qkv, factors = before(x, layer, given["modulation"], given["norms"], hook_args["silu_emb"], num_text)
    # No reference to what is used up stays: the MLP that follows needs the memory.
    if given["around_attention"] is None:
        attended = [attention_fn(*qkv, **hook_args)]
    else:
        with given["around_attention"]():
            attended = [attention_fn(*qkv, **hook_args)]
    del qkv
    return after(x, attended.pop(), layer, factors, num_text, keeps_text)


def before_attention(
    x: torch.Tensor,
    layer: Any,
    modulation: nn.Sequential,
    norms: tuple[nn.Module, nn.Module] | None,
    silu_emb: torch.Tensor,
    num_text: int,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return queries, keys and values (B, S, heads, head_dim), and the factors that `after_attention` needs.

    Args:
        x: (B, S, D).
        layer: SAT's layer.
        modulation: SiLU, then the linear layer of adaLN. The first has been applied, once for all blocks.
        norms: of queries and keys.
        silu_emb: SiLU of the time embedding (B, E), or without gradients that of all samples (1, E).
        num_text: L.
    """
    # For patches and for text: shift, scale, gate of the attention and of the MLP.
    shift, scale, *factors = modulation[1](silu_emb).unflatten(-1, (2, 6, -1)).unbind(2)
    h = modulated_norm(layer.input_layernorm, x, scale, shift, num_text)
    attention = layer.attention
    qkv = apply_linear(attention.query_key_value, h).unflatten(-1, (3, -1, attention.hidden_size_per_attention_head))
    return (qkv.unbind(2) if norms is None else normalised_heads(qkv, *norms)), tuple(factors)


def after_attention(
    x: torch.Tensor,
    attended: torch.Tensor,
    layer: Any,
    factors: tuple[torch.Tensor, ...],
    num_text: int,
    keeps_text: bool,
) -> torch.Tensor:
    """Return the tokens after attention's output layer and the MLP.

    Args:
        x: (B, S, D), the input of the block.
        attended: (B, S, heads, head_dim).
        layer: SAT's layer.
        factors: as `before_attention` returns them.
        num_text: L.
        keeps_text: False drops the text before the MLP.
    """
    gate1, shift2, scale2, gate2 = factors
    branch = apply_linear(layer.attention.dense, attended.flatten(2))
    del attended
    x = add_gated(x, branch, gate1, num_text)
    del branch
    if not keeps_text:
        x, num_text = x[:, num_text:], 0
    h = modulated_norm(layer.post_attention_layernorm, x, scale2, shift2, num_text)
    return add_gated(x, feed_forward(layer.mlp, h), gate2, num_text)


def feed_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """SAT's MLP, without its lookup by layer number."""

    def run(x: torch.Tensor) -> torch.Tensor:
        if not mlp.is_gated_mlp and mlp.activation_func is gelu:
            return linear_after_gelu(mlp.dense_4h_to_h, apply_linear(mlp.dense_h_to_4h, x))
        inner = mlp.activation_func(mlp.dense_h_to_4h_gate(x) if mlp.is_gated_mlp else mlp.dense_h_to_4h(x))
        return mlp.dense_4h_to_h(inner * mlp.dense_h_to_4h(x) if mlp.is_gated_mlp else inner)

    return in_pieces(mlp, run, x)


class CompiledBlock:
    """`transformer_block`, compiled at its first call.

    Args:
        options: of ``torch.compile``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._whole: Any = None
        self._halves: tuple[Any, Any] | None = None

    def __call__(self, x: torch.Tensor, *, keeps_text: bool, hook_args: dict[str, Any], **given: Any) -> torch.Tensor:
        """Run a block; the last one computes the text as well, so that its graph is that of the others."""
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # the first block of a frozen network, likewise
        tokens = hook_args["tokens"]
        if tokens.size == 1 and is_traceable(tokens.attention) and given["around_attention"] is None:
            self._whole = self._whole or self._compiled(transformer_block, given["layer"])
            run = self._whole
        else:
            if self._halves is None:
                before, after = (self._compiled(each, given["layer"]) for each in (before_attention, after_attention))
                self._halves = before, after
            run = partial(_around, *self._halves)
        out = run(x, hook_args=hook_args, keeps_text=True, **given)
        return out if keeps_text else out[:, hook_args["num_text"] :]

    def _compiled(self, function: Callable, layer: nn.Module) -> Callable:
        # Hooks of ZeRO-3 bring the parameters of each layer, outside of a graph.
        hooked = any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
        return torch.compile(function, **{"fullgraph": not hooked, **self._options})
