"""Failures that end a run (losses that are not finite, unreadable clips, dead ranks, a full disk), and checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sgm.training.run
from sgm.inference.video import write_video
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.training.main import main
from sgm.training.metrics import read_metrics
from sgm.util import InputError, RunError
from sgm.weights.files import find_weights, read_tensors
from tests.marks import only, thorough
from tests.processes import ROOT, Training, only_run, run

LORA, FULL = "dit_t2v_5b_lora", "dit_t2v_1.5"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_weights(folder))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Losses that are not finite


@pytest.fixture
def breaks_at(monkeypatch):
    """Return a function that multiplies the loss of one forward pass, counted from 1, by a number."""
    original = SATVideoDiffusionEngine.training_losses

    def make(number: int, factor: float) -> None:
        calls = []

        def losses(engine, inputs):
            calls.append(1)
            return original(engine, inputs) * (factor if len(calls) == number else 1)

        monkeypatch.setattr(SATVideoDiffusionEngine, "training_losses", losses)

    return make


@pytest.mark.parametrize(
    ("stage", "value"),
    [
        (0, float("nan")),
        pytest.param(0, float("inf"), marks=pytest.mark.slow),
        thorough(2, float("inf")),
        pytest.param(2, float("nan"), marks=pytest.mark.slow),
        pytest.param(3, float("nan"), marks=pytest.mark.slow),
        pytest.param(3, float("inf"), marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run(job, breaks_at, tmp_path, clips, stage, value):
    stage = f"deepspeed.zero_optimization.stage={stage}"
    before = job(LORA, stage, "args.lr_decay_style=constant", "args.train_iters=2", save="before").folder
    breaks_at(3, value)
    with pytest.raises(RunError) as caught:
        job(LORA, stage, "args.lr_decay_style=constant", "args.train_iters=5")
    message, run = str(caught.value), only_run(tmp_path / "runs")
    assert message.startswith("iteration 3 failed: a loss is not finite")
    assert message.count(str(clips)) == 2 and "lower deepspeed.optimizer.params.lr" in message
    assert f"the newest checkpoint is {run / '2'}" in message
    assert caught.value.exit_code == 1
    assert equal(weights(run), weights(before)), "the weights before the step are there"
    resumed = job(LORA, stage, "args.lr_decay_style=constant", "args.train_iters=5", "args.resume=auto")
    assert resumed.iteration == 5 and resumed.folder == run


def test_a_full_disk_does_not_hide_a_loss_that_is_not_finite(job, breaks_at, small_disk):
    job(FULL, "args.train_iters=4", "args.exit_interval=1", "args.lr_decay_style=constant")
    breaks_at(2, float("nan"))
    with small_disk(40_000), pytest.raises(RunError, match="^iteration 3 failed: a loss is not finite") as caught:
        job(FULL, "args.train_iters=4", "args.resume=auto", "args.lr_decay_style=constant", "args.save_interval=9")
    assert "the weights before it could not be saved: could not write" in str(caught.value)


def test_a_bad_micro_batch_of_several_is_found(job, breaks_at):
    breaks_at(3, float("nan"))  # the first of the second step
    with pytest.raises(RunError, match="iteration 2 failed: a loss is not finite") as caught:
        job(LORA, "args.train_iters=3", "deepspeed.gradient_accumulation_steps=2")
    assert str(caught.value).count(".mp4") == 4


@pytest.fixture
def infinite_gradient(monkeypatch):
    """Make the third forward pass return a finite loss whose gradient is not finite."""
    original, calls = SATVideoDiffusionEngine.training_losses, []

    def losses(engine, inputs):
        calls.append(1)
        value = original(engine, inputs)
        return value if len(calls) != 3 else value + (value - value.detach()).sqrt()

    monkeypatch.setattr(SATVideoDiffusionEngine, "training_losses", losses)


def test_weights_that_are_not_finite_are_never_saved(job, infinite_gradient, tmp_path):
    with pytest.raises(RunError, match="iteration 4 failed: a loss is not finite") as caught:
        job(LORA, "args.train_iters=6", "args.save_interval=2")
    run = only_run(tmp_path / "runs")
    assert "the weights themselves are not finite any more and were not saved" in str(caught.value)
    assert f"the newest checkpoint is {run / '2'}" in str(caught.value)
    assert find_weights(run) == find_weights(run / "2")
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_a_save_refuses_weights_that_are_not_finite(job, infinite_gradient, tmp_path):
    with pytest.raises(RunError, match="after iteration 3 the weights are not finite and were not saved"):
        job(LORA, "args.train_iters=6", "args.save_interval=1")
    assert find_weights(only_run(tmp_path / "runs")).parent.name == "2"


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, thorough(3)])
def test_zero_skips_a_step_without_finite_gradients(job, infinite_gradient, stage):
    run = job(LORA, f"deepspeed.zero_optimization.stage={stage}", "args.train_iters=4").folder
    skipped = [line["skipped_steps"] for line in read_metrics(run / "metrics.jsonl")]
    assert skipped == [0, 0, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_the_command_line_ends_with_one_message(training_yaml, tmp_path, breaks_at, capsys):
    breaks_at(2, float("nan"))
    code = main(["--base", *training_yaml(LORA), f"args.save={tmp_path}", "args.train_iters=3"])
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: iteration 2 failed") for line in lines) == 1
    assert not any("Traceback" in line for line in lines)


def test_steps_skipped_in_a_row_end_the_run(job, monkeypatch, tmp_path):
    """The test increments DeepSpeed's counter, since a CPU does not train in fp16."""
    original = sgm.training.run.TrainingRun._step

    def step(run, batches, taken):
        engine = run.parts.deepspeed
        engine_step = engine.step

        def skipping():
            engine_step()
            engine.skipped_steps += run.iteration in (1, 3, 4, 5)

        engine.step = skipping
        try:
            return original(run, batches, taken)
        finally:
            del engine.step

    monkeypatch.setattr(sgm.training.run.TrainingRun, "_step", step)
    with pytest.raises(RunError, match=r"iteration 6 failed: 3 steps in a row were skipped") as caught:
        job(LORA, "args.train_iters=9", "args.max_skipped_steps=3")
    assert "args.max_skipped_steps=3" in str(caught.value) and ".mp4" in str(caught.value)
    run = only_run(tmp_path / "runs")
    assert weights(run)
    monkeypatch.setattr(sgm.training.run.TrainingRun, "_step", original)
    assert job(LORA, "args.train_iters=7", "args.resume=auto").iteration == 7


