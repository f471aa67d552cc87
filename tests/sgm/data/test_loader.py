"""Samples by number: independent of ranks, batches and resuming; replacement of broken clips; workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sgm.data.buckets.plan import RankBatch
from sgm.data.clips.decode import ClipError
from sgm.data.loader import MAX_ATTEMPTS, SampleStream, _worker_death, make_loader
from sgm.data.order import TrainingOrder
from sgm.util import RunError
from tests.marks import thorough


class Numbered:
    """A data set of clips that contain their index, some broken; counts decoded clips."""

    def __init__(self, size=30, broken=(), name="set"):
        self.size, self.broken, self.name = size, set(broken), name
        self.decoded = multiprocessing.Value("i", 0)
        self.tried = []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        with self.decoded.get_lock():
            self.decoded.value += 1
        self.tried.append(index)
        path = f"{self.name}/{index}.mp4"
        if index in self.broken:
            raise ClipError(path, "is broken")
        clip = torch.full((1, 3, 2, 2), float(index))
        return {"mp4": clip, "txt": f"caption {index}", "num_frames": 1, "fps": 8.0, "path": path}


def stream_of(*datasets, seed=0):
    return SampleStream(datasets, TrainingOrder([len(dataset) for dataset in datasets], seed=seed))


def loader(stream, first=0, stop=24, rank=0, world=1, micro_batch=1, num_workers=0, **more):
    numbers = {"first": first, "stop": stop, "rank": rank, "world": world, "micro_batch": micro_batch}
    return make_loader(stream, **numbers, num_workers=num_workers, **more)


def by_number(batches):
    """The content of batches, by sample number."""
    return {
        number: (float(clip.mean()), text, path)
        for batch in batches
        for number, clip, text, path in zip(batch["number"], batch["mp4"], batch["txt"], batch["path"], strict=True)
    }


def test_a_batch():
    batch = next(iter(loader(stream_of(Numbered()), micro_batch=3)))
    assert batch["mp4"].shape == (3, 1, 3, 2, 2)
    assert batch["number"] == [0, 1, 2]
    assert batch["fps"] == [8.0] * 3
    assert batch["failures"] == []
    assert batch["txt"] == [f"caption {int(clip.mean())}" for clip in batch["mp4"]]


class Fractions(Numbered):
    """Clips of four frames with values between those of 16-bit numbers; odd ones have an image."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 2, 2, generator=generator) if index % 2 else None
        return super().__getitem__(index) | {"mp4": torch.rand(4, 3, 2, 2, generator=generator), "image": image}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_clips_travel_in_the_type_of_the_autoencoder(dtype):
    stream, numbers = stream_of(Fractions()), RankBatch((0, 1, 2, 3), (1.0,) * 4, None)
    plain = [stream[number] for number in numbers.numbers]
    batch = loader(stream, clip_dtype=dtype)._loader.dataset[numbers]
    assert batch["mp4"].dtype == (dtype or torch.float32)
    assert torch.equal(batch["mp4"], torch.stack([sample["mp4"] for sample in plain]).to(dtype))
    assert {sample["image"] is None for sample in plain} == {True, False}
    for sample, image in zip(plain, batch["image"], strict=True):
        if dtype is torch.bfloat16:
            assert torch.equal(image, sample["mp4"][0] if sample["image"] is None else sample["image"])
            assert image.untyped_storage().nbytes() == image.nbytes, "the clip itself stays behind"
        else:
            assert (image is None) == (sample["image"] is None)


