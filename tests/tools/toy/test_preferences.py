import json
from pathlib import Path

import preferences
import pytest
import torch

from data_video import SFTDataset

ROOT = Path(__file__).parents[3]


def bars(found: dict) -> None:
    """The chosen size is preferred, and what captions say is still shown."""
    before, after = found["before"], found["after"]
    assert after["large"] >= 0.8 and after["large"] >= before["large"] + 0.2
    assert after["area"] > 1.05 * before["area"] and found["validation"]["accuracy"] >= 0.9
    for name in ("colour", "shape", "direction"):
        assert after[name] >= before[name] - 0.1


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    found = json.loads((ROOT / "assets/toy/preferences.json").read_text())
    bars(found)
    page = (ROOT / "docs/preferences.md").read_text()
    for when in ("before", "after"):
        shares = [f"{found[when][name]:.0%}" for name in ("large", "colour", "shape", "direction")]
        assert f"| {when} | {' | '.join(shares)} |" in page


def test_pairs_differ_in_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "PARTS", {"train": 2, "valid": 1})
    preferences.make(tmp_path)
    data = SFTDataset(
        data_dir=tmp_path / "train",
        rejected_column="rejected",
        video_size=(64, 64),
        max_num_frames=17,
        skip_frms_num=0,
    )
    assert len(data) == 2
    for index in range(2):
        sample = data[index]
        sizes = [preferences.area(_array(sample[name])) for name in ("mp4", "rejected")]
        assert sizes[0] > 1.8 * sizes[1]


def _array(video: torch.Tensor):
    return ((video + 1) / 2).permute(0, 2, 3, 1).numpy()


@pytest.mark.slow  # about five minutes
def test_the_toy_prefers_the_chosen_size(tmp_path, monkeypatch):
    """The command of docs/preferences.md."""
    monkeypatch.chdir(ROOT)
    assert preferences.main([str(tmp_path), "--write", str(tmp_path / "found.json")]) == 0
    bars(json.loads((tmp_path / "found.json").read_text()))
