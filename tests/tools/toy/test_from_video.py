import json
from pathlib import Path

import from_video
import numpy as np
import pytest
import quality
import scene

ROOT = Path(__file__).parents[3]


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    """At the default strength of 0.8 colours change and the motion stays; strength 1 keeps nothing of the motion."""
    found = json.loads((ROOT / "assets/toy/from_video.json").read_text())
    assert min(found["0.8"].values()) >= 0.9 and min(found["0.6"].values()) >= 0.9
    assert found["0.2"]["colour"] <= 0.6 and found["1"]["motion"] <= 0.5
    page = (ROOT / "docs/from_video.md").read_text(encoding="utf-8")
    section = page.partition("## Video to video")[2].partition("\n## ")[0]
    for strength in from_video.STRENGTHS:
        one = found[f"{strength:g}"]
        assert f"| {strength:g} | {one['colour']:.0%} | {one['motion']:.0%} |" in section


def test_a_motion_is_kept_by_the_place_of_the_shape_not_by_its_colour():
    clip = scene.random_clip(("red", "circle", "left"), np.random.default_rng(0))
    (other,) = from_video.other_colours([clip])
    moved = scene.Clip(other.colour, "circle", "right", clip.radius, clip.start, 0.0)
    source = scene.render(clip)
    assert other.colour != clip.colour
    assert from_video.judged([scene.render(other)], [other], [source]) == (1, 1)
    assert from_video.judged([source], [other], [source]) == (0, 1)
    assert from_video.judged([scene.render(moved)], [other], [source]) == (1, 0)


@pytest.mark.slow  # seconds: with few steps, at which the colour follows too
def test_few_steps_of_the_toy_change_a_colour_and_keep_the_motion(monkeypatch):
    monkeypatch.chdir(ROOT)
    colour, motion = from_video.shares(quality.load_engine("configs/toy.yaml"), 4, 0.7, num_steps=12)
    assert colour >= 0.75 and motion == 1


@pytest.mark.slow
def test_the_colour_changes_and_the_motion_stays(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = from_video.shares(quality.load_engine("configs/toy.yaml"), 24, 0.6)
    assert min(found) >= 0.9, "of the colour of the prompt, and of the motion of the clip"
