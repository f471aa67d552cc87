"""Validation losses, comparable between runs and numbers of ranks, and samples at evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import build_vae, vae_section
from sgm.config.args import TrainingArgs
from sgm.config.load import load_config
from sgm.data.clips.decode import ClipError
from sgm.inference.measures import fidelity, flicker
from sgm.inference.run import sample
from sgm.inference.video import read_video, to_uint8, write_video
from sgm.training.evaluate import Evaluation, _sampling_vae, evaluation_mode, validation_timestep
from sgm.training.metrics import read_metrics
from sgm.training.sample_measures import SampleMeasures, check_measures
from sgm.util import InputError, RunError
from sgm.weights.files import find_weights, read_tensors
from tests.processes import train_all

ROOT = Path(__file__).parents[3]
LORA, FULL, I2V = "dit_t2v_5b_lora", "dit_t2v_1.5", "dit_i2v_5b"
FROZEN = "deepspeed.optimizer.params.lr=0.0"
CONSTANT = "args.lr_decay_style=constant"
QUICK = ["args.only_log_video_latents=true", "args.valid_prompts=[a red circle moves left]"]
FIVE = "args.sampling_num_frames=2"  # latent frames
THREE = "args.valid_prompts=[a red circle,a blue square,a green triangle]"
STOPS_WITHIN_SAMPLES = 7  # two validation batches, a prompt and its two steps, the next prompt, and a step of it


def validation(folder: Path) -> list[dict[str, float]]:
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation_loss" in line]
    return [{name: value for name, value in line.items() if name.startswith("validation_")} for line in lines]


def written(folder: Path) -> list[str]:
    """Return the results of a run's evaluations, as iteration/prompt/number."""
    found = [path for path in (folder / "samples").rglob("000000.*") if path.suffix != ".json"]
    return sorted(path.relative_to(folder / "samples").as_posix() for path in found)


@pytest.fixture(scope="module")
def three_clips(clips, tmp_path_factory) -> Path:
    """A folder with three of the clips."""
    folder = tmp_path_factory.mktemp("three")
    for kind, suffix in (("videos", "mp4"), ("labels", "txt")):
        (folder / kind).mkdir()
        for number in range(3):
            name = f"{number:03d}.{suffix}"
            (folder / kind / name).symlink_to(clips / kind / name)
    return folder


