import json
from pathlib import Path

import masked
import numpy as np
import pytest
import scene

from data_video import SFTDataset

ROOT = Path(__file__).parents[3]
ROWS = {"base": "before", "without": "trained without masks", "with": "trained with masks"}


def bars(found: dict) -> None:
    """The bar is learned without masks alone; with them the size is, which counts."""
    assert found["without"]["bar"] >= 0.8 and found["base"]["bar"] == 0 and found["with"]["bar"] <= 0.05
    assert found["with"]["big"] >= 0.9 and found["base"]["big"] <= 0.1
    assert found["with"]["colour"] >= 0.9


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    found = json.loads((ROOT / "assets/toy/masked.json").read_text())
    bars(found)
    page = (ROOT / "docs/training_well.md").read_text(encoding="utf-8")
    for name, row in ROWS.items():
        assert f"| {row} | {' | '.join(f'{value:.0%}' for value in found[name].values())} |" in page
    assert f"for {found['steps']} iterations of 8" in page and f"{found['clips']} samples of captions" in page


def test_the_masks_leave_out_the_bar_and_nothing_of_the_shapes(tmp_path):
    masked.make(tmp_path, 3)
    data = SFTDataset(data_dir=tmp_path, video_size=(64, 64), max_num_frames=17, skip_frms_num=0, mask=True)
    assert len(data) == 3 and not any(report.problems for report in data.check())
    for index in range(3):
        sample = data[index]
        video = (sample["mp4"].permute(0, 2, 3, 1).numpy() + 1) / 2
        assert masked.like(video, masked.COLOUR)[:, 1 : masked.BAR - 1].mean() > 0.9
        rows = np.flatnonzero(sample["mask"].any(dim=0).squeeze(0).any(dim=1).numpy())
        assert rows.tolist() == [3, 4, 5, 6, 7], "latents below the bar and a row more"
        differs = np.abs(video - scene.BACKGROUND).max(axis=-1) > 0.3
        assert not differs[:, masked.BAR + 1 : masked.HIDDEN].any() and differs[:, masked.HIDDEN :].any()


def test_what_samples_show_is_told_apart():
    clips = masked.clips(4, held_out=True, seed=7)
    as_prompted = [scene.render(clip) for clip in clips]
    assert masked.shown(as_prompted, clips) == {"bar": 0, "big": 0, "colour": 1}
    as_trained = [masked.with_bar(scene.render(masked.big(clip))) for clip in clips]
    assert masked.shown(as_trained, clips) == {"bar": 1, "big": 1, "colour": 1}
    others = clips[1:] + clips[:1]
    assert masked.shown(as_trained, others)["colour"] == 0


@pytest.mark.slow  # about ten minutes
def test_the_toy_learns_what_masks_leave_and_not_what_they_hide(tmp_path, monkeypatch):
    """The command of docs/training_well.md."""
    monkeypatch.chdir(ROOT)
    assert masked.main([str(tmp_path / "toy"), "--write", str(tmp_path / "found.json")]) == 0
    bars(json.loads((tmp_path / "found.json").read_text()))
