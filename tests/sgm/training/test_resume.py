"""Exact resume, equal ZeRO stages, and independence of the number of ranks; real processes."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from sgm.weights.files import find_weights, read_tensors
from tests.marks import thorough
from tests.processes import Training, asked, only_run, run, selected, train_all

ROOT = Path(__file__).parents[3]
MODELS = {"lora": "dit_t2v_5b_lora", "full": "dit_t2v_1.5"}
STAGES, WORLDS, ITERS = (0, 1, 2, 3), (1, 2), 6
REFERENCES = [(kind, 1, 0) for kind in MODELS]
# All combinations take minutes: by default stage 3 runs on two ranks, stage 2 in the test with kills; test_presets.py
# trains at stage 1, and test_run.py resumes in one process.
QUICK = [("full", 2, 3)]
KILLED = [pytest.param(1, marks=pytest.mark.slow), 2]  # ranks
ALL = [*itertools.product(MODELS, WORLDS, STAGES)]
# Small parameters are sharded too, and buckets are smaller than the network.
SHARDED = [
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "deepspeed.zero_optimization.reduce_bucket_size=20000",
]


def marked(keys):
    return [key if key in QUICK else pytest.param(*key, marks=pytest.mark.slow) for key in keys]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1)), "each iteration once"
    return {line["iteration"]: line["loss"] for line in lines}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_weights(run))


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert a, "there are weights"
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.fixture(scope="session")
def runs(request, training_yaml, tmp_path_factory):
    """Return a function: (kind, world, stage, part) → run folder; global batch 4; part is uninterrupted or resumed."""
    top = tmp_path_factory.mktemp("resume")

    def folder(kind, world, stage, part):
        return top / f"{kind}-{world}-{stage}-{part}"

    chosen = {*asked(request, "kind", "world", "stage")}
    killed = {("lora", world, 2) for (world,) in asked(request, "killed_ranks")}
    compare = (test_ranks_and_stages_do_not_matter, test_training_changes_the_loss_and_the_weights)
    combinations = {*chosen, *killed, *(REFERENCES if any(selected(request, test) for test in compare) else ())}
    for world in WORLDS:
        jobs = []
        for kind, _, stage in sorted(key for key in combinations if key[1] == world):
            overrides = [
                f"args.train_iters={ITERS}",
                f"deepspeed.train_micro_batch_size_per_gpu={4 // world}",
                f"deepspeed.zero_optimization.stage={stage}",
                "args.ema_decay=0.9",
                "args.save_interval=2",
                *SHARDED,
            ]
            bases = training_yaml(MODELS[kind])
            parts = [("straight", [])]
            if (kind, world, stage) in chosen:
                parts += [("resumed", [f"args.exit_interval={ITERS // 2}"]), ("resumed", ["args.resume=auto"])]
            for part, more in parts:
                save = f"args.save={folder(kind, world, stage, part)}"
                jobs.append({"bases": bases, "overrides": [*overrides, save, *more]})
        train_all(jobs, top, world)
    return lambda *key: only_run(folder(*key))


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "world", "stage"), marked(ALL))
def test_a_resumed_run_equals_an_uninterrupted_one(runs, kind, world, stage):
    straight, resumed = runs(kind, world, stage, "straight"), runs(kind, world, stage, "resumed")
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == ITERS
    assert difference(weights(resumed), weights(straight)) == 0
    averages = [read_tensors(find_weights(run / f"{ITERS}-ema")) for run in (resumed, straight)]
    assert difference(*averages) == 0
    assert difference(averages[0], weights(straight)) > 0


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "world", "stage"), marked(key for key in ALL if key not in REFERENCES))
def test_ranks_and_stages_do_not_matter(runs, kind, world, stage):
    reference, run = runs(kind, 1, 0, "straight"), runs(kind, world, stage, "straight")
    assert losses(run) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(weights(run), weights(reference)) <= 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("kind", MODELS)
def test_training_changes_the_loss_and_the_weights(runs, kind):
    run = runs(kind, 1, 0, "straight")
    first, last = (read_tensors(find_weights(run / name)) for name in (f"{ITERS}-ema", str(ITERS)))
    assert difference(first, last) > 1e-5
    assert len(set(losses(run).values())) == ITERS


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/metrics.jsonl"))


@pytest.mark.parametrize("killed_ranks", KILLED)
def test_a_killed_run_goes_on_from_its_last_save(runs, training_yaml, tmp_path, killed_ranks):
    world = killed_ranks
    overrides = [
        f"args.train_iters={ITERS}",
        f"deepspeed.train_micro_batch_size_per_gpu={4 // world}",
        "deepspeed.zero_optimization.stage=2",
        f"args.save={tmp_path}",
        "args.save_interval=2",
        "args.resume=auto",
        "args.ema_decay=0.9",
        "args.keep_last=1",
        "args.num_workers=1",
        *SHARDED,
    ]
    bases = training_yaml(MODELS["lora"])
    training = Training(bases, overrides, world, forked=True)
    training.wait_for(lambda: lines_of(tmp_path) >= 3)
    training.kill()
    assert lines_of(tmp_path) < ITERS, "it was killed before its end"
    goes_on = run("train_video.py", ["--base", *bases, *overrides], world)
    assert goes_on.returncode == 0 and "resuming" in goes_on.stderr, goes_on.stderr[-3000:]
    straight, resumed = runs("lora", world, 2, "straight"), only_run(tmp_path)
    assert losses(resumed) == losses(straight)
    assert difference(weights(resumed), weights(straight)) == 0
    averages = [read_tensors(find_weights(run / f"{ITERS}-ema")) for run in (resumed, straight)]
    assert difference(*averages) == 0
    assert sorted(path.name for path in resumed.iterdir() if path.name[0].isdigit()) == ["6", "6-ema"], "keep_last=1"


@pytest.mark.slow  # all combinations take 15 minutes
@pytest.mark.parametrize(("kind", "world", "stage"), marked(ALL))
def test_ten_steps_a_kill_and_ten_more_are_twenty(training_yaml, tmp_path, kind, world, stage):
    bases = training_yaml(MODELS[kind])
    overrides = [
        "args.train_iters=20",
        "args.save_interval=10",
        "args.resume=auto",
        "args.ema_decay=0.9",
        f"deepspeed.train_micro_batch_size_per_gpu={4 // world}",
        f"deepspeed.zero_optimization.stage={stage}",
        *SHARDED,
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    Training(bases, [*overrides, f"args.save={straight}"], world).finish()
    training = Training(bases, [*overrides, f"args.save={killed}"], world)
    training.wait_for(lambda: lines_of(killed) >= 12)
    training.kill()
    assert 10 < lines_of(killed) < 20
    training = Training(bases, [*overrides, f"args.save={killed}"], world)
    assert "after iteration 10" in training.finish()
    runs = only_run(straight), only_run(killed)
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == 20
    assert difference(weights(runs[0]), weights(runs[1])) == 0
    averages = [read_tensors(find_weights(run / "20-ema")) for run in runs]
    assert difference(*averages) == 0


def test_a_folder_that_is_being_trained_in_is_refused(training_yaml, tmp_path):
    overrides = [f"args.save={tmp_path}", "args.train_iters=1000", "args.save_interval=1", "args.resume=auto"]
    bases = training_yaml(MODELS["lora"])
    training = Training(bases, overrides, forked=True)
    training.wait_for(lambda: list(tmp_path.glob("*/resume/latest")))
    refused = run("train_video.py", ["--base", *bases, *overrides])
    assert refused.returncode == 2 and f"is in use by process {training.forks()[0]}" in refused.stderr
    training.kill()


@pytest.mark.parametrize(("number", "code"), [thorough(signal.SIGUSR1, 143), (signal.SIGTERM, 0)])
def test_a_signal_finishes_the_step_and_saves(training_yaml, tmp_path, number, code):
    overrides = [f"args.save={tmp_path}", "args.train_iters=1000", "args.num_workers=1", f"args.stop_exit_code={code}"]
    training = Training(training_yaml(MODELS["lora"]), overrides, forked=True)
    training.wait_for(lambda: lines_of(tmp_path) >= 2)
    os.killpg(training.process.pid, number)
    messages = training.finish(code=code)
    folder = only_run(tmp_path)
    done = max(losses(folder))
    assert (folder / "latest").read_text().strip() == (folder / "resume" / "latest").read_text().strip() == str(done)
    assert f"iteration {done} of 1000: stopped by {number.name}" in messages
