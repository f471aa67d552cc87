"""Training samples by number, and the batches of one rank.

Legend: B clips of a batch, F frames, H W pixels.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sgm.data.buckets.plan import BucketPlan, RankBatch
from sgm.data.clips.decode import ClipError
from sgm.data.order import TrainingOrder, derive_seed
from sgm.util import RunError

MAX_ATTEMPTS = 10  # clips tried for one sample; so many bad ones in a row mean that all are
_PARENT_CHECK_S = 2.0
_CAN_WAIT_FOR_SIGNALS = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


class ClipDataset(Protocol):
    """What a data set that YAML names must offer to be trained on.

    ``dataset[i]`` is ``{"mp4": (F, 3, H, W) float32 in [-1, 1], "txt": str, "num_frames": int, "fps": float,
    "path": str}``, and perhaps more, or raises a ClipError. ``moments`` of a cache may stand in place of ``mp4``.
    A data set with something random about its samples has a method ``sample(i, generator)``, too, which is called
    instead with a generator of the training sample's own; one that buckets are used with has
    ``sample(i, generator, (F, H, W))``.
    """

    def __len__(self) -> int:
        """Return the number of clips."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index`, decoded."""
        ...


class SampleStream(Dataset):
    """The samples of a training run by number, counted over all ranks and steps from 0.

    ``stream[number]`` is what the data set gives, with ``number`` and ``failures``: path and reason of the clips that
    should have been shown and could not be used. They are replaced by others of the same data set. What replaces them
    depends on the seed and the number alone, so a resumed run shows the same.

    Args:
        datasets: where the clips come from.
        order: which clip each number shows.
        plan: of buckets, so that what replaces a clip comes from the same bucket where there is another.
    """

    def __init__(self, datasets: Sequence[ClipDataset], order: TrainingOrder, plan: BucketPlan | None = None) -> None:
        sizes = tuple(len(dataset) for dataset in datasets)
        if sizes != order.sizes:
            raise ValueError(f"the order is one of {order.sizes} clips, the data sets have {sizes}")
        self.datasets = list(datasets)
        self.order = order
        self.plan = plan
        self._bad: dict[tuple[int, int], tuple[str, str]] = {}  # known to this process, which need not try again

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return sample `number`, see `sample`."""
        return self.sample(number)

    def sample(self, number: int, shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
        """Return sample `number`.

        Args:
            number: of the sample.
            shape: (F, H, W) that its clip is brought to; None leaves it to the data set.

        Raises:
            RunError: no usable clip was found for it; the message names those that were tried.
        """
        dataset, first = self.order[number]
        failures: list[tuple[str, str]] = []
        for clip in self._candidates(dataset, first, number):
            if (dataset, clip) not in self._bad:
                try:
                    return {**self._decode(dataset, clip, number, shape), "number": number, "failures": failures}
                except ClipError as error:
                    self._bad[dataset, clip] = error.path, error.reason
            failures.append(self._bad[dataset, clip])
        tried = "\n".join(f"  {path}: {reason}" for path, reason in failures)
        raise RunError(
            f"sample {number}: none of the {len(failures)} clips tried for it can be used; repair or remove them "
            f"(tools/check_dataset.py finds all bad ones):\n{tried}"
        )

    def _decode(self, dataset: int, clip: int, number: int, shape: tuple[int, int, int] | None) -> dict[str, Any]:
        """Decode a clip, with the draws of sample `number` where its data set has any."""
        sample = getattr(self.datasets[dataset], "sample", None)
        if sample is None:
            return self.datasets[dataset][clip]
        generator = torch.Generator().manual_seed(derive_seed(self.order.seed, "clip", number))
        return sample(clip, generator) if shape is None else sample(clip, generator, shape)

    def _candidates(self, dataset: int, first: int, number: int) -> Iterator[int]:
        """Yield the clip of a sample, then its replacements, each once."""
        yield first
        size = self.order.sizes[dataset]
        generator = torch.Generator().manual_seed(derive_seed(self.order.seed, "replacement", number))
        others = torch.randperm(size - 1, generator=generator)
        others += others >= first
        if self.plan is not None:
            others = others[(~self.plan.alike(number)[others]).to(torch.uint8).argsort(stable=True)]
        yield from others[: MAX_ATTEMPTS - 1].tolist()


class SampleLoader:
    """The batches of one rank, prepared ahead by worker processes. See `make_loader`."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        """Return the number of batches from the first to the last."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield batches, from the first.

        Raises:
            RunError: a sample has no usable clip, or a worker process died.
        """
        with _signals_held():
            batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("Caught "):  # an error of the data set, with the worker's traceback
                    raise
                raise RunError(
                    f"a process that decodes clips died: {_death(error)}; where memory, or shared memory in a "
                    "container (docker: --ipc=host or --shm-size), is short, lower args.num_workers and "
                    "args.prefetch_factor"
                ) from error
            if batch is None:
                return
            if isinstance(batch, RunError):
                raise batch
            yield batch


def _death(error: Exception) -> Exception:
    """Return what torch says of a worker that was killed.

    It says so in its handler of SIGCHLD. The connection to the worker may break off before: then wait for the handler,
    whose error would otherwise come up anywhere.
    """
    if not isinstance(error, RuntimeError):
        try:
            time.sleep(1)
        except RuntimeError as death:
            return death
    return error


def make_loader(
    stream: SampleStream,
    *,
    first: int,
    stop: int,
    rank: int,
    world: int,
    micro_batch: int,
    num_workers: int,
    prefetch_factor: int = 2,
) -> SampleLoader:
    """Return the batches of one rank.

    The micro batches of all ranks lie side by side: batch k of a rank holds the numbers from ``first + (k * world +
    rank) * micro_batch`` on. With accumulation, a step is several batches in a row. So each step takes the same
    samples, however they are divided into ranks, micro batches and accumulation.

    Args:
        stream: the samples.
        first: the number to begin with: those that the steps before have consumed.
        stop: the number to end before; batches are short, or missing on some ranks, where it does not divide evenly.
        rank: of this process among those with different data.
        world: how many those are.
        micro_batch: samples of a batch.
        num_workers: processes that decode; 0 decodes in this one, when a batch is asked for.
        prefetch_factor: batches that each worker prepares ahead: no more than workers times this wait in memory.

    Returns:
        Batches ``{"mp4": (B, F, 3, H, W) float32, "txt", "num_frames", "fps", "path", "number": lists of B,
        "weight": list of B factors of the samples' losses, all 1 here, "failures": list of (path, reason)}``.
    """
    batches = _RankNumbers(first=first, stop=stop, rank=rank, world=world, micro_batch=micro_batch)
    return _loader(stream, batches, num_workers, prefetch_factor)


def make_bucket_loader(
    stream: SampleStream, *, first: int, stop: int, rank: int, num_workers: int, prefetch_factor: int = 2
) -> SampleLoader:
    """Return the batches of one rank, each of the shape of its bucket; see `make_loader`.

    Args:
        stream: the samples, with a plan of buckets.
        first: the micro-batch to begin with: as many as the steps before have taken.
        stop: the micro-batch to end before, after whole steps.
        rank: of this process among those with different data.
        num_workers: see `make_loader`.
        prefetch_factor: see `make_loader`.
    """
    assert stream.plan is not None
    batches = _RankBatches(plan=stream.plan, first=first, stop=stop, rank=rank)
    return _loader(stream, batches, num_workers, prefetch_factor)


def _loader(stream: SampleStream, batches: Sampler[RankBatch], num_workers: int, prefetch_factor: int) -> SampleLoader:
    loader = DataLoader(
        _Batches(stream),
        batch_size=None,
        sampler=batches,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else it draws from the generator that training draws from
    )
    return SampleLoader(loader)


@dataclass(frozen=True, kw_only=True)
class _RankNumbers(Sampler[RankBatch]):
    """The samples in each batch of one rank."""

    first: int
    stop: int
    rank: int
    world: int
    micro_batch: int

    def _starts(self) -> range:
        return range(self.first + self.rank * self.micro_batch, self.stop, self.world * self.micro_batch)

    def __iter__(self) -> Iterator[RankBatch]:
        for start in self._starts():
            numbers = range(start, min(start + self.micro_batch, self.stop))
            yield RankBatch(tuple(numbers), (1.0,) * len(numbers), None)

    def __len__(self) -> int:
        return len(self._starts())


@dataclass(frozen=True, kw_only=True)
class _RankBatches(Sampler[RankBatch]):
    """The same with buckets."""

    plan: BucketPlan
    first: int
    stop: int
    rank: int

    def __iter__(self) -> Iterator[RankBatch]:
        return self.plan.rank_batches(self.rank, first=self.first, stop=self.stop)

    def __len__(self) -> int:
        return self.stop - self.first


class _Batches(Dataset):
    """Batches by the samples in them. A RunError is returned, as torch would wrap it in the text of its traceback."""

    def __init__(self, stream: SampleStream) -> None:
        self.stream = stream

    def __getitem__(self, wanted: RankBatch) -> dict[str, Any] | RunError:
        try:
            samples = [self.stream.sample(number, wanted.shape) for number in wanted.numbers]
        except RunError as error:
            return error
        batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
        if "mp4" in batch:
            batch["mp4"] = torch.stack(batch["mp4"])
        return batch | {
            "weight": list(wanted.weights),
            "failures": [f for each in batch["failures"] for f in each],
        }


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back while workers are started, which inherit this: until `_start_worker`, one would kill them."""
    if not _CAN_WAIT_FOR_SIGNALS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_worker: int) -> None:
    """Leave signals to the parent, which finishes its step when it is told to end, and needs its batches for that.

    They reach whole process groups: SIGINT from a terminal, SIGTERM from torchrun and cluster schedulers. SIGTERM from
    the parent itself, how Python ends workers when it exits, must still end them; else it would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _CAN_WAIT_FOR_SIGNALS:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the parent says so or is gone; torch misses parents that die while a worker starts."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_CHECK_S)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
