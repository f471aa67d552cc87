"""Micro-batches of one shape for every rank: a pure function of seed, clips, buckets and ranks.

Samples keep the numbers of `sgm.data.order.TrainingOrder`, and so the clip, noise and timestep of a run without
buckets. The samples of each bucket are split into micro-batches across all ranks, which are then shuffled. All
ranks have the same shape at each step, so none waits for a larger one.

Legend: N clips, F frames, H W pixels.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sgm.data.buckets.assign import NOWHERE, PATH, Buckets, ClipSizes
from sgm.data.order import TrainingOrder, derive_seed
from sgm.util import InputError, default

_MAX_EMPTY_EPOCHS = 1000  # in a row, before too small probabilities are an error


@dataclass(frozen=True)
class RankBatch:
    """A micro-batch of one rank.

    The weighted mean over a rank's samples, ranks and micro-batches of a step is the mean over its distinct samples.
    """

    numbers: tuple[int, ...]  # sample numbers
    weights: tuple[float, ...]  # weight of each sample's loss, 0 for padding
    shape: tuple[int, int, int] | None  # (F, H, W) of all samples; None is that of the data set


@dataclass(frozen=True)
class _Epoch:
    """The micro-batches of an epoch, in order."""

    numbers: np.ndarray  # sample numbers
    starts: np.ndarray  # of each micro-batch in `numbers`
    sizes: np.ndarray
    buckets: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Division:
    """How samples are split into micro-batches; independent of the clips."""

    buckets: Buckets  # supported by the network
    ranks: int  # data parallel size
    micro_batch: int  # batch size of a rank for buckets without one
    accumulation: int = 1  # micro-batches per step
    drop_partial: bool = False  # drop samples that do not fill a micro-batch on all ranks

    @property
    def batch_sizes(self) -> list[int]:
        """Batch size of a rank for each bucket."""
        return [default(bucket.batch_size, self.micro_batch) for bucket in self.buckets.buckets]

    @property
    def digest(self) -> str:
        """SHA-256 of all inputs of the micro-batches except clips and seed."""
        parts = (self.buckets, self.batch_sizes, self.ranks, self.drop_partial)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


class BucketPlan:
    """The micro-batches of a run, numbered from 0 over all epochs.

    Args:
        order: of the samples.
        division: of the samples into micro-batches.
        clips: sizes of all clips, by data set in the order of `order`.

    Raises:
        InputError: no clip fits any bucket.
    """

    def __init__(self, order: TrainingOrder, division: Division, clips: ClipSizes) -> None:
        if len(clips) != sum(order.sizes):
            raise ValueError(f"the order is one of {sum(order.sizes)} clips, there are sizes of {len(clips)}")
        self.order, self.division, self.clips = order, division, clips
        self._scheme, self._all, self._batch_sizes = division.buckets, division.buckets.buckets, division.batch_sizes
        self.num_fitting = int(self._scheme.reachable(clips).sum())
        if not self.num_fitting:
            raise InputError(
                f"none of the {len(clips):,} clips fits a bucket of {PATH}: they are smaller, or shorter, than all, or "
                "cannot be read; tools/check_dataset.py shows their sizes"
            )
        self._offsets = torch.tensor([0, *order.sizes]).cumsum(0)
        # Micro-batches and samples before each epoch; filled on demand.
        self._batches_before, self._samples_before = [0], [0]
        self._epochs: dict[int, _Epoch] = {}  # the latest two: the loader prefetches
        self._clips: tuple[int, torch.Tensor] | None = None  # buckets of the clips in one epoch

    @property
    def digest(self) -> str:
        """SHA-256 of the inputs of the micro-batches outside `Division`: order and sizes."""
        sides = (self.clips.frames, self.clips.heights, self.clips.widths)
        found = hashlib.sha256(self.order.digest.encode())
        for side in sides:
            found.update(side.astype("<i8").tobytes())
        return found.hexdigest()

    def bucket_of_clips(self, epoch: int) -> np.ndarray:
        """Return the index of each clip's bucket in an epoch, or `NOWHERE`: (N,) int64."""
        # One row per clip, so that its draws do not depend on the number of clips.
        generator = torch.Generator().manual_seed(derive_seed(self.order.seed, "buckets", epoch))
        draws = torch.rand((len(self.clips), self._scheme.num_draws), generator=generator, dtype=torch.float64)
        return self._scheme.choose(self.clips, draws.numpy())

    def bucket_of_samples(self, epoch: int) -> np.ndarray:
        """Return the index of each sample's bucket in an epoch, or `NOWHERE`, by sample number."""
        datasets, clips = self.order.epoch(epoch)
        return self.bucket_of_clips(epoch)[(self._offsets[datasets] + clips).numpy()]

    def same_bucket(self, number: int) -> torch.Tensor:
        """Return which clips of the sample's data set share its bucket in its epoch: (clips,) bool."""
        epoch = number // self.order.epoch_length
        if self._clips is None or self._clips[0] != epoch:
            self._clips = epoch, torch.from_numpy(self.bucket_of_clips(epoch))
        dataset, clip = self.order[number]
        buckets = self._clips[1][self._offsets[dataset] : self._offsets[dataset + 1]]
        return buckets == buckets[clip]

    def counts(self, epoch: int) -> list[int]:
        """Return the number of samples of each bucket in an epoch."""
        return self._count(self.bucket_of_samples(epoch))

    def divided(self, count: int, bucket: int) -> list[int]:
        """Return the sizes, over all ranks, of the micro-batches of `count` samples of a bucket."""
        whole, rest = divmod(count, self._batch_sizes[bucket] * self.division.ranks)
        sizes = [self._batch_sizes[bucket] * self.division.ranks] * whole
        return sizes if self.division.drop_partial or not rest else [*sizes, rest]

    def steps(self, epochs: int, first: int = 0) -> int:
        """Return the number of steps from micro-batch `first` to the end of the first epochs."""
        self._count_epochs(epochs)
        return -(-max(self._batches_before[epochs] - first, 0) // self.division.accumulation)

    def samples_before(self, position: int) -> int:
        """Return the number of samples, without padding, in the micro-batches before number `position`."""
        epoch, index = self._locate(position)
        return self._samples_before[epoch] + (int(self._load(epoch).sizes[:index].sum()) if index else 0)

    def epochs_before(self, position: int) -> int:
        """Return the number of whole epochs before a micro-batch."""
        return self._locate(position)[0]

    def rank_batches(self, rank: int, *, first: int, stop: int) -> Iterator[RankBatch]:
        """Yield the micro-batches `first` to `stop` - 1 of a rank; both are at the start of a step."""
        ranks, accumulation = self.division.ranks, self.division.accumulation
        for start in range(first, stop, accumulation):
            groups = [self._samples(position) for position in range(start, start + accumulation)]
            total = sum(len(numbers) for _, numbers in groups)
            for bucket, numbers in groups:
                rows = -(-len(numbers) // ranks)
                places = np.arange(rank, rows * ranks, ranks)
                # DeepSpeed averages over ranks and micro-batches, the training step over a rank's samples.
                weight = accumulation * ranks * rows / total
                yield RankBatch(
                    tuple(numbers[places % len(numbers)].tolist()),
                    tuple(weight if place < len(numbers) else 0.0 for place in places.tolist()),
                    self._all[bucket].shape,
                )

    def table(self) -> str:
        """Return a table of the first epoch: samples and micro-batches of each bucket, and clips without one."""
        counts, rows = self.counts(0), [("bucket", "samples", "batch size of a rank", "micro-batches")]
        for index, count in enumerate(counts):
            if count:
                batches = len(self.divided(count, index))
                rows.append((str(self._all[index]), f"{count:,}", str(self._batch_sizes[index]), f"{batches:,}"))
        lines = _aligned(rows)
        dropped, passed_over = len(self.clips) - self.num_fitting, self.order.epoch_length - sum(counts)
        if dropped:
            lines.append(f"{dropped:,} of {len(self.clips):,} clips fit no bucket, or cannot be used")
        if self._scheme.num_draws:
            lines.append(f"{passed_over:,} of {self.order.epoch_length:,} samples of the first epoch are in no bucket")
        return "\n".join(lines)

    def _count(self, chosen: np.ndarray) -> list[int]:
        return np.bincount(chosen[chosen != NOWHERE], minlength=len(self._all)).tolist()

    def _samples(self, position: int) -> tuple[int, np.ndarray]:
        """Return the bucket and the sample numbers, over all ranks, of a micro-batch."""
        epoch, index = self._locate(position)
        plan = self._load(epoch)
        start = plan.starts[index]
        return int(plan.buckets[index]), plan.numbers[start : start + plan.sizes[index]]

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the epoch of a micro-batch, and its index in it."""
        while self._batches_before[-1] <= position:
            self._count_epochs(len(self._batches_before))
        epoch = bisect_right(self._batches_before, position) - 1
        return epoch, position - self._batches_before[epoch]

    def _count_epochs(self, epochs: int) -> None:
        """Count micro-batches and samples of the first epochs."""
        epochs_equal = self._scheme.num_draws == 0 and self.order.every_clip_once
        while len(self._batches_before) <= epochs:
            epoch = len(self._batches_before) - 1
            if epochs_equal and epoch > 0:
                batches, samples = self._batches_before[1], self._samples_before[1]
            else:
                sizes = [size for i, count in enumerate(self.counts(epoch)) for size in self.divided(count, i)]
                batches, samples = len(sizes), sum(sizes)
            self._batches_before.append(self._batches_before[-1] + batches)
            self._samples_before.append(self._samples_before[-1] + samples)
            window = self._batches_before[-_MAX_EMPTY_EPOCHS - 2 :]
            if epoch >= _MAX_EMPTY_EPOCHS and window[0] == window[-1]:
                raise InputError(
                    f"{PATH} leaves nothing to train on in {_MAX_EMPTY_EPOCHS} epochs; raise its probabilities, or set "
                    "data.params.drop_partial=false"
                )

    def _load(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: self._plan(epoch)}
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> _Epoch:
        chosen = self.bucket_of_samples(epoch)
        by_bucket = np.argsort(chosen, kind="stable")  # within a bucket, samples keep their shuffled order
        starts, sizes, buckets = [], [], []
        begin = int((chosen == NOWHERE).sum())
        for bucket, count in enumerate(self._count(chosen)):
            parts = self.divided(count, bucket)
            starts += np.cumsum([begin, *parts])[: len(parts)].tolist()
            sizes += parts
            buckets += [bucket] * len(parts)
            begin += count
        generator = torch.Generator().manual_seed(derive_seed(self.order.seed, "micro-batches", epoch))
        shuffled = torch.randperm(len(sizes), generator=generator).numpy()
        return _Epoch(
            numbers=epoch * self.order.epoch_length + by_bucket,
            starts=np.array(starts, np.int64)[shuffled],
            sizes=np.array(sizes, np.int64)[shuffled],
            buckets=np.array(buckets, np.int64)[shuffled],
        )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
