import json
from pathlib import Path

import from_video
import pytest
import quality

ROOT = Path(__file__).parents[3]


def test_the_recorded_figures_reach_their_bar_and_the_page_shows_them():
    """The command of the page measures them, the slow test one strength."""
    found = json.loads((ROOT / "assets/toy/from_video.json").read_text())["strengths"]
    assert [float(strength) for strength in found] == list(from_video.STRENGTHS)
    assert min(found["0.6"].values()) >= 0.9
    page = (ROOT / "docs/from_video.md").read_text()
    for strength, own in found.items():
        assert f"| {strength} | {own['colour']:.0%} | {own['motion']:.0%} |" in page


@pytest.mark.slow
def test_the_colour_changes_and_the_motion_stays(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = from_video.shares(quality.load_engine("configs/toy.yaml"), 24, 0.6)
    assert min(found) >= 0.9, "of the colour of the prompt, and of the motion of the clip"