def test_timesteps_cover_the_range_evenly_whatever_their_number():
    for num in (4, 8, 50):
        quarters = [validation_timestep(number, 1000) // 250 for number in range(num)]
        counts = [quarters.count(quarter) for quarter in range(4)]
        assert min(counts) >= num // 4 - 1 and max(counts) <= num // 4 + 2
    assert len({validation_timestep(number, 1000) for number in range(100)}) == 100


def test_evaluation_mode_ends_with_the_block():
    network = torch.nn.Dropout()
    with pytest.raises(RuntimeError), evaluation_mode(network):
        assert not network.training
        raise RuntimeError
    assert network.training


def test_the_validation_loss_depends_on_neither_seed_nor_batch_nor_iteration(job):
    runs = [
        job(LORA, FROZEN, *QUICK, "args.train_iters=2", "args.eval_interval=1", "args.seed=1", "args.eval_iters=2"),
        job(
            LORA, FROZEN, *QUICK, "args.train_iters=1", "args.eval_interval=1", "args.seed=2", "args.eval_batch_size=4"
        ),
    ]
    first, second, other = validation(runs[0].folder) + validation(runs[1].folder)
    assert first == second and first == pytest.approx(other, abs=1e-6)
    assert len(first) >= 3 and first["validation_loss"] > 0


def test_the_validation_loss_follows_the_weights_and_is_said_at_once(job, log):
    folder = job(LORA, *QUICK, "args.train_iters=2", "args.eval_interval=1", CONSTANT).folder
    losses = [line["validation_loss"] for line in validation(folder)]
    assert losses[0] != losses[1]
    said = [record.getMessage() for record in log.records if record.levelname == "INFO"]
    said = [text for text in said if not text.startswith("loading T5")]
    steps = said[said.index("training: iterations 1 to 2") + 1 :]
    expected = [
        "iteration 1 of 2: loss ",
        "evaluating after iteration 1: the loss of 2 validation samples, then videos",
        f"validation after iteration 1: loss {losses[0]:.4f} (timesteps ",
        f"wrote {folder / 'samples' / '00000001'}",
        "iteration 2 of 2: loss ",
        f"saved {folder / '2'}",
        "evaluating after iteration 2: ",
        f"validation after iteration 2: loss {losses[1]:.4f} (timesteps ",
        f"wrote {folder / 'samples' / '00000002'}",
    ]
    assert len(steps) == len(expected) and all(map(str.startswith, steps, expected))


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(job, monkeypatch, log):
    """It is saved at its evaluation, survives args.keep_last, is known after a resume, and is named at the end."""
    measured = iter([3.0, 1.0, float("nan"), 2.0, 4.0])
    monkeypatch.setattr(Evaluation, "losses", lambda _: {"validation_loss": next(measured)})
    monkeypatch.setattr(Evaluation, "sample", lambda *_: [])
    overrides = ["args.train_iters=5", "args.eval_interval=1", "args.keep_best=true", "args.keep_last=1"]
    first = job(LORA, *overrides, "args.exit_interval=4")
    assert (first.best, first.stopped) == ((2, 1.0), "args.exit_interval=4")
    validated = [
        line["iteration"] for line in read_metrics(first.folder / "metrics.jsonl") if "validation_loss" in line
    ]
    assert validated == [1, 2, 3, 4], "a process that ends evaluates first"
    kept = [path.name for path in first.folder.iterdir() if path.name.isdecimal()]
    assert sorted(kept) == ["2", "4"]
    second = job(LORA, *overrides, "args.resume=auto", "args.eval_interval=5")
    assert second.folder == first.folder and second.best == (2, 1.0)
    assert f"the lowest validation loss is 1.0000: args.load={first.folder / '2'}" in str(second)
    assert find_weights(first.folder / "2").is_file() and find_weights(first.folder).parent.name == "5"
    assert not (first.folder / "4").exists() and (first.folder / "2").is_dir()


@pytest.mark.thorough
def test_losses_of_other_validation_samples_are_not_compared(job, monkeypatch, log):
    """The best checkpoint of those before is kept, and counts again where the samples are the former ones."""
    measured = iter([1.0, 3.0, 2.0, 1.5])
    monkeypatch.setattr(Evaluation, "losses", lambda _: {"validation_loss": next(measured)})
    monkeypatch.setattr(Evaluation, "sample", lambda *_: [])
    overrides = ["args.train_iters=4", "args.eval_interval=1", "args.keep_best=true", "args.keep_last=1"]
    overrides += ["args.resume=auto", "args.exit_interval=1"]
    first = job(LORA, *overrides)
    assert first.best == (1, 1.0)
    second = job(LORA, *overrides, "args.eval_iters=2", "args.exit_interval=2")
    assert second.best == (3, 2.0)
    assert "the validation loss is of other samples than before iteration 2 (clips, their number," in log.text
    assert f"does not compare them, and keeps {first.folder / '1'}, the best of those before" in log.text
    assert sorted(path.name for path in first.folder.iterdir() if path.name.isdecimal()) == ["1", "3"]
    assert job(LORA, *overrides).best == (1, 1.0)
    sets = [
        line["validation_set"] for line in read_metrics(first.folder / "metrics.jsonl") if "validation_loss" in line
    ]
    assert sets[0] == sets[3] != sets[1] == sets[2]


def test_evaluation_does_not_disturb_training(job):
    overrides = ["args.train_iters=3", "model.network_config.params.modules.lora_config.params.lora_dropout=0.5"]
    plain = job(LORA, *overrides, save="plain").folder
    evaluated = job(LORA, *overrides, *QUICK, "args.eval_interval=1", save="evaluated").folder
    weights = [read_tensors(find_weights(run)) for run in (plain, evaluated)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_validation_loss_is_measured_without_dropout(job):
    dropout = "model.network_config.params.modules.lora_config.params.lora_dropout"
    overrides = [FROZEN, *QUICK, "args.train_iters=1", "args.eval_interval=1"]
    without, with_ = (job(LORA, *overrides, f"{dropout}={share}") for share in (0.0, 0.5))
    assert validation(without.folder) == validation(with_.folder)
    losses = [read_metrics(run.folder / "metrics.jsonl")[0]["loss"] for run in (without, with_)]
    assert losses[0] != losses[1]


def test_strict_evaluation_takes_every_clip_once(job, three_clips, monkeypatch):
    numbers = []
    clip = Evaluation._clip

    def record(dataset, number):
        numbers.append(number)
        return clip(dataset, number)

    monkeypatch.setattr(Evaluation, "_clip", staticmethod(record))
    overrides = [FROZEN, *QUICK, "args.train_iters=1", "args.eval_interval=1", f"args.valid_data=[{three_clips}]"]
    job(LORA, *overrides, "args.strict_eval=true", "args.eval_iters=7")
    assert numbers == [0, 1, 2]
    numbers.clear()
    job(LORA, *overrides, "args.eval_iters=2")
    assert numbers == [0, 1, 2, 3]


def test_samples_are_those_of_the_sampling_command(job, training_yaml, tmp_path):
    folder = job(LORA, "args.train_iters=1", "args.eval_interval=1", "args.eval_measures=true", THREE, FIVE).folder
    measured = read_metrics(folder / "metrics.jsonl")[-1]
    assert measured.keys() == {"iteration", "sample_smoothness", "sample_flicker"}
    videos = [read_video(folder / "samples" / name) for name in written(folder)]
    assert measured["sample_flicker"] == pytest.approx(np.mean([flicker(video) for video in videos]))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green triangle\n")
    overrides = [FIVE, f"args.load={folder}", f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'out'}"]
    again = sample(load_config(training_yaml(LORA)[:1], [*overrides, "model.precision=fp32"], mode="inference"))
    names = written(folder)
    assert len(names) == 3 and all(name.startswith("00000001/") and name.endswith(".mp4") for name in names)
    for name, path in zip(names, sorted(again.written), strict=True):
        ours, theirs = (iio.imread(video).astype(int) for video in (folder / "samples" / name, path))
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1


def test_latents_alone_may_be_written(job):
    folder = job(LORA, *QUICK, "args.train_iters=1", "args.eval_interval=1").folder
    (name,) = written(folder)
    assert name.endswith(".safetensors") and load_file(folder / "samples" / name)


def test_captions_of_the_data_are_sampled_where_no_prompts_are_given(job, three_clips):
    overrides = ["args.train_iters=1", "args.eval_interval=1", f"args.valid_data=[{three_clips}]"]
    folder = job(LORA, *overrides, "args.only_log_video_latents=true", "args.eval_batch_size=2").folder
    assert len(written(folder)) == 2
    sidecars = [json.loads(path.read_text()) for path in (folder / "samples").rglob("*.json")]
    assert {sidecar["prompt"] for sidecar in sidecars} == {"a red circle moves left", "a blue square moves right"}


def test_first_frames_of_the_data_are_the_images_of_image_to_video(job, three_clips):
    overrides = ["args.train_iters=1", "args.eval_interval=1", f"args.valid_data=[{three_clips}]"]
    folder = job(I2V, *overrides, "args.eval_batch_size=2", "args.only_log_video_latents=true").folder
    assert len(written(folder)) == 2
    for number, path in enumerate(sorted((folder / "samples").rglob("first_frame_*.png"))):
        image = iio.imread(path).astype(int)
        frame = iio.imread(three_clips / "videos" / f"{number:03d}.mp4", index=0).astype(int)
        assert image.shape == (64, 96, 3) and np.abs(image - frame).mean() < 4
    assert number == 1


@pytest.fixture(scope="module")
def two_ranks(training_yaml, three_clips, tmp_path_factory):
    """Train several jobs on two ranks; return a function: name → run folder."""
    top = tmp_path_factory.mktemp("ranks")
    common = ["args.train_iters=1", "args.eval_interval=1", FROZEN, "deepspeed.train_micro_batch_size_per_gpu=1"]
    strict = ["args.strict_eval=true", f"args.valid_data=[{three_clips}]"]
    latents = "args.only_log_video_latents=true"
    jobs = {
        "counted": [*QUICK, "args.eval_iters=3"],
        "strict": [*strict, THREE, latents],
        "sharded": [*strict, THREE, latents, "deepspeed.zero_optimization.stage=3"],
        "data": [*strict, latents, "deepspeed.zero_optimization.stage=3", "args.eval_batch_size=3"],
        "stopped": [*strict, THREE, latents, "args.resume=auto", "args.train_iters=3"],
        "stopped sharded": [*strict, latents, "deepspeed.zero_optimization.stage=3", "args.train_iters=2"],
    }
    content = [
        {"bases": training_yaml(LORA), "overrides": [*common, *more, f"args.save={top / name}"]}
        for name, more in jobs.items()
    ]
    # Within the second round of validation batches, and within the sampling of the second round of prompts, in which
    # one of two ranks has none.
    content[-2]["stop_at"], content[-1]["stop_at"] = STOPS_WITHIN_SAMPLES, 2
    content.append({**content[-2], "stop_at": None})
    train_all(content, top, world=2)
    return lambda name: next((top / name).iterdir())


@pytest.mark.thorough
def test_two_ranks_give_the_validation_loss_of_one(job, two_ranks, three_clips):
    overrides = [FROZEN, *QUICK, "args.train_iters=1", "args.eval_interval=1"]
    one = job(LORA, *overrides, "args.eval_iters=3")
    assert validation(two_ranks("counted")) == [pytest.approx(validation(one.folder)[0], abs=1e-6)]
    strict = job(LORA, *overrides, "args.strict_eval=true", f"args.valid_data=[{three_clips}]")
    for name in ("strict", "sharded", "data"):
        assert validation(two_ranks(name)) == [pytest.approx(validation(strict.folder)[0], abs=1e-6)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["strict", "sharded", "data"])
def test_two_ranks_sample_every_prompt_once(two_ranks, name):
    names = written(two_ranks(name))
    assert len(names) == 3 and len({path.split("/")[1] for path in names}) == 3
    samples = [load_file(two_ranks(name) / "samples" / path) for path in names]
    assert all(torch.isfinite(tensor).all() for content in samples for tensor in content.values())


@pytest.mark.thorough
def test_a_signal_within_an_evaluation_ends_it_on_all_ranks_and_saves(two_ranks):
    """The rank that is asked has no prompt in the last round; with ZeRO 3 the other one must leave in step."""
    sharded, run = two_ranks("stopped sharded"), two_ranks("stopped")
    assert (sharded / "resume" / "latest").read_text() == "1\n" and find_weights(sharded).parent.name == "1"
    assert validation(sharded) == [] and not (sharded / "samples").exists()
    assert find_weights(run).parent.name == "3" and len(validation(run)) == 3, "it was resumed after iteration 1"
    assert [name.split("/")[0] for name in written(run)] == ["00000001"] * 2 + ["00000002"] * 3 + ["00000003"] * 3


@pytest.mark.thorough
def test_sharded_samples_equal_whole_ones(two_ranks):
    for name in written(two_ranks("strict")):
        whole, sharded = (load_file(two_ranks(run) / "samples" / name) for run in ("strict", "sharded"))
        for key in whole:
            torch.testing.assert_close(sharded[key], whole[key], rtol=0, atol=1e-5)


def test_tiles_are_for_samples_and_not_for_encoded_clips():
    engine = SimpleNamespace(first_stage_model=build_vae(vae_section("cogvideox_5b", ch=32, num_res_blocks=1)))
    vae, args = engine.first_stage_model, TrainingArgs(vae_tiling=True, train_data=("x",), save="y")
    with pytest.raises(KeyError), _sampling_vae(engine, args):
        assert engine.first_stage_model.tiling is not None and engine.first_stage_model.slicing
        assert vae.tiling is None and not vae.slicing
        assert engine.first_stage_model.decoder is vae.decoder
        raise KeyError
    assert engine.first_stage_model is vae


def test_samples_of_captions_are_compared_with_their_clips(tmp_path, monkeypatch):
    clip, other = torch.rand(2, 5, 3, 16, 16).unbind()
    frames = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    sample = tmp_path / "1_a" / "0" / "000000.mp4"
    sample.parent.mkdir(parents=True)
    write_video(sample, frames, 8)
    evaluation = object.__new__(Evaluation)
    evaluation.engine, evaluation.dataset = SimpleNamespace(input_key="mp4"), [{"mp4": other}, {"mp4": clip}]
    evaluation._measures = SampleMeasures(TrainingArgs(train_data=("x",), save="y"))
    evaluation._clip_of = {tmp_path / "1_a": 1}
    evaluation._asked_to_stop = lambda: False
    found = evaluation.measured([sample])
    wanted = fidelity(read_video(sample), to_uint8(clip).numpy())
    assert found["sample_psnr"] == pytest.approx(wanted["psnr"]) and 0 < found["sample_psnr"] < 20
    assert found.keys() == {"sample_psnr", "sample_ssim", "sample_smoothness", "sample_flicker"}
    for no_reference in ({"mp4": clip[:, :, :8]}, {"moments": clip}):
        evaluation.dataset[1] = no_reference
        assert evaluation.measured([sample]).keys() == {"sample_smoothness", "sample_flicker"}
    assert evaluation.measured([]) == {}
    evaluation._asked_to_stop = lambda: True
    assert evaluation.measured([sample]) == {}, "who is asked to stop measures no more"


def test_measures_without_their_files_or_videos_are_told_before_training(tmp_path):
    args = TrainingArgs(train_data=("x",), save="y", eval_measures=True, eval_clip=str(tmp_path))
    with pytest.raises(InputError, match="has no config.json"):
        check_measures(args)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"weights of LPIPS .*other.safetensors: has no features.0.weight"):
        check_measures(replace(args, eval_clip=None, eval_lpips=str(tmp_path / "other.safetensors")))
    wrong = replace(args, eval_measures=False, only_log_video_latents=True)
    assert ("eval_clip", "is given, and eval_measures is false") in [problem[:2] for problem in wrong.problems()]
    assert "eval_measures" in [problem[0] for problem in replace(args, only_log_video_latents=True).problems()]
    assert "eval_measures" in args.unused


def test_the_next_readable_clip_validates_in_the_place_of_a_bad_one(caplog):
    class Clips(list):
        def __getitem__(self, number):
            if (found := super().__getitem__(number)) is None:
                raise ClipError(f"{number}.mp4", "is empty")
            return found

    assert Evaluation._clip(Clips([{"txt": "a"}, None, None]), 1) == {"txt": "a"}
    assert caplog.text.count("validation leaves out clip") == 2
    with pytest.raises(RunError, match="validation clips cannot be read: clip 1.mp4: is empty; clip 0.mp4: is empty"):
        Evaluation._clip(Clips([None, None]), 1)
