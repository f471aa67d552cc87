"""Training samples by number, and batches of one rank, prefetched by worker processes.

Legend: B clips of a batch, F frames, H W pixels.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sgm.data.buckets.plan import BucketPlan, RankBatch
from sgm.data.clips.decode import ClipError
from sgm.data.order import TrainingOrder, derive_seed
from sgm.util import RunError

MAX_ATTEMPTS = 10  # clips tried for one sample
_SAMPLES_AHEAD, _THREADS_AHEAD = 64, 8  # read from afar before the loader asks for them
_CAN_WAIT_FOR_SIGNALS = hasattr(signal, "sigwaitinfo")  # not on macOS and Windows


class ClipDataset(Protocol):
    """Protocol of the data sets in YAML.

    ``dataset[i]`` returns ``{"mp4": (F, 3, H, W) float32 in [-1, 1], "txt": str, "num_frames": int, "fps": float,
    "path": str}`` and optionally more, or raises a ClipError. ``moments`` of a cache may replace ``mp4``. A data set
    with random augmentation also has ``sample(i, generator)``, called instead with a generator seeded per sample;
    for buckets it needs ``sample(i, generator, (F, H, W))``. One whose ``is_remote`` is true has ``prefetch(i)``, which
    reads what a clip needs from afar ahead of its sample.
    """

    def __len__(self) -> int:
        """Return the number of clips."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return clip `index`, decoded."""
        ...


