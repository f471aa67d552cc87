"""Compare sequence parallelism with one rank, in groups of 2, 3 and 4 of four processes; for test_sequence.py.

Run: torchrun --standalone --nproc_per_node=4 tests/sgm/parallel/sequence_ranks.py RESULTS.json

Writes {group size: {case: figure}}: the worst difference over all ranks and tensors of a case, how many times fewer
bytes a rank saves for the backward pass than a single rank, or an error message.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # checkpoint imports it later; after groups exist, that would keep them alive
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgm.parallel.ring_attention import ring_attention
from sgm.parallel.sequence import gather_sequence, group_size, shard_sizes, split_sequence, ulysses_attention

# Sequence parallel groups. The two pairs run at the same time, as with two samples on four ranks.
GROUPS = ([0, 1, 2, 3], [1, 2, 3], [0, 2], [1, 3])
HEAD_DIM = 8
# Text tokens and patches: divisible by 2, 3 and 4; by none of them; less text than ranks.
LENGTHS = ((12, 36), (7, 29), (1, 10))


def full_attention(q, k, v, *_):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def ulysses(q, k, v, group, lengths):
    return ulysses_attention(q, k, v, group, lengths, full_attention)


METHODS: dict[str, Callable] = {"ulysses": ulysses, "ring": ring_attention}


def local_lengths(num_text: int, num_patches: int, group) -> list[int]:
    size = group_size(group)
    return [
        text + patches
        for text, patches in zip(shard_sizes(num_text, size), shard_sizes(num_patches, size), strict=True)
    ]


def split(tokens: torch.Tensor, num_text: int, group) -> torch.Tensor:
    """Return this rank's shard of the text, then of the patches."""
    text, patches = tokens.split((num_text, tokens.shape[1] - num_text), dim=1)
    return torch.cat((split_sequence(text, group), split_sequence(patches, group)), dim=1)


def gather(tokens: torch.Tensor, num_text: int, num_patches: int, group) -> torch.Tensor:
    own_text = shard_sizes(num_text, group_size(group))[dist.get_rank(group)]
    text, patches = tokens.split((own_text, tokens.shape[1] - own_text), dim=1)
    whole = gather_sequence(text, group, 1, num_text), gather_sequence(patches, group, 1, num_patches)
    return torch.cat(whole, dim=1)