@pytest.mark.parametrize("there", [True, False])
def test_batches_are_in_pinned_memory_where_there_is_an_accelerator(monkeypatch, there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    assert loader(stream_of(Numbered()))._loader.pin_memory == there


@pytest.mark.parametrize(("world", "micro_batch", "accumulation"), [(2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2)])
def test_a_step_takes_the_same_samples_however_it_is_divided(world, micro_batch, accumulation):
    stream = stream_of(Numbered(11, broken=[4]), Numbered(7), seed=5)
    whole = list(loader(stream, micro_batch=4))
    ranks = [list(loader(stream, rank=rank, world=world, micro_batch=micro_batch)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {6 * accumulation}
    for step, batch in enumerate(whole):
        parts = [part for batches in ranks for part in batches[step * accumulation : (step + 1) * accumulation]]
        assert by_number(parts) == by_number([batch])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_equals_the_uninterrupted_one(num_workers):
    def stream():
        return stream_of(Numbered(9, broken=[2, 5]), seed=1)

    whole = by_number(loader(stream(), micro_batch=2))
    for first in (0, 2, 10, 22):
        resumed = by_number(loader(stream(), first=first, micro_batch=2, num_workers=num_workers))
        assert resumed == {number: content for number, content in whole.items() if number >= first}


def test_batches_end_at_the_stop():
    assert [batch["number"] for batch in loader(stream_of(Numbered()), stop=5, micro_batch=2)] == [[0, 1], [2, 3], [4]]
    numbers = [b["number"] for b in loader(stream_of(Numbered()), stop=5, micro_batch=2, rank=1, world=2)]
    assert numbers == [[2, 3]]
    assert len(loader(stream_of(Numbered()), stop=5, micro_batch=2)) == 3


def test_loading_leaves_the_random_numbers_of_training_alone():
    state = torch.get_rng_state()
    list(loader(stream_of(Numbered()), stop=4, num_workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_holds_no_more_than_the_prefetched_batches():
    dataset = Numbered(60)
    batches = iter(loader(stream_of(dataset), stop=60, micro_batch=2, num_workers=2, prefetch_factor=3))
    for _ in range(8):
        next(batches)
    time.sleep(0.5)  # long enough to fetch everything if prefetching were unlimited
    assert 8 * 2 <= dataset.decoded.value <= (8 + 2 * 3) * 2


def test_without_workers_nothing_is_prefetched():
    dataset = Numbered()
    batches = iter(loader(stream_of(dataset), micro_batch=2))
    next(batches)
    assert dataset.decoded.value == 2


def test_broken_clips_are_replaced_and_named():
    broken = {1, 4, 7}
    stream = stream_of(Numbered(12, broken), Numbered(5, name="other"), seed=3)
    samples = [stream[number] for number in range(17)]
    failures = [failure for sample in samples for failure in sample["failures"]]
    assert {path for path, _ in failures} == {f"set/{clip}.mp4" for clip in broken}
    assert {reason for _, reason in failures} == {"is broken"}
    for number, sample in enumerate(samples):
        assert sample["number"] == number
        dataset, clip = stream.order[number]
        expected = f"{stream.datasets[dataset].name}/"
        assert sample["path"].startswith(expected), "the replacement is of the same data set"
        assert bool(sample["failures"]) == (dataset == 0 and clip in broken)
        assert sample["path"] not in [path for path, _ in sample["failures"]]


def test_a_known_bad_clip_is_not_tried_again_and_replacements_do_not_depend_on_that():
    veteran = stream_of(Numbered(6, broken=[0, 3]), seed=2)
    samples = [veteran[number] for number in range(24)]
    tried = veteran.datasets[0].tried
    assert (tried.count(0), tried.count(3)) == (1, 1)
    for number in range(24):
        fresh = stream_of(Numbered(6, broken=[0, 3]), seed=2)[number]
        for key in ("path", "failures", "txt"):
            assert fresh[key] == samples[number][key]


class DamagedBehind(Numbered):
    """Clip 0 can be read up to its fifth frame."""

    def sample(self, index, generator, shape):
        if index == 0 and shape[0] > 5:
            raise ClipError(f"{self.name}/0.mp4", "ends after 5 frames")
        return self[index]


def test_a_clip_that_is_bad_at_one_shape_is_used_at_another_by_a_resumed_run_and_an_unbroken_one():
    unbroken, resumed = (stream_of(DamagedBehind(6), seed=2) for _ in range(2))
    number = next(number for number in range(6) if unbroken.order[number][1] == 0)
    assert unbroken.sample(number, (9, 8, 8))["path"] != "set/0.mp4"
    for stream in (unbroken, resumed):
        assert stream.sample(number, (5, 8, 8))["path"] == "set/0.mp4"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_without_any_usable_clip_stops_the_run_and_names_them(num_workers):
    with pytest.raises(RunError, match=r"sample 0: none of the 3 clips") as caught:
        list(loader(stream_of(Numbered(3, broken=range(3))), num_workers=num_workers))
    assert all(f"set/{clip}.mp4: is broken" in str(caught.value) for clip in range(3))
    assert "Traceback" not in str(caught.value)


def test_attempts_are_bounded():
    dataset = Numbered(200, broken=range(200))
    with pytest.raises(RunError):
        stream_of(dataset)[0]
    assert len(set(dataset.tried)) == len(dataset.tried) == MAX_ATTEMPTS


def test_an_order_with_other_sizes_is_refused():
    with pytest.raises(ValueError, match="the data sets have"):
        SampleStream([Numbered(3)], TrainingOrder([4], seed=0))


class Stuck(Numbered):
    """The third clip is never decoded to its end."""

    def __getitem__(self, index):
        clip = super().__getitem__(index)
        if self.decoded.value > 2:
            time.sleep(600)
        return clip


def started(dataset, num_workers):
    """Return batches after the first one, and the process ids of the workers."""
    others = {child.pid for child in multiprocessing.active_children()}
    batches = iter(loader(stream_of(dataset), stop=len(dataset), num_workers=num_workers))
    next(batches)
    return batches, {child.pid for child in multiprocessing.active_children()} - others


def test_workers_survive_signals_meant_for_their_parent():
    batches, workers = started(Numbered(60), num_workers=2)
    assert len(workers) == 2
    for pid in workers:
        for name in ("INT", "TERM"):  # as sent by a terminal or scheduler, not by the parent
            subprocess.run(["sh", "-c", f"kill -{name} {pid}"], check=True)
    assert [batch["number"] for batch in batches] == [[number] for number in range(1, 60)]


def test_a_dead_worker_is_reported_with_a_hint():
    dataset = Stuck()
    batches, workers = started(dataset, num_workers=1)
    while dataset.decoded.value < 3:  # while it decodes: torch waits for ever for the lock of one killed in its loop
        time.sleep(0.01)
    os.kill(workers.pop(), signal.SIGKILL)
    with pytest.raises(RunError, match="a process that decodes clips died: .*lower args.num_workers"):
        list(batches)


@pytest.mark.parametrize("seconds", [0.05, None])
def test_a_broken_connection_waits_for_the_report_of_the_death(seconds):
    def handler(number, frame):
        raise RuntimeError("worker is killed")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)
        found = _worker_death(ConnectionResetError("connection reset"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert str(found) == ("worker is killed" if seconds else "connection reset")


PROGRAM = """
import sys, time
import torch
from sgm.data.loader import SampleStream, make_loader
from sgm.data.order import TrainingOrder

class Clips:
    def __len__(self): return 10
    def __getitem__(self, i): return {"mp4": torch.zeros(1, 3, 2, 2), "path": str(i)}

batches = iter(make_loader(SampleStream([Clips()], TrainingOrder([10], seed=0)), first=0, stop=1000, rank=0, world=1,
                           micro_batch=1, num_workers=2))
next(batches)
print("ready", flush=True)
if sys.argv[1] != "exit":
    time.sleep(60)
sys.modules["kept"] = batches  # alive until the interpreter is gone, as in a traceback
"""


@pytest.mark.parametrize(
    ("end", "code"), [thorough("exit", 0), thorough("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)]
)
def test_a_parent_that_exits_or_is_ended_leaves_nothing_hanging(end, code):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, end], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(-code)  # 0 sends none
        # Workers hold the pipe as well: it only closes when they are gone, too.
        process.communicate(timeout=20)
        assert process.returncode == code
    finally:
        process.kill()