class SampleStream(Dataset):
    """The samples of a training run by number, counted from 0 over all ranks and steps.

    ``stream[number]`` is the data set's sample, with ``number`` and ``failures``: path and reason of unusable clips
    that it replaces. A replacement comes from the same data set, chosen only by seed and number, so that a resumed run
    picks the same one.

    Args:
        datasets: of the clips.
        order: the clip of each number.
        plan: of buckets; replacements then come from the same bucket, if it has other clips.
    """

    def __init__(self, datasets: Sequence[ClipDataset], order: TrainingOrder, plan: BucketPlan | None = None) -> None:
        sizes = tuple(len(dataset) for dataset in datasets)
        if sizes != order.sizes:
            raise ValueError(f"the order is one of {order.sizes} clips, the data sets have {sizes}")
        self.datasets = list(datasets)
        self.order = order
        self.plan = plan
        # Found by this process: by shape, as damage behind the frames of one is in those of another.
        self._bad: dict[tuple[int, int, tuple[int, int, int] | None], tuple[str, str]] = {}

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return sample `number`, see `sample`."""
        return self.sample(number)

    def sample(self, number: int, shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
        """Return sample `number`.

        Args:
            number: of the sample.
            shape: (F, H, W) of the result; None uses the data set's shape.

        Raises:
            RunError: no candidate clip is usable; the message lists them.
        """
        dataset, first = self.order[number]
        failures: list[tuple[str, str]] = []
        for clip in self._candidates(dataset, first, number):
            if (dataset, clip, shape) not in self._bad:
                try:
                    return {**self._decode(dataset, clip, number, shape), "number": number, "failures": failures}
                except ClipError as error:
                    self._bad[dataset, clip, shape] = error.path, error.reason
            failures.append(self._bad[dataset, clip, shape])
        tried = "\n".join(f"  {path}: {reason}" for path, reason in failures)
        raise RunError(
            f"sample {number}: none of the {len(failures)} clips tried for it can be used; repair or remove them "
            f"(tools/check_dataset.py finds all bad ones):\n{tried}"
        )

    @property
    def is_remote(self) -> bool:
        """Whether samples are read from afar, so that `prefetch` has an effect."""
        return any(getattr(dataset, "is_remote", False) for dataset in self.datasets)

    def prefetch(self, number: int) -> None:
        """Read what sample `number` needs from afar; a failure is left to `sample`."""
        dataset, clip = self.order[number]
        if getattr(self.datasets[dataset], "is_remote", False):
            self.datasets[dataset].prefetch(clip)  # type: ignore[attr-defined]

    def _decode(self, dataset: int, clip: int, number: int, shape: tuple[int, int, int] | None) -> dict[str, Any]:
        """Decode a clip, with the random numbers of sample `number`."""
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
            others = others[(~self.plan.same_bucket(number)[others]).to(torch.uint8).argsort(stable=True)]
        yield from others[: MAX_ATTEMPTS - 1].tolist()


class SampleLoader:
    """The batches of one rank, prefetched by worker processes. See `make_loader`."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches.

        Raises:
            RunError: a sample has no usable clip, or a worker process died.
        """
        with _signals_blocked():
            batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("Caught "):  # an error of the data set, with the worker's traceback
                    raise
                raise RunError(
                    f"a process that decodes clips died: {_worker_death(error)}; where memory, or shared memory in a "
                    "container (docker: --ipc=host or --shm-size), is short, lower args.num_workers and "
                    "args.prefetch_factor"
                ) from error
            if batch is None:
                return
            if isinstance(batch, RunError):
                raise batch
            yield batch


def _worker_death(error: Exception) -> Exception:
    """Return DataLoader's report of a dead worker.

    Its SIGCHLD handler raises the report. If the connection to the worker breaks before that signal arrives, wait for
    it here, so that it does not interrupt the error handling.
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
    clip_dtype: torch.dtype | None = None,
) -> SampleLoader:
    """Return the batches of one rank.

    Batch k of a rank holds the numbers from ``first + (k * world + rank) * micro_batch`` on; with gradient
    accumulation, a step is several consecutive batches. So the samples of a step do not depend on the number of ranks,
    the micro-batch size and accumulation.

    Args:
        stream: the samples.
        first: first sample number (= samples consumed by earlier steps).
        stop: end sample number, exclusive; the last batches are short, or missing on some ranks.
        rank: data parallel rank.
        world: data parallel size.
        micro_batch: batch size.
        num_workers: decoding processes; 0 decodes in this process, on demand.
        prefetch_factor: maximum number of batches prefetched per worker.
        clip_dtype: of ``mp4`` in the batches, so that less passes through shared memory; None keeps that of the data
            set. ``image`` then holds the first frames, unconverted, where the data set gives no image.

    Returns:
        Batches ``{"mp4": (B, F, 3, H, W), "txt", "num_frames", "fps", "path", "number": lists of B,
        "weight": list of B factors of the samples' losses, all 1 here, "failures": list of (path, reason)}``; tensors
        are in pinned memory if there is an accelerator.
    """
    starts = range(first + rank * micro_batch, stop, world * micro_batch)

    def batches() -> Iterator[RankBatch]:
        for start in starts:
            numbers = tuple(range(start, min(start + micro_batch, stop)))
            yield RankBatch(numbers, (1.0,) * len(numbers), None)

    return _loader(stream, _Batches(batches, len(starts)), num_workers, prefetch_factor, clip_dtype)


def make_bucket_loader(
    stream: SampleStream,
    *,
    first: int,
    stop: int,
    rank: int,
    num_workers: int,
    prefetch_factor: int = 2,
    clip_dtype: torch.dtype | None = None,
) -> SampleLoader:
    """Return the batches of one rank, each of one bucket's shape; see `make_loader`.

    Args:
        stream: the samples, with a bucket plan.
        first: the first micro-batch, at the start of a step.
        stop: end micro-batch, exclusive, at the end of a step.
        rank: data parallel rank.
        num_workers: see `make_loader`.
        prefetch_factor: see `make_loader`.
        clip_dtype: see `make_loader`.
    """
    plan = stream.plan
    assert plan is not None
    batches = _Batches(lambda: plan.rank_batches(rank, first=first, stop=stop), stop - first)
    return _loader(stream, batches, num_workers, prefetch_factor, clip_dtype)


