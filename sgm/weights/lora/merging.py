"""Merge adapters into the weights: W + strength·ΔW in float32, rounded once."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.nn.functional import pad

from sgm.util import InputError
from sgm.weights.adapters import WRAPPED, Pair, adapter_pairs, is_adapter
from sgm.weights.lazy import AnyTensor, LazyTensor, Tensors
from sgm.weights.lora.dora import gains, parts_of, row_norms
from sgm.weights.lora.lokr import changes_of, is_kronecker
from sgm.weights.lora.names import MODULATION, NORM_CHUNKS, projection_of


def merge_adapters(
    tensors: Tensors,
    *,
    alpha: float,
    rank: int | None = None,
    strength: float = 1.0,
    shares: Mapping[str, torch.Tensor] | None = None,
    changes: Mapping[str, LazyTensor] | None = None,
) -> dict[str, LazyTensor]:
    """Merge adapters into the weights, summed in float32 and rounded to the dtype of W once.

    LoRA gives W + strength·(alpha / r)·B·A. DoRA gives W + strength·(g·V - W), see `sgm.weights.lora.dora`, and LoKr
    W + strength·(alpha / r)·w1 ⊗ w2.

    Args:
        tensors: a network with adapters. Adapted projections are named with or without ``.original``.
        alpha: numerator of the scale.
        rank: r of LoKr, whose matrices do not tell it.
        strength: 0 gives the network without its adapters, bit for bit.
        shares: h (D_out,) of projections to which h·W is added too, see `sgm.weights.lora.several`.
        changes: ΔW (D_out, D_in) that is added too, by projection.

    Returns:
        The network without ``.original`` in its names; tensors without adapters are unchanged.

    Raises:
        InputError: matrices without a partner or a weight, or with mismatched shapes.
    """
    pairs, magnitudes = adapter_pairs(tensors, "the checkpoint"), magnitudes_of(tensors)
    added = dict(changes or {})
    if rank is not None:
        added |= kronecker_changes(tensors, scale=strength * alpha / rank)
    assert added or not any(map(is_kronecker, tensors)), "the caller gives the rank of LoKr"
    result = {}
    for name, tensor in tensors.items():
        if is_adapter(name):
            continue
        plain = WRAPPED.sub(r".\1", name)
        module, _, kind = plain.rpartition(".")
        own = pairs.pop(module, None) if kind == "weight" else None
        change = added.pop(module, None) if kind == "weight" else None
        if strength == 0 or (own is None and change is None):
            result[plain] = LazyTensor((tensor,))
            continue
        if change is not None:
            require_shape(module, tensor, change)
            whole = LazyTensor((tensor,), to_dtype=torch.float32)
            made = whole if own is None else _merged(module, whole, own, magnitudes, alpha, strength, shares)
            result[plain] = LazyTensor((made, change), _add, to_dtype=tensor.dtype)
        elif own is not None:
            result[plain] = _merged(module, tensor, own, magnitudes, alpha, strength, shares)
    if left := [*pairs, *added]:
        raise InputError(f"the checkpoint has adapters on {left[0]} and no weight there; give the whole base")
    return result


def _merged(
    module: str,
    tensor: AnyTensor,
    own: list[Pair],
    magnitudes: Mapping[str, list[AnyTensor]],
    alpha: float,
    strength: float,
    shares: Mapping[str, torch.Tensor] | None,
) -> LazyTensor:
    """Return a weight with the matrices of LoRA, and of DoRA the magnitudes, of its projection."""
    require_fitting(module, tensor, own)
    matrices = [matrix for pair in own for matrix in pair]
    modulates, scale = projection_of(module)[1] == MODULATION, alpha / matrices[0].shape[0]
    if module in magnitudes:
        make = partial(_decomposed, scale, strength, modulates, len(own))
        return LazyTensor((tensor, *matrices, *magnitudes[module]), make)
    share = (shares or {}).get(module)
    more = () if share is None else (share,)
    return LazyTensor((tensor, *more, *matrices), partial(_add_products, strength * scale, modulates, bool(more)))


def kronecker_changes(tensors: Tensors, *, scale: float) -> dict[str, LazyTensor]:
    """Return scale·w1 ⊗ w2 (D_out, D_in) float32 of each projection with LoKr, in the order of its rows.

    Args:
        tensors: by names without prefix.
        scale: strength·alpha / r.
    """
    return changes_of(tensors, scale, _in_rows)


def _in_rows(projection: str, parts: list[torch.Tensor]) -> torch.Tensor:
    return in_order(parts) if projection_of(projection)[1] == MODULATION else torch.cat(parts)


def _add(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return weight + change.view_as(weight)


def require_shape(projection: str, weight: AnyTensor, change: AnyTensor) -> None:
    """Raise InputError unless a change is of the shape of a weight."""
    if (weight.shape[0], math.prod(weight.shape[1:])) != tuple(change.shape):
        raise InputError(
            f"the LoKr of {projection} changes a weight {tuple(change.shape)}, and there it is {tuple(weight.shape)}; "
            "give the base that it was trained on"
        )


def magnitudes_of(tensors: Tensors) -> dict[str, list[AnyTensor]]:
    """Return the magnitudes of the pairs of each projection; names are without prefix. Empty for LoRA.

    Raises:
        InputError: some are missing.
    """
    result: dict[str, list[AnyTensor]] = {}
    if not any(".magnitude." in name for name in tensors if is_adapter(name)):
        return result
    for projection, own in adapter_pairs(tensors, "the checkpoint").items():
        names = [f"{projection}.magnitude.{index}" for index in range(len(own))]
        if missing := [name for name in names if name not in tensors]:
            raise InputError(f"the DoRA in the checkpoint lacks {missing[0]}; give a checkpoint saved completely")
        result[projection] = [tensors[name] for name in names]
    return result


def require_fitting(projection: str, weight: AnyTensor, pairs: list[Pair]) -> None:
    """Raise InputError unless the pairs of a projection add up to the shape of its weight."""
    shapes = [((a.shape[0], math.prod(a.shape[1:])), tuple(b.shape)) for a, b in pairs]
    rows = sum(b[0] for _, b in shapes)
    columns = {a[1] for a, _ in shapes}
    if (weight.shape[0], math.prod(weight.shape[1:])) != (rows, *columns) or any(a[0] != b[1] for a, b in shapes):
        listed = ", ".join(f"A {a} B {b}" for a, b in shapes)
        raise InputError(
            f"the adapters of {projection} ({listed}) do not fit its weight {tuple(weight.shape)}; give the base that "
            "they were trained on"
        )


def _add_products(
    scale: float, modulates: bool, shared: bool, weight: torch.Tensor, *matrices: torch.Tensor
) -> torch.Tensor:
    """Return a weight with scale·B·A of each pair added to its rows, and, of a share h in front of them, h·W."""
    pairs = matrices[shared:]
    products = [b.float() @ a.float().flatten(1) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    whole = in_order(products) if modulates else torch.cat(products)
    full = weight.float()
    added = full + matrices[0].view(-1, *[1] * (full.dim() - 1)) * full if shared else full
    return (added + scale * whole.view_as(weight)).to(weight.dtype)


def _decomposed(
    scale: float, strength: float, modulates: bool, num: int, weight: torch.Tensor, *tensors: torch.Tensor
) -> torch.Tensor:
    """Return a weight with `strength` of the difference to its decomposition, of `num` pairs and their magnitudes."""
    pairs, magnitudes = tensors[: 2 * num], tensors[2 * num :]
    parts = []
    rows = parts_of(weight.flatten(1), num, modulates=modulates)
    for own, a, b, magnitude in zip(rows, pairs[::2], pairs[1::2], magnitudes, strict=True):
        plain = own.float()
        directed = torch.addmm(plain, b.float(), a.flatten(1).float(), alpha=scale)
        gain = gains(magnitude, row_norms(own, a, b, scale))[:, None]
        parts.append(plain + strength * (gain * directed - plain))
    whole = in_order(parts) if modulates else torch.cat(parts)
    return whole.view_as(weight).to(weight.dtype)


def in_order(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Return rows of a block's modulation, of its two pairs, in the order of SAT; see `NORM_CHUNKS`."""
    chunks = {
        i: chunk
        for own, part in zip(NORM_CHUNKS, parts, strict=True)
        for i, chunk in zip(own, part.chunk(6, dim), strict=True)
    }
    return torch.cat([chunks[index] for index in range(12)], dim)


def pair_of(u: torch.Tensor, values: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, D_in) and B (D_out, rank) whose product is u·diag(values)·vᵀ.

    Args:
        u: (D_out, n), n at most `rank`: a projection may be narrower, and the rest of A and B is zero.
        values: (n,) singular values, of which A and B have the roots.
        v: (D_in, n).
        rank: of the pair.
    """
    root, missing = values.sqrt(), rank - len(values)
    return pad((v * root).T, (0, 0, 0, missing)), pad(u * root, (0, missing))
