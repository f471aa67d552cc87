"""Metrics of a run: log files, what is shown of them, the loss by quarter of the timesteps, and a plot."""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sgm.inference.measures import MEASURES
from sgm.io import atomic_file, parse_json
from sgm.log import LINE_SECONDS, get_logger
from sgm.training.sample_measures import PREFIX
from sgm.training.timing import PHASES
from sgm.util import InputError, RunError

logger = get_logger(__name__)

FILE = "metrics.jsonl"

# Values that are shown: name, text. A terminal without room for all shows the first ones.
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("step_seconds", "{:.3g} s/step"),
    ("memory_gib", "{:.1f} GiB"),
    ("eta", "ETA {}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.3g}"),
    ("samples_per_second", "{:.3g} samples/s"),
    ("tokens_per_second", "{:.3g} tokens/s"),
    ("mfu", "MFU {:.1%}"),
    ("shares", "{}"),
)
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}"
_FIRST_SHOWN, _SHORTEST_BAR = 4, 10  # values on a narrow terminal; columns of the bar itself
_QUARTER = re.compile(r"loss_(\d+)_(\d+)")


class Metrics:
    """Write metrics to ``metrics.jsonl``, TensorBoard and optionally wandb, and show them; on rank zero only.

    On a terminal a progress bar shows the latest values. Elsewhere every line of metrics is a line of text, and between
    those that are more than a minute apart, one each minute says where the run is.

    Args:
        folder: of the run; gets ``metrics.jsonl`` and ``tensorboard/``.
        total_iters: iterations of the whole run.
        config: the merged configuration, shown in wandb.
        experiment: name of the run in wandb.
        resume_from: iteration of a resumed run; later lines are removed, since these iterations are repeated.
        wandb: log to Weights & Biases too.
        wandb_project: wandb project; None for `experiment`.
        clock: in seconds.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder, self._clock = Path(folder), clock
        self._wandb = _start_wandb(folder, config, experiment, wandb_project or experiment) if wandb else None
        self._path = folder / FILE
        kept = [line for line in read_metrics(self._path) if line["iteration"] <= resume_from]
        with atomic_file(self._path) as temporary:
            temporary.write_text("".join(_to_line(line) for line in kept), encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter  # lazy: a check writes nothing

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)
        self._total, self._first = total_iters, resume_from
        self._began = self._said = clock()
        self._bar = tqdm(
            total=total_iters,
            initial=resume_from,
            desc="training",
            disable=None,
            dynamic_ncols=True,
            bar_format=_BAR,
        )

    def log(self, iteration: int, values: Mapping[str, float], **labels: str) -> None:
        """Write values by name, and to the file `labels` too; values that are not finite become null there.

        Raises:
            RunError: the file is not writable.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_to_line({"iteration": iteration, **values, **labels}))
        except OSError as error:
            raise RunError(f"could not append to {self._path}: {error}; free some space and resume the run") from error
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log({"iteration": iteration, **values})
        if "validation_loss" in values:
            logger.info("validation after iteration %d: %s", iteration, _by_quarter(values))
        elif figures := _figures(values):
            logger.info("samples after iteration %d: %s", iteration, figures)
        else:
            self._show(iteration, values)

    def _show(self, iteration: int, values: Mapping[str, float]) -> None:
        """Show the values of the last steps on the progress bar, or in a line where there is no terminal."""
        known = {**values, "eta": self._left(iteration)}
        if shares := _shares(values):
            known["shares"] = shares
        texts = [text.format(known[name]) for name, text in _SHOWN if name in known]
        if self._bar.disable:
            self._said = self._clock()
            logger.info("iteration %d of %d: %s", iteration, self._total, ", ".join(texts))
            return
        room = self._bar.format_dict["ncols"] or math.inf
        room -= len(f"training {self._total}/{self._total} ||") + _SHORTEST_BAR
        parts = [texts, *(texts[:count] for count in range(_FIRST_SHOWN, 0, -1))]
        fitting = next((part for part in parts if len(", ".join(part)) + 2 <= room), texts[:1])
        self._bar.set_postfix_str(", ".join(fitting), refresh=False)
        self._bar.update(iteration - self._bar.n)

    def step_done(self, iteration: int) -> None:
        """Show that an iteration without metrics is done."""
        if not self._bar.disable:
            self._bar.update(iteration - self._bar.n)
        elif self._clock() - self._said >= LINE_SECONDS:
            self._said = self._clock()
            logger.info("iteration %d of %d: ETA %s", iteration, self._total, self._left(iteration))

    def _left(self, iteration: int) -> str:
        share = (iteration - self._first) / max(self._total - self._first, 1)
        return tqdm.format_interval((self._clock() - self._began) / share * (1 - share)) if share else "?"

    def close(self) -> None:
        """Close files and connections."""
        self._bar.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _shares(values: Mapping[str, float]) -> str:
    """Return the shares of a step's phases that take more than a hundredth of it, as text."""
    step = values.get("step_seconds") or math.inf
    shares = {phase: values.get(f"{phase}_seconds", 0) / step for phase in PHASES}
    return " ".join(f"{phase} {share:.0%}" for phase, share in shares.items() if share >= 0.01)


