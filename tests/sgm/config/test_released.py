"""The files that the reference released load unchanged but for their placeholders."""

import re
from itertools import product
from pathlib import Path

import pytest

from sgm.config.load import load_config

FOLDER = Path(__file__).parents[2] / "data" / "released"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WHOLE = [name for name in NAMES if re.match("cogvideox_2b_(infer|sft)", name)]  # model and args in one file
SETTINGS = [name for name in NAMES if re.match("inference|sft", name)]
MODELS = [name for name in NAMES if name not in (*WHOLE, *SETTINGS)]
PAIRS = [*product(MODELS, SETTINGS), *((name,) for name in WHOLE)]
# Each model with the last files, and all files with one model of each kind.
QUICK = [
    pair
    for pair in PAIRS
    if len(pair) == 1 or pair[1] in ("inference.5", "sft.3") or pair[0] in ("cogvideox_2b.1", "cogvideox_5b_i2v_lora.2")
]


def load_all(pairs: list[tuple[str, ...]], folder: Path) -> None:
    for name in NAMES:
        text = re.sub(r"\{[^{}]*\}", "somewhere", (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    for pair in pairs:
        mode = "train" if "sft" in pair[-1] else "inference"
        config = load_config([folder / f"{name}.yaml" for name in pair], mode=mode)
        assert config.mode == mode and config.model["network_config"]["target"], pair


def test_released_files_load_in_sampling_and_training(tmp_path):
    assert (len(MODELS), len(SETTINGS), len(WHOLE), len(PAIRS), len(QUICK)) == (20, 8, 5, 165, 57)
    load_all(QUICK, tmp_path)


@pytest.mark.slow
def test_released_files_load_in_all_pairs(tmp_path):
    load_all(PAIRS, tmp_path)