class Toy(nn.Module):
    """A minimal transformer block: modulated tokens, attention, a linear layer, patches at the end."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        dim = heads * HEAD_DIM
        self.heads = heads
        self.modulation = nn.Linear(4, dim)
        self.qkv, self.dense, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, tokens, emb, num_text: int, group=None, method: Callable = full_attention, recompute=False):
        num_patches = tokens.shape[1] - num_text
        own_text = shard_sizes(num_text, group_size(group))[dist.get_rank(group) if group else 0]
        x = split(tokens, num_text, group)
        arguments = x, emb, group, local_lengths(num_text, num_patches, group), method
        y = checkpoint(self.inner, *arguments, use_reentrant=False) if recompute else self.inner(*arguments)
        return gather_sequence(y[:, own_text:], group, 1, num_patches)

    def inner(self, x, emb, group, lengths, method):
        x = x * (1 + self.modulation(emb))[:, None]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.out(F.gelu(self.dense(method(q, k, v, group, lengths).flatten(2))))


def difference(ours, theirs) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def attention_cases(group) -> Iterator[tuple[str, float]]:
    """Outputs, and gradients of queries, keys and values, against full attention."""
    for name, heads, batch, (num_text, num_patches) in itertools.product(METHODS, (4, 5, 30), (1, 2), LENGTHS):
        torch.manual_seed(heads)
        length = num_text + num_patches
        qkv = torch.randn(batch, length, 3, heads, HEAD_DIM, requires_grad=True)
        weight = torch.randn(batch, length, heads, HEAD_DIM)
        expected = full_attention(*qkv.unbind(2))
        (expected_grad,) = torch.autograd.grad((expected * weight).sum(), qkv)

        q, k, v = split(qkv, num_text, group).unbind(2)
        out = METHODS[name](q, k, v, group, local_lengths(num_text, num_patches, group))
        out = gather(out, num_text, num_patches, group)
        (grad,) = torch.autograd.grad((out * weight).sum(), qkv)
        yield (
            f"{name}, {heads} heads, {batch}×({num_text}+{num_patches})",
            difference((out, grad), (expected, expected_grad)),
        )


def linear_case(group) -> Iterator[tuple[str, float]]:
    """Gradients of a linear layer: complete on every rank for inputs, summed over the group for weights."""
    torch.manual_seed(0)
    layer, x, weight = nn.Linear(3, 2), torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 2)
    expected = torch.autograd.grad((layer(x) * weight).sum(), (x, *layer.parameters()))
    shard = split_sequence(x, group, 0)
    assert shard.untyped_storage().nbytes() == shard.nbytes, "the shard keeps the unsharded tensor in memory"
    y = gather_sequence(layer(shard), group, 0, 5)
    of_x, *of_weights = torch.autograd.grad((y * weight).sum(), (x, *layer.parameters()))
    yield "input", difference([of_x], expected[:1])
    yield "weights", difference(summed(of_weights, group), expected[1:])


def block_cases(group) -> Iterator[tuple[str, float]]:
    """A block: its output, the gradients of its inputs, and those of its weights, summed over the group."""
    for name, recompute in itertools.product(METHODS, (False, True)):
        torch.manual_seed(0)
        num_text, num_patches = 3, 22
        toy = Toy(heads=5)
        tokens, emb = torch.randn(2, num_text + num_patches, 5 * HEAD_DIM, requires_grad=True), torch.randn(2, 4)
        target = torch.randn(2, num_patches, 3)

        leaves = tokens, *toy.parameters()
        expected = toy(tokens, emb, num_text)
        expected_grads = torch.autograd.grad(F.mse_loss(expected, target, reduction="sum"), leaves)
        out = toy(tokens, emb, num_text, group, METHODS[name], recompute)
        of_tokens, *of_weights = torch.autograd.grad(F.mse_loss(out, target, reduction="sum"), leaves)
        ours = out, of_tokens, *summed(of_weights, group)
        yield f"{name}, {recompute=}", difference(ours, (expected, *expected_grads))


def half_precision_cases(group) -> Iterator[tuple[str, float]]:
    for name, method in METHODS.items():
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, 40, 4, 16, dtype=torch.bfloat16).unbind()
        local = [split_sequence(x, group) for x in (q, k, v)]
        out = method(*local, group, shard_sizes(40, group_size(group)))
        assert out.dtype == torch.bfloat16
        expected = full_attention(q.float(), k.float(), v.float())
        yield name, difference([gather_sequence(out, group, 1, 40).float()], [expected])


def memory_cases(group) -> Iterator[tuple[str, float]]:
    torch.manual_seed(0)
    toy, tokens, emb = Toy(heads=12), torch.randn(1, 1600, 12 * HEAD_DIM), torch.randn(1, 4)
    alone = saved_bytes(toy, tokens, emb, 100)
    for name, method in METHODS.items():
        yield name, alone / saved_bytes(toy, tokens, emb, 100, group, method)


def saved_bytes(module: nn.Module, *arguments: Any) -> int:
    """Bytes saved for the backward pass, without the weights."""
    storages = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # keep alive: its address must not be reused
        return tensor.detach()  # an output itself would create a reference cycle with its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(*arguments)
    assert out.grad_fn is not None
    return sum(storage.nbytes() for storage in storages.values())


def summed(gradients, group) -> list[torch.Tensor]:
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    return gradients


def messages(group) -> Iterator[tuple[str, str]]:
    """Wrong sizes: refused before anything is sent."""
    size = group_size(group)
    one = torch.zeros(1, 1, 1, HEAD_DIM)
    wrong = {
        "few heads": lambda: ulysses(one, one, one, group, [1] * size),
        "few sizes": lambda: ring_attention(one, one, one, group, [1]),
        "wrong size": lambda: ulysses(one.expand(1, 1, 4, -1), one, one, group, [2] * size),
        "wrong shard": lambda: gather_sequence(one, group, 1, 9 * size),
        "no token": lambda: ring_attention(one[:, :0], one[:, :0], one[:, :0], group, [0] * size),
    }
    for name, call in wrong.items():
        try:
            call()
        except ValueError as error:
            yield name, f"{type(error).__name__}: {error}"


CASES: dict[str, Callable] = {
    "attention": attention_cases,
    "linear": linear_case,
    "block": block_cases,
    "half precision": half_precision_cases,
    "memory": memory_cases,
    "messages": messages,
}


def main(path: str) -> None:
    dist.init_process_group("gloo")
    groups = [(len(ranks), dist.new_group(ranks)) for ranks in GROUPS]
    mine: dict[int, dict[str, dict[str, Any]]] = {}
    for (size, group), ranks in zip(groups, GROUPS, strict=True):
        if dist.get_rank() in ranks:
            mine[size] = {kind: dict(cases(group)) for kind, cases in CASES.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        sizes = {size for size, _ in groups}
        Path(path).write_text(json.dumps({size: merged([m[size] for m in everyone if size in m]) for size in sizes}))
    dist.destroy_process_group()


def merged(results: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Worst case over ranks: the largest difference, the smallest saving."""
    worst = {kind: min if kind == "memory" else max for kind in CASES}
    return {kind: {n: worst[kind](r[kind][n] for r in results) for n in results[0][kind]} for kind in CASES}


if __name__ == "__main__":
    main(sys.argv[1])
