"""Ring attention: exact sequence parallel attention, for any number of heads (Liu et al. 2023).

Legend: ``B`` samples, ``s`` tokens of this rank, ``t`` tokens of a block, ``H`` heads, ``d`` channels of a head.

Every rank keeps its queries. Blocks of keys and values, one per rank, are passed around the ring; the next block is
prefetched during attention over the current one. Attention over a block returns an output and the log-sum-exp of its
scores, used to combine the blocks to the softmax over all of them:

    lse = log(e^lse₁ + e^lse₂),    out = e^(lse₁ - lse)·out₁ + e^(lse₂ - lse)·out₂

The backward pass sends the blocks around the ring again. With the final ``lse``, the gradients of a block need no other
block; gradients of keys and values travel with their block and are complete after a full round. Sums are in float32.

Why `torch.ops.aten`: of the public functions that return a log-sum-exp, `flex_attention` has no backward pass on a CPU
and holds all scores unless it is compiled, and `varlen_attn` has no kernel for a CPU. The operators are private: their
schemas are the same in torch 2.10 to 2.13, and a test on fake tensors checks those of the installed torch. Why not
`torch.distributed.tensor.experimental`: its ring attention takes blocks of one size only, has no kernel for a CPU, and
replaces attention globally.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sgm.parallel.sequence import Group, check_shard, group_size
from sgm.util import InputError

aten = torch.ops.aten

# Maximum number of scores per chunk of unfused attention: 256 MB in float32.
PLAIN_SCORES = 2**26


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, lengths: Sequence[int]
) -> torch.Tensor:
    """Attention of this rank's queries over the keys and values of all ranks.

    Args:
        q: (B, s, H, d), the tokens of this rank, with positions applied.
        k: the same shape.
        v: the same shape.
        group: the sequence parallel group, see `sgm.parallel.sequence`.
        lengths: s of every rank.

    Returns:
        (B, s, H, d), in the dtype of q.

    Raises:
        InputError: a rank has no token.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if group_size(group) == 1:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    check_shard(q, group, lengths)
    if min(lengths) < 1:
        raise InputError(
            f"ring attention needs a token on every rank, and the ranks hold {list(lengths)}; "
            "use fewer ranks for a sample"
        )
    q = q if q.stride(-1) == 1 else q.contiguous()  # the kernels need contiguous channels
    return _Ring.apply(q, k, v, group, lengths)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        group: dist.ProcessGroup,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        kernel, queries = _kernel(q), q.transpose(1, 2)
        blocks = _blocks(_heads_first(k, v), group, lengths)
        out, lse, state = kernel.forward(queries, *next(blocks))
        out = out.float()
        for block in blocks:
            block_out, block_lse, state = kernel.forward(queries, *block)
            out, lse = _join(out, lse, block_out, block_lse)
        out = out.transpose(1, 2).to(q.dtype).contiguous()
        ctx.save_for_backward(q, k, v, out, lse.contiguous())
        ctx.group, ctx.lengths, ctx.kernel, ctx.state = group, lengths, kernel, state
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out, queries, out = (x.transpose(1, 2) for x in (grads[0].contiguous(), q, out))
        rank, size = dist.get_rank(ctx.group), group_size(ctx.group)
        grad_q = torch.zeros_like(queries, dtype=torch.float32)
        incoming = None
        for step, block in enumerate(_blocks(_heads_first(k, v), ctx.group, ctx.lengths), start=1):
            from_q, from_k, from_v = ctx.kernel.backward(grad_out, queries, *block, out, lse, ctx.state)
            grad_q += from_q
            grad_block = torch.stack((from_k.float(), from_v.float()))
            if incoming is not None:
                grad_block += incoming.wait()
            incoming = _Transfer(grad_block, ctx.group, ctx.lengths[(rank - step) % size])
        assert incoming is not None  # a group has at least two ranks
        grad_k, grad_v = incoming.wait()
        return *(grad.transpose(1, 2).to(q.dtype) for grad in (grad_q, grad_k, grad_v)), None, None


