"""The committed toy model, judged on held-out combinations."""

from pathlib import Path

import concept
import imageio.v3 as iio
import numpy as np
import pytest
import quality
import scene
import torch

ROOT = Path(__file__).parents[3]
TOY = ROOT / "assets" / "toy"
NUM_SAMPLES = 24  # every held-out combination in both sizes
RIGHT, FIRST_FRAME, RECONSTRUCTION = 0.9, 25.0, 28.0  # shares, dB


def engine(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return quality.load_engine(f"configs/{name}.yaml")


def videos(folder: Path) -> dict[str, np.ndarray]:
    """Return the videos of a sampling run by prompt."""
    found = sorted(folder.glob("*/0/000000.mp4"))
    return {path.parent.parent.name.partition("_")[2]: iio.imread(path) / np.float32(255) for path in found}


def judge(samples: dict[str, np.ndarray]) -> list[list[bool]]:
    """Tell for each video whether colour, shape and direction are those of its prompt."""
    measured = [(prompt.split("_"), scene.measure(video)) for prompt, video in samples.items()]
    return [[word in prompt for word in (m.colour, m.shape, m.direction)] for prompt, m in measured]


def test_the_autoencoder_reconstructs_clips_it_never_saw():
    assert np.mean(quality.reconstruction_psnr(engine("toy"), quality.held_out_clips(1))) >= RECONSTRUCTION


@torch.no_grad()
def test_the_autoencoder_brings_back_land_which_only_loras_ask_for():
    toy, video = engine("toy"), concept.render(concept.PROMPTS[0], np.random.default_rng(3))[:5]
    latents = toy.encode_first_stage(quality.to_engine(video)[None], sample=False)
    assert concept.land_share(quality.to_arrays(toy.decode_first_stage(latents))[0]) > 0.95


@pytest.mark.parametrize(("model", "num"), [("toy", 6), ("toy_i2v", 4)])
def test_the_videos_of_the_demo_show_what_their_prompts_say(demo, model, num):
    judged = judge(videos(demo / "outputs" / model))
    assert len(judged) == num
    assert np.mean(judged) >= RIGHT, judged


def test_the_videos_of_the_demo_start_at_their_images(demo):
    lines = (TOY / "prompts_i2v.txt").read_text(encoding="utf-8").splitlines()
    found = videos(demo / "outputs" / "toy_i2v")
    psnr = []
    for prompt, image in (line.split("@@") for line in lines):
        psnr.append(scene.psnr(found[prompt.replace(" ", "_")][0], iio.imread(ROOT / image) / np.float32(255)))
    assert np.mean(psnr) >= FIRST_FRAME, psnr


def test_a_network_with_temporal_patches_starts_at_the_image_and_shows_what_the_prompt_says():
    clips, toy = quality.held_out_clips(2, seed=1), engine("toy1.5_i2v")
    assert toy.network.patch_size == (2, 2, 2) and toy.network_kwargs(1, toy.device)["ofs"] == 2.0
    judged = quality.judge(quality.sample(toy, clips, with_image=True, num_steps=12), clips, with_image=True)
    assert judged.everything == 1.0, judged
    assert judged.first_frame_psnr_db >= FIRST_FRAME, judged


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "toy_i2v", "toy1.5_i2v"])
def test_every_held_out_combination_is_composed(name):
    clips, with_image = quality.held_out_clips(NUM_SAMPLES), name != "toy"
    samples = quality.sample(engine(name), clips, with_image=with_image)
    judged = quality.judge(samples, clips, with_image=with_image)
    assert min(judged.colour, judged.shape, judged.direction, judged.size) >= RIGHT, judged
    assert not with_image or judged.first_frame_psnr_db >= FIRST_FRAME, judged


def test_the_assets_are_small():
    assert sum(file.stat().st_size for file in TOY.rglob("*") if file.is_file()) <= 19 * 10**6


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
