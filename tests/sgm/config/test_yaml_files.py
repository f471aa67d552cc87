"""YAML files and overrides are read and merged; what is no YAML is refused with its place."""

import copy
import os
import time

import pytest

from sgm.config.load import ConfigError, Problem, load_config
from sgm.inference.prepare import prepare
from tests.sgm.config.loading import ROOT, TOY, complaint, override_complaint, toy


def test_later_files_win_key_by_key(write):
    extra = write("args:\n  seed: 7\nmodel:\n  sampler_config:\n    params:\n      num_steps: 3\n")
    config = load_config([TOY, extra], mode="inference")
    assert config.args.seed == 7
    assert config.args.load == "assets/toy/transformer"
    assert config.model["sampler_config"]["params"]["num_steps"] == 3
    assert config.model["sampler_config"]["target"].endswith("VPSDEDPMPP2MSampler")


def test_overrides_win_and_are_yaml():
    config = toy("args.seed=7", "args.sampling_image_size=[32, 64]", "args.guidance_scale=2e0", "args.load=null")
    assert config.args.seed == 7
    assert config.args.sampling_image_size == (32, 64)
    assert config.args.guidance_scale == 2.0
    assert config.args.load is None


def test_overrides_reach_into_lists_and_missing_sections():
    path = "model.conditioner_config.params.emb_models.0.params.model_dir"
    config = toy(f"{path}=elsewhere", "data.params.fps=8")
    assert config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] == "elsewhere"
    assert config.data == {"params": {"fps": 8}}


def test_a_mapping_as_override_merges():
    config = toy("model.sampler_config.params={num_steps: 3}")
    assert config.model["sampler_config"]["params"]["num_steps"] == 3
    assert "guider_config" in config.model["sampler_config"]["params"]


def test_aliases_are_separate_copies():
    config = toy("model.first_stage_config.params.encoder_config.params.num_res_blocks=2")
    parts = config.model["first_stage_config"]["params"]
    assert parts["encoder_config"]["params"]["num_res_blocks"] == 2
    assert parts["decoder_config"]["params"]["num_res_blocks"] == 1


def test_numbers_in_scientific_notation(write):
    extra = write("deepspeed:\n  optimizer:\n    params:\n      lr: 1e-5\n      eps: 1.e-8\n")
    params = load_config([TOY, extra], mode="inference").deepspeed["optimizer"]["params"]
    assert params == {"lr": 1e-5, "eps": 1e-8}


def test_digest_follows_values_only(write):
    config = toy()
    assert config.digest == load_config([write(config.to_yaml())], mode="inference").digest
    assert config.digest != toy("args.seed=7").digest
    assert len(config.digest) == 64


def test_no_file():
    assert "--base" in complaint([])


def test_missing_file_names_the_nearest():
    text = complaint([ROOT / "configs" / "toi.yaml", ROOT / "configs" / "nothing.yaml"])
    assert "did you mean 'toy.yaml'" in text and "nothing.yaml" in text and "2 problems" in text


def test_folder_instead_of_a_file(tmp_path):
    assert "is a folder" in complaint([tmp_path])


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "UTF-8" in complaint([tmp_path / "x.yaml"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("args:\n  seed: [1,\n  load: x\n", "line 4, column 1"),
        ("args:\n\tseed: 1\n", "line 2, column 1"),
        ('args:\n  load: "x\n', "line 3, column 1"),
        ("args: &a\n  b: *a\n", "line 1, column 7"),
    ],
)
def test_syntax_errors_give_line_and_column(write, text, place):
    path = write(text)
    message = complaint([path])
    line, column = (word.split(" ")[1] for word in place.split(", "))
    assert place in message and f"{path}:{line}:{column}" in message


def test_syntax_errors_say_where_an_open_bracket_stands(write):
    assert "which begins in line 2" in complaint([write("args:\n  seed: [1,\n  load: x\n")])


def test_syntax_errors_of_several_files_are_reported_together(write):
    text = complaint([write("a: [", "one.yaml"), write("b: }", "two.yaml")])
    assert "one.yaml" in text and "two.yaml" in text


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "word\n"])
def test_files_without_sections(write, text):
    assert "write sections such as 'args:'" in complaint([write(text)])


def test_a_key_written_twice_is_an_error(write):
    path = write("args:\n  seed: 1\n  load: x\n  seed: 2\n")
    text = complaint([TOY, path])
    assert f"args.seed ({path}:4)" in text and "line 2 and in line 4" in text and "remove one" in text


def test_control_characters(write):
    assert "remove the characters" in complaint([write("args:\n  load: a\x07b\n")])


@pytest.mark.parametrize(
    "override",
    [
        "seed",
        "args=5",
        "deepspeed={}",
        "nothing=1",
        "args..seed=1",
        "=1",
        "args.load.x.0=1",
        "model.conditioner_config.params.emb_models.7=1",
    ],
)
def test_malformed_overrides(override):
    assert override in (said := override_complaint(override)) and "of its own=" not in said


