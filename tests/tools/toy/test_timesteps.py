import json
from pathlib import Path

import timesteps

ROOT = Path(__file__).parents[3]
FOUND = json.loads((ROOT / "assets/toy/timesteps.json").read_text(encoding="utf-8"))
ROWS = {
    "uniform": "uniform",
    "strata": "`strata: 8`",
    "loss": "`distribution: loss`",
    "loss, strata": "`distribution: loss`, `strata: 8`",
}


def section() -> str:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    return page.partition("#### Timesteps by loss\n")[2].partition("\n## ")[0]


def test_timesteps_by_loss_make_gradients_vary_less_and_the_page_shows_it():
    text = section()
    assert max(FOUND["loss"]["variance"], FOUND["loss, strata"]["variance"]) <= 0.75
    assert max(FOUND["loss"]["loss_variance"], FOUND["loss, strata"]["loss_variance"]) <= 0.5
    for way, row in ROWS.items():
        own = FOUND[way]
        assert f"| {row} | {own['variance']:.2f} | {own['loss_variance']:.2f} |" in text
        assert own["apart"] < own["by_chance"], "no other mean than that of uniform timesteps"
    assert f"{FOUND['steps']} steps of 8 clips" in text and list(ROWS) == list(timesteps.WAYS)
