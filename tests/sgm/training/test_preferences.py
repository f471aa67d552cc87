"""Training on pairs of clips: what is read, how it goes on, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch

from data_video import SFTDataset
from sgm.checks.training import pair_problems
from sgm.config.args import TrainingArgs
from sgm.config.load import load_config
from sgm.data.clips.decode import ClipError
from sgm.inference.video import write_video
from sgm.training.inputs.precompute import after_encoding, before_encoding
from sgm.training.metrics import read_metrics
from sgm.util import InputError
from sgm.weights.files import find_weights, read_tensors
from tests.processes import only_run, train_all
from tests.sgm.training.conftest import CAPTIONS

LORA = "dit_t2v_5b_lora"
LOSS = "sgm.modules.diffusionmodules.preference.DiffusionDPOLoss"
PAIRS = [
    f"model.loss_fn_config.target={LOSS}",
    "data.params.rejected_column=rejected",
    "model.network_config.params.modules.lora_config.params.lora_dropout=0.5",
]
CONFIGS = Path(__file__).parents[3] / "configs"
SIZE = {"video_size": (16, 32), "max_num_frames": 5, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def pairs(clips):
    """Write a manifest beside the clips: of each caption, one clip is preferred to another."""
    rows = [
        {"caption": CAPTIONS[k], "video": f"videos/00{2 * k}.mp4", "rejected": f"videos/00{2 * k + 1}.mp4"}
        for k in range(3)
    ]
    path = clips / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_sample_has_both_clips_with_one_augmentation(pairs):
    data = SFTDataset(data_dir=pairs, rejected_column="rejected", reshape_mode="random", random_flip=0.5, **SIZE)
    alone = SFTDataset(data_dir=pairs.parent, reshape_mode="random", random_flip=0.5, **SIZE)
    sample = data.sample(1, torch.Generator().manual_seed(3))
    others = [alone.sample(index, torch.Generator().manual_seed(3)) for index in (2, 3)]
    assert torch.equal(sample["mp4"], others[0]["mp4"]) and torch.equal(sample["rejected"], others[1]["mp4"])
    assert "rejected" not in SFTDataset(data_dir=pairs, **SIZE)[0]
    with pytest.raises(InputError, match="data.params.rejected_column.*did you mean 'rejected'"):
        SFTDataset(data_dir=pairs, rejected_column="rejectd", **SIZE)
    with pytest.raises(InputError, match="rejected_column"):
        SFTDataset(data_dir=pairs.parent, rejected_column="rejected", **SIZE)


def test_a_rejected_clip_of_another_length_or_the_clip_itself_is_a_bad_clip(pairs, tmp_path):
    """Padded with its last frame it would end with a still, which the loss would be about."""
    frames = iio.imread(pairs.parent / "videos" / "000.mp4")
    for name, num in (("one", None), ("two", None), ("short", 2)):
        write_video(tmp_path / f"{name}.mp4", frames[:num], 8)
    rows = [
        {"caption": "a", "video": f"{a}.mp4", "rejected": f"{b}.mp4"} for a, b in (("one", "short"), ("two", "two"))
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTDataset(data_dir=tmp_path, rejected_column="rejected", **SIZE)
    found = [report.problems[0] for report in data.check()]
    said = "short.mp4 gives 2 frames, and the chosen one 5; give both the same length"
    assert found[0].endswith(said) and found[1].startswith("its rejected clip, ") and "is the clip itself" in found[1]
    for index, message in enumerate((said, "is the clip itself")):
        with pytest.raises(ClipError, match=message):
            data.sample(index, None)


def test_a_rejected_clip_that_is_missing_or_damaged_is_named(pairs, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for number in range(2):
        (tmp_path / f"{number}.mp4").symlink_to(pairs.parent / "videos" / f"00{number}.mp4")
    rows = [{"caption": "a", "video": "0.mp4", "rejected": "bad.mp4"}]
    rows += [{"caption": "b", "video": "1.mp4", "rejected": "gone.mp4"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTDataset(data_dir=tmp_path, rejected_column="rejected", **SIZE)
    found = [report.problems[0] for report in data.check()]
    assert found[0].startswith(f"its rejected clip {tmp_path / 'bad.mp4'} ")
    assert found[1].startswith(f"its rejected clip {tmp_path / 'gone.mp4'} does not exist") and ":2" in found[1]
    with pytest.raises(ClipError, match="its rejected clip .*bad.mp4") as caught:
        data.sample(0, None)
    assert caught.value.path == str(tmp_path / "0.mp4"), "the bad clip that is left out of later runs"


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_pairs_resume_exactly_and_validation_says_how_many_are_preferred(job, pairs, stage):
    given = [*PAIRS, f"args.train_data=[{pairs}]", f"args.valid_data=[{pairs}]", "args.train_iters=2"]
    given += [f"deepspeed.zero_optimization.stage={stage}", "deepspeed.gradient_accumulation_steps=2"]
    evaluated = ["args.eval_interval=2", "args.strict_eval=true", "args.only_log_video_latents=true"]
    straight = job(LORA, *given, *evaluated, "args.valid_prompts=[a red circle]", save="straight").folder
    job(LORA, *given, "args.exit_interval=1")
    resumed = job(LORA, *given, "args.resume=auto", "args.checkpoint_activations=true").folder
    one, two = (read_tensors(find_weights(run)) for run in (straight, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    (last,) = [row for row in read_metrics(straight / "metrics.jsonl") if "validation_margin" in row]
    assert 0 <= last["validation_accuracy"] <= 1 and last["validation_loss"] > 0


CONTROLLED = {"network_config": {"params": {"control_channels": 16}}}


@pytest.mark.parametrize(
    ("args", "data", "model", "adapters", "path", "text"),
    [
        ({}, {}, {}, True, "data.params.rejected_column", "is missing"),
        ({}, {"rejected_column": "r"}, {}, False, "model.loss_fn_config.target", "train a LoRA"),
        ({"latent_cache": "c"}, {"rejected_column": "r"}, {}, True, "args.latent_cache", "args.text_cache works"),
        ({"precompute": True}, {"rejected_column": "r"}, {}, True, "args.precompute", "no rejected clips"),
        ({"precompute": True, "text_cache": "c"}, {"rejected_column": "r"}, {}, True, None, ""),  # of captions alone
        ({}, {"rejected_column": "r"}, {"latent_input": True}, True, "model.latent_input", "takes videos"),
        ({}, {"rejected_column": "r"}, {"loss_fn_config": None}, True, "data.params.rejected_column", "no pairs"),
        ({}, {"rejected_column": "r"}, CONTROLLED, True, "model.network_config.params.control_channels", "reference"),
        ({}, {"rejected_column": "r"}, {}, True, None, ""),
    ],
)
def test_what_contradicts_pairs_is_refused(args, data, model, adapters, path, text):
    config = SimpleNamespace(
        args=replace(TrainingArgs(train_iters=1), **args),
        data={"params": data},
        model={"loss_fn_config": {"target": LOSS}, **model},
    )
    found = list(pair_problems(config, trains_adapters=adapters))
    assert [problem.path for problem in found] == [path][: path is not None]
    assert all(text in str(problem) for problem in found)


def test_captions_alone_can_be_encoded_before_training_on_pairs():
    """A run is checked before its caches are there, and once more with them."""
    bases = [CONFIGS / name for name in ("toy_lora.yaml", "toy_sft.yaml", "loss/preferences.yaml")]
    both = load_config(bases, ["args.precompute=true"], mode="train")
    captions = replace(both, args=replace(both.args, text_cache="c"))
    for config, found in ((both, ["args.precompute"]), (captions, [])):
        assert [problem.path for problem in pair_problems(before_encoding(config), trains_adapters=True)] == found
        if not found:
            assert not [*pair_problems(after_encoding(config), trains_adapters=True)]


@pytest.mark.slow
def test_two_ranks_learn_the_same_from_pairs_whether_weights_are_sharded_or_not(training_yaml, pairs, tmp_path):
    """At stage 3 the pass of the reference gathers the weights of another set of modules, without the adapters."""
    words = [*PAIRS[:2], f"args.train_data=[{pairs}]", f"args.valid_data=[{pairs}]", "args.train_iters=3"]
    words += ["deepspeed.optimizer.params.lr=1e-2"]
    content = [
        {
            "bases": training_yaml(LORA),
            "overrides": [*words, f"deepspeed.zero_optimization.stage={stage}", f"args.save={tmp_path / str(stage)}"],
        }
        for stage in (0, 3)
    ]
    train_all(content, tmp_path, world=2)
    whole, sharded = (
        [row["loss"] for row in read_metrics(only_run(tmp_path / str(stage)) / "metrics.jsonl") if "loss" in row]
        for stage in (0, 3)
    )
    # The loss is of a thousand times (half of `beta`) the difference of two float32 errors, which round by 1e-7.
    assert len(whole) == 3 and whole == pytest.approx(sharded, abs=1e-4) and max(whole) - min(whole) > 1e-3
