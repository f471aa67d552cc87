"""LoKr: ΔW = (alpha / r)·w1 ⊗ w2, a Kronecker product (Hyeon-Woo et al. 2022, Yeh et al. 2024, LyCORIS).

The outputs of a module are factored as o1·o2 and its inputs as i1·i2. w1 [o1, i1] is whole. w2 [o2, i2] is the product
of w2_a [o2, r] and w2_b [r, i2] where that is smaller, else whole. A row x of i1·i2 inputs, as a matrix X [i1, i2],
gives w1·X·w2ᵀ, so that the Kronecker product itself is never made::

    <projection>.lokr_w1.<j>, <projection>.lokr_w2.<j>, or lokr_w2_a.<j> and lokr_w2_b.<j> in its place

w2, or w2_b, starts as zero.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgm.util import InputError
from sgm.weights.lazy import AnyTensor, LazyTensor, Tensors
from sgm.weights.lora.names import ADAPTER, PROJECTIONS, projection_of

W1, W2, W2_A, W2_B = "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"
KINDS = (W1, W2, W2_A, W2_B)

Matrices = Mapping[str, AnyTensor]


def is_kronecker(name: str) -> bool:
    """Whether a tensor is one of LoKr, by its name with or without prefix."""
    match = ADAPTER.fullmatch(name)
    return match is not None and match[2] in KINDS


def factors_of(size: int, factor: int) -> tuple[int, int]:
    """Return the two factors of a size, as LyCORIS and PEFT choose them.

    Args:
        size: number of inputs or outputs.
        factor: the first of both if it divides `size`, else the bound of the first; -1 for no bound. The first is the
            largest divisor within the bound that is not above the second.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = max(divisor for divisor in range(1, most + 1) if size % divisor == 0)
    return first, size // first