def _by_quarter(values: Mapping[str, float]) -> str:
    """Return the validation loss as text, in total and by quarter of the timesteps."""
    quarters = [
        f"{found[1]}-{found[2]} {value:.4f}"
        for name, value in values.items()
        if (found := _QUARTER.fullmatch(name.removeprefix("validation_")))
    ]
    text = f"loss {values['validation_loss']:.4f}" + (f" (timesteps {', '.join(quarters)})" if quarters else "")
    if "validation_accuracy" in values:  # of pairs, see `PairValues`
        text += f", {values['validation_accuracy']:.0%} of pairs preferred, margin {values['validation_margin']:.3g}"
    return text


def _figures(values: Mapping[str, float]) -> str:
    """Return the measures of samples as text."""
    known = ((measure, values.get(f"{PREFIX}{name}")) for name, measure in MEASURES.items())
    return ", ".join(f"{measure.title} {value:.{measure.digits}f}" for measure, value in known if value is not None)


def _to_line(values: Mapping[str, float | str | None]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
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

    def add(self, idx: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add samples: timesteps (B,) from 0 to ``num_idx − 1``, losses (B,), and their weights (B,) in the means."""
        hits = idx[:, None] * 4 // self._num_idx == self._quarters  # (B, 4)
        losses = losses.detach().float()
        if weights is not None:
            losses = losses * weights
        # Not a product: an infinite loss would give NaN in the other quarters.
        self._sums += torch.where(hits, losses[:, None], 0).sum(0)
        self._counts += hits.sum(0) if weights is None else torch.where(hits, weights[:, None], 0).sum(0)

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


class PairValues:
    """Means of what a loss that takes pairs says of them, see `DiffusionDPOLoss`; none of other losses."""

    def __init__(self, loss_fn: Any, device: torch.device) -> None:
        self._values_of = getattr(loss_fn, "validation_values", None)
        self._names = [] if self._values_of is None else list(self._values_of(torch.ones(1)))
        self._sums = torch.zeros(len(self._names) + 1, device=device)  # the last counts

    def add(self, losses: torch.Tensor) -> None:
        """Add the losses (B,) of pairs."""
        if self._values_of is not None:
            found = self._values_of(losses.detach())
            self._sums += torch.stack([*found.values(), torch.ones_like(losses)]).sum(1)

    def reduce(self, reduction: Callable[[torch.Tensor], Any]) -> None:
        """Apply `reduction`, e.g. an in-place all-reduce, to the sums."""
        if self._names:
            reduction(self._sums)

    def values(self) -> dict[str, float]:
        """Return the mean of each value by its name."""
        *sums, count = self._sums.tolist()
        return {name: total / count for name, total in zip(self._names, sums, strict=True)} if count else {}


def smooth(values: list[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` values (at least 1), with normalised weights."""
    keep = 1 - 1 / max(span, 1.0)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def draw_curve(metrics: str | Path, picture: str | Path) -> None:
    """Plot the losses and the learning rate of a ``metrics.jsonl`` into a PNG file.

    Training and validation losses, each with a smoothed line of its own: over all timesteps on top, and below for
    every quarter of them, since the loss at noisy timesteps hides that at the others.
    """
    lines = read_metrics(metrics)
    from matplotlib.figure import Figure  # lazy: half a second, for the end of a run

    figure = Figure(figsize=(12, 9), layout="constrained")  # not pyplot, which keeps figures and needs a display
    quarters = [*quarters_of(lines).values()]
    rows: Any = [["loss"] * max(len(quarters), 1), *([quarters] if quarters else []), ["lr"] * max(len(quarters), 1)]
    axes = figure.subplot_mosaic(rows, sharex=True, height_ratios=(4, 3, 1) if quarters else (4, 1))
    for name in ("loss", *quarters):
        found = _QUARTER.fullmatch(name)
        axes[name].set_title(f"timesteps {found[1]} to {found[2]}" if found else "loss")
        _draw_losses(axes[name], lines, name)
    if axes["loss"].lines:
        axes["loss"].legend()
    axes["lr"].plot(*_series(lines, "lr"), color="tab:green")
    axes["lr"].set_ylabel("learning rate")
    axes["lr"].set_xlabel("iteration")
    axes["lr"].set_ylim(bottom=0)
    axes["lr"].grid(alpha=0.3)
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, dpi=120)


def quarters_of(lines: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Return number, from 0, → name of the training losses of quarters of the timesteps in lines of metrics."""
    found = filter(None, map(_QUARTER.fullmatch, {name for line in lines for name in line}))
    return dict(sorted((_quarter(int(name[1]), int(name[2])), name[0]) for name in found))


def _quarter(first: int, last: int) -> int:
    return round(first / (last - first + 1))


def _draw_losses(axis: Any, lines: list[dict[str, Any]], name: str) -> None:
    """Draw a loss of training and of validation, each as it was measured (faint) and smoothed."""
    kinds = (("", "training", "tab:blue", ""), ("validation_", "validation", "tab:orange", "o"))
    for prefix, label, color, marker in kinds:
        iterations, losses = _series(lines, prefix + name)
        if not losses:
            continue
        axis.plot(iterations, losses, marker=marker, markersize=4, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(iterations, smooth(losses, len(losses) / 10), color=color, label=f"{label}, smoothed")
    axis.grid(alpha=0.3)


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return iterations and finite values of one metric."""
    found = [(line["iteration"], float(line[name])) for line in lines if line.get(name) is not None]
    return [iteration for iteration, _ in found], [value for _, value in found]