# The disk


def test_a_full_disk_leaves_the_former_checkpoint(job, small_disk, tmp_path, monkeypatch):
    first = job(FULL, "args.train_iters=4", "args.exit_interval=2", "args.lr_decay_style=constant").folder
    kept = weights(first)
    with small_disk(40_000), pytest.raises(RunError, match="could not write"):
        job(FULL, "args.train_iters=4", "args.resume=auto", "args.lr_decay_style=constant")
    assert equal(weights(first), kept) and find_weights(first) == find_weights(first / "2")
    straight = job(FULL, "args.train_iters=4", "args.lr_decay_style=constant", save="straight").folder
    resumed = job(FULL, "args.train_iters=4", "args.resume=auto", "args.lr_decay_style=constant").folder
    assert equal(weights(resumed), weights(straight))
    assert not [path for path in resumed.rglob(".*") if path.is_file() and path.name != ".lock"], "no temporary files"


@pytest.mark.parametrize("number", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 7))])
def test_a_crash_at_any_moment_of_a_save_is_survived(job, kept_run, begun, monkeypatch, number):
    """Crash after writing the n-th file of the second save, before renaming it."""
    straight = kept_run(LORA, "args.train_iters=2", "args.ema_decay=0.5")
    first = begun(LORA, "args.train_iters=2", "args.exit_interval=1", "args.ema_decay=0.5", "args.keep_last=1")
    calls, replace = [], Path.replace

    class Crash(BaseException):
        pass

    def crashing(path, target):
        relevant = "resume" in Path(target).parts or Path(target).name in ("latest", "mp_rank_00_model_states.pt")
        calls.append(relevant)
        if relevant and sum(calls) == number:
            raise Crash
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crashing)
        try:
            job(LORA, "args.train_iters=2", "args.resume=auto", "args.ema_decay=0.5", "args.keep_last=1")
        except Crash:
            pass
        else:
            assert sum(calls) < number, "the save writes fewer files"
    assert weights(first)
    resumed = job(LORA, "args.train_iters=2", "args.resume=auto", "args.ema_decay=0.5", "args.keep_last=1").folder
    assert resumed == first and equal(weights(first / "2"), weights(straight))


# Clips


def clip(path: Path, seed: int, *, fps: int = 8, frames: int = 9) -> Path:
    picture = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    picture = np.kron(picture, np.ones((16, 16, 1), np.uint8))
    write_video(path, np.stack([np.roll(picture, 4 * frame, axis=1) for frame in range(frames)]), fps)
    return path