def _loader(
    stream: SampleStream,
    batches: Sampler[RankBatch],
    num_workers: int,
    prefetch_factor: int,
    clip_dtype: torch.dtype | None,
) -> SampleLoader:
    if stream.is_remote:
        batches = _Ahead(batches, stream)
    # One pass is the whole run, so persistent_workers has no use.
    loader = DataLoader(
        _Collated(stream, clip_dtype),
        batch_size=None,
        sampler=batches,
        collate_fn=_unchanged,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        worker_init_fn=_start_worker,
        pin_memory=torch.accelerator.is_available(),
        generator=torch.Generator().manual_seed(0),  # the default would consume training's random numbers
    )
    return SampleLoader(loader)


@dataclass(frozen=True)
class _Batches(Sampler[RankBatch]):
    """The samples of each batch of one rank, and the number of batches."""

    make: Callable[[], Iterator[RankBatch]]
    num: int

    def __iter__(self) -> Iterator[RankBatch]:
        return self.make()

    def __len__(self) -> int:
        return self.num


@dataclass(frozen=True)
class _Ahead(Sampler[RankBatch]):
    """The same batches; what the ones after them need from afar is read meanwhile, in threads of this process.

    The loader asks for a batch before it is needed; this one looks further ahead, by a number of samples.
    """

    batches: Sampler[RankBatch]
    stream: SampleStream

    def __iter__(self) -> Iterator[RankBatch]:
        waiting: deque[tuple[RankBatch, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(_THREADS_AHEAD, "prefetch")  # its threads start after the loader's workers
        try:
            for batch in self.batches:
                waiting.append((batch, [pool.submit(self.stream.prefetch, number) for number in batch.numbers]))
                if sum(len(futures) for _, futures in waiting) > _SAMPLES_AHEAD:
                    yield waiting.popleft()[0]
            while waiting:
                yield waiting.popleft()[0]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


class _Collated(Dataset):
    """Collated batches. Returns a RunError, since DataLoader would wrap a raised one in a traceback text."""

    def __init__(self, stream: SampleStream, clip_dtype: torch.dtype | None) -> None:
        self.stream = stream
        self.clip_dtype = clip_dtype

    def __getitem__(self, wanted: RankBatch) -> dict[str, Any] | RunError:
        try:
            samples = [self._converted(self.stream.sample(number, wanted.shape)) for number in wanted.numbers]
        except RunError as error:
            return error
        batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
        for key in ("mp4", "rejected"):
            if key in batch:
                batch[key] = torch.stack(batch[key])
        failures = [failure for sample in samples for failure in sample["failures"]]
        return batch | {"weight": list(wanted.weights), "failures": failures}

    def _converted(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Convert the clip; keep its first frame, to which image-to-video adds noise before it is converted."""
        clip, image = sample.get("mp4"), sample.get("image")
        if clip is None or self.clip_dtype in (None, clip.dtype):
            return sample
        first = clip[0].clone() if image is None else image  # a view would take the whole clip along
        names = ("mp4", "rejected", "control")
        clips = {name: sample[name].to(self.clip_dtype) for name in names if name in sample}
        return sample | clips | {"image": first}


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals while workers start (they inherit the mask), so that none dies before `_start_worker`."""
    if not _CAN_WAIT_FOR_SIGNALS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_worker: int) -> None:
    """Ignore signals to the process group, since the parent needs batches to finish its step.

    These are SIGINT from a terminal, and SIGTERM from torchrun and cluster schedulers. SIGTERM from the parent still
    ends the worker: Python ends workers this way at exit. So does the end of the parent, at once; DataLoader looks for
    it every few seconds, and misses a parent that dies while a worker starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if _CAN_WAIT_FOR_SIGNALS:
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_end_by_signal, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_by_signal(parent: int) -> None:
    """Exit when the parent sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with_parent(parent: BaseProcess) -> None:
    """Exit when the parent is gone."""
    parent.join()
    os._exit(0)
