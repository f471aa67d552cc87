import json
from pathlib import Path

import loops
import numpy as np
import pytest
import quality

ROOT = Path(__file__).parents[3]


def closes(found: dict) -> None:
    """The step over the seam is like the others, with colours and most shapes; without a loop it is a jump."""
    assert found["loop"]["seam"] < 1.5 < 4 < found["without"]["seam"]
    assert found["loop"]["colour"] >= 0.75 and found["loop"]["shape"] >= 0.6 and found["loop"]["moves"] > 3


def test_the_recorded_loops_close_and_the_page_shows_it():
    found = json.loads((ROOT / "assets/toy/loops.json").read_text())
    closes(found)
    page = (ROOT / "docs/from_video.md").read_text(encoding="utf-8")
    for way, name in (("without", "clip"), ("loop", "loop")):
        one = found[way]
        shares = f"{one['colour']:.0%} | {one['shape']:.0%} | {one['moves']:.0f} pixels"
        assert f"| {name} | {one['seam']:.1f} | {shares} |" in page


def test_a_seam_is_the_step_that_closes_a_circle():
    circle = np.array([0.0, 1, 2, 1]).reshape(4, 1, 1, 1)
    assert loops.seam(circle) == 1 and loops.seam(circle[:3]) == 2


@pytest.mark.slow
def test_loops_of_the_toy(monkeypatch):
    monkeypatch.chdir(ROOT)
    engine = quality.load_engine("configs/toy.yaml")
    closes({way: loops.measured(engine, way, 12) for way in loops.WAYS})
