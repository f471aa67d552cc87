import dataclasses
import re
from pathlib import Path

import pytest

from sgm.config.args import TRAINING_ARGS, Interval, LoraArgs, SamplingArgs, TrainingArgs, names_of
from sgm.config.refused import REFUSED
from sgm.config.values import misfit


def problems(**args) -> dict[str, str]:
    """Return the cures, by key, of a training section that is complete but for `args`."""
    section = {"load": "x", "train_data": ("x",), "train_iters": 1} | args
    return {name: cure for name, _, cure in TrainingArgs(**section).problems()}


def test_every_key_is_explained():
    document = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = {
        name
        for row in re.findall(r"^\| (`.*?`) \|", document, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert [name for name in names_of(TrainingArgs) if name not in rows] == []


def test_training_takes_the_keys_of_sampling():
    assert {*names_of(SamplingArgs)} < {*names_of(TrainingArgs)}
    assert not TRAINING_ARGS & {*names_of(SamplingArgs)}
    foreign = {*TrainingArgs.IGNORED_PARAMS} | {*REFUSED["args"]}
    assert not foreign & {*names_of(TrainingArgs)}
    assert foreign < TRAINING_ARGS


def test_a_complete_section_has_no_problems():
    assert problems() == {}
    assert problems(train_iters=None, epochs=1, mode="pretrain", load=None) == {}
    assert problems(train_data=("a", "b"), train_data_weights=(1, 0.5), ema_decay=0.999) == {}


@pytest.mark.parametrize(
    ("args", "name", "cure"),
    [
        ({"load": None}, "load", "args.mode=pretrain"),
        ({"prompt": "a"}, "prompt", "args.valid_prompts=["),
        ({"video": "a"}, "video", "args.valid_prompts=["),
        ({"loras": (LoraArgs(path="x"),)}, "loras", "merge them first"),
        ({"train_iters": None}, "train_iters", "args.epochs=10"),
        ({"epochs": 3}, "epochs", "keep one"),
        ({"train_data": ()}, "train_data", "args.train_data=["),
        ({"valid_data": ()}, "valid_data", "null to use args.split"),
        ({"train_data_weights": (1, 2)}, "train_data_weights", "one number for each folder"),
        ({"train_data_weights": (0,)}, "train_data_weights", "above 0"),
        ({"split": "1,0"}, "split", "98,2,0"),
        ({"split": "a,b,c"}, "split", "98,2,0"),
        ({"split": "0,1,0"}, "split", "first above 0"),
        ({"split": "2,-1,0"}, "split", "98,2,0"),
        ({"split": "inf,0,0"}, "split", "98,2,0"),
        ({"split": "nan,0,0"}, "split", "98,2,0"),
        ({"eval_interval": 5}, "eval_interval", "args.valid_data"),
        ({"experiment_name": "a/b"}, "experiment_name", "without slashes"),
        ({"experiment_name": ".."}, "experiment_name", "give a name"),
        ({"experiment_name": "a\0b"}, "experiment_name", "give a name"),
        ({"experiment_name": ""}, "experiment_name", "give a name"),
        ({"resume": ""}, "resume", "auto, none"),
        ({"ema_decay": 1}, "ema_decay", "0.9999"),
        ({"ema_decay": 0}, "ema_decay", "0.9999"),
        ({"valid_prompts": ()}, "valid_prompts", "a list of prompts"),
        ({"valid_prompts": ("", " ")}, "valid_prompts", "a list of prompts"),
        ({"valid_prompts": " "}, "valid_prompts", "a list of prompts"),
        ({"fp16": True, "bf16": True}, "fp16", "keep the one"),
        ({"seed": 2**63}, "seed", "from 0 to"),
        ({"text_encoder_weights": "int8"}, "text_encoder_weights", "set it when sampling"),
        ({"lr_power": 2.0}, "lr_power", "set args.lr_decay_style=polynomial"),
        ({"lr_cycles": 2}, "lr_cycles", "set args.lr_decay_style=cosine_with_restarts"),
        ({"save": "s3://bucket/runs"}, "save", "name a folder of this machine"),
        ({"precompute": True, "text_cache": "s3://bucket/text"}, "precompute", "--out FOLDER --upload URL before"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval", "[0.0, 0.8]"),
        ({"guidance_interval": (0.0, 0.5), "cfg_parallel_size": 2}, "guidance_interval", "sequence_parallel_size=2"),
        ({"step_cache_threshold": 0.1}, "step_cache_threshold", "args.step_cache=first_block"),
        ({"attention": "flash", "sequence_attention": "ring"}, "attention", "sequence_attention=ulysses"),
    ],
)
def test_contradicting_args_are_refused(args, name, cure):
    found = problems(**args)
    assert [*found] == [name]
    assert cure in found[name]


def test_adapters_that_change_with_the_step_and_skipped_blocks_exclude_each_other():
    lora = LoraArgs(path="x", schedule=((0.0, 1.0), (1.0, 0.0)))
    (found,) = SamplingArgs(loras=(lora,), step_cache="first_block", prompt="x").problems()
    assert found[0] == "step_cache" and "does not notice" in found[1]
    for given, key in (
        ({"held_frames": 9}, "held_frames"),
        ({"start": "a", "held_frames": 8}, "held_frames"),
        ({"start": "a", "video": "b"}, "video"),
        ({"start": "a", "image": "b"}, "image"),
        ({"inversion": "a"}, "inversion"),
        ({"time_window_overlap": 2}, "time_window_overlap"),
        ({"time_window": 5, "step_cache": "first_block"}, "step_cache"),
        ({"loop": True, "step_cache": "first_block"}, "step_cache"),
        ({"loop": True, "video": "a"}, "loop"),
        ({"loop": True, "end": "a"}, "loop"),
        ({"mask": "a"}, "mask"),
        ({"video": "a", "inversion": "b", "cfg_parallel_size": 2}, "inversion"),
    ):
        assert [problem[0] for problem in SamplingArgs(prompt="x", **given).problems()] == [key]
    (found,) = SamplingArgs(strength=0.5, prompt="x").problems()
    assert found[0] == "strength" and "there is no video" in found[1]


def test_evaluation_takes_valid_data_or_a_share_of_the_training_data():
    assert problems(eval_interval=5, valid_data=("y",)) == {}
    assert problems(eval_interval=5, split="9,1,0") == {}


def test_split_shares_add_up_to_one():
    assert TrainingArgs(train_data=("x",), split=" 98, 1,1").split_shares == pytest.approx((0.98, 0.01, 0.01))
    assert TrainingArgs(train_data=("x",)).split_shares == (1, 0, 0)


def test_args_unused_without_evaluation():
    args = TrainingArgs(train_data=("x",), valid_prompts=("a",), strict_eval=True)
    assert args.unused == ["valid_prompts", "strict_eval"]
    assert dataclasses.replace(args, eval_interval=5).unused == []


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        ({}, {"latents": "runs/cache", "text": "runs/cache"}),
        ({"latent_cache": "a"}, {"latents": "a"}),
        ({"latent_cache": "a", "text_cache": "b"}, {"latents": "a", "text": "b"}),
    ],
)
def test_precomputing_fills_the_caches_that_are_named_or_one_beside_the_runs(given, folders):
    assert TrainingArgs(save="runs", precompute=True, **given).precomputed == folders


@pytest.mark.parametrize(
    ("fits", "values"), [(True, ["1 epoch", "20 epochs", 5]), (False, ["0 epochs", "epoch", "1.5 epochs", 0])]
)
def test_intervals_are_iterations_or_epochs(fits, values):
    problems = [misfit(value, Interval) for value in values]
    assert all(problem is None if fits else problem and "text such as '2 epochs'" in problem[1] for problem in problems)
