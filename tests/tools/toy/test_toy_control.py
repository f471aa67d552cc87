import json
from pathlib import Path

import control
import numpy as np
import pytest
import scene

from data_video import SFTDataset

ROOT = Path(__file__).parents[3]
ROWS = {"base": "without a control", "control": "with a control"}


def test_the_recorded_figures_reach_their_bar_and_the_page_shows_them():
    """The slow test and the command of the page measure them."""
    found = json.loads((ROOT / "assets/toy/control.json").read_text())
    assert min(found["control"]["colour"], found["control"]["follows"]) >= 0.9 and found["base"]["follows"] <= 0.3
    page = (ROOT / "docs/control.md").read_text()
    for name, row in ROWS.items():
        own = found[name]
        assert f"| {row} | {own['colour']:.0%} | {own['follows']:.0%} | {own['mean_overlap']:.2f} |" in page


def test_the_clips_have_outlines_of_themselves_as_control(tmp_path):
    control.make(tmp_path, 2)
    data = SFTDataset(data_dir=tmp_path, video_size=(64, 64), max_num_frames=17, skip_frms_num=0, control=True)
    assert len(data) == 2 and not any(report.problems for report in data.check())
    sample = data[0]
    video, shown = ((sample[name].permute(0, 2, 3, 1).numpy() + 1) / 2 for name in ("mp4", "control"))
    edges = shown.mean(axis=-1) > 0.5
    assert 0.02 < edges.mean() < 0.2
    shape = np.abs(video - scene.BACKGROUND).max(axis=-1) > 0.3
    rows, columns = (np.flatnonzero(shape[0].any(axis=axis)) for axis in (1, 0))
    outline = [np.flatnonzero(edges[0].any(axis=axis)) for axis in (1, 0)]
    for own, wanted in zip(outline, (rows, columns), strict=True):
        assert abs(own[0] - wanted[0]) <= 3 and abs(own[-1] - wanted[-1]) <= 3


def test_overlap_is_of_place_and_size_not_of_colour():
    clip = scene.Clip("red", "square", "right", 9.0, (20.0, 32.0), 22.0)
    other = scene.Clip("blue", "square", "right", 9.0, (20.0, 32.0), 22.0)
    moved = scene.Clip("red", "square", "right", 9.0, (20.0, 41.0), 22.0)
    assert control.overlap(scene.render(other), scene.render(clip)) > 0.9
    assert 0.2 < control.overlap(scene.render(moved), scene.render(clip)) < 0.8


@pytest.mark.slow
def test_the_toy_learns_to_follow_outlines_and_takes_colours_from_the_prompt(tmp_path, monkeypatch):
    """Takes minutes: the command of docs/control.md."""
    monkeypatch.chdir(ROOT)
    assert control.main([str(tmp_path / "toy"), "--write", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert min(found["control"]["colour"], found["control"]["follows"]) >= 0.9
    assert found["base"]["follows"] <= 0.3, "by chance: there are five lanes"
