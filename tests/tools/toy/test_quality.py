"""The committed toy model, judged on combinations that its training never saw."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools" / "toy"))

import quality  # noqa: E402
import scene  # noqa: E402

TOY = ROOT / "assets" / "toy"
NUM_SAMPLES = 24  # every held-out combination twice


@pytest.fixture(scope="module", params=[NUM_SAMPLES // 2, pytest.param(NUM_SAMPLES, marks=pytest.mark.slow)])
def clips(request):
    return quality.held_out_clips(request.param)


@pytest.fixture(scope="module")
def t2v():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield quality.load_engine("configs/toy.yaml")


@pytest.fixture(scope="module")
def i2v():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield quality.load_engine("configs/toy_i2v.yaml")


def test_the_autoencoder_reconstructs_clips_it_never_saw(t2v):
    assert np.mean(quality.reconstruction_psnr(t2v, 12)) >= 28.0


def test_text_to_video_composes_what_it_was_asked_for(t2v, clips):
    judged = quality.judge(quality.sample(t2v, clips), clips)
    assert judged.colour.value >= 0.9, judged
    assert judged.direction.value >= 0.8, judged


def test_image_to_video_starts_at_the_image_and_follows_the_text(i2v, clips):
    judged = quality.judge(quality.sample(i2v, clips, with_image=True), clips, with_image=True)
    assert judged.first_frame_psnr >= 25.0, judged
    assert judged.colour.value >= 0.9, judged
    assert judged.direction.value >= 0.8, judged


def test_the_assets_are_small():
    assert sum(file.stat().st_size for file in TOY.rglob("*") if file.is_file()) <= 15 * 10**6


def test_every_clip_has_its_caption_and_shows_no_held_out_combination():
    videos = {file.stem for file in (TOY / "videos").glob("*.mp4")}
    labels = {file.stem: file.read_text(encoding="utf-8").strip() for file in (TOY / "labels").glob("*.txt")}
    held_out = {scene.caption(*names) for names in scene.combinations(held_out=True)}
    assert videos == set(labels)
    assert len(videos) >= 48
    assert not held_out & set(labels.values())


def test_prompt_files_ask_for_held_out_combinations_and_name_existing_images():
    held_out = {scene.caption(*names) for names in scene.combinations(held_out=True)}
    prompts = (TOY / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == 6
    assert held_out & set(prompts)
    for line in (TOY / "prompts_i2v.txt").read_text(encoding="utf-8").splitlines():
        prompt, image = line.split("@@")
        assert prompt in held_out
        assert (ROOT / image).is_file()


def test_the_recorded_quality_meets_the_bar():
    quality = json.loads((TOY / "quality.json").read_text(encoding="utf-8"))
    assert quality["vae_psnr_db"]["mean"] >= 28.0
    for name in ("t2v", "i2v"):
        assert quality[name]["colour"] >= 0.9
        assert quality[name]["direction"] >= 0.8
    assert quality["i2v"]["first_frame_psnr_db"] >= 25.0