@pytest.mark.parametrize(("name", "place"), [("seed", "args.seed"), ("learning_rate", "deepspeed.optimizer.params.lr")])
def test_an_override_without_its_section(name, place):
    assert f"not an override\n      -> write {place}=..." in override_complaint(f"{name}=1")


def test_from_another_folder_the_message_says_where_to_run_it(tmp_path, monkeypatch):
    toy = ["configs/toy.yaml", "configs/toy_inference.yaml"]
    config = load_config(toy, mode="inference")
    monkeypatch.chdir(tmp_path)
    files = ", ".join(toy)
    assert complaint(toy) == f"run it from the project's folder: cd {ROOT} ({files}: there, not in {tmp_path})"
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert caught.value.elsewhere == ["assets/toy/transformer", "assets/toy/prompts.txt"] + [
        "assets/toy/vae/3d-vae.pt",
        "assets/toy/t5",
    ]
    assert "\n" not in str(caught.value) and "hf download" not in str(caught.value)
    assert "did you mean" in complaint([ROOT / "configs" / "toi.yaml"]), "what is missing there too is told as ever"


def test_another_name_of_a_key_counts_where_it_stands(write):
    path = write("args:\n  videos_per_prompt: 3\n")
    assert load_config([TOY, path], mode="inference").args.batch_size == 3
    assert toy("args.videos_per_prompt=4", "args.batch_size=2").args.batch_size == 2
    assert load_config([TOY, path], ["args.videos_per_prompt=4"], mode="inference").args.batch_size == 4
    assert "command line: args.videos_per_prompt=0" in override_complaint("args.videos_per_prompt=0")
    twice = write("args:\n  batch_size: 1\n  videos_per_prompt: 3\n")
    assert "written twice" in complaint([TOY, twice])


def test_an_override_that_is_no_yaml():
    assert "in quotes" in override_complaint("args.output_dir=[a")


@pytest.mark.parametrize("name", ["args.output_dir=runs/caf", "args.prompt=[x", "args.load.caf", "model.caf"])
def test_bytes_of_overrides_that_are_not_utf_8(name):
    text = override_complaint(f"{name}\udce9=x" if "=" not in name else f"{name}\udce9")
    assert text.startswith("1 problem in") and "is not UTF-8 text" in text and "in UTF-8" in text


def bomb(line: str, first: str) -> str:
    return "".join([first, *(line.format(new=new, old=old) for old, new in zip("abcdefgh", "bcdefghi", strict=True))])


@pytest.mark.parametrize(
    "text",
    [
        bomb("{new}: &{new} [" + ",".join(["*{old}"] * 9) + "]\n", "a: &a [x,x,x,x,x,x,x,x,x]\n"),
        bomb("{new}: &{new} {{<<: [" + ",".join(["*{old}"] * 9) + "]}}\n", "a: &a {x: 1, y: 2}\n"),
        bomb("{new}: [" + ",".join(["'${{{old}}}'"] * 9) + "]\n", "a: [x,x,x,x,x,x,x,x,x]\n"),
        bomb("{new}: '" + "${{{old}}}" * 12 + "'\n", "a: xxxxxxxx\n"),
        "a: &a0 x\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(100)),
        "".join(f"c{i}: ${{c{i + 1}}}\n" for i in range(100)) + "c100: x\n",
        "args: " + "[" * 3000 + "]" * 3000 + "\n",
        "args: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
        "- " * 3000 + "x\n",
        "args:\n  seed: " + "9" * 5000 + "\n",
        "args:\n  load: !!python/object/apply:os.getcwd []\n",
        "args:\n  load: !!binary aGVsbG8=\n",
        "args:\n  ~: 1\n",
    ],
)
def test_small_files_stay_small(write, text):
    path = write(text)
    start = time.process_time()
    message = complaint([path])
    assert time.process_time() - start < 2 and len(message) < 2000
    assert str(path) in message and "1 problem " in message


