"""Whole matrices for optimizers that need them, at ZeRO stages 1 and 2, which flatten parameters and slice them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sgm.distributed


@dataclass
class _Piece:
    """What this rank holds of a parameter.

    Attributes:
        whole: the parameter in its shape, for the inner optimizer.
        place: its elements in the slice of the rank.
        part: the same elements in the flattened parameter.
        shared: where the parameter lies in the buffer of those that several ranks hold; None if it is all here.
    """

    whole: nn.Parameter
    place: slice
    part: slice
    shared: slice | None


class WholeMatrices(torch.optim.Optimizer):
    """Run an optimizer on parameters in their shapes inside ZeRO 1 and 2.

    ZeRO replaces the parameters of each group by one vector: a slice of their concatenation. A parameter inside the
    slice is updated through a view of it. One that crosses the border of two slices is all-reduced before the step, and
    each rank that holds a part updates it whole and keeps its part; so at most a parameter per border is computed, and
    its state kept, more than once.

    Args:
        groups: parameter groups, as for `cls`.
        cls: the optimizer.
        params: its other parameters.

    Attributes:
        gradients: slice of the vector of the group that steps → its gradients, which are then made for one parameter at
            a time; None takes those of the vector.

    Raises:
        ValueError: `cls` refuses a parameter.
    """

    gradients: Callable[[slice], Tensor] | None = None

    def __init__(
        self, groups: list[dict[str, Any]], cls: Callable[..., torch.optim.Optimizer], params: Mapping[str, Any]
    ) -> None:
        example = cls([dict(group) for group in groups], **params)
        self.cls, self._params = cls, dict(params)
        self._parameters = [list(group["params"]) for group in groups]
        self._own_settings = [{name: group[name] for name in group if name != "params"} for group in groups]
        self._inner: list[torch.optim.Optimizer] = []
        self._pieces: list[list[_Piece]] = []
        self._shared_sizes: list[int] = []
        super().__init__(example.param_groups, example.defaults)
        for number, group in enumerate(self.param_groups):
            group["number"] = number

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters; DeepSpeed may show one group at a time."""
        loss = None if closure is None else closure()
        self._divide()
        for group in self.param_groups:
            (flat,), number = group["params"], group["number"]
            if flat.grad is not None:
                self._step_group(flat, group, number)
        return loss

    def _step_group(self, flat: Tensor, group: dict[str, Any], number: int) -> None:
        pieces, size = self._pieces[number], self._shared_sizes[number]
        values, whole_gradient = flat.detach(), flat.grad
        assert whole_gradient is not None
        gradients = self.gradients or whole_gradient.__getitem__
        shared = torch.zeros(2, size, dtype=flat.dtype, device=sgm.distributed.device()) if size else None
        if shared is not None:
            for piece in pieces:
                if piece.shared is not None:
                    shared[0, piece.shared][piece.part] = values[piece.place]
                    shared[1, piece.shared][piece.part] = gradients(piece.place)
            dist.all_reduce(shared)
        (inner_group,) = self._inner[number].param_groups
        inner_group.update({name: group[name] for name in self.defaults if name in group})
        everything = inner_group["params"]
        for piece in pieces:
            whole = piece.whole
            if piece.shared is None:
                whole.data, gradient = values[piece.place].view(whole.shape), gradients(piece.place)
            else:
                assert shared is not None
                whole.data, gradient = (row[piece.shared].view(whole.shape).to(flat.device) for row in shared)
            whole.grad = gradient.view(whole.shape)
            inner_group["params"] = [whole]
            self._inner[number].step()
            whole.grad = None
            if piece.shared is not None:
                values[piece.place] = whole.detach().flatten()[piece.part]
        inner_group["params"] = everything

    def _divide(self) -> None:
        """Find what this rank holds, once DeepSpeed has sliced the parameters. Collective."""
        if self._inner:
            return
        flat = self.param_groups[0]["params"][0]
        found = [[_place(p) for p in parameters] for parameters in self._parameters]
        device = sgm.distributed.device()  # of the collective, also where the state is in host memory
        held = [torch.tensor([part.stop - part.start for _, part in places], device=device) for places in found]
        most = [sgm.distributed.all_reduce_(each, largest=True).tolist() for each in held]  # on any rank
        for number, (parameters, places) in enumerate(zip(self._parameters, found, strict=True)):
            pieces, size = [], 0
            for index, (p, (place, part)) in enumerate(zip(parameters, places, strict=True)):
                shared = None
                if most[number][index] < p.numel():
                    shared, size = slice(size, size + p.numel()), size + p.numel()
                if part.stop > part.start:
                    whole = nn.Parameter(flat.new_zeros(()).expand(p.shape))  # each step sets its data
                    pieces.append(_Piece(whole, place, part, shared))
            # A rank may hold padding only, and optimizers refuse an empty list.
            own = [piece.whole for piece in pieces] or [nn.Parameter(flat.new_zeros(1, 1))]
            self._inner.append(self.cls([{"params": own, **self._own_settings[number]}], **self._params))
            self._pieces.append(pieces)
            self._shared_sizes.append(size)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the vectors (an average), and those of the inner optimizers."""
        return {**super().state_dict(), "inner": [inner.state_dict() for inner in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same slices. Collective."""
        own = dict(state_dict)
        states = own.pop("inner")
        super().load_state_dict(own)
        if states:
            self._divide()
            for inner, state in zip(self._inner, states, strict=True):
                inner.load_state_dict(state)


def _place(parameter: nn.Parameter) -> tuple[slice, slice]:
    """Return the elements of a parameter in the slice of this rank, and in the parameter; empty if it has none."""
    mapping = getattr(parameter, "_hp_mapping", None)  # where DeepSpeed says so
    if mapping is None:
        return slice(0, 0), slice(0, 0)
    own, part = mapping.hp_fragment_address, mapping.lp_fragment_address
    return slice(own.start, own.start + own.numel), slice(part.start, part.start + part.numel)
