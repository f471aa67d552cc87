"""Blocks skipped at the steps of a sampler where they would add nearly the same as before.

Consecutive steps give the blocks similar tokens, so the sum of what they add changes slowly. `StepCache` keeps this sum
and adds it again until a cheap measure of change reaches a threshold:

    first_block     what the first block adds, which is computed at every step, against the last step at which the
                    others ran too (the first-block cache of ParaAttention and diffusers)
    teacache        the time embedding, from step to step, scaled by a polynomial that was fitted for each released
                    model and summed until the blocks run (Liu et al. 2024, "Timestep Embedding Tells")

Each sample of a batch is decided by itself, so that it does not depend on its neighbours. The two branches of its
guidance are decided together, by the larger change: guidance amplifies their difference, in which errors of the same
age cancel.

Legend: ``B`` rows, ``S = L + n`` tokens of this rank, ``L`` of text first, then ``n`` patches; ``D`` hidden size; ``E``
size of the time embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

import sgm.distributed
from sgm.parallel.sequence import Group, group_size
from sgm.util import InputError

Run = Callable[[torch.Tensor, Sequence[int] | None], torch.Tensor]

DEFAULT_THRESHOLDS = {"first_block": 0.1, "teacache": 0.1}  # of the kinds; see docs/speed.md for their effect

# Published with TeaCache, highest power first, by (hidden size, blocks, input channels, temporal patch).
FITTED = {
    (1920, 30, 16, 1): (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),  # 2B
    (3072, 42, 16, 1): (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),  # 5B
    (3072, 42, 32, 1): (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),  # 5B-I2V
    (3072, 42, 16, 2): (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),  # 1.5-5B
    (3072, 42, 32, 2): (122.842302, -104.088754, 26.2981677, -0.306009921, 0.0371213220),  # 1.5-5B-I2V
}


class StepCache:
    """Decides at every step which rows of the batch run which blocks; for sampling, without gradients.

    Args:
        kind: ``first_block`` or ``teacache``.
        threshold: change at which the blocks run again; at 0 they always run, with the results of no cache.
        shape: (hidden size, blocks, input channels, temporal patch) of the network.

    Attributes:
        in_use: whether a run of a sampler is going on; only then blocks are skipped.

    Raises:
        InputError: there is no polynomial for this network.
    """

    def __init__(self, kind: str, threshold: float, shape: tuple[int, int, int, int]) -> None:
        if kind == "teacache" and shape not in FITTED:
            raise InputError(
                f"teacache was fitted for the released models only, and this network has {shape[0]} channels, "
                f"{shape[1]} blocks, {shape[2]} input channels and a temporal patch of {shape[3]}; use first_block"
            )
        if shape[1] < 2:
            raise InputError("a network of one block has none that could be skipped; remove the cache")
        self._fitted = FITTED[shape] if kind == "teacache" else None
        self.threshold, self._num_blocks = threshold, shape[1]
        self.in_use, self._num_samples = False, 0
        self._ran = self._calls = 0
        self._clear(0)

    @property
    def share_run(self) -> float:
        """Share of all calls of blocks, counted by row, that ran in the last `sampling`."""
        return self._ran / self._calls if self._calls else 1.0

    @contextmanager
    def sampling(self, num_steps: int, num_samples: int) -> Iterator[None]:
        """Context of one run of a sampler, with one forward pass a step; its tensors are freed at the end."""
        self._num_samples = num_samples
        self._ran = self._calls = 0
        self._clear(num_steps)
        self.in_use = True
        try:
            yield
        finally:
            self._clear(0)
            self.in_use = False

    def _clear(self, num_steps: int) -> None:
        self._steps_left = num_steps
        self._signal: torch.Tensor | None = None  # what the next one is compared with
        self._summed: list[float] = []  # change of each row since it was computed, for teacache
        self._residual: torch.Tensor | None = None  # added to `_start` by the blocks when they ran last, (B, n, D)
        self._start: torch.Tensor | None = None  # patches (B, n, D) before the first block that may be skipped
        self._rows: list[int] | None = None  # computed in this step; None: all

    def block(
        self, index: int, run: Run, x: torch.Tensor, *, emb: torch.Tensor, num_text: int, group: Group
    ) -> torch.Tensor:
        """Run a block for the rows that are computed in this step.

        Args:
            index: of the block.
            run: called as ``run(x, rows)`` with the rows of the batch that `x` has left, None for all.
            x: tokens (B, S, D) of the first block; of a later one, the result of the block before.
            emb: time embedding (B, E), or that of all rows (1, E).
            num_text: L.
            group: the ranks that share the tokens, which decide together; None for one.

        Returns:
            Tokens of the computed rows; if there are none, `x`. The last block returns patches (B, n, D) of all rows.
        """
        if index == 0:
            return self._first(run, x, emb, num_text, group)
        if index == self._num_blocks - 1:
            return self._last(run, x)
        return self._run(run, x)

    def _run(self, run: Run, x: torch.Tensor) -> torch.Tensor:
        if self._rows == []:
            return x
        self._ran += len(x)
        return run(x, self._rows)

    def _first(self, run: Run, x: torch.Tensor, emb: torch.Tensor, num_text: int, group: Group) -> torch.Tensor:
        self._calls += len(x) * self._num_blocks
        self._steps_left -= 1
        self._rows = None
        if self._residual is not None and len(self._residual) != len(x):  # guidance begins or ends
            self._signal = self._residual = None
        self._start = x[:, num_text:].clone()  # blocks may overwrite their input
        signal = emb.expand(len(x), -1)
        if self._fitted is None:
            x = self._run(run, x)
            signal, self._start = x[:, num_text:] - self._start, x[:, num_text:].clone()
        rows = self._choose(signal, group)
        if len(rows) < len(x):
            self._rows = rows
            x = x[rows] if rows else x
        return x if self._fitted is None else self._run(run, x)

    def _choose(self, signal: torch.Tensor, group: Group) -> list[int]:
        """Return the rows to compute, and remember the `signal` (B, ...) of this step."""
        every = list(range(len(signal)))
        # The polynomials are negative near 0, so that sums may stay below a threshold of 0.
        if self._signal is None or self._residual is None or self._steps_left <= 0 or self.threshold == 0:
            self._signal, self._summed = signal, [0.0] * len(signal)
            return every
        changes = _relative_changes(signal, self._signal, None if self._fitted else group)
        changes = self._of_samples(changes).tolist()
        if self._fitted is None:
            rows = [row for row in every if not changes[row] < self.threshold]  # a change that is NaN is computed
            self._signal[rows] = signal[rows]
            return rows
        self._signal = signal
        for row, change in enumerate(changes):
            self._summed[row] += _polynomial(self._fitted, change)
        rows = [row for row in every if not self._summed[row] < self.threshold]
        for row in rows:
            self._summed[row] = 0.0
        return rows

    def _of_samples(self, changes: torch.Tensor) -> torch.Tensor:
        """Return for each row (B,) the larger change of the branches of its sample."""
        if (group := sgm.distributed.cfg_group()) is not None:  # the other branch is on another rank
            dist.all_reduce(changes, dist.ReduceOp.MAX, group=group)
        elif len(changes) == 2 * self._num_samples:
            return changes.view(2, -1).amax(0).repeat(2)
        return changes

    def _last(self, run: Run, x: torch.Tensor) -> torch.Tensor:
        assert self._start is not None
        if self._rows is None:
            out = self._run(run, x)
            self._residual = out - self._start
            return out
        assert self._residual is not None, "at the first step all rows are computed"
        result = self._start + self._residual
        if self._rows:
            out = self._run(run, x)
            self._residual[self._rows] = out - self._start[self._rows]
            result[self._rows] = out
        return result


def _relative_changes(new: torch.Tensor, old: torch.Tensor, group: Group) -> torch.Tensor:
    """Return mean |new − old| / mean |old| of each row of (B, ...), over the tokens of all ranks of `group`."""
    sums = torch.stack([part.abs().flatten(1).sum(1, dtype=torch.float32) for part in (new - old, old)])
    if group_size(group) > 1:
        dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
