import json
from pathlib import Path

import inpainting
import numpy as np
import pytest
import quality
import scene

ROOT = Path(__file__).parents[3]


def stays(found: dict) -> None:
    """The shape gets its colour and keeps its way, and the rest is as before, to a level of grey or two."""
    assert min(found["colour"], found["motion"]) >= 0.9
    assert found["psnr_db"] > 45


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    found = json.loads((ROOT / "assets/toy/inpainting.json").read_text())
    stays(found["0.8"])
    page = (ROOT / "docs/from_video.md").read_text(encoding="utf-8")
    section = page.partition("## Inpainting")[2].partition("\n## ")[0]
    for strength in ("0.8", "1"):
        one = found[strength]
        decibels = " | ".join(f"{one[name]:.1f} dB" for name in ("psnr_db", "autoencoder_psnr_db"))
        assert f"| {strength} | {one['colour']:.0%} | {one['motion']:.0%} | {decibels} |" in section


def test_around_a_shape_are_the_pixels_up_to_a_margin():
    video = np.full((1, 9, 9, 3), scene.BACKGROUND, np.float32)
    video[0, 4, 4] = 1 - video[0, 4, 4]
    rows, columns = np.nonzero(scene.around(video, 2)[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max(), len(rows)) == (2, 6, 2, 6, 25)
    assert inpainting._pixels(np.eye(2, dtype=bool)[:, None]).shape == (5, 8, 16)


@pytest.mark.slow
def test_a_part_of_a_clip_is_sampled_anew(monkeypatch):
    monkeypatch.chdir(ROOT)
    stays(inpainting.measured(quality.load_engine("configs/toy.yaml"), 12, 0.8))