def _heads_first(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Pack two of (B, s, H, d) into one message (2, B, H, s, d)."""
    return torch.stack((k.transpose(1, 2), v.transpose(1, 2)))


def _blocks(block: torch.Tensor, group: dist.ProcessGroup, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the blocks (2, B, H, t, d) of all ranks, this rank's first; the next one is prefetched."""
    rank, size = dist.get_rank(group), group_size(group)
    for step in range(1, size):
        incoming = _Transfer(block, group, lengths[(rank - step) % size])
        yield block
        block = incoming.wait()
    yield block


class _Transfer:
    """Asynchronously send a tensor to the next rank and receive one from the previous rank.

    Args:
        tensor: (..., t, d).
        group: the ring.
        length: t of the received tensor.
    """

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup, length: int) -> None:
        rank, size = dist.get_rank(group), group_size(group)
        self.sent = tensor  # kept alive until sent
        self.received = tensor.new_empty((*tensor.shape[:-2], length, tensor.shape[-1]))
        self.requests = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def wait(self) -> torch.Tensor:
        """Return the received tensor."""
        for request in self.requests:
            request.wait()
        return self.received


def _join(
    out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two sets of keys, (B, H, s, d) and (B, H, s) each; in float32."""
    total = torch.logaddexp(lse, block_lse)
    out = out * (lse - total).exp()[..., None] + block_out.float() * (block_lse - total).exp()[..., None]
    return out, total


class _Kernel(NamedTuple):
    """Attention over one block of keys; queries (B, H, s, d), keys and values (B, H, t, d).

    Args:
        forward: q, k, v → out (B, H, s, d), lse (B, H, s) in float32, state of the kernel for the backward pass.
        backward: gradient of out; q, k, v; out and lse over all blocks; state → gradients of q, k, v.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _kernel(q: torch.Tensor) -> _Kernel:
    """Return the fused kernel for the device, dtype and channels of q; without one, matrix products in float32."""
    if _has_operator(q, "_scaled_dot_product_flash_attention_for_cpu"):
        return CPU_FLASH
    is_supported = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return FLASH if is_supported and _has_operator(q, "_scaled_dot_product_flash_attention") else PLAIN


def _has_operator(x: torch.Tensor, name: str) -> bool:
    """Whether PyTorch or an extension has an operator for the device of a tensor."""
    key = torch._C._dispatch_key_for_device(x.device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def _cpu_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v), ()


def _cpu_flash_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, _: Any
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse, (seed, offset)  # of dropout: unused, but required by the backward pass


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dropout: Any,
) -> Any:
    lengths = None, None, q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *lengths, 0.0, False, *dropout)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    outs, sums = [], []
    q, k, v = (x.float() for x in (q, k, v))
    for queries in q.split(_query_chunk(q, k), dim=2):
        scores = queries @ k.mT / math.sqrt(q.shape[-1])
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v)
    return torch.cat(outs, 2), torch.cat(sums, 2), ()


def _plain_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, _: Any
) -> Any:
    scale = 1 / math.sqrt(q.shape[-1])
    grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
    grads_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
    for dout, queries, outs, sums in zip(*(x.split(_query_chunk(q, k), 2) for x in (grad, q, out, lse)), strict=True):
        weights = (queries @ k.mT * scale - sums[..., None]).exp()
        dscores = weights * (dout @ v.mT - (dout * outs).sum(-1, keepdim=True)) * scale
        grads_q.append(dscores @ k)
        grad_k += dscores.mT @ queries
        grad_v += weights.mT @ dout
    return torch.cat(grads_q, 2), grad_k, grad_v


def _query_chunk(q: torch.Tensor, k: torch.Tensor) -> int:
    """Return the number of queries per chunk."""
    return max(1, PLAIN_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


CPU_FLASH = _Kernel(_cpu_flash, _cpu_flash_backward)
FLASH = _Kernel(_flash, _flash_backward)
PLAIN = _Kernel(_plain, _plain_backward)
