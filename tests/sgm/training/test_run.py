"""Train tiny networks in this process: files, length, precision, accumulation, resume."""

import contextlib
import functools
import itertools
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from scene import BACKGROUND, Clip, render
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sgm.training.save
from sgm.config.args import TrainingArgs
from sgm.config.load import ConfigError, load_config
from sgm.inference.run import sample
from sgm.inference.video import write_video
from sgm.modules import host_activations
from sgm.training.build import Parts, _publish
from sgm.training.metrics import read_metrics
from sgm.training.run import TrainingRun, _hint, train
from sgm.training.state import checkpoint_engine
from sgm.training.timing import PHASES
from sgm.util import InputError
from sgm.weights.checkpoint import save_network
from sgm.weights.files import find_weights, read_entry, read_tensors

ROOT = Path(__file__).parents[3]
LORA, FULL = "dit_t2v_5b_lora", "dit_t2v_1.5"
SLOW = pytest.mark.slow
DROPOUT = "model.network_config.params.modules.lora_config.params.lora_dropout"


def losses(folder: Path) -> dict[int, float]:
    return {line["iteration"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_weights(folder))


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# Files


def test_a_run_folder_holds_everything(job, plots, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", map(float, itertools.count()).__next__)  # each look takes a second
    own = ["args.train_iters=3", "args.log_interval=2", "args.experiment_name=mine", "args.peak_tflops=1"]
    folder = job(LORA, *own).folder
    assert folder.name.startswith("mine-")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [2, 3]
    expected = {
        "loss",
        "lr",
        "grad_norm",
        "step_seconds",
        "samples_per_second",
        "memory_gib",
        "quarantined_clips",
        "skipped_steps",
        "samples",
        "tokens_per_second",
        "mfu",
    }
    for line in lines:
        seconds = {phase: line[f"{phase}_seconds"] for phase in PHASES}
        assert all(value > 0 for phase, value in seconds.items() if phase != "save")
        assert line["step_seconds"] / 2 < sum(seconds.values()) <= line["step_seconds"], "no time counts twice"
    assert all(0 < line["mfu"] < 1 for line in lines)
    tokens = [line["tokens_per_second"] / line["samples_per_second"] for line in lines]
    assert tokens == pytest.approx([10, 10]), "6 of text, and 2 x 1 x 2 patches"
    assert all(expected <= line.keys() and None not in line.values() for line in lines)
    assert [line["samples"] for line in lines] == [4, 6]
    assert any(name.startswith("loss_") for name in lines[0])
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [event.step for event in events.Scalars("mfu")] == [2, 3]
    report = json.loads((folder / "data_check.json").read_text())
    assert report["summary"]["clips"] == len(report["rows"]) == 8 and report["summary"]["bad"] == 0
    assert (folder / "latest").read_text().strip() == "3"


@pytest.mark.thorough
def test_the_written_configuration_trains_the_same(kept_run, tmp_path):
    first = kept_run(LORA, "args.train_iters=2")
    config = load_config([first / "config.yaml"], [f"args.save={tmp_path / 'again'}"], mode="train")
    again = train(config)
    assert losses(again.folder) == losses(first)
    assert largest_difference(weights(again.folder), weights(first)) == 0


@pytest.mark.thorough
def test_a_logged_loss_is_the_mean_since_the_last_line(job):
    single = losses(job(LORA, "args.train_iters=4").folder)
    pairs = losses(job(LORA, "args.train_iters=4", "args.log_interval=2").folder)
    assert pairs == pytest.approx({2: (single[1] + single[2]) / 2, 4: (single[3] + single[4]) / 2})


def test_keep_last_leaves_the_newest(job):
    overrides = ["args.train_iters=5", "args.save_interval=1", "args.keep_last=2", "args.ema_decay=0.5"]
    folder = job(LORA, *overrides).folder
    assert sorted(path.name for path in folder.iterdir() if path.name[0].isdigit()) == ["4", "4-ema", "5", "5-ema"]
    assert [path.name for path in (folder / "resume").iterdir() if path.is_dir()] == ["5"]


def test_the_average_is_saved_beside_the_weights(job):
    folder = job(FULL, "args.train_iters=2", "args.ema_decay=0.5").folder
    average, last = read_tensors(find_weights(folder / "2-ema")), weights(folder)
    assert 0 < largest_difference(average, last)
    assert find_weights(folder) == find_weights(folder / "2"), "latest names the weights, not the average"


def test_a_lora_run_saves_adapters_alone_or_with_their_base(job, kept_run, golden, tiny_weights):
    alone = kept_run(LORA, "args.train_iters=1")
    whole = job(LORA, "args.train_iters=1", "args.save_full=true").folder
    base = read_tensors(find_weights(golden / LORA / "transformer"))
    adapters = weights(alone)
    assert adapters and all(".matrix_" in name for name in adapters)
    entry = read_entry(find_weights(alone), "lora")
    assert entry["base"] == str(tiny_weights(LORA)) and entry["rank"] == 4
    saved = weights(whole)
    tables = {name for name in base if ".pos_embed.freqs_" in name}  # constants computed by the network
    assert saved.keys() == base.keys() - tables
    assert all(torch.equal(saved[name], adapters[name]) for name in adapters)
    assert all(torch.equal(saved[name], base[name]) for name in saved.keys() - adapters.keys())


@pytest.mark.parametrize("name", [LORA, FULL])
def test_only_the_network_is_saved_and_optimized(job, name, monkeypatch):
    modules = []
    close = TrainingRun.close

    def keep(run):
        modules.append(run.parts.deepspeed.module)
        close(run)

    monkeypatch.setattr(TrainingRun, "close", keep)
    folder = job(name, "args.train_iters=1", "args.save_full=true").folder
    for path in folder.rglob("*.pt"):
        content = checkpoint_engine().load(str(path))
        names = list(content.get("module", ()) or ())
        assert all(each.startswith("model.diffusion_model.") for each in names), path
        assert not path.match("mp_rank*") or names
    assert all(each.startswith("model.diffusion_model.") for each, _ in modules[0].named_parameters())


# Length


def test_epochs_count_passes_over_the_clips(job):
    summary = job(LORA, "args.train_iters=null", "args.epochs=2")
    assert summary.total == summary.iteration == 8  # 8 clips, 2 a step


def test_exit_interval_stops_with_a_checkpoint_that_goes_on(job, log):
    straight = job(LORA, "args.train_iters=5", save="straight")
    first = job(LORA, "args.train_iters=5", "args.exit_interval=2")
    assert (first.iteration, first.stopped) == (2, "args.exit_interval=2")
    second = job(LORA, "args.train_iters=5", "args.exit_interval=2", f"args.resume={first.folder}")
    assert (second.folder, second.iteration) == (first.folder, 4)
    last = job(LORA, "args.train_iters=5", "args.exit_interval=2", "args.resume=auto")
    assert (last.folder, last.iteration, last.stopped) == (first.folder, 5, "")
    assert losses(last.folder) == losses(straight.folder)
    assert largest_difference(weights(last.folder), weights(straight.folder)) == 0
    job(LORA, "args.train_iters=5", "args.exit_interval=2", "args.resume=auto")
    assert "has all 5 iterations; args.resume=none starts a new run" in messages(log)


# Data


def test_weights_of_folders_are_how_often_they_are_drawn(job, clips, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.symlink_to(clips)
    seen = []
    step = TrainingRun._step

    def record(run, batches, taken):
        stop = step(run, batches, taken)
        seen.extend(path for batch in taken for path in batch["path"])
        return stop

    monkeypatch.setattr(TrainingRun, "_step", record)
    folders = f"args.train_data=[{clips},{other}]"
    job(LORA, folders, "args.train_data_weights=[3,1]", "args.train_iters=8")
    assert sum(path.startswith(str(other)) for path in seen) == 4 and len(seen) == 16


def test_a_split_sets_validation_clips_aside(job, monkeypatch):
    seen = {"train": set(), "valid": set()}
    step = TrainingRun._step

    def record(run, batches, taken):
        stop = step(run, batches, taken)
        seen["train"] |= {path for batch in taken for path in batch["path"]}
        seen["valid"] = set(run.parts.valid_data.paths)
        return stop

    monkeypatch.setattr(TrainingRun, "_step", record)
    job(LORA, "args.valid_data=null", "args.split='6,2,0'", "args.train_iters=3")
    assert (len(seen["train"]), len(seen["valid"])) == (6, 2) and not seen["train"] & seen["valid"]


# How it is computed


@pytest.mark.parametrize(("name", "more"), [pytest.param(FULL, [], marks=SLOW), (LORA, [f"{DROPOUT}=0.5"])])
def test_accumulation_equals_a_larger_batch(job, name, more):
    three = ["args.train_iters=3", *more]
    one = job(name, *three, "deepspeed.train_micro_batch_size_per_gpu=4", save="one").folder
    two = job(name, *three, "deepspeed.gradient_accumulation_steps=2", save="two").folder
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert largest_difference(weights(two), weights(one)) <= 1e-5
    norms = [[line["grad_norm"] for line in read_metrics(run / "metrics.jsonl")] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("name", [LORA, pytest.param(FULL, marks=SLOW)])
def test_where_activations_are_changes_nothing(job, name, monkeypatch):
    monkeypatch.setattr(host_activations, "SMALLEST", 1024)
    settings = [
        ["args.checkpoint_activations=true"],
        ["args.checkpoint_activations=1", "args.offload_activations=true"],
    ]
    plain, *runs = [job(name, "args.train_iters=3", *given).folder for given in ([], *settings)]
    for run in runs:
        assert losses(run) == losses(plain)
        assert largest_difference(weights(run), weights(plain)) == 0


@pytest.mark.parametrize(
    ("name", "stage"), [(LORA, 2), *(pytest.param(*key, marks=SLOW) for key in ((LORA, 0), (FULL, 0), (FULL, 2)))]
)
def test_bf16_trains_and_resumes_bit_for_bit(job, name, stage):
    overrides = [
        "args.train_iters=4",
        "model.precision=null",
        "deepspeed.bf16.enabled=true",
        "args.ema_decay=0.9",
        f"deepspeed.zero_optimization.stage={stage}",
    ]
    straight = job(name, *overrides, save="straight").folder
    job(name, *overrides, "args.exit_interval=2")
    resumed = job(name, *overrides, "args.resume=auto").folder
    assert losses(resumed) == losses(straight) and len(losses(straight)) == 4
    assert largest_difference(weights(resumed), weights(straight)) == 0
    averages = [read_tensors(find_weights(run / "4-ema")) for run in (resumed, straight)]
    assert largest_difference(*averages) == 0
    assert {tensor.dtype for tensor in weights(straight).values()} == {torch.bfloat16}


@pytest.mark.slow  # about a minute of compilation
def test_a_compiled_network_trains(job):
    plain = job(LORA, "args.train_iters=2", save="plain").folder
    compiled = job(LORA, "args.train_iters=2", "args.compile=true", save="compiled").folder
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.thorough
def test_dropout_of_adapters_has_an_effect(job):
    without, with_ = (job(LORA, "args.train_iters=3", f"{DROPOUT}={p}").folder for p in (0.0, 0.5))
    assert losses(without) != losses(with_)


@pytest.mark.thorough
@pytest.mark.parametrize("evaluates", [pytest.param(False, marks=SLOW), True])
def test_dropout_of_adapters_resumes_exactly(job, evaluates):
    overrides = ["args.train_iters=4", f"{DROPOUT}=0.5", "args.save_interval=2"]
    if evaluates:
        overrides += ["args.eval_interval=1", "args.valid_prompts=[a red circle]", "args.only_log_video_latents=true"]
    straight = job(LORA, *overrides, save="straight").folder
    job(LORA, *overrides, "args.exit_interval=2")
    resumed = job(LORA, *overrides, "args.resume=auto").folder
    assert largest_difference(weights(resumed), weights(straight)) == 0


@pytest.mark.thorough
def test_random_states_may_be_left_out(job):
    job(LORA, "args.train_iters=3", "args.exit_interval=2", "args.no_save_rng=true")
    summary = job(LORA, "args.train_iters=3", "args.resume=auto")  # which finds none
    assert summary.iteration == 3


def test_a_tensor_that_the_checkpoint_lacks_keeps_its_value_when_forced(job, golden, tmp_path, training_yaml, log):
    tensors = read_tensors(find_weights(golden / FULL / "transformer"))
    prefix = "model.diffusion_model."
    missing = "mixins.final_layer.linear.bias"
    kept = {name.removeprefix(prefix): t for name, t in tensors.items() if name != prefix + missing}
    save_network(tmp_path / "lacking", 1, kept, patch_size=[2, 2, 2])
    load = f"args.load={tmp_path / 'lacking'}"
    with pytest.raises(ConfigError, match=missing):
        job(FULL, load, "args.train_iters=1")
    folder = job(FULL, load, "args.train_iters=1", "args.force_train=true").folder
    assert prefix + missing in weights(folder)
    assert missing in messages(log)


# Zero learning rate


def sampled(training_yaml, load: Path, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Sample one prompt from a checkpoint with the base model's file; return the latents."""
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle moves left\n")
    overrides = [
        f"args.load={load}",
        f"args.input_file={prompts}",
        f"args.output_dir={folder}",
        "args.only_save_latents=true",
        "model.precision=fp32",
    ]
    summary = sample(load_config(training_yaml(name)[:1], overrides, mode="inference"))
    return load_file(summary.written[0])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (LORA, 0),
        *(pytest.param(name, stage, marks=SLOW) for name in (LORA, FULL, "dit_t2v_2b") for stage in (0, 2)),
    ],
)
def test_a_zero_learning_rate_leaves_the_samples_as_they_are(job, base, golden, training_yaml, tmp_path, name, stage):
    """With LoRA: adapters with B = 0 give the samples of the base."""
    base = base if name == LORA else golden / name / "transformer"
    overrides = ["args.train_iters=5", "deepspeed.optimizer.params.lr=0.0", f"args.load={base}"]
    folder = job(name, *overrides, f"deepspeed.zero_optimization.stage={stage}", "args.ema_decay=0.9").folder
    before = sampled(training_yaml, base, tmp_path / "before", name) if name != LORA else None
    if before is None:
        before = sampled_without_adapters(training_yaml, base, tmp_path)
    for load in (folder, folder / "5-ema"):
        after = sampled(training_yaml, load, tmp_path / f"after-{load.name}", name)
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory) -> Path:
    """The golden LoRA network without its adapters."""
    folder = tmp_path_factory.mktemp("base")
    tensors = read_tensors(find_weights(golden / LORA / "transformer"))
    plain = {
        name.removeprefix("model.diffusion_model.").replace(".original.", "."): tensor
        for name, tensor in tensors.items()
        if ".matrix_" not in name
    }
    save_network(folder, 1, plain, patch_size=2)
    return folder


def sampled_without_adapters(training_yaml, base: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    model = yaml.safe_load(Path(training_yaml(LORA)[0]).read_text())
    del model["model"]["network_config"]["params"]["modules"]["lora_config"]
    model["model"].pop("not_trainable_prefixes", None)
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(model))
    return sampled(lambda _: [str(plain)], base, tmp_path / "before", LORA)


def test_a_trained_adapter_changes_the_samples(job, base, training_yaml, tmp_path, log):
    folder = job(LORA, "args.train_iters=2", f"args.load={base}", "deepspeed.optimizer.params.lr=0.01").folder
    assert "without effect" not in messages(log)
    before = sampled_without_adapters(training_yaml, base, tmp_path)
    after = sampled(training_yaml, folder, tmp_path / "after", LORA)
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_adapters_without_effect_are_reported(job, base, log):
    job(LORA, "args.train_iters=1", "deepspeed.optimizer.params.lr=0.0", f"args.load={base}")
    assert "every B matrix is zero" in messages(log)


def test_adapters_are_trained_further_in_a_new_run(job, kept_run, base):
    first = kept_run(LORA, "args.train_iters=2", f"args.load={base}")
    second = job(LORA, "args.train_iters=1", f"args.load={first}", "deepspeed.optimizer.params.lr=0.0", save="2").folder
    assert largest_difference(weights(second), weights(first)) == 0
    assert read_entry(find_weights(second), "lora")["base"] == str(base)


# Resuming


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.stage"),
        ("deepspeed.optimizer.type=torch.optim.SGD", "deepspeed.optimizer.type"),
        ("args.ema_decay=0.9", "args.ema_decay"),
        ("args.load=2b", "args.load"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(job, begun, base, tmp_path, change, key):
    load = f"args.load={base}"
    begun(LORA, "args.train_iters=3", "args.exit_interval=1", load)
    if change == "args.load=2b":
        changed = {n.removeprefix("model.diffusion_model."): t + 1 for n, t in weights(base).items()}
        save_network(tmp_path / "changed", 1, changed, patch_size=2)
        load = change = f"args.load={tmp_path / 'changed'}"
    optimizer = ["deepspeed.optimizer.params={lr: 0.001}"] if "SGD" in change else []
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        job(LORA, "args.train_iters=3", "args.resume=auto", load, change, *optimizer)


def test_going_on_warns_of_what_differs_only(job, begun, log):
    begun(LORA, "args.train_iters=3", "args.exit_interval=1")
    log.clear()
    job(LORA, "args.train_iters=3", "args.exit_interval=1", "args.resume=auto")
    assert "the configuration differs" not in messages(log)
    job(LORA, "args.train_iters=3", "args.warmup=0.5", "args.resume=auto")
    assert "the configuration differs" in messages(log)


def test_latest_names_the_newest_weights_after_a_crash_in_the_last_save(job, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sgm.training.save, "write_latest", crash)
        with pytest.raises(KeyboardInterrupt):
            job(LORA, "args.train_iters=1")
    folder = job(LORA, "args.train_iters=1", "args.resume=auto").folder
    assert find_weights(folder) == find_weights(folder / "1")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("mp_rank_00_model_states.pt", "cut"),
        ("mp_rank_00_model_states.pt", "missing"),
        ("rng_00.pt", "text"),
        ("rng_00.pt", "empty"),
        ("resume.json", "cut"),
        ("resume.json", "missing"),
    ],
)
def test_a_damaged_state_is_told(job, begun, file, damage):
    path = begun(LORA, "args.train_iters=2", "args.exit_interval=1") / "resume" / "1" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-100], "text": b"no state", "empty": b""}[damage])
    with pytest.raises(InputError, match=file):
        job(LORA, "args.train_iters=2", "args.resume=auto")


