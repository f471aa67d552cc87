"""DoRA (Liu et al. 2024, arXiv:2402.09353): a magnitude for each output beside the matrices of LoRA.

With V = W + s·B·A, the weight is m/‖V‖ · V row by row: ‖V‖ are the Euclidean norms of the rows, and m, which is
trained, starts as the norms of W. Written as the gains g = m/‖V‖ and the output y of LoRA with the bias b::

    y + (g - 1)·(y - b)

so that gains of exactly 1, before any training, leave every bit as it is. ‖V‖ is a constant in the backward pass
(section 4.3 of the paper). It is rounded to the dtype of m, as the first m was. Outputs whose row of V is zero have the
gain 1.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from sgm.util import InputError
from sgm.weights.lazy import AnyTensor, LazyTensor, Tensors, compute
from sgm.weights.lora.names import ADAPTER, MODULATION, NORM_CHUNKS, PROJECTIONS, projection_of
from sgm.weights.quantize import StoredLinear

_ROWS = 1024  # of V in float32 at a time


def is_magnitude(name: str) -> bool:
    """Whether a tensor holds the magnitudes of an adapter, by its name with or without prefix."""
    match = ADAPTER.fullmatch(name)
    return match is not None and match[2] == "magnitude"


def parts_of(weight: torch.Tensor, num: int, *, modulates: bool) -> Sequence[torch.Tensor]:
    """Return the rows of a weight, or the elements of a vector, that belong to each of `num` pairs.

    Args:
        weight: (D_out, ...).
        num: of pairs.
        modulates: whether it is the modulation of a block, see `NORM_CHUNKS`.
    """
    if not modulates:
        return weight.chunk(num)
    chunks = weight.chunk(12)
    return [torch.cat([chunks[index] for index in own]) for own in NORM_CHUNKS]


def row_norms(
    weight: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None, scale: float = 0.0
) -> torch.Tensor:
    """Return the norms (D_out,) of the rows of W + scale·B·A, or of W: float32, without a gradient.

    Args:
        weight: W (D_out, ...).
        a: A (r, ...).
        b: B (D_out, r).
        scale: alpha / r.
    """
    with torch.no_grad():
        found = []
        for first in range(0, weight.shape[0], _ROWS):
            rows = weight[first : first + _ROWS].flatten(1).float()
            if a is not None and b is not None:
                rows = torch.addmm(rows, b[first : first + _ROWS].float(), a.flatten(1).float(), alpha=scale)
            found.append(torch.linalg.vector_norm(rows, dim=1))
        return torch.cat(found)


def gains(magnitude: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return m/‖V‖ (D_out,) float32, with the gradient of m.

    Args:
        magnitude: m (D_out,).
        norms: ‖V‖ (D_out,) float32, of `row_norms`.
    """
    norms = norms.to(magnitude.dtype).float()
    is_zero = norms == 0
    return torch.where(is_zero, 1.0, magnitude.float() / torch.where(is_zero, 1.0, norms))


def initial_magnitude(network: nn.Module, name: str) -> torch.Tensor:
    """Return magnitudes before training: the norms of the rows of the weight as the network has it, also in fewer bits.

    Args:
        network: whose weight is loaded already.
        name: of the magnitudes in it.
    """
    match = ADAPTER.fullmatch(name)
    assert match is not None, "the caller knows the name"
    adapter: Any = network.get_submodule(match[1])
    rows = parts_of(
        plain_weight(adapter.original), len(adapter.matrix_B), modulates=projection_of(match[1])[1] == MODULATION
    )
    return row_norms(rows[int(match[3])])


def base_magnitude(weights: Tensors, name: str) -> torch.Tensor:
    """Return the magnitudes (D_out,) float32 of a module without adapters: those of the weights of a network.

    Args:
        weights: by the names of the network.
        name: of the magnitudes in it.
    """
    match = ADAPTER.fullmatch(name)
    assert match is not None, "the caller knows the name"
    target = projection_of(match[1])[1]
    rows = parts_of(compute(weights[f"{match[1]}.weight"]), len(PROJECTIONS[target]), modulates=target == MODULATION)
    return row_norms(rows[int(match[3])])


def plain_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer, out of fewer bits if it is stored so (`sgm.weights.quantize`)."""
    weight: Any = layer.weight
    return weight.detach().dequantize() if isinstance(layer, StoredLinear) else weight.detach()


class Gains:
    """g of the parts of a DoRA on its base, each computed once, when it is first needed.

    Args:
        tensors: matrices and magnitudes by SAT's names.
        weights: of the base, by the names of the network.
        scale: alpha / r.
        source: of the adapters, for messages.
    """

    def __init__(self, tensors: Tensors, weights: Tensors, scale: float, source: str) -> None:
        self._tensors, self._weights, self._scale, self._source = tensors, weights, scale, source
        self._found: dict[str, torch.Tensor] = {}

    def of(self, name: str) -> torch.Tensor:
        """Return g (D_out,) float32 of a part, by the name of its matrix B.

        Raises:
            InputError: the base has no such weight, or one of another shape.
        """
        if name not in self._found:
            match = ADAPTER.fullmatch(name)
            assert match is not None, "a name of SAT"
            projection, index = match[1], int(match[3])
            target = projection_of(projection)[1]
            names = (name.replace(".matrix_B.", f".{kind}.") for kind in ("matrix_A", "matrix_B", "magnitude"))
            a, b, magnitude = (compute(self._tensors[each]) for each in names)
            whole = self._weights.get(f"{projection}.weight")
            num = len(PROJECTIONS[target])
            if whole is None or (whole.shape[0], math.prod(whole.shape[1:])) != (num * len(b), a[0].numel()):
                found = "has no weight" if whole is None else f"has a weight {tuple(whole.shape)}"
                raise InputError(
                    f"{self._source} is for another model: {projection} {found} there; give the base that it was "
                    "trained on"
                )
            rows = parts_of(compute(whole), num, modulates=target == MODULATION)[index]
            self._found[name] = gains(magnitude, row_norms(rows, a, b, self._scale))
        return self._found[name]

    def put_into(self, tensors: Tensors) -> dict[str, AnyTensor]:
        """Return the matrices of a LoRA of the same ranks, with g·B in the place of B: g·V - W lacks (g - 1)·W then."""
        return {
            name: LazyTensor((tensor,), partial(self._scaled, name)) if ".matrix_B." in name else tensor
            for name, tensor in tensors.items()
            if not is_magnitude(name)
        }

    def _scaled(self, name: str, b: torch.Tensor) -> torch.Tensor:
        return b.float() if b.is_meta else self.of(name)[:, None] * b.float()
