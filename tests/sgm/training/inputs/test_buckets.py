"""Buckets with a cache, in resumed runs, and in runs without a step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_video import SFTDataset
from sgm.config.args import TrainingArgs
from sgm.data.buckets.config import parse_buckets
from sgm.data.buckets.plan import Division
from sgm.data.cache import CachedTensors, Description, begin, write_shard
from sgm.training.inputs.buckets import bucket_report, plan_buckets, require_same_plan, total_steps
from sgm.training.inputs.clips import Data
from sgm.util import InputError, RunError
from tests.sgm.training.points import POINT

BUCKETS = parse_buckets({"240p": {17: [1, 1], 33: [1, 1]}})
WIDE = "240x432"
SOURCE = {"precision": "fp32"}


def dataset(folder: Path, frames=(40, 20, 9), height=240) -> SFTDataset:
    """Clips that are never opened: the manifest has their sizes. The third fills no bucket."""
    rows = [f"clip,{index}.mp4,{count},8,{height},432" for index, count in enumerate(frames)]
    for index in range(len(frames)):
        (folder / f"{index}.mp4").touch()
    (folder / "clips.csv").write_text("\n".join(["caption,video,num_frames,fps,height,width", *rows]))
    return SFTDataset(data_dir=folder / "clips.csv", video_size=(32, 32), skip_frms_num=0)


def arguments(**values) -> TrainingArgs:
    return TrainingArgs(**({"train_data": ("clips",), "load": "weights", "train_iters": 1} | values))


def plan(data: SFTDataset, *, args=None, **division):
    division = {"buckets": BUCKETS, "ranks": 1, "micro_batch": 1} | division
    return plan_buckets(Data((data,), ()), Division(**division), args or arguments())[0]


@pytest.fixture
def cached(tmp_path):
    """Return a function: the clips, perhaps with other sizes by now → the same from a cache of the former ones."""
    keys = dataset(tmp_path).cache_keys()
    given = [*keys.values()]
    shapes = (f"33x{WIDE}", f"17x{WIDE}")
    made = Description("latents", "fp32", SOURCE, (tuple(given[:2]),), shapes, (given[2],))

    def make(data: SFTDataset, *, failed: str | None = None):
        begin(tmp_path / "cache", made)
        moments = torch.zeros(2, 9, 30, 54)
        write_shard(tmp_path / "cache", made, 0, [failed or moments, torch.zeros(2, 5, 30, 54)])
        cache = CachedTensors(tmp_path / "cache", "latents")
        cache.require(keys.values(), SOURCE)
        return data.cached(cache, keys, images=None, image_keys={}, first_frames=False)

    return make


def test_clips_with_another_bucket_than_in_the_cache_are_named(tmp_path, cached):
    plan(cached(dataset(tmp_path)))
    edited = cached(dataset(tmp_path, frames=(40, 40, 20)))
    with pytest.raises(InputError) as refused:
        plan(edited)
    message = str(refused.value)
    assert f"1.mp4: 17x{WIDE} in '{tmp_path / 'cache'}', 33x{WIDE} now" in message
    assert f"2.mp4: left out, as it fitted no bucket in '{tmp_path / 'cache'}', 17x{WIDE} now" in message
    assert "2 clips have" in message and "0.mp4" not in message


def test_a_clip_that_could_not_be_encoded_may_have_any_bucket(tmp_path, cached):
    plan(cached(dataset(tmp_path, frames=(20, 20, 9)), failed="cannot be opened"))


def test_a_clip_missing_in_the_cache_is_an_error_when_it_is_drawn(tmp_path, cached):
    data = cached(dataset(tmp_path))
    assert data.sample(1, None, (17, 240, 432))["moments"].shape == (2, 5, 30, 54)
    with pytest.raises(RunError, match=r"2\.mp4 is left out of .*, and 17x240x432 is asked for; train without"):
        data.sample(2, None, (17, 240, 432))
    with pytest.raises(RunError, match=r"1\.mp4 is 17x240x432 in .*, and 33x240x432 is asked for; train without"):
        data.sample(1, None, (33, 240, 432))


def test_a_run_resumes_only_with_the_same_micro_batches(tmp_path):
    before = plan(dataset(tmp_path))
    point = replace(POINT, run=Path("runs/x"), plan=before.digest)
    require_same_plan(point, plan(dataset(tmp_path)), {})
    weighted = arguments(train_data_weights=(1.0,))
    require_same_plan(point, plan(dataset(tmp_path), args=weighted), {})  # the same shares
    others = [
        plan(dataset(tmp_path, frames=(40, 21, 9))),
        plan(dataset(tmp_path, height=256)),
        plan(dataset(tmp_path, frames=(40, 20))),
        plan(dataset(tmp_path), args=arguments(seed=7)),
    ]
    assert len({before.digest, *(other.digest for other in others)}) == 5
    for other in others:
        with pytest.raises(InputError, match=r"runs/x counts micro-batches.*restore what changed.*args\.resume=none"):
            require_same_plan(point, other, {})
    with pytest.raises(InputError, match="cannot be read now:\n  a.mp4: no such file"):
        require_same_plan(point, others[0], {"a.mp4": "no such file"})


def test_a_run_without_a_step_is_refused(tmp_path):
    epochs = arguments(train_iters=None, epochs=1)
    alone, many = (plan(dataset(tmp_path), args=epochs, ranks=ranks, drop_partial=True) for ranks in (1, 4))
    assert total_steps(alone, epochs) == 2
    for work in (total_steps, bucket_report):
        with pytest.raises(InputError, match=r"args\.epochs=1 gives no step: .* all 4 ranks; set .*drop_partial=false"):
            work(many, epochs)
