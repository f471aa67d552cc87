"""Figures of the samples at evaluation: those of `sgm.inference.measures`, as means over the samples of all ranks."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.inference.measures import MEASURES, Clip, Lpips, fidelity, flicker, require, smoothness
from sgm.inference.results import read_record
from sgm.inference.video import read_video
from sgm.log import get_logger

logger = get_logger(__name__)

PREFIX = "sample_"  # of the names in the metrics


def check_measures(args: TrainingArgs) -> None:
    """Check packages and weights of ``args.eval_measures``.

    Raises:
        InputError: a package is missing, or a file is not what it should be.
    """
    require(references=True)
    if args.eval_lpips is not None:
        Lpips(Path(args.eval_lpips))
    if args.eval_clip is not None:
        Clip.check(Path(args.eval_clip))


class SampleMeasures:
    """Measures samples on the CPU, so that training keeps the memory of its device.

    Args:
        args: ``eval_lpips`` and ``eval_clip`` name the weights of the measures that need some.

    Raises:
        InputError: a file is not what it should be.
    """

    def __init__(self, args: TrainingArgs) -> None:
        self._device = torch.device("cpu")
        self._lpips = None if args.eval_lpips is None else Lpips(Path(args.eval_lpips))
        self._clip = None if args.eval_clip is None else Clip(Path(args.eval_clip), self._device)

    def of(self, sample: Path, reference: np.ndarray | None) -> dict[str, float]:
        """Return the figures of one sample by name.

        Args:
            sample: its file, with its record beside it.
            reference: the frames (T, H, W, 3) uint8 of the clip that its caption describes, or None. One of another
                shape cannot be compared.
        """
        frames = read_video(sample)
        found: dict[str, float | None] = {"smoothness": smoothness(frames), "flicker": flicker(frames)}
        if reference is not None and reference.shape == frames.shape:
            found |= fidelity(frames, reference, self._lpips, device=self._device)
        if self._clip is not None and (record := read_record(sample)) is not None:
            found["clip"] = self._clip(frames, record["prompt"])
        return {name: value for name, value in found.items() if value is not None}


def means(figures: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the samples of all ranks that have it, under its name in the metrics.

    Args:
        figures: of the samples of this rank.
    """
    sums = torch.zeros(2, len(MEASURES), dtype=torch.float32, device=sgm.distributed.device())
    for of_one in figures:
        values = [(of_one.get(name, 0.0), float(name in of_one)) for name in MEASURES]
        sums += torch.tensor(values, device=sums.device).T
    sgm.distributed.all_reduce_(sums)
    totals, counts = sums.tolist()
    named = zip(MEASURES, totals, counts, strict=True)
    return {f"{PREFIX}{name}": total / count for name, total, count in named if count}
