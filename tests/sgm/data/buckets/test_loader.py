"""Batches of one shape from a bucket plan, and replacements of broken clips."""

import numpy as np
import pytest
import torch

from sgm.data.buckets.assign import ClipSizes
from sgm.data.buckets.config import parse_buckets
from sgm.data.buckets.plan import BucketPlan, Division
from sgm.data.clips.decode import ClipError
from sgm.data.loader import SampleStream, make_bucket_loader
from sgm.data.order import TrainingOrder

NUM = 30


class Shaped:
    """Clips that contain their index, in the given shape."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        raise AssertionError("clips of buckets are asked for with their shape")

    def sample(self, index, generator, shape):
        if index in self.broken:
            raise ClipError(f"{index}.mp4", "is broken")
        frames, height, width = shape
        return {"mp4": torch.full((frames, 3, height, width), float(index)), "txt": "", "path": f"{index}.mp4"}


def stream_of(broken=(), every=3, **more) -> SampleStream:
    """One clip of `every` is tall."""
    tall = np.arange(NUM) % every == 0
    sizes = ClipSizes(np.full(NUM, 9), np.where(tall, 48, 32), np.where(tall, 32, 48))
    order = TrainingOrder([NUM], seed=5)
    division = Division(buckets=parse_buckets(["9x32x48", "5x32x48", "9x48x32"]), micro_batch=4, **more)
    return SampleStream([Shaped(broken)], order, BucketPlan(order, division, sizes))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_plan(num_workers):
    stream = stream_of(ranks=2)
    assert stream.plan is not None
    for rank in range(2):
        wanted = list(stream.plan.rank_batches(rank, first=1, stop=5))
        loader = make_bucket_loader(stream, first=1, stop=5, rank=rank, num_workers=num_workers)
        batches = list(loader)
        assert len(loader) == len(batches) == 4
        for batch, want in zip(batches, wanted, strict=True):
            assert batch["mp4"].shape == (len(want.numbers), want.shape[0], 3, *want.shape[1:])
            assert batch["number"] == list(want.numbers) and batch["weight"] == list(want.weights)
            clips = [stream.order[number][1] for number in want.numbers]
            assert batch["path"] == [f"{clip}.mp4" for clip in clips]
            assert {clip % 3 == 0 for clip in clips} == {want.shape == (9, 48, 32)}


def test_a_broken_clip_is_replaced_by_one_of_its_bucket():
    broken = (0, 3, 6, 9, 1, 2)
    stream = stream_of(broken, ranks=1)
    shown = list(make_bucket_loader(stream, first=0, stop=8, rank=0, num_workers=0))
    assert {path for batch in shown for path, _ in batch["failures"]} == {f"{clip}.mp4" for clip in broken}
    for batch in shown:
        tall = {int(clip.mean()) % 3 == 0 for clip in batch["mp4"]}
        assert tall == {batch["mp4"].shape[-2:] == (48, 32)}


def test_the_last_clip_of_a_bucket_is_replaced_by_any_other():
    stream = stream_of(broken=(0, 10, 20), every=10, ranks=1)
    shown = list(make_bucket_loader(stream, first=0, stop=8, rank=0, num_workers=0))
    assert (48, 32) in {batch["mp4"].shape[-2:] for batch in shown}
    assert not {int(clip.mean()) for batch in shown for clip in batch["mp4"]} & {0, 10, 20}
