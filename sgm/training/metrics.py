"""Metrics of a run: log files, the loss by quarter of the timesteps, and a plot."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sgm.io import atomic_file, parse_json
from sgm.log import get_logger
from sgm.util import InputError, RunError

logger = get_logger(__name__)

FILE = "metrics.jsonl"

# Values on the progress bar: name, label, format.
_BAR = (
    ("loss", "loss", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:.3g}"),
    ("step_seconds", "s/step", "{:.3g}"),
    ("samples_per_second", "samples/s", "{:.3g}"),
    ("memory_gib", "GiB", "{:.1f}"),
)


class Metrics:
    """Write metrics to ``metrics.jsonl``, TensorBoard, the progress bar and optionally wandb; on rank zero only.

    Args:
        folder: of the run; gets ``metrics.jsonl`` and ``tensorboard/``.
        total_iters: iterations of the whole run.
        config: the merged configuration, shown in wandb.
        experiment: name of the run in wandb.
        resume_from: iteration of a resumed run; later lines are removed, since these iterations are repeated.
        wandb: log to Weights & Biases too.
        wandb_project: wandb project; None for `experiment`.

    Raises:
        InputError: wandb is requested, but missing or fails to start.
        RunError: the folder is not writable.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_iters: int,
        config: Mapping[str, Any],
        experiment: str,
        resume_from: int = 0,
        wandb: bool = False,
        wandb_project: str | None = None,
    ) -> None:
        folder = Path(folder)
        self._wandb = _start_wandb(folder, config, experiment, wandb_project or experiment) if wandb else None
        self._path = folder / FILE
        kept = [line for line in read_metrics(self._path) if line["iteration"] <= resume_from]
        with atomic_file(self._path) as temporary:
            temporary.write_text("".join(_to_line(line) for line in kept), encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)
        self._bar = tqdm(total=total_iters, initial=resume_from, desc="training", disable=None, dynamic_ncols=True)
        self._shown: dict[str, str] = {}

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Write values by name; values that are not finite become null in the file.

        Raises:
            RunError: the file is not writable.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_to_line({"iteration": iteration, **values}))
        except OSError as error:
            raise RunError(f"could not append to {self._path}: {error}; free some space and resume the run") from error
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log({"iteration": iteration, **values})
        self._shown |= {short: form.format(values[name]) for name, short, form in _BAR if name in values}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(iteration - self._bar.n)

    def close(self) -> None:
        """Close files and connections."""
        self._bar.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _to_line(values: Mapping[str, float | None]) -> str:
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(finite) + "\n"


def import_wandb() -> Any:
    """Return the wandb package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "args.wandb is true, but wandb is not installed; run: pip install wandb, or set args.wandb: false"
        ) from error
    return wandb


def _start_wandb(folder: Path, config: Mapping[str, Any], experiment: str, project: str) -> Any:
    """Start or resume the wandb run whose id is the name of `folder`."""
    wandb = import_wandb()
    try:
        run = wandb.init(
            project=project,
            name=experiment,
            id=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )
    except wandb.Error as error:
        raise InputError(
            f"args.wandb is true, but wandb does not start: {error}; run: wandb login, set WANDB_MODE=offline in the "
            "environment, or set args.wandb: false"
        ) from error
    # wandb drops values whose step does not increase, such as iterations repeated by a resumed run.
    run.define_metric("*", step_metric="iteration")
    return run


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``, each with at least ``iteration``; empty without a file.

    Lines left incomplete by a crash are skipped.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            values = parse_json(text)
            values["iteration"] = int(values["iteration"])
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: line %d cannot be read and is left out", path, number)
            continue
        lines.append(values)
    return lines


class LossByQuarter:
    """Mean loss over all `num_idx` timesteps and over each quarter, summed on `device` without synchronizing."""

    def __init__(self, device: torch.device, *, num_idx: int = 1000) -> None:
        self._num_idx = num_idx
        self._quarters = torch.arange(4, device=device)
        self._sums = torch.zeros(4, device=device)
        self._counts = torch.zeros(4, device=device)

    def add(self, idx: torch.Tensor, losses: torch.Tensor) -> None:
        """Add samples: timesteps (B,) from 0 to ``num_idx − 1``, and losses (B,)."""
        hits = idx[:, None] * 4 // self._num_idx == self._quarters  # (B, 4)
        # Not a product: an infinite loss would give NaN in the other quarters.
        self._sums += torch.where(hits, losses.detach().float()[:, None], 0).sum(0)
        self._counts += hits.sum(0)

    def reduce(self, reduction: Callable[[torch.Tensor], Any]) -> None:
        """Apply `reduction` (e.g. an in-place all-reduce) to sums and counts.

        Every rank of a group counts the group's samples. All groups have the same size, so means are unaffected.
        """
        totals = torch.stack([self._sums, self._counts])
        reduction(totals)
        self._sums, self._counts = totals.unbind()

    def values(self) -> dict[str, float]:
        """Return ``loss`` and, for quarters with samples, e.g. ``loss_250_499``; synchronizes the device."""
        sums, counts = self._sums.tolist(), self._counts.tolist()
        if not sum(counts):
            return {}
        values = {"loss": sum(sums) / sum(counts)}
        edges = [-(-quarter * self._num_idx // 4) for quarter in range(5)]
        for first, end, total, count in zip(edges, edges[1:], sums, counts, strict=False):
            if count:
                values[f"loss_{first}_{end - 1}"] = total / count
        return values

    def reset(self) -> None:
        """Set sums and counts to zero."""
        self._sums = torch.zeros_like(self._sums)
        self._counts = torch.zeros_like(self._counts)


def smooth(values: list[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` values (at least 1), with normalised weights."""
    keep = 1 - 1 / max(span, 1.0)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_curve(metrics: str | Path, picture: str | Path) -> None:
    """Plot raw and smoothed losses, validation losses and learning rate of a ``metrics.jsonl`` into a PNG file."""
    lines = read_metrics(metrics)
    from matplotlib.figure import Figure  # lazy: half a second, for the end of a run

    figure = Figure(figsize=(9, 6))  # not pyplot, which keeps figures and needs a display
    margins = {"left": 0.11, "right": 0.97, "bottom": 0.09, "top": 0.97, "hspace": 0.1}
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1), gridspec_kw=margins)
    iterations, losses = _series(lines, "loss")
    upper.plot(iterations, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    span = len(losses) / 10
    upper.plot(iterations, smooth(losses, span), color="tab:blue", label="training, smoothed")
    validated, validation = _series(lines, "validation_loss")
    if validated:
        upper.plot(validated, validation, "o-", color="tab:orange", markersize=5, label="validation")
    upper.set_ylabel("loss")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(*_series(lines, "lr"), color="tab:green")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("iteration")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.3)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, dpi=120)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return iterations and finite values of one metric."""
    found = [(line["iteration"], float(line[name])) for line in lines if line.get(name) is not None]
    return [iteration for iteration, _ in found], [value for _, value in found]
