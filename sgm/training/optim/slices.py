"""The step of ZeRO 1 and 2 in slices, so that no more than a slice of the gradients is in float32 at once.

DeepSpeed flattens all gradients of a rank's partition and converts them, 6 bytes a parameter in 16 bits, before it lets
the optimizer update the partition, a vector. Here the optimizer gets one slice of the vector after another, or one
matrix after another where it needs them (`WholeMatrices`), with the gradients of these alone. Results are bit-equal.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from sgm.training.optim.whole import WholeMatrices

NUMBERS = 2**26  # of a slice: 256 MiB in float32; more than any matrix of the released networks


class SlicedStep:
    """Replaces what DeepSpeed's optimizer for ZeRO 1 and 2 does with each group of parameters in its step.

    Args:
        zero: that optimizer. It asks for gradients that are flat already, unscales and clips them, and steps.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._flat_already = zero._get_preflattened_grad_partition
        self._scale, self._step = zero.unscale_and_clip_grads, zero._optimizer_step
        self._gradients: _Gradients | None = None  # of the group that steps
        zero._get_preflattened_grad_partition = self._begin
        zero.unscale_and_clip_grads = self._keep_norm
        zero._optimizer_step = self._update

    def _begin(self, group: int) -> Tensor:
        """Return the gradients of a group if they are flat, as those accumulated in float32; else a place for them."""
        if (given := self._flat_already(group)) is not None:
            return given
        zero, weights = self._zero, self._zero.single_partition_of_fp32_groups[group]
        self._gradients = _Gradients(zero.averaged_gradients[group], weights, self._scale)
        return weights.new_zeros(()).expand(weights.numel())

    def _keep_norm(self, gradients: Sequence[Tensor], norm: Any) -> None:
        if self._gradients is None:
            self._scale(gradients, norm)
        else:
            self._gradients.norm = norm

    def _update(self, group: int) -> None:
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            self._step(group)
        elif isinstance(self._zero.optimizer, WholeMatrices):
            self._zero.optimizer.gradients = gradients.of
            try:
                self._step(group)
            finally:
                self._zero.optimizer.gradients = None
        else:
            step_in_slices(self._zero.optimizer, group, gradients)
            self._zero._lazy_init_hp_params_optimizer_state()  # as DeepSpeed does after a step


class _Gradients:
    """The gradients of a partition.

    Args:
        parts: one after another, in the precision of the run.
        weights: the partition, a vector with padding at its end.
        scale: unscales and clips a list of gradients by their norm.
    """

    norm: Any = None

    def __init__(self, parts: Sequence[Tensor], weights: Tensor, scale: Any) -> None:
        self._parts = [part.flatten() for part in parts]
        self._starts = [*accumulate((len(part) for part in self._parts), initial=0)]
        self._weights, self._scale = weights, scale

    def of(self, place: slice) -> Tensor:
        """Return those of a slice in the precision of the optimizer, unscaled and clipped."""
        found = torch.zeros(place.stop - place.start, dtype=self._weights.dtype, device=self._weights.device)
        for index in range(bisect_right(self._starts, place.start) - 1, len(self._parts)):
            first = self._starts[index]
            low, high = max(place.start, first), min(place.stop, self._starts[index + 1])
            if low >= high:
                break
            found[low - place.start : high - place.start] = self._parts[index][low - first : high - first]
        self._scale([found], self.norm)
        return found


@torch.no_grad()
def step_in_slices(optimizer: torch.optim.Optimizer, group: int, gradients: Any) -> None:
    """Update the one vector of a parameter group, slice by slice.

    Args:
        optimizer: one that treats every element alone. What its state holds is of each element or of all.
        group: number of the parameter group.
        gradients: with ``of(slice)``.
    """
    groups, states = optimizer.param_groups, optimizer.state
    (vector,) = groups[group]["params"]
    before, after = states.get(vector, {}), {}
    settings = {name: value for name, value in groups[group].items() if name != "params"}
    changed: dict[str, Any] = settings
    try:
        for start in range(0, vector.numel(), NUMBERS):
            place = slice(start, min(start + NUMBERS, vector.numel()))
            piece = nn.Parameter(vector.detach()[place])
            piece.grad = gradients.of(place)
            # Counters of group and state begin each slice where the step began.
            changed = {**settings, "params": [piece]}
            optimizer.param_groups = [changed]
            optimizer.state = defaultdict(dict, {piece: _part_of(before, vector, place)} if before else {})
            optimizer.step()
            _join(after, optimizer.state[piece], vector, place, before)
    finally:
        optimizer.param_groups, optimizer.state = groups, states
    groups[group].update({name: value for name, value in changed.items() if name != "params"})
    states[vector] = after


def _part_of(state: dict[str, Any], vector: Tensor, place: slice) -> dict[str, Any]:
    def part(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[place] if value.shape == vector.shape else value.clone()

    return {name: part(value) for name, value in state.items()}


def _join(after: dict[str, Any], part: dict[str, Any], vector: Tensor, place: slice, before: dict[str, Any]) -> None:
    """Put the state of a slice into that of the vector."""
    for name, value in part.items():
        if not isinstance(value, Tensor) or value.shape != (place.stop - place.start,):
            after[name] = value
            continue
        if name not in after:
            after[name] = before[name] if name in before else value.new_empty(vector.shape)
        if after[name][place].data_ptr() != value.data_ptr():
            after[name][place] = value
