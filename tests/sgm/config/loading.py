"""Loads YAML files of the toy, and their complaints."""

from pathlib import Path

import pytest

from sgm.config.load import ConfigError, load_config

ROOT = Path(__file__).parents[3]
TOY = ROOT / "configs" / "toy.yaml"
SFT = ROOT / "configs" / "toy_sft.yaml"


def training(*overrides: str):
    return load_config([TOY, SFT], overrides, mode="train")


def training_complaint(*overrides: str) -> str:
    return complaint([TOY, SFT], overrides, mode="train")


def toy(*overrides: str, mode="inference"):
    return load_config([TOY], overrides, mode=mode)


def complaint(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **{"mode": "inference"} | kwargs)
    for problem in caught.value.problems:
        assert problem.found and problem.cure
    return str(caught.value)


def override_complaint(*overrides: str) -> str:
    return complaint([TOY], overrides)
