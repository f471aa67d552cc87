"""Training on buckets: clips of several shapes, one and two ranks, resume in the middle of an epoch."""

import json
import re
import shutil

import imageio.v3 as iio
import numpy as np
import pytest

from sgm.checks.sampling_plan import scaling_warnings
from sgm.config.args import LoraArgs, SamplingArgs
from sgm.config.load import ConfigError, load_config
from sgm.conversion.lora import export_lora
from sgm.inference.video import write_video
from sgm.training.main import parse, run
from sgm.training.metrics import read_metrics
from sgm.training.run import train
from sgm.util import InputError
from sgm.weights.files import find_weights, read_metadata, read_tensors
from tests.geometries import ROTARY
from tests.marks import thorough
from tests.processes import asked, only_run, selected, train_all

LORA = "dit_t2v_5b_lora"
# frames, height, width → clips: with 4 at a time, each bucket has whole and partial micro-batches.
CLIPS = {(9, 16, 32): 6, (9, 32, 16): 5, (5, 16, 32): 3}
BUCKETS = "data.params.buckets=[9x16x32,9x32x16,5x16x16]"
ITERS = 7  # an epoch has 5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Clips of several sizes and lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "labels").mkdir()
    for (frames, height, width), num in CLIPS.items():
        for index in range(num):
            name = f"{frames}_{height}_{index}"
            noise = np.random.default_rng(index).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
            picture = np.kron(noise, np.ones((16, 16, 1), np.uint8))
            pictures = np.stack([np.roll(picture, 2 * frame, axis=1) for frame in range(frames)])
            write_video(folder / "videos" / f"{name}.mp4", pictures, 8)
            (folder / "labels" / f"{name}.txt").write_text(f"clip {index}")
    return folder


@pytest.fixture(scope="module")
def settings(mixed):
    return [f"args.train_data=[{mixed}]", "args.valid_data=null", BUCKETS, f"args.train_iters={ITERS}"]


