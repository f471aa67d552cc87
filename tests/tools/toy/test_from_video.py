from pathlib import Path

import from_video
import pytest
import quality

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_colour_changes_and_the_motion_stays(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = from_video.shares(quality.load_engine("configs/toy.yaml"), 24, 0.6)
    assert min(found) >= 0.9, "of the colour of the prompt, and of the motion of the clip"
