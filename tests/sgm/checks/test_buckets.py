"""Buckets checked against the network before anything is read, and the most expensive one."""

from pathlib import Path

import pytest
import torch

from sgm.checks.planner import training_rows
from sgm.checks.sampling import params_of
from sgm.checks.training import check_training_data, fitted_buckets, with_largest_bucket
from sgm.config.load import load_config
from sgm.modules.geometry import Geometry

CONFIGS = Path(__file__).parents[3] / "configs"


def toy(buckets, *more):
    files = [CONFIGS / "toy.yaml", CONFIGS / "toy_sft.yaml"]
    config = load_config(files, [f"data.params.buckets={buckets}", *more], mode="train")
    return config, Geometry.from_network(params_of(config.model["network_config"]))


def test_buckets_that_the_network_takes():
    config, geometry = toy("[17x64x64,5x32x48]")
    assert check_training_data(config, geometry) == []
    buckets = fitted_buckets(config, geometry)
    assert buckets is not None and len(buckets.buckets) == 2
    assert fitted_buckets(*toy("null")) is None


def test_all_that_is_wrong_is_told_with_its_place():
    config, geometry = toy("[17x64x64,21x64x64,9x64x72]", "data.params.max_num_frames=16")
    found = config.located(check_training_data(config, geometry))
    assert [problem.path for problem in found] == [
        "data.params.max_num_frames",
        "data.params.buckets.1",
        "data.params.buckets.2",
    ]
    assert all("command line" in problem.source for problem in found)


@pytest.mark.parametrize(
    ("buckets", "size", "frames", "micro_batch", "words"),
    [
        ("[9x64x64,17x64x64,1x64x64]", [64, 64], 17, 4, "17x64x64, 4 at a time"),
        ("[17x64x64,{shape: 9x64x64, batch_size: 8}]", [64, 64], 9, 8, "9x64x64, 8 at a time"),
        ("{frames: [1], heights: [32, 48], widths: 64, batch_size: 2}", [48, 64], 1, 2, "1x48x64, 2 at a time"),
    ],
)
def test_the_bucket_that_takes_most(buckets, size, frames, micro_batch, words):
    config, geometry = toy(buckets)
    alone, said = with_largest_bucket(config, geometry)
    assert said == words
    assert alone.data["params"]["video_size"] == size and alone.data["params"]["max_num_frames"] == frames
    assert alone.deepspeed["train_micro_batch_size_per_gpu"] == micro_batch
    assert fitted_buckets(alone, geometry) is None


def test_the_estimate_is_that_of_the_largest_bucket():
    rows = [training_rows(toy(buckets)[0], torch.float32, []) for buckets in ("[17x64x64,1x64x64]", "null")]
    assert rows[0].pop("largest bucket") == "17x64x64, 4 at a time"
    assert rows[0] == rows[1]


def test_classes_of_numbers_and_of_names_have_one_digest():
    given = "{256: {1: [1.0, 2]}, 144p: {5: [1.0, 1], 1: [1.0, 2]}}"
    turned = "{144p: {1: [1.0, 2], 5: [1.0, 1]}, 256: {1: [1.0, 2]}}"
    assert toy(given)[0].digest == toy(turned)[0].digest != toy("null")[0].digest
