from pathlib import Path

import from_video
import pytest
import quality

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("num_clips", "num_steps"), [(2, 10), pytest.param(24, 30, marks=pytest.mark.slow)])
def test_the_colour_changes_and_the_motion_stays(monkeypatch, num_clips, num_steps):
    monkeypatch.chdir(ROOT)
    found = from_video.shares(quality.load_engine("configs/toy.yaml"), num_clips, 0.6, num_steps=num_steps)
    assert min(found) >= 0.9, "of the colour of the prompt, and of the motion of the clip"
