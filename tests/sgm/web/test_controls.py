"""Controls come from the types of the arguments, and mean what YAML would."""

import re
from pathlib import Path

import pytest

import sgm.web
from sgm.config.args import SamplingArgs, names_of
from sgm.config.load import load_config
from sgm.util import InputError
from sgm.web.controls import BASIC, CONTROLS, MORE, STRENGTH, overrides
from sgm.web.words import WORDS, has, say

MODEL = "configs/toy.yaml"


def test_kinds_and_limits_are_those_of_the_annotations():
    assert {*BASIC, *MORE} <= {*names_of(SamplingArgs)} and not {*BASIC} & {*MORE}
    assert CONTROLS["seed"].kind == "whole" and CONTROLS["seed"].least == 0 and CONTROLS["seed"].default == 42
    scale = CONTROLS["guidance_scale"]
    assert (scale.kind, scale.least, scale.most) == ("number", 0, 1000)
    assert CONTROLS["weights"].choices == ("int8", "fp8", "nf4")
    assert CONTROLS["sampling_image_size"].kind == "pair" and CONTROLS["sampling_image_size"].whole
    assert CONTROLS["guidance_interval"].kind == "pair" and not CONTROLS["guidance_interval"].whole
    assert CONTROLS["compile"].kind == "switch"
    assert (CONTROLS["vae_tiling"].kind, CONTROLS["vae_tiling"].choices) == ("choice", ("true", "false", "large"))
    assert (STRENGTH.kind, STRENGTH.least, STRENGTH.most, STRENGTH.default) == ("number", -100, 100, 1.0)


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("prompt", 'a: [b] # "c" {d}\n 猫 🐈', None),
        ("negative_prompt", "null", None),
        ("num_steps", 7.0, 7),
        ("num_steps", " 7", 7),
        ("guidance_interval", ["0", "0.5"], (0, 0.5)),
        ("guidance_scale", 4.5, None),
        ("sampling_image_size", [64.0, 64], (64, 64)),
        ("step_cache", "first_block", None),
        ("vae_tiling", "true", True),
        ("vae_tiling", "large", None),
        ("compile", True, None),
        ("negative_prompt", "${args.seed}, \\${x} {y} # z: '\"", None),
        ("negative_prompt", "a\x7fb\x85c\u2028d\ufeffe\nf 😀", None),
    ],
)
def test_a_value_reaches_the_run_as_it_was_entered(name, value, typed):
    given = overrides({"prompt": "a red circle", name: value})
    args = load_config([MODEL], given, mode="inference").args
    assert getattr(args, name) == (value if typed is None else typed)


def test_what_is_empty_stays_as_in_the_file():
    empty = {
        "num_steps": " ",
        "guidance_scale": None,
        "guidance_interval": ["", ""],
        "sampling_image_size": [None, None],
        "negative_prompt": " ",
        "weights": "",
    }
    assert overrides({"prompt": "a cat", **empty}) == ['args.prompt="a cat"']


def test_all_wrong_values_are_told_as_for_yaml():
    wrong = {"num_steps": 2.5, "guidance_scale": -1, "sampling_image_size": [64, None], "weights": "int3"}
    with pytest.raises(InputError) as caught:
        overrides({"prompt": "a cat", **wrong})
    said = str(caught.value).splitlines()
    assert [line.split()[0] for line in said] == [f"args.{name}" for name in wrong]
    with pytest.raises(InputError, match="args.num_steps is '7x'; give a whole number.*\nargs.guidance_scale is 'nan'"):
        overrides({"prompt": "a cat", "num_steps": "7x", "guidance_scale": "nan"})
    assert "is 2.5; give a whole number of at least 1" in said[0] and "from 0 to 1,000" in said[1]
    with pytest.raises(InputError, match="write what the video shows"):
        overrides({"prompt": "  "})


def test_both_languages_have_all_words():
    assert all(english.strip() and chinese.strip() for english, chinese in WORDS.values())
    for name, control in {**CONTROLS, STRENGTH.name: STRENGTH}.items():
        parts = ("first", "second") if control.kind == "pair" else ("control",)
        assert all(has(f"{part}.{name}") for part in parts), f"{name} has no label"
    fields = [{part.partition("}")[0] for part in words.split("{")[1:]} for pair in WORDS.values() for words in pair]
    assert fields[::2] == fields[1::2], "the same values stand in both languages"
    same = [key for key, (english, chinese) in WORDS.items() if english == chinese]
    assert same == [] and say("zh", "run") == "生成" and say("en", "range", least=1, most=2) == "From 1 to 2."


def test_no_words_are_left_over():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(sgm.web.__path__[0]).glob("*.py"))
    computed = ("control.", "first.", "second.", "hint.")  # keys made from a control's name
    written = {key: len(re.findall(rf"[\"']{re.escape(key)}[\"']", source)) for key in WORDS}
    used = [key for key, count in written.items() if not key.startswith(computed) and count < 2]
    assert used == []
    stale = [
        key for key in WORDS if key.startswith(computed) and key.partition(".")[2] not in {*CONTROLS, STRENGTH.name}
    ]
    assert stale == []