def test_a_folder_without_a_state_is_refused(job, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no resume/latest"):
        job(LORA, "args.train_iters=1", f"args.resume={tmp_path / 'none'}")


# Synchronization with the device


def test_a_step_reads_no_more_than_its_flags_from_the_device(job, monkeypatch):
    """Count calls that synchronize an accelerator."""
    counts: dict[int, int] = {}
    running = []
    step = TrainingRun._step

    def numbered(run, batches, taken):
        running.append(run.iteration + 1)
        try:
            return step(run, batches, taken)
        finally:
            running.clear()

    def counted(function):
        def call(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            caller = frame.f_globals.get("__name__", "")
            inside = caller.startswith(("sgm.training.", "sgm.models."))
            # `StepFlags.read` reads its copy on the host.
            if running and inside and (caller, frame.f_code.co_name) != ("sgm.training.step", "read"):
                counts[running[0]] = counts.get(running[0], 0) + 1
            return function(tensor, *args, **kwargs)

        return call

    monkeypatch.setattr(TrainingRun, "_step", numbered)
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    job(LORA, "args.train_iters=6", "args.log_interval=3")
    assert counts == {}


# Overfitting one clip


@pytest.fixture(scope="module")
def overfit(tmp_path_factory):
    """Return a function that trains a toy model on one clip of unseen appearance and returns the last validation loss.

    The clip is encoded once, into a cache.
    """
    folder = tmp_path_factory.mktemp("one_clip")
    shape = render(Clip("blue", "square", "down", 10.0, (20.0, 20.0), 25.0))
    grey = np.where(np.abs(shape - BACKGROUND).max(-1, keepdims=True) > 0.05, shape, 0.5)
    write_video(folder / "data" / "videos" / "0.mp4", (grey * 255).astype(np.uint8), 8)
    (folder / "data" / "labels").mkdir()
    (folder / "data" / "labels" / "0.txt").write_text("a blue square moves down")

    def run(name: str, iterations: int, lr: float) -> float:
        overrides = [
            f"args.train_data=[{folder / 'data'}]",
            f"args.valid_data=[{folder / 'data'}]",
            f"args.train_iters={iterations}",
            f"args.eval_interval={iterations}",
            "args.eval_iters=2",
            "args.eval_batch_size=4",
            "args.only_log_video_latents=true",
            "args.valid_prompts=[a blue square moves down]",
            "args.num_steps=1",
            "args.num_workers=0",
            "args.resume=none",
            f"args.save={folder / 'runs'}",
            "data.params.max_num_frames=5",
            "deepspeed.train_micro_batch_size_per_gpu=2",
            f"deepspeed.optimizer.params.lr={lr}",
        ]
        bases = [ROOT / "configs" / f"{stem}.yaml" for stem in (name, "toy_sft")]
        cache = folder / "cache"
        overrides += [f"args.latent_cache={cache}", f"args.precompute={str(not cache.exists()).lower()}"]
        summary = train(load_config(bases, overrides, mode="train"))
        assert (cache / "latents.json").is_file() and not (cache / "text.json").exists(), "only what was named"
        return read_metrics(summary.folder / "metrics.jsonl")[-1]["validation_loss"]

    return run


@pytest.mark.parametrize(
    ("name", "iterations", "lr"), [("toy_lora", 32, 4e-3), pytest.param("toy", 15, 3e-3, marks=SLOW)]
)
def test_one_clip_is_learned(overfit, monkeypatch, name, iterations, lr):
    monkeypatch.chdir(ROOT)  # the toy files have relative paths
    assert overfit(name, iterations, lr) < overfit(name, 1, 0.0) / 2


def test_steps_are_timed_without_evaluations_between_two_lines(monkeypatch):
    run = SimpleNamespace(
        args=SimpleNamespace(eval_measures=False),
        evaluation=SimpleNamespace(num_samples=1, losses=lambda: {"validation_loss": 1.0}, sample=lambda _: []),
        parts=SimpleNamespace(
            deepspeed=None, plan=SimpleNamespace(caches=SimpleNamespace(encodes={})), network_leaves=nullcontext
        ),
        saver=SimpleNamespace(keep_if_best=lambda *_: None, best=None),
        summary=SimpleNamespace(samples=[]),
        metrics=None,
        iteration=3,
        _logged_at=10.0,
    )
    monkeypatch.setattr("sgm.training.run.evaluation_weights", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("sgm.training.run.time.perf_counter", iter((20.0, 25.0)).__next__)
    TrainingRun._evaluate(run)  # pyright: ignore[reportArgumentType]
    assert run._logged_at == 15.0, "the five seconds of the evaluation do not count, the ten before it do"


@pytest.mark.parametrize(
    ("interval", "due"), [(4, [4, 8, 12]), ("1 epoch", [3, 5, 8, 10, 13]), ("2 epochs", [5, 10]), ("9 epochs", [])]
)
def test_intervals_count_iterations_or_epochs(interval, due):
    """Four samples an iteration, ten clips: an epoch ends within the third iteration, the next with the fifth."""
    parts = SimpleNamespace(epoch_samples=10, samples_before=lambda iteration: 4 * iteration, buckets=None)
    parts.epochs_before = functools.partial(Parts.epochs_before, parts)
    runs = [SimpleNamespace(iteration=iteration, parts=parts) for iteration in range(1, 14)]
    assert [run.iteration for run in runs if TrainingRun._is_due(run, interval)] == due


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "args.checkpoint_activations=true"),
        ("the loss is not finite", "lower deepspeed.optimizer.params.lr"),
        ("[gloo] Connection closed by peer", "another rank has ended or hangs: its own message says why"),
        ("something else", "start again with args.resume=auto once the cause is removed"),
    ],
)
def test_a_failure_is_told_with_what_may_help(reason, advice):
    assert advice in _hint(reason)


def test_a_new_run_takes_a_name_that_no_other_has(tmp_path, monkeypatch):
    args = TrainingArgs(save=str(tmp_path), experiment_name="x", resume="none")
    monkeypatch.setattr(time, "strftime", lambda _: "01-02")

    def hidden():
        (folder := tmp_path / ".hidden").mkdir()
        (folder / "log.txt").touch()
        return folder

    assert [_publish(hidden(), args).name for _ in range(2)] == ["x-01-02", "x-01-02-1"]
    rename = Path.rename

    def taken_meanwhile(path, target):
        if target.name == "x-01-02-2":
            (target / "of another process").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", taken_meanwhile)
    assert _publish(hidden(), args).name == "x-01-02-3"
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("denied")))
    with pytest.raises(OSError, match="denied"):
        _publish(hidden(), args)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    with pytest.raises(InputError, match="there are 1000 runs named x-01-02 already"):
        _publish(tmp_path / ".hidden", args)