@pytest.fixture
def twenty_clips(tmp_path) -> tuple[Path, dict[str, str]]:
    """Twenty clips, five of them broken; return the paths of broken clips by kind of damage."""
    folder = tmp_path / "data"
    (folder / "labels").mkdir(parents=True)
    for number in range(20):
        (folder / "labels" / f"{number:03d}.txt").write_text("a red circle moves left")
        clip(folder / "videos" / f"{number:03d}.mp4", number)
    broken = {name: folder / "videos" / f"{number:03d}.mp4" for name, number in BROKEN.items()}
    whole = broken["truncated"].read_bytes()
    broken["truncated"].write_bytes(whole[: len(whole) // 2])
    broken["empty"].write_bytes(b"")
    broken["text"].write_text("this is no video\n" * 100)
    header = broken["no frames"].read_bytes()
    start = header.index(b"mdat")
    broken["no frames"].write_bytes(header[:start] + b"free" + header[start + 4 :].replace(header[start + 4 :], b""))
    _set_rate(broken["odd rate"])
    return folder, {name: str(path) for name, path in broken.items()}


BROKEN = {"truncated": 2, "empty": 5, "text": 8, "no frames": 11, "odd rate": 17}


def _set_rate(path: Path) -> None:
    """Write a rate of 8,000 frames per second into the header of a clip: time units 1000 times smaller."""
    data = bytearray(path.read_bytes())
    at = data.index(b"mdhd") + 4
    scale = int.from_bytes(data[at + 12 : at + 16], "big")
    data[at + 12 : at + 16] = (scale * 1000).to_bytes(4, "big")
    path.write_bytes(data)


def test_five_broken_clips_of_twenty_are_named_and_left_out(job, twenty_clips, monkeypatch):
    folder, broken = twenty_clips
    seen = set()
    original = sgm.training.run.TrainingRun._step

    def step(run, batches, taken):
        stop = original(run, batches, taken)
        seen.update(path for batch in taken for path in batch["path"])
        return stop

    monkeypatch.setattr(sgm.training.run.TrainingRun, "_step", step)
    data = [f"args.train_data=[{folder}]", "args.max_bad_share=0.25", "args.valid_data=null"]
    summary = job(LORA, *data, "args.train_iters=8")
    assert summary.iteration == 8 and len(seen) == 15 and not seen & set(broken.values())
    report = json.loads((summary.folder / "data_check.json").read_text())
    assert report["summary"]["bad"] == 5
    assert {row["path"] for row in report["rows"] if row["problems"]} == set(broken.values())
    reasons = json.loads((summary.folder / "bad_clips.json").read_text())["at_start"]
    assert reasons.keys() == set(broken.values()) and all(reasons.values())
    assert "frames per second" in reasons[broken["odd rate"]]
    assert read_metrics(summary.folder / "metrics.jsonl")[-1]["quarantined_clips"] == 5


@pytest.mark.thorough
def test_an_epoch_has_the_clips_that_are_left(job, twenty_clips):
    data = [f"args.train_data=[{twenty_clips[0]}]", "args.max_bad_share=0.25", "args.valid_data=null"]
    batch = "deepspeed.train_micro_batch_size_per_gpu=5"
    assert job(LORA, *data, batch, "args.train_iters=null", "args.epochs=1").iteration == 3


def test_too_many_broken_clips_are_listed(job, twenty_clips):
    folder, broken = twenty_clips
    with pytest.raises(InputError, match="5 of 20 clips cannot be used") as caught:
        job(LORA, f"args.train_data=[{folder}]", "args.valid_data=null", "args.train_iters=2")
    assert all(path in str(caught.value) for path in broken.values())


def test_too_many_missing_captions_are_listed_and_leave_no_run(training_yaml, tmp_path, capsys):
    folder = tmp_path / "data"
    for number in range(4):
        clip(folder / "videos" / f"{number}.mp4", number)
    (folder / "labels").mkdir()
    (folder / "labels" / "0.txt").write_text("a red circle")
    (folder / "labels" / "1.txt").write_text("  \n")
    data = [f"args.train_data=[{folder}]", "args.valid_data=null", f"args.save={tmp_path / 'runs'}"]
    command = ["--base", *training_yaml(LORA), *data, "args.train_iters=1"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "3 of 4 clips have no usable caption" in message
    assert all(str(folder / "videos" / f"{number}.mp4") in message for number in (1, 2, 3))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert main([*command, "--check", "args.max_bad_share=0.75"]) == 0
    report = capsys.readouterr().out
    assert "left out" in report and all(f"{number}.mp4: its caption" in report for number in (1, 2, 3))
    assert "data           1 training clips" in report.replace("   ", "   ")
    assert main([*command, "data.params.allow_missing_captions=true"]) == 0


def damage(path: Path) -> None:
    """Overwrite all frames of a clip but the first, keeping container and packets."""
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in packets[3:]:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)


@pytest.fixture
def breaks_when_decoded(tmp_path) -> tuple[Path, str]:
    """Ten clips; one passes the check but cannot be decoded."""
    folder = tmp_path / "data"
    (folder / "labels").mkdir(parents=True)
    for number in range(10):
        clip(folder / "videos" / f"{number}.mp4", number)
        (folder / "labels" / f"{number}.txt").write_text("a red circle moves left")
    bad = folder / "videos" / "4.mp4"
    damage(bad)
    return folder, str(bad)


@pytest.mark.parametrize("num_workers", only([0], [0, 2]))
def test_a_clip_that_breaks_when_it_is_decoded_is_replaced_and_named(job, breaks_when_decoded, num_workers):
    folder, bad = breaks_when_decoded
    data = [f"args.train_data=[{folder}]", "args.valid_data=null", f"args.num_workers={num_workers}"]
    summary = job(LORA, *data, "args.train_iters=6", "args.log_interval=4")
    assert summary.iteration == 6
    bad_clips = json.loads((summary.folder / "bad_clips.json").read_text())
    assert bad_clips["at_start"] == {}, "it looks well"
    reasons = bad_clips["in_training"]
    assert list(reasons) == [bad] and "cannot be decoded" in reasons[bad]
    assert read_metrics(summary.folder / "metrics.jsonl")[-1]["quarantined_clips"] == 1


def test_clips_that_cannot_be_decoded_count_against_the_allowed_share(job, breaks_when_decoded):
    folder, bad = breaks_when_decoded
    for number in (2, 7):
        damage(folder / "videos" / f"{number}.mp4")
    with pytest.raises(RunError, match="3 of 10 training clips cannot be read") as caught:
        job(
            LORA, f"args.train_data=[{folder}]", "args.valid_data=null", "args.train_iters=12", "args.max_bad_share=0.2"
        )
    assert bad in str(caught.value) and "args.max_bad_share=0.2" in str(caught.value)


@pytest.mark.thorough
def test_a_resumed_run_remembers_its_bad_clips(job, breaks_when_decoded):
    folder, bad = breaks_when_decoded
    data = [f"args.train_data=[{folder}]", "args.valid_data=null", "args.train_iters=6"]
    first = job(LORA, *data, "args.exit_interval=5").folder
    assert list(json.loads((first / "bad_clips.json").read_text())["in_training"]) == [bad]
    job(LORA, *data, "args.resume=auto")
    assert list(json.loads((first / "bad_clips.json").read_text())["in_training"]) == [bad]
    assert read_metrics(first / "metrics.jsonl")[-1]["quarantined_clips"] == 1


# Ranks


DYING = '''
"""Imported by every Python process of the test: let one rank die in its third step, once."""
import os

if os.environ.get("RANK") == "1":
    import sgm.training.run as run

    step = run.TrainingRun._step

    def dying(self, batches, taken):
        marker = os.environ["H_MARKER"]
        if self.iteration == 2 and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(17)
        return step(self, batches, taken)

    run.TrainingRun._step = dying
'''


@pytest.mark.thorough
def test_a_rank_that_dies_ends_the_others_with_a_message(training_yaml, job, tmp_path):
    overrides = ["args.train_iters=4", "args.save_interval=1", "deepspeed.zero_optimization.stage=2"]
    (tmp_path / "dying").mkdir()
    (tmp_path / "dying" / "sitecustomize.py").write_text(DYING)
    env = {"PYTHONPATH": f"{tmp_path / 'dying'}:{ROOT}", "H_MARKER": str(tmp_path / "marker")}
    command = [*overrides, "deepspeed.train_micro_batch_size_per_gpu=1", f"args.save={tmp_path / 'runs'}"]
    bases = training_yaml(LORA)
    messages = Training(bases, command, 2, forked=True, **env).finish(code=1)
    assert (tmp_path / "marker").exists()
    assert "iteration 3 failed" in messages, messages[-3000:]
    assert "start again with args.resume=auto" in messages and ".mp4" in messages
    folder = only_run(tmp_path / "runs")
    assert find_weights(folder) == find_weights(folder / "2") and weights(folder)
    again = run("train_video.py", ["--base", *bases, *command, "args.resume=auto"], world=2)
    assert again.returncode == 0, again.stderr[-3000:]
    one = job(LORA, *overrides, save="one").folder  # the same samples on one rank
    losses = [[line["loss"] for line in read_metrics(each / "metrics.jsonl")] for each in (folder, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
