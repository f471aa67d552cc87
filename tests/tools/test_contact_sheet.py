"""Pictures of finished runs: which videos stand beside each other, and what a file can hold."""

import json

import contact_sheet
import numpy as np
import pytest

from sgm.inference import video
from sgm.inference.video import write_video
from sgm.util import InputError


def sampled(folder, *prompts, seed=1):
    """A sampling run with a video of each prompt."""
    for number, prompt in enumerate(prompts):
        place = folder / f"{number}_{prompt}/0"
        write_video(place / "000000.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8)
        (place / "000000.json").write_text(json.dumps({"prompt": prompt, "image": None, "seed": seed}))
    return str(folder)


@pytest.mark.parametrize("name", ["sheet.png", "sheet.webp", "sheet.gif"])
def test_runs_beside_each_other_show_the_same_samples(name, tmp_path, capsys):
    runs = [sampled(tmp_path / "a", "x", "y"), sampled(tmp_path / "b", "x", "y")]
    others = [sampled(tmp_path / "fewer", "x"), sampled(tmp_path / "other", "x", "z")]
    out = tmp_path / name
    for other in others:
        assert contact_sheet.main([runs[0], other, "--beside", "--out", str(out)]) == 2 and not out.exists()
        assert "prompts, seeds or sizes differ" in capsys.readouterr().err
    assert contact_sheet.main([*runs, "--beside", "--out", str(out)]) == 0 and out.is_file()


def test_what_a_format_cannot_hold_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(video.MOST_PIXELS, ".webp", 300)
    monkeypatch.setitem(video.MOST_PIXELS, ".jpg", 300)
    entries = [("a", np.zeros((2, 192, 192, 3), np.uint8))] * 2
    with pytest.raises(InputError, match=r"a.jpg: the picture would be \d+x\d+, and this format holds 300 .* \.png"):
        video.contact_sheet(entries, tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a.webp: .* other --columns, or draw fewer videos"):
        video.animation(entries, tmp_path / "a.webp", columns=1, fps=8)
    assert not [*tmp_path.iterdir()]
    video.contact_sheet(entries, tmp_path / "a.png")
