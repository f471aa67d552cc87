from dataclasses import replace
from types import SimpleNamespace

import pytest

from sgm.checks.training import check_training_data
from tests.geometries import PATCHED, ROTARY, SINCOS


def problems(geometry, target="torch.nn.Identity", **params) -> str:
    config = SimpleNamespace(data={"target": target, "params": params}, model={})
    found = check_training_data(config, geometry)
    return "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("geometry", "frames", "size"),
    [(ROTARY, 49, [480, 720]), (ROTARY, 1, [256, 400]), (SINCOS, 17, [480, 720]), (PATCHED, 81, [768, 1360])],
)
def test_what_the_network_takes(geometry, frames, size):
    assert problems(geometry, max_num_frames=frames, video_size=size) == ""


def test_a_data_set_without_these_parameters():
    assert problems(ROTARY) == ""


@pytest.mark.parametrize(
    ("target", "keys", "said"),
    [
        ("data_video.SFTDataset", {"input_key": "txt"}, ""),
        ("data_video.SFTDataset", {"input_key": "caption"}, "emb_models.0.input_key: is caption, which no clip has"),
        ("data_video.SFTDataset", {"input_keys": ["txt", "jpg"]}, "emb_models.0.input_keys: is jpg, which no clip has"),
        ("torch.nn.Identity", {"input_key": "caption"}, ""),  # of others, samples alone tell
    ],
)
def test_an_encoder_of_texts_that_clips_do_not_have(target, keys, said):
    data = {"target": target, "params": {"video_size": [480, 720]}}
    model = {"conditioner_config": {"params": {"emb_models": [keys]}}}
    found = check_training_data(SimpleNamespace(data=data, model=model), ROTARY)
    assert [str(each).splitlines()[0].split("params.")[-1] for each in found] == ([said] if said else [])


def test_the_defaults_of_a_data_set_are_judged_too():
    short = replace(ROTARY, max_latents=5)
    assert "is 49" in problems(short, target="data_video.SFTDataset", video_size=[480, 720])
    assert problems(short, target="data_video.SFTDataset", video_size=[480, 720], max_num_frames=17) == ""


@pytest.mark.parametrize(
    ("geometry", "frames", "text"),
    [
        (ROTARY, 48, "nearest legal: data.params.max_num_frames=49; legal: 1 + multiples of 4, up to 49"),
        (ROTARY, 0, "max_num_frames=1;"),
        (ROTARY, 81, "model.network_config.params.num_frames=81 allows it"),
        (PATCHED, 79, "nearest legal: data.params.max_num_frames=77; legal: 1 + multiples of 4, up to 81"),
    ],
)
def test_frame_counts(geometry, frames, text):
    assert text in problems(geometry, max_num_frames=frames)


def test_even_counts_of_latents_are_trained_with_a_temporal_patch_of_2():
    assert problems(PATCHED, max_num_frames=77) == problems(PATCHED, max_num_frames=81) == ""


def test_tables_of_positions_end():
    assert "allows it" not in problems(SINCOS, max_num_frames=81)
    assert "allows it" not in problems(ROTARY, max_num_frames=82)


@pytest.mark.parametrize(
    ("geometry", "size", "text"),
    [
        (ROTARY, [481, 720], "nearest legal: data.params.video_size=[480,720]; height: multiples of 16 up to 480"),
        (ROTARY, [720, 1280], "video_size=[480,720]"),
        (SINCOS, [256, 256], "video_size=[480,720]; the sincos positions of this network fit that size only"),
    ],
)
def test_sizes(geometry, size, text):
    assert text in problems(geometry, video_size=size)


def test_both_are_reported_together():
    text = problems(SINCOS, max_num_frames=50, video_size=[64, 64])
    assert "data.params.max_num_frames: " in text and "data.params.video_size: " in text


def test_scaled_positions_allow_longer_clips_and_buckets():
    longer = replace(ROTARY, longer=True)
    assert "args.time_scaling=riflex" in problems(ROTARY, max_num_frames=97)
    assert problems(longer, max_num_frames=97) == ""
    buckets = ["49x480x720", "97x480x720"]
    assert "97 frames" in problems(ROTARY, buckets=buckets) and "time_scaling" in problems(ROTARY, buckets=buckets)
    assert problems(longer, buckets=buckets) == "" and "98 frames" in problems(longer, buckets=["98x480x720"])
    assert "args.time_scaling" in problems(replace(SINCOS, longer=True))