def losses(folder):
    return {line["iteration"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")}


def weights(folder):
    return read_tensors(find_weights(folder))


def difference(one, other):
    assert one.keys() == other.keys() and one
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def runs(request, training_yaml, settings, tmp_path_factory):
    """Return a function: (ranks, part) → run folder; global batch 4, uninterrupted or resumed."""
    top = tmp_path_factory.mktemp("buckets")
    on_two = (2,) in asked(request, "world") or selected(request, test_two_ranks_train_as_one_does)
    for world in (1, 2) if on_two else (1,):
        jobs = []
        shared = [*settings, f"deepspeed.train_micro_batch_size_per_gpu={4 // world}"]
        for part, more in (("straight", []), ("resumed", ["args.exit_interval=2"]), ("resumed", ["args.resume=auto"])):
            save = f"args.save={top / f'{world}-{part}'}"
            jobs.append({"bases": training_yaml(LORA), "overrides": [*shared, save, *more]})
        if world == 1:
            for job in jobs:
                train(load_config(job["bases"], job["overrides"], mode="train"))
        else:
            train_all(jobs, top, world)
    return lambda world, part: only_run(top / f"{world}-{part}")


@pytest.mark.thorough
def test_two_ranks_train_as_one_does(runs):
    one, two = runs(1, "straight"), runs(2, "straight")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert difference(weights(two), weights(one)) < 1e-5
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    assert [line["samples"] for line in first] == [line["samples"] for line in second]
    assert first[-1]["samples"] < 4 * ITERS, "some micro-batches are partial"
    per_epoch = [line["samples"] for line in first if line["iteration"] == 5]
    assert per_epoch == [sum(CLIPS.values())], "5 micro-batches are an epoch, each clip in it counted once"


@pytest.mark.slow  # starts two processes again
def test_ranks_that_share_samples_share_buckets(runs, training_yaml, settings, tmp_path):
    more = [
        "deepspeed.train_micro_batch_size_per_gpu=4",
        "args.sequence_parallel_size=2",
        f"args.save={tmp_path / 'runs'}",
    ]
    train_all([{"bases": training_yaml(LORA), "overrides": [*settings, *more]}], tmp_path, 2)
    one, two = runs(1, "straight"), only_run(tmp_path / "runs")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert difference(weights(two), weights(one)) < 1e-5


def test_an_epoch_is_whole_with_other_accumulation_and_its_weights_are_required(training_yaml, settings, tmp_path):
    overrides = [*settings, "args.train_iters=null", "args.epochs=1", f"args.save={tmp_path}"]
    overrides.append("deepspeed.train_micro_batch_size_per_gpu=4")
    for more in (["args.exit_interval=2"], (again := ["deepspeed.gradient_accumulation_steps=3", "args.resume=auto"])):
        found = train(load_config(training_yaml(LORA), [*overrides, *more], mode="train"))
    assert (found.iteration, found.total) == (3, 3), "two of five micro-batches were done, three are left"
    assert read_metrics(found.folder / "metrics.jsonl")[-1]["samples"] == sum(CLIPS.values())
    shutil.rmtree(found.folder / "3")
    with pytest.raises(InputError, match="its weights were removed"):
        train(load_config(training_yaml(LORA), [*overrides, *again], mode="train"))


@pytest.mark.parametrize("world", [1, thorough(2)])
def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(runs, world):
    straight, resumed = runs(world, "straight"), runs(world, "resumed")
    assert losses(resumed) == losses(straight) and len(losses(straight)) == ITERS
    assert difference(weights(resumed), weights(straight)) == 0
    state = json.loads((resumed / "resume" / str(ITERS) / "resume.json").read_text())
    assert state["micro_batches"] == ITERS and len(state["buckets"]) == len(state["plan"]) == 64


def test_a_resume_with_other_buckets_or_ranks_is_refused(runs, training_yaml, settings):
    save = f"args.save={runs(1, 'straight').parent}"
    more = [save, f"args.resume={runs(1, 'straight')}", "args.train_iters=20"]
    for changed in ("deepspeed.train_micro_batch_size_per_gpu=3", "data.params.buckets=null"):
        config = load_config(training_yaml(LORA), [*settings, *more, changed], mode="train")
        with pytest.raises(InputError, match="written with other buckets, batch sizes or data-parallel ranks"):
            train(config)
    lengths = ["deepspeed.train_micro_batch_size_per_gpu=4", "data.params.fps=4"]
    config = load_config(training_yaml(LORA), [*settings, *more, *lengths], mode="train")
    with pytest.raises(InputError, match="counts micro-batches, and now they have other samples"):
        train(config)


def test_epochs_are_counted_in_batches_of_the_buckets(job, settings):
    more = ["args.train_iters=null", "args.epochs=1", "data.params.drop_partial=true"]
    pairs = ["deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.gradient_accumulation_steps=2"]
    summary = job(LORA, *settings, *more, *pairs)
    # 3 + 2 + 1 complete micro-batches, two per step.
    assert summary.total == summary.iteration == 3
    assert read_metrics(summary.folder / "metrics.jsonl")[-1]["samples"] == 12


def test_an_unreadable_clip_is_left_out_and_told(job, settings, mixed, tmp_path):
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    for path in mixed.glob("videos/*.mp4"):
        (data / "videos" / path.name).symlink_to(path)
    (data / "labels").symlink_to(mixed / "labels")
    broken = data / "videos" / "9_32_0.mp4"
    broken.unlink()
    broken.write_text("no video")
    more = [f"args.train_data=[{data}]", "args.check_clips=none", "args.train_iters=2", "args.max_bad_share=0.5"]
    folder = job(LORA, *settings, *more).folder
    assert read_metrics(folder / "metrics.jsonl")[-1]["quarantined_clips"] == 1


def test_the_check_prints_the_table(training_yaml, settings, capsys):
    arguments = ["--base", *training_yaml(LORA), *settings, "deepspeed.train_micro_batch_size_per_gpu=4", "--check"]
    run(parse(arguments))
    text = capsys.readouterr().out
    assert re.search(r"^9x16x32 +6 +4 +2$", text, re.MULTILINE)
    assert re.search(r"^5x16x16 +3 +4 +1$", text, re.MULTILINE)
    assert "5 iterations an epoch; 7 in all, on " in text


@pytest.mark.parametrize(
    ("name", "buckets", "text"),
    [
        ("dit_t2v_2b", "[5x64x96,5x32x48]", "32x48 is no size"),
        ("dit_t2v_1.5", "[9x32x48,6x32x48]", "6 frames cannot be encoded"),
        (LORA, "[{shape: 5x32x48, batchsize: 2}]", "did you mean 'batch_size'"),
    ],
)
def test_impossible_buckets_are_refused_before_clips_are_read(training_yaml, name, buckets, text):
    config = load_config(training_yaml(name), [f"data.params.buckets={buckets}"], mode="train")
    with pytest.raises(ConfigError, match=text) as error:
        train(config)
    assert str(error.value).startswith("1 problem in"), "told once"


def test_longer_buckets_are_trained_with_scaled_positions_and_the_weights_say_so(job, settings, log, tmp_path):
    """The network knows 5 frames. Losses of the bucket of 9 depend on the scaling, those of the bucket of 5 do not."""
    more = ["model.network_config.params.num_frames=5", "data.params.buckets=[9x16x32,5x16x16]", "args.train_iters=4"]
    more += ["deepspeed.train_micro_batch_size_per_gpu=4", "deepspeed.optimizer.params.lr=1e-12"]
    names = ("interpolate", "extrapolate")
    folders = {name: job(LORA, *settings, *more, f"args.time_scaling={name}", save=name).folder for name in names}
    scaled, plain = (losses(folders[name]) for name in names)
    apart = [abs(scaled[iteration] - plain[iteration]) > 1e-6 for iteration in plain]
    assert any(apart) and not all(apart), (scaled, plain)
    run_folder = folders["interpolate"]
    given = ({"load": str(run_folder)}, True), ({"loras": (LoraArgs(path=str(run_folder)),)}, True), ({}, False)
    for own, said in given:
        found = "".join(scaling_warnings(SamplingArgs(time_scaling="ntk", **own), ROTARY, 25))
        assert ("was trained with args.time_scaling=interpolate, and it is ntk" in found) == said
    header = read_metadata(export_lora(run_folder, tmp_path / "lora"))
    assert header["training_time_scaling"] == "interpolate" and "which other tools do not compute" in log.text


def test_a_mask_changes_the_loss_of_every_bucket(job, settings, mixed, tmp_path):
    """Masks that are white, and black in the left half, change the losses of training and validation alike."""
    data, found = tmp_path / "data", []
    for name in ("videos", "labels"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).symlink_to(mixed / name)
    more = ["args.train_iters=2", "data.params.random_flip=0.5", "deepspeed.train_micro_batch_size_per_gpu=4"]
    more += [f"args.{kind}_data=[{data}]" for kind in ("train", "valid")]
    more += [
        "args.eval_interval=2",
        "args.eval_iters=1",
        "args.valid_prompts=[a clip]",
        "data.params.video_size=[16,32]",
    ]
    more += ["args.only_log_video_latents=true", "data.params.max_num_frames=5"]
    for left in (255, 0):
        masks = data / "mask"
        masks.mkdir(exist_ok=True)
        for frames, height, width in CLIPS:
            picture = np.full((height, width), 255, np.uint8)
            picture[:, : width // 2] = left
            for index in range(CLIPS[frames, height, width]):
                iio.imwrite(masks / f"{frames}_{height}_{index}.png", picture)
        folder = job(LORA, *settings, *more, "data.params.mask=true", save=str(left)).folder
        rows = read_metrics(folder / "metrics.jsonl")
        found.append([row[key] for row in rows for key in ("loss", "validation_loss") if key in row])
    white, half = found
    assert len(white) == 3 and all(abs(own - other) > 1e-3 for own, other in zip(white, half, strict=True))