def shapes_of(num_outputs: int, num_inputs: int, rank: int, factor: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices of a module."""
    (o1, o2), (i1, i2) = factors_of(num_outputs, factor), factors_of(num_inputs, factor)
    whole = {W2: (o2, i2)} if rank >= max(o2, i2) / 2 else {W2_A: (o2, rank), W2_B: (rank, i2)}
    return {W1: (o1, i1), **whole}


def product(x: torch.Tensor, w1: torch.Tensor, *w2: torch.Tensor) -> torch.Tensor:
    """Return (w1 ⊗ w2)·x (..., D_out) of x (..., D_in), with w2 whole or as its two matrices."""
    second = w2[0] if len(w2) == 1 else w2[0] @ w2[1]
    rows = F.linear(x.unflatten(-1, (w1.shape[1], second.shape[1])), second)
    return F.linear(rows.transpose(-1, -2), w1).transpose(-1, -2).flatten(-2)


def kronecker(scale: float, w1: torch.Tensor, *w2: torch.Tensor) -> torch.Tensor:
    """Return scale·w1 ⊗ w2 (D_out, D_in), float32."""
    second = w2[0].float() if len(w2) == 1 else w2[0].float() @ w2[1].float()
    return scale * torch.kron(w1.float().contiguous(), second.contiguous())


def in_parts(tensors: Tensors) -> dict[str, list[dict[str, AnyTensor]]]:
    """Return the matrices of each part of the projections with LoKr, by name of the projection; empty without any.

    Raises:
        InputError: some are missing.
    """
    found: dict[str, dict[int, dict[str, AnyTensor]]] = {}
    for name, tensor in tensors.items():
        match = ADAPTER.fullmatch(name)
        if match is not None and match[2] in KINDS:
            found.setdefault(match[1], {}).setdefault(int(match[3]), {})[match[2]] = tensor
    for projection, parts in found.items():
        num = len(PROJECTIONS[projection_of(projection)[1]])
        complete = all(parts.get(index, {}).keys() in ({W1, W2}, {W1, W2_A, W2_B}) for index in range(num))
        if len(parts) != num or not complete:
            raise InputError(
                f"the LoKr of {projection} in the checkpoint is not lokr_w1 with lokr_w2 or both lokr_w2_a and "
                f"lokr_w2_b, for {num} parts; give a checkpoint that was saved completely"
            )
    return {projection: [parts[index] for index in sorted(parts)] for projection, parts in found.items()}


def changes_of(
    tensors: Tensors, scale: float, join: Callable[[str, list[torch.Tensor]], torch.Tensor]
) -> dict[str, LazyTensor]:
    """Return ΔW (D_out, D_in) float32 of each projection with LoKr, lazy.

    Args:
        tensors: by SAT's names.
        scale: strength·alpha / r.
        join: the parts of a projection to its rows, by its name.
    """
    result = {}
    for projection, parts in in_parts(tensors).items():
        matrices = [matrix for part in parts for matrix in ordered(part)]
        counts = [len(part) for part in parts]
        made = partial(_joined, scale, counts, partial(join, projection))
        result[projection] = LazyTensor(tuple(matrices), made)
    return result


def ordered(part: Matrices) -> list[AnyTensor]:
    """Return the matrices of a part in the order of `KINDS`, as `product` and `kronecker` take them."""
    return [part[kind] for kind in KINDS if kind in part]


def _joined(
    scale: float,
    counts: Iterable[int],
    join: Callable[[list[torch.Tensor]], torch.Tensor],
    *matrices: torch.Tensor,
) -> torch.Tensor:
    found, left = [], list(matrices)
    for count in counts:
        found.append(kronecker(scale, *left[:count]))
        left = left[count:]
    return join(found)


def completed(tensors: Tensors) -> dict[str, AnyTensor]:
    """Return the tensors of a LoKr with zeros for the parts of its projections that have none."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        match = ADAPTER.fullmatch(name)
        if match is None or match[2] not in KINDS:
            continue
        for index in range(len(PROJECTIONS[projection_of(match[1])[1]])):
            own = [f"{match[1]}.{kind}.{index}" for kind in KINDS]
            if not any(each in tensors for each in own):
                result[f"{match[1]}.{match[2]}.{index}"] = LazyTensor((tensor,), torch.zeros_like)
    return result


# --- Files of other tools.


def read_kronecker(file: str, modules: Mapping[str, Mapping[str, AnyTensor]], scales: Mapping[str, float]) -> "Form":
    """Bring the matrices of other tools to the form of one rank and factor, with a scale of 1.

    Args:
        file: for messages.
        modules: the matrices of each module, also ``lokr_w1_a`` and ``lokr_w1_b``, by any name of the module.
        scales: of each module: alpha / r.

    Raises:
        InputError: matrices are missing or do not fit each other, or the modules are not of one factor.
    """
    parts: dict[str, dict[str, AnyTensor]] = {}
    for module, own in modules.items():
        one = own.keys() & {W1, f"{W1}_a", f"{W1}_b"}
        two = own.keys() & set(KINDS[1:])
        if one not in ({W1}, {f"{W1}_a", f"{W1}_b"}) or two not in ({W2}, {W2_A, W2_B}):
            raise InputError(f"{file} has of {module} only {', '.join(sorted(own)) or 'alpha'}; copy or save it again")
        shapes = [tuple(tensor.shape) for tensor in own.values()]
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise InputError(
                f"{file}: the LoKr of {module} has matrices {shapes}; expected two axes, as of linear layers, of 1 or "
                "more"
            )
        for first, second in ((f"{W1}_a", f"{W1}_b"), (W2_A, W2_B)):
            if first in own and own[first].shape[1] != own[second].shape[0]:
                shapes = f"{first} {tuple(own[first].shape)} and {second} {tuple(own[second].shape)}"
                raise InputError(f"{file}: {shapes} of {module} have no rank in common; copy or save it again")
        w1 = (own[W1],) if W1 in own else (own[f"{W1}_a"], own[f"{W1}_b"])
        first = LazyTensor(w1, partial(_scaled_first, scales[module]))
        parts[module] = {W1: first} | {kind: own[kind] for kind in KINDS[1:] if kind in own}
    sizes = {module: _sizes(own) for module, own in parts.items()}
    factor = _factor(file, sizes)
    ranks = {own[W2_B].shape[0] for own in parts.values() if W2_B in own}
    rank = ranks.pop() if len(ranks) == 1 else 0
    if not rank or any((W2 in own) != (W2 in _expected(sizes[name], rank, factor)) for name, own in parts.items()):
        # No rank has this form: the least rank of which every w2 is whole.
        rank = max(math.ceil(max(o2, i2) / 2) for (_, o2), (_, i2) in sizes.values())
        parts = {module: _with_whole(own) for module, own in parts.items()}
    return Form(rank, factor, parts)


class Form(NamedTuple):
    """Matrices of LoKr of one rank and factor, by name of the module."""

    rank: int
    factor: int
    parts: Mapping[str, Mapping[str, AnyTensor]]


Sizes = tuple[tuple[int, int], tuple[int, int]]  # (o1, o2), (i1, i2)


def _sizes(own: Matrices) -> Sizes:
    (o1, i1), second = own[W1].shape, own.get(W2)
    o2, i2 = second.shape if second is not None else (own[W2_A].shape[0], own[W2_B].shape[1])
    return (o1, o2), (i1, i2)


def _expected(sizes: Sizes, rank: int, factor: int) -> dict[str, tuple[int, int]]:
    (o1, o2), (i1, i2) = sizes
    return shapes_of(o1 * o2, i1 * i2, rank, factor)


def _factor(file: str, sizes: Mapping[str, Sizes]) -> int:
    """Return the factor that gives all sizes."""
    pairs = {pair for both in sizes.values() for pair in both}
    for factor in (-1, *sorted({first for first, _ in pairs})):
        if all(factors_of(first * second, factor) == (first, second) for first, second in pairs):
            return factor
    listed = ", ".join(f"{first}·{second}" for first, second in sorted(pairs))
    raise InputError(f"{file} factors sizes as {listed}, which no one factor gives; train with one")


def _scaled_first(scale: float, *w1: torch.Tensor) -> torch.Tensor:
    first = w1[0] if len(w1) == 1 else w1[0].float() @ w1[1].float()
    return first if scale == 1 and len(w1) == 1 else (scale * first.float()).to(w1[0].dtype)


def _with_whole(own: Matrices) -> dict[str, AnyTensor]:
    if W2 in own:
        return dict(own)
    return {W1: own[W1], W2: LazyTensor((own[W2_A], own[W2_B]), _whole)}


def _whole(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() @ b.float()).to(a.dtype)
