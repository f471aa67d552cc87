import json
from pathlib import Path

import long_clips
import pytest
import quality

ROOT = Path(__file__).parents[3]


def bars(found: dict) -> None:
    """Clips of twice the trained length start again as they are, go on with RIFLEx, and mostly in windows."""
    assert found["extrapolate"]["motion"] <= 0.2
    assert found["riflex"]["motion"] >= 0.8 and found["windows"]["motion"] >= 0.5
    for way in ("riflex", "windows"):
        assert found[way]["colour"] >= 0.9 and found[way]["shape"] >= found["extrapolate"]["shape"] - 0.17


def test_the_recorded_figures_reach_their_bars_and_the_page_shows_them():
    found = json.loads((ROOT / "assets/toy/long_clips.json").read_text())
    bars(found["33"])
    assert found["65"]["riflex"]["motion"] >= 0.5 > 0.2 >= found["65"]["extrapolate"]["motion"]
    page = (ROOT / "docs/long_clips.md").read_text()
    for frames in ("33", "65"):
        for way, shares in found[frames].items():
            assert f"| {frames} | {way} | {' | '.join(f'{value:.0%}' for value in shares.values())} |" in page


@pytest.mark.slow
def test_clips_of_twice_the_trained_length(monkeypatch):
    monkeypatch.chdir(ROOT)
    engine = quality.load_engine("configs/toy.yaml")
    bars({way: long_clips.measured(engine, way, 33, 12) for way in long_clips.WAYS})
