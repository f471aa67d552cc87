"""The video that sampling starts from."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.checks.sampling_plan import SamplingPlan
from sgm.config.args import SamplingArgs
from sgm.data.clips.masks import latent_mask
from sgm.inference.main import main
from sgm.inference.source_video import check_clip, encode_clips, held_problems, load_mask, load_whole
from sgm.inference.video import read_video, write_video
from sgm.util import InputError

ROOT = Path(__file__).parents[3]


def plan(latents, fps=8):
    return SamplingPlan(latents, latents, 4 * latents - 3, (16, 24), fps, False)


@pytest.fixture
def clip(tmp_path):
    """Nine frames at 8 fps, each of its own grey, the outer quarters of their width white."""
    frames = np.full((9, 32, 96, 3), 255, np.uint8)
    frames[:, :, 24:72] = np.arange(20, 200, 20, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "clip.mp4", frames, 8, crf=0)
    return SamplingArgs(video=str(tmp_path / "clip.mp4"), prompt="x", strength=0.5)


@pytest.mark.parametrize(("latents", "fps", "greys"), [(3, 8, range(20, 200, 20)), (2, 4, range(20, 200, 40))])
def test_frames_are_those_of_the_result_in_rate_and_size(clip, latents, fps, greys):
    frames = load_whole(str(clip.video), plan(latents, fps), (16, 24))
    assert frames.shape == (4 * latents - 3, 3, 16, 24)
    found = (frames.mean(dim=(1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(found, torch.tensor([float(grey) for grey in greys]), rtol=0, atol=3)
    said = check_clip(clip, plan(latents, fps), "video")
    assert f"clip.mp4 (32x96): {4 * latents - 3} frames at {fps} fps, from 0 to 8 of 9; strength 0.5" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip.mp4", "has 9 frames at 8 fps, and the result 17; set args.sampling_num_frames=3 .9 frames"),
        ("clap.mp4", "there is no file '.*clap.mp4'; did you mean"),
        ("text.mp4", "text.mp4"),
        ("pipe.mp4", "pipe.mp4: cannot be read: .*it is a named pipe, not a file"),
    ],
)
def test_what_cannot_be_taken_is_said_with_the_cure(clip, tmp_path, name, said):
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(InputError, match=said):
        check_clip(SamplingArgs(video=str(tmp_path / name), prompt="x"), plan(5), "video")


@pytest.mark.parametrize("key", ["video", "start", "end"])
def test_damage_within_a_clip_is_found_before_models_are_loaded(tmp_path, key):
    path, noise = tmp_path / "clip.mp4", np.random.default_rng(0)
    write_video(path, noise.integers(0, 255, (17, 32, 48, 3), dtype=np.uint8), 8, crf=30)
    content = path.read_bytes()
    first = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 5
    path.write_bytes(content[:first] + bytes(len(content) // 4) + content[first + len(content) // 4 :])
    with pytest.raises(InputError, match=r"clip.mp4: its frame at 0.\d+ s cannot be decoded; encode it again"):
        check_clip(SamplingArgs(prompt="x", **{key: str(path)}), plan(5), key)


class Encoder:
    """Of an engine: what it encodes is one grey for each latent frame, that of its last frame."""

    device = torch.device("cpu")

    def encode_first_stage(self, video, *, sample):
        assert not sample, "a clip does not depend on the seed"
        return video[:, ::4, :1].mean(dim=(3, 4), keepdim=True)


def greys(latents):
    return ((latents.flatten() + 1) * 127.5).round().tolist()


def test_the_last_frames_of_a_clip_are_continued_and_the_first_ones_end_it(clip):
    args = SamplingArgs(start=clip.video, end=clip.video, held_frames=5, prompt="x")
    clips = encode_clips(args, plan(5), (16, 24), Encoder())
    assert greys(clips.inputs["start"]) == pytest.approx([100, 180], abs=3), "frames 4 to 8"
    assert greys(clips.inputs["end"]) == pytest.approx([100], abs=3), "frames 1 to 4, without the single one in front"
    new = torch.zeros(17, 16, 24, 3, dtype=torch.uint8)
    joined = clips.joined(new)
    assert joined.shape == (9 + 12, 16, 24, 3) and joined[:9].min() > 0 and not joined[9:].any()
    said = check_clip(args, plan(5), "start")
    assert (
        "held: its last 5 frames, in 2 of 5 latent frames; written: 9 frames of it at 8 fps, then 12 new ones" in said
    )
    assert "held: its first 5 frames, in 1 of 5 latent frames" in check_clip(args, plan(5), "end")


def test_a_latent_is_sampled_if_any_of_its_pixels_is():
    pixels = torch.zeros(9, 16, 24, dtype=torch.bool)
    pixels[0, 3, 3] = pixels[4, 15, 7] = pixels[5, 8, 16] = True
    assert latent_mask(pixels).shape == (1, 3, 1, 2, 3)
    assert latent_mask(pixels)[0, :, 0].nonzero().tolist() == [[0, 0, 0], [1, 1, 0], [2, 1, 2]]


def test_masks_are_pictures_or_videos_with_something_to_sample_and_something_to_keep(clip, tmp_path):
    """Of the clip, the outer quarters are cropped away; its frames 6 to 8 are lighter than half."""
    assert load_mask(str(clip.video), plan(3), (16, 24))[0, :, 0, 0, 0].tolist() == [False, False, True]
    args = replace(clip, mask=str(clip.video))
    assert check_clip(args, plan(3), "mask").endswith("clip.mp4: 33% of the video is sampled anew")
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[16:, 32:] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    mask = load_mask(str(tmp_path / "mask.png"), plan(3), (16, 24))
    assert mask.nonzero().tolist() == [[0, t, 0, 1, 2] for t in range(3)]
    inputs = encode_clips(replace(clip, mask=str(tmp_path / "mask.png")), plan(3), (16, 24), Encoder()).inputs
    assert torch.equal(inputs["mask"], mask) and inputs["strength"] == 0.5 and inputs["source"].shape[1] == 3
    for value, said in (
        (0, "is black throughout, so nothing is sampled"),
        (255, "is white throughout, so nothing of the"),
    ):
        Image.fromarray(np.full((16, 48), value, np.uint8)).save(tmp_path / "plain.png")
        with pytest.raises(InputError, match=said):
            check_clip(replace(clip, mask=str(tmp_path / "plain.png")), plan(3), "mask")
    with pytest.raises(InputError, match="mask.png is 32x48, and the clip 32x96: another shape, so that crops differ"):
        check_clip(replace(clip, mask=str(tmp_path / "mask.png")), plan(3), "mask")


def test_a_clip_that_is_too_short_to_be_held_is_refused(clip):
    args = SamplingArgs(start=clip.video, held_frames=13, prompt="x")
    said = "has 9 frames at 8 fps, and 13 are held; set args.held_frames=9, or give a longer clip"
    with pytest.raises(InputError, match=said):
        check_clip(args, plan(5), "start")


def test_held_clips_leave_something_to_sample_and_a_number_of_frames_has_an_effect(clip, tmp_path):
    def found(latents, **given):
        return [
            f"{each.path} {each.found} -> {each.cure}" for each in held_problems(SamplingArgs(**given), plan(latents))
        ]

    picture = str(tmp_path / "picture.png")
    Image.new("RGB", (48, 32)).save(picture)
    assert not found(4, start=clip.video) and not found(3) and not found(3, start=picture, end=picture)
    assert not found(5, start=picture, end=clip.video, held_frames=5)
    (said,) = found(3, start=clip.video)
    assert said.startswith(
        "args.sampling_num_frames gives 3, and start holds 3 latent frames, so that nothing is sampled"
    )
    assert said.endswith("set it to 4 or more, or a smaller args.held_frames (4 fewer hold one latent frame less)")
    (said,) = found(1, start=picture, end=picture)
    assert "start and end hold 2 latent frames" in said and said.endswith("set it to 3 or more")
    (said,) = found(3, start=picture, end=picture, held_frames=5)
    assert said.startswith("args.held_frames is 5, and start and end hold one frame, as a picture does -> remove it")


def test_a_missing_end_is_not_said_of_the_start(capsys):
    given = ["--base", "configs/toy.yaml", "configs/toy_between.yaml", "args.end=none.png", "--check"]
    assert main([str(ROOT / word) if word.startswith("configs") else word for word in given]) == 2
    said = capsys.readouterr().err
    assert said.count("there is no file 'none.png'") == 1 and "args.end (command line" in said


def test_an_inversion_that_is_cut_is_named(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = ("toy", "toy_inference", "toy_inversion")
    text = "a blue circle moves right " * 5
    assert main(["--base", *(f"configs/{name}.yaml" for name in configs), f"args.inversion={text}", "--check"]) == 0
    assert "inversion: cut, since " in capsys.readouterr().out


def test_a_picture_begins_a_video(monkeypatch, tmp_path):
    """The prompts of image to video then name no image; the commands of docs/from_video.md run text to video."""
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    monkeypatch.chdir(ROOT)
    given = ["--base", "configs/toy_i2v.yaml", "args.prompt=a red circle", f"args.output_dir={tmp_path}"]
    few = ["args.sampling_num_frames=2", "args.num_steps=1"]
    assert main([*given, f"args.start={tmp_path / 'red.png'}", *few]) == 0
    (path,) = tmp_path.glob("0_*/0/000000.mp4")
    video, record = read_video(path), json.loads(path.with_suffix(".json").read_text())
    assert len(video) == 5 and np.abs(video[0].astype(int) - (255, 0, 0)).max() < 12, "the picture itself, not decoded"
    assert record["start"] == str(tmp_path / "red.png") and record["held_frames"] == 9
