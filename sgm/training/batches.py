"""Clips divided among buckets: their sizes, found on rank zero, and the plan that all ranks share."""

from typing import Any

import numpy as np

import sgm.distributed
from sgm.args import TrainingArgs
from sgm.data.bucket_plan import BucketPlan, Division
from sgm.data.buckets import PATH, ClipSizes, clip_sizes
from sgm.data.order import TrainingOrder
from sgm.training.data import Data
from sgm.util import InputError

_NEEDED = ("clip_infos", "fps", "skip", "sample", "paths")


def plan_buckets(data: Data, division: Division, args: TrainingArgs) -> tuple[BucketPlan, dict[str, str]]:
    """Return which samples every rank takes at a time, and path → reason of clips that cannot be read.

    All ranks call together; rank zero reads what is not known yet of the clips.

    Args:
        data: the training clips.
        division: of the buckets.
        args: with ``seed`` and ``train_data_weights``.

    Raises:
        InputError: the data set does not offer what buckets need, or no clip fits any of them.
    """
    for dataset in data.train:
        missing = [name for name in _NEEDED if not hasattr(dataset, name)]
        if missing:
            raise InputError(
                f"{PATH} needs a data set with {', '.join(missing)}, which {type(dataset).__name__} lacks; see "
                "data_video.SFTDataset, or remove the buckets"
            )
    found: tuple[ClipSizes, dict[str, str]] | None = None
    if sgm.distributed.rank() == 0:
        found = _sizes(data.train)
    sizes, unreadable = sgm.distributed.from_rank_zero(found)
    order = TrainingOrder([len(dataset) for dataset in data.train], seed=args.seed, weights=args.train_data_weights)
    return BucketPlan(order, division, sizes), unreadable


def _sizes(datasets: tuple[Any, ...]) -> tuple[ClipSizes, dict[str, str]]:
    """Return the sizes of all clips, and path → reason of those that cannot be read."""
    parts, unreadable = [], {}
    for dataset in datasets:
        infos = dataset.clip_infos()
        unreadable |= {path: info for path, info in zip(dataset.paths, infos, strict=True) if isinstance(info, str)}
        parts.append(clip_sizes(infos, fps=dataset.fps, skip=dataset.skip))
    sides = zip(*((part.frames, part.heights, part.widths) for part in parts), strict=True)
    return ClipSizes(*map(np.concatenate, sides)), unreadable


def total_steps(buckets: BucketPlan, args: TrainingArgs) -> int:
    """Return the optimizer steps of the whole run."""
    if args.train_iters is not None:
        return args.train_iters
    assert args.epochs is not None, "the configuration is refused without either"
    return buckets.steps(args.epochs)


def bucket_report(buckets: BucketPlan, args: TrainingArgs) -> str:
    """Return the table of the buckets, and how long an epoch and the run are."""
    total = total_steps(buckets, args)
    samples = buckets.samples_before(total * buckets.division.accumulation)
    return f"{buckets.table()}\n{buckets.steps(1):,} iterations an epoch; {total:,} in all, on {samples:,} samples"
