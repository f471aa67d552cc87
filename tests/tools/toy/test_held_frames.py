import json
from pathlib import Path

import held_frames
import inversion
import pytest
import quality

ROOT = Path(__file__).parents[3]


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    """The slow test and the command of the page measure them."""
    found = json.loads((ROOT / "assets/toy/held_frames.json").read_text())
    assert min(found["continuation"][name] for name in ("colour", "motion", "speed")) >= 0.9
    page = (ROOT / "docs/from_video.md").read_text()
    for name, row in (("continuation", "continuation"), ("first_and_last", "first and last picture")):
        shares = " | ".join(
            f"{found[name][key]:.0%}" if key in found[name] else "" for key in ("colour", "motion", "speed")
        )
        assert f"| {row} | {shares} |" in page
    assert f"({found['continuation']['mean_speed']:.2f} times)" in page


def test_the_recorded_inversion_gives_a_clip_back_and_the_page_shows_it():
    found = json.loads((ROOT / "assets/toy/inversion.json").read_text())
    assert found["psnr_db"] > found["autoencoder_psnr_db"] - 1.5
    page = (ROOT / "docs/from_video.md").read_text()
    for value in (f"{found['psnr_db']:.1f} dB", f"{found['autoencoder_psnr_db']:.1f} dB", f"{found['motion']:.0%}"):
        assert f"| {value} |" in page


@pytest.mark.slow
def test_a_clip_comes_back_from_its_noise(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = inversion.measured(quality.load_engine("configs/toy.yaml", [inversion.DDIM]), 4, 0.6)
    assert found["psnr_db"] > found["autoencoder_psnr_db"] - 1.5


@pytest.mark.slow
def test_a_continued_clip_keeps_colour_and_motion(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = held_frames.continuation(quality.load_engine("configs/toy.yaml"), 24)
    assert min(found["colour"], found["motion"], found["speed"]) >= 0.9
