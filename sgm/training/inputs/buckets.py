"""Assign clips to buckets: sizes are read on rank zero, and all ranks compute the same plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.data.buckets.assign import NOWHERE, PATH, ClipSizes, clip_sizes
from sgm.data.buckets.plan import BucketPlan, Division
from sgm.data.cache import TOOL
from sgm.data.order import TrainingOrder
from sgm.data.rows import listed
from sgm.training.inputs.clips import Data
from sgm.training.state import ResumePoint
from sgm.util import InputError

_NEEDED = ("clip_infos", "fps", "skip", "sample", "paths")


def plan_buckets(data: Data, division: Division, args: TrainingArgs) -> tuple[BucketPlan, dict[str, str]]:
    """Return the samples of every micro-batch, and path → reason of unreadable clips.

    Collective: all ranks call it; rank zero opens clips of unknown size.

    Raises:
        InputError: a data set lacks the interface for buckets, no clip fits one, or a cache has clips at other shapes.
    """
    for dataset in data.train:
        missing = [name for name in _NEEDED if not hasattr(dataset, name)]
        if missing:
            raise InputError(
                f"{PATH} needs a data set with {', '.join(missing)}, which {type(dataset).__name__} lacks; see "
                "data_video.SFTDataset, or remove the buckets"
            )
    sizes, unreadable = sgm.distributed.run_on_rank_zero(lambda: _sizes(data.train))
    order = TrainingOrder([len(dataset) for dataset in data.train], seed=args.seed, weights=args.train_data_weights)
    buckets = BucketPlan(order, division, sizes)
    _require_cached(data.train, buckets)
    return buckets, unreadable


def _require_cached(datasets: Sequence[Any], buckets: BucketPlan) -> None:
    """Check that caches hold each clip at the shape of its bucket."""
    names = [*map(str, buckets.division.buckets.buckets)]
    shapes = [None if index == NOWHERE else names[index] for index in buckets.bucket_of_clips(0).tolist()]
    found, start = [], 0
    for dataset in datasets:
        if hasattr(dataset, "not_cached"):
            found += dataset.not_cached(shapes[start : start + len(dataset)])
        start += len(dataset)
    if found:
        raise InputError(
            f"args.latent_cache: {len(found):,} clips have other sizes or lengths than when they were encoded, in "
            f"files or columns of a manifest; restore them, or run {TOOL} with another --out:\n{listed(found)}"
        )


def require_same_plan(point: ResumePoint, buckets: BucketPlan, unreadable: Mapping[str, str]) -> None:
    """Check that a resume state was saved with the current plan of micro-batches.

    Raises:
        InputError: it was not; lists the `unreadable` clips (path → reason), a possible cause.
    """
    if point.plan == buckets.digest:
        return
    lines = [f"{path}: {reason}" for path, reason in unreadable.items()]
    raise InputError(
        f"args.resume: {point.run} counts micro-batches, and now they have other samples: clips were added, removed, "
        "replaced, or cannot be read, or num_frames, fps, height or width in a manifest, args.seed or "
        "args.train_data_weights changed; restore what changed, or use args.resume=none (args.load may name the run "
        "folder)" + (f"\nclips that cannot be read now:\n{listed(lines)}" if lines else "")
    )


def _sizes(datasets: tuple[Any, ...]) -> tuple[ClipSizes, dict[str, str]]:
    """Return the sizes of all clips, and path → reason of unreadable ones."""
    parts, unreadable = [], {}
    for dataset in datasets:
        infos = dataset.clip_infos()
        unreadable |= {path: info for path, info in zip(dataset.paths, infos, strict=True) if isinstance(info, str)}
        parts.append(clip_sizes(infos, fps=dataset.fps, skip=dataset.skip))
    sides = zip(*((part.frames, part.heights, part.widths) for part in parts), strict=True)
    return ClipSizes(*map(np.concatenate, sides)), unreadable


def total_steps(buckets: BucketPlan, args: TrainingArgs, resume: ResumePoint | None = None) -> int:
    """Return the optimizer steps of the whole run, whose first ones may have had other accumulation.

    Raises:
        InputError: it has none.
    """
    if args.train_iters is not None:
        return args.train_iters
    assert args.epochs is not None, "the configuration is refused without either"
    if buckets.steps(args.epochs) == 0:
        raise InputError(
            f"args.epochs={args.epochs} gives no step: no bucket of {PATH} gets the clips of a whole micro-batch of "
            f"all {buckets.division.ranks} ranks; set data.params.drop_partial=false, or lower batch sizes, or raise "
            "args.epochs or probabilities"
        )
    done, first = _done(resume)
    return done + buckets.steps(args.epochs, first)


def bucket_report(buckets: BucketPlan, args: TrainingArgs, resume: ResumePoint | None = None) -> str:
    """Return the table of buckets, and the lengths of an epoch and of the run."""
    total = total_steps(buckets, args, resume)
    done, first = _done(resume)
    samples = buckets.samples_before(first + max(total - done, 0) * buckets.division.accumulation)
    return f"{buckets.table()}\n{buckets.steps(1):,} iterations an epoch; {total:,} in all, on {samples:,} samples"


def _done(resume: ResumePoint | None) -> tuple[int, int]:
    """Return the steps and the micro-batches that are done."""
    return (0, 0) if resume is None else (resume.iteration, resume.micro_batches)