def test_only_files_are_read(tmp_path):
    """A pipe would keep the reader waiting, and a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    assert "is a device, not a YAML file" in complaint(["/dev/zero"])
    assert "is a named pipe, not a YAML file" in complaint([tmp_path / "pipe"])
    assert "null" in complaint(["a\0b"])
    (tmp_path / "large.yaml").write_text("#" * 2_000_001)
    assert "larger than 2 MB" in complaint([tmp_path / "large.yaml"])


def test_a_ratio_is_no_number_to_the_base_of_60(write):
    assert "args.seed" in (said := complaint([TOY, write("args:\n  seed: 16:9\n")])) and "is '16:9'" in said


@pytest.mark.parametrize("number", ["010", "-07", "0_7"])
def test_a_number_with_a_leading_zero_is_none_to_the_base_of_8(write, number):
    assert f"is '{number}'" in complaint([TOY, write(f"args:\n  seed: {number}\n")])
    assert (
        load_config([TOY, write(f"args:\n  negative_prompt: {number}\n")], mode="inference").args.negative_prompt
        == number
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("!!bool x", "'x' is no value of its tag"),
        ("!!bool ''", "'' is no value of its tag"),
        ("!!int ''", "'' is no number"),
        ("!!float ''", "'' is no number"),
        ("!!null text", "'text' is not null"),
        ("0x" + "f" * 10_000, "is no number that can be used"),
        ("0b" + "1" * 20_000, "is no number that can be used"),
    ],
)
def test_what_a_tag_or_base_does_not_fit(write, value, said):
    assert said in (text := complaint([TOY, write(f"args:\n  seed: {value}\n")])) and ":2:9)" in text
    if value.startswith("!!bool"):
        assert said in complaint([TOY, write(f"args:\n  {value}: 1\n")])


def test_merged_mappings_are_read_as_others(write):
    def text(merged: str, *more: str) -> str:
        return "\n".join(["args:", f"  <<: {merged}", *(f"  {each}" for each in more)])

    both = write(text("[{seed: 7, videos_per_prompt: 3}, {seed: 8, num_steps: 4}]", "num_steps: 5"))
    config = load_config([TOY, both], mode="inference")
    assert (config.args.seed, config.args.batch_size, config.args.num_steps) == (7, 3, 5)
    assert "written twice" in complaint([TOY, write(text("{seed: 7, seed: 8}"))])
    assert "a key must be a word" in complaint([TOY, write(text("{~: 7}"))])
    assert "an alias refers to the value" in complaint([TOY, write("args: &a\n  <<: *a\n")])
    assert "args.seed (" in (said := complaint([TOY, write(text("{num_steps: 3}", "seed: -1"))])) and ":3)" in said
    assert "args.num_steps (" in (said := complaint([TOY, write(text("{num_steps: 0}", "seed: 1"))])) and ":2)" in said


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("blurry #1 text, low  quality", "blurry #1 text, low  quality"),
        ("#1 text", "#1 text"),
        (" two  spaces ", " two  spaces "),
        ("line\n\n  line", "line\n\n  line"),
        ("it's 5 o'clock {now}", "it's 5 o'clock {now}"),
        ("x" * 100_000, "x" * 100_000),
        ("2024-01-31", "2024-01-31"),
        ("--- text", "--- text"),
        ("12 #3", "12 #3"),
        ("'no'", "no"),
        ('"a # b"', "a # b"),
        ("? what", "? what"),
        ("| bar", "| bar"),
        ("- a list", "- a list"),
        ("'a red' circle", "'a red' circle"),
        ("5: 6", "5: 6"),
        ("no", "no"),
        ("", None),
        ("null", None),
    ],
)
def test_sentences_in_overrides_arrive_as_typed(typed, value):
    assert toy(f"args.negative_prompt={typed}").args.negative_prompt == value


def test_an_empty_prompt_is_not_the_wish_for_those_of_the_file():
    assert "args.prompt=): is ''" in override_complaint("args.prompt=")


def test_a_key_below_which_all_is_commented_out_changes_nothing(write, tmp_path):
    first = tmp_path / "first.yaml"
    first.write_text("args:\n  seed: 7\n  guidance_scale: 5\n")
    for text in ("args:\n", "args:\n  # seed: 8\nmodel:\n", "model:\n  sampler_config:\n    params:\n"):
        config = load_config([TOY, first, write(text)], mode="inference")
        assert (config.args.seed, config.args.guidance_scale) == (7, 5)
        assert config.model == toy().model
    assert load_config([TOY, first, write("args: null\n")], ["args.load=x"], mode="inference").args.seed == 42


def test_what_yaml_would_drop_from_an_override_is_refused():
    text = override_complaint("args.output_dir='a' # b", "args.sampling_image_size=[64,64] # c", "args.seed=1 # d")
    assert "'# b' would be a comment" in text and "'# c' would be a comment" in text and "is '1 # d'" in text


def test_an_error_of_the_configuration_reaches_other_ranks():
    error = ConfigError([Problem("args.seed", "x.yaml:1", "is -1", "give 0 or more")])
    again = copy.copy(error)  # as pickling, which sends it
    assert str(again) == str(error) and again.problems == error.problems


def test_a_superscript_is_no_number_of_an_entry():
    with pytest.raises(ConfigError, match="args.²"):
        load_config(["configs/toy.yaml"], ["args.²=1"], mode="inference")


def test_a_key_without_its_equals_sign_is_no_file():
    said = complaint([TOY, "learning_rate"])
    assert "is a key, and no file" in said and "write deepspeed.optimizer.params.lr=..." in said
