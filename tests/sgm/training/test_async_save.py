"""Saves that training does not wait for."""

import logging
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import sgm.distributed
import sgm.training.save
from sgm.checks.estimate import training_estimate
from sgm.config.load import ConfigError, load_config
from sgm.training.async_save import BackgroundSave, HostMemory
from sgm.training.optim.optimizer import make_optimizer
from sgm.training.prepare import prepare
from sgm.training.run import TrainingRun
from sgm.training.save import Saver
from sgm.training.state import newest_state
from sgm.util import RunError
from sgm.weights.checksums import save_torch
from tests.processes import only_run, train_all

LORA = "dit_t2v_5b_lora"
EACH = ("args.train_iters=2", "args.save_interval=1", "args.async_save=true")


def tensors(run: Path) -> dict[str, bytes]:
    """Return the bytes of tensors of weights and state, by path in a run folder and entry of the file.

    The rest holds numbers that DeepSpeed counts in a process.
    """
    archives = {str(path.relative_to(run)): zipfile.ZipFile(path) for path in sorted(run.rglob("*.pt"))}
    return {
        f"{path}: {name}": archives[path].read(name)
        for path in archives
        for name in archives[path].namelist()
        if "/data/" in name
    }


def test_files_of_copies_are_those_of_the_originals(tmp_path):
    flat = torch.arange(12, dtype=torch.float32)
    marked = torch.ones(2)
    marked.ds_id = 3
    group = {"lr": 1e-3, "betas": (0.9, 0.99)}
    state = {
        "views": [flat[:4].view(2, 2), flat[4:].requires_grad_()],
        "alone": torch.ones(3, dtype=torch.bfloat16),
        "weight": nn.Parameter(marked, requires_grad=False),
        "marked": marked,
        "groups": (group, group, None),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0),
    }
    memory = HostMemory()
    copied = memory.copy(state)
    size = memory.nbytes
    assert size == 4 * 12 + 2 * 3 + 4 * 2 + 8
    for name, content in (("a.pt", state), ("b.pt", copied)):
        save_torch(content, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()

    flat.zero_()
    assert copied["views"][0].tolist() == [[0, 1], [2, 3]], "a copy"
    memory.release()
    again = memory.copy(state)
    assert memory.nbytes == size and not again["views"][0].any()
    assert copied["views"][0].data_ptr() == again["views"][0].data_ptr(), "in the same memory"
    assert memory.copy_dense(flat[2:5]).untyped_storage().nbytes() == 12


def test_states_in_eight_bits_are_copied():
    pytest.importorskip("torchao.optim", reason="torchao is not installed: pip install .[lowmem]")
    p = nn.Parameter(torch.randn(64, 64))
    optimizer = make_optimizer({"type": "torchao.optim.AdamW8bit", "params": {"lr": 1e-2}}, [("weight", p)])
    p.grad = torch.randn(64, 64)
    optimizer.step()
    moment = optimizer.state[p]["exp_avg"]
    copied = HostMemory().copy(optimizer.state[p])["exp_avg"]
    before = moment.dequantize()
    assert type(copied) is type(moment) and torch.equal(copied.dequantize(), before)
    optimizer.step()
    assert torch.equal(copied.dequantize(), before) and not torch.equal(moment.dequantize(), before)


def fail(error: Exception):
    def raise_it(*_: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("publish", "settle", "error", "said"),
    [
        (fail(RunError("the disk is full")), None, RunError, "^the disk is full$"),
        (fail(OSError("it is gone")), None, OSError, "it is gone"),
        (lambda _: None, fail(ConnectionError("rank 1 has ended")), ConnectionError, "rank 1 has ended"),
        (lambda _: None, lambda *_: "rank 1: its disk is full", RunError, "^rank 1: its disk is full$"),
    ],
)
def test_a_save_that_cannot_be_completed_is_undone_and_told(monkeypatch, publish, settle, error, said):
    if settle is not None:
        monkeypatch.setattr(sgm.distributed, "settle", settle)
    undone = []
    save = BackgroundSave(7, write=lambda: ["a"], publish=publish, undo=lambda: undone.append("undone"))
    save.wait_after_failure()
    with pytest.raises(error, match=said):
        save.wait()
    assert save.failed and undone == (["undone"] if settle is None else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "more"),
    [
        (LORA, 0, []),
        (LORA, 2, ["args.ema_decay=0.5", "args.keep_last=1"]),
        ("dit_t2v_2b", 1, ["model.precision=bf16", "args.ema_decay=0.5"]),
        ("dit_t2v_2b", 3, ["args.save_full=true"]),
    ],
)
def test_what_is_written_beside_training_is_what_would_be_written_before_it_goes_on(job, name, stage, more):
    overrides = [*EACH, *more, f"deepspeed.zero_optimization.stage={stage}"]
    expected = tensors(job(name, *overrides, "args.async_save=false", save="waiting").folder)
    run = job(name, *overrides, save="beside").folder
    assert tensors(run) == expected and len(expected) > 2
    assert newest_state(run) == (run / "latest").read_text().strip() == "2"


def test_what_two_ranks_write_beside_training(training_yaml, tmp_path):
    words = [*EACH, "args.num_workers=0", "deepspeed.train_micro_batch_size_per_gpu=1", "args.ema_decay=0.5"]
    words += ["deepspeed.zero_optimization.stage=1"]
    jobs = [[*words, f"args.save={tmp_path / way}", f"args.async_save={way}"] for way in ("false", "true")]
    train_all([{"bases": training_yaml(LORA), "overrides": job} for job in jobs], tmp_path, world=2)
    expected, found = (tensors(only_run(tmp_path / way)) for way in ("false", "true"))
    assert any("rank_1" in name for name in expected) and found == expected
    assert newest_state(only_run(tmp_path / "true")) == "2"


def test_a_run_killed_before_a_save_is_complete_goes_on_from_the_former_one(job, monkeypatch, tmp_path):
    publish = sgm.training.save.publish_state

    def copy_before(point, names):
        if point.iteration == 2:
            shutil.copytree(point.run, tmp_path / "killed" / point.run.name)
        publish(point, names)

    monkeypatch.setattr(sgm.training.save, "publish_state", copy_before)
    run = job(LORA, *EACH, "args.train_iters=3").folder
    killed = only_run(tmp_path / "killed")
    assert (killed / "resume" / "2").is_dir() and (killed / "2").is_dir() and newest_state(killed) == "1"
    monkeypatch.undo()
    assert job(LORA, *EACH, "args.train_iters=3", "args.resume=auto", save="killed").folder == killed
    assert tensors(killed) == tensors(run)


@pytest.fixture
def held(monkeypatch):
    """Hold the writing of weights until the returned event is set."""
    event, write = threading.Event(), Saver._write

    def wait(saver, *args):
        assert event.wait(30)
        write(saver, *args)

    monkeypatch.setattr(Saver, "_write", wait)
    return event


def test_training_goes_on_meanwhile_and_waits_for_a_save_before_the_next_one(job, held, monkeypatch, caplog):
    seen = []
    step, finish = TrainingRun._step, Saver.finish

    def observe(run, *args):
        seen.append((run.iteration, newest_state(run.parts.folder)))
        return step(run, *args)

    def finish_held(saver):
        seen.append("waits")
        held.set()
        finish(saver)

    monkeypatch.setattr(TrainingRun, "_step", observe)
    monkeypatch.setattr(Saver, "finish", finish_held)
    caplog.set_level(logging.INFO, "sgm")
    overrides = ["args.train_iters=5", "args.save_interval=2", "args.async_save=true", "args.keep_last=1"]
    run = job(LORA, *overrides).folder
    assert seen[:5] == [(0, None), (1, None), (2, None), (3, None), "waits"]
    assert "iteration 4: training waits until iteration 2 is saved" in caplog.text
    assert "saving takes longer than the iterations between saves" in caplog.text
    assert newest_state(run) == "5" and (run / "5").is_dir() and not (run / "2").exists()
    messages = [record.message for record in caplog.records]
    assert [f"saved {run / str(n)}" in messages for n in (2, 4, 5)] == [True, True, True]


def test_a_save_that_fails_ends_the_run_and_keeps_the_former_checkpoint(job, monkeypatch, tmp_path):
    write = sgm.training.save.write_state_file

    def full(path, content):
        if "resume/2/" in str(path):
            raise RunError(f"could not write {path}: the disk is full")
        write(path, content)

    monkeypatch.setattr(sgm.training.save, "write_state_file", full)
    with pytest.raises(RunError, match="^could not write .*: the disk is full$"):
        job(LORA, *EACH, "args.train_iters=50")
    run = only_run(tmp_path / "runs")
    assert newest_state(run) == (run / "latest").read_text().strip() == "1"
    assert not (run / "2").exists() and not (run / "resume" / "2").exists()


def test_a_save_in_flight_is_finished_when_training_fails(job, held, monkeypatch, tmp_path):
    step = TrainingRun._step

    def fail(run, *args):
        if run.iteration == 2:
            held.set()
            raise RuntimeError("cut")
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", fail)
    with pytest.raises(RunError, match=r"iteration 3 failed: RuntimeError: cut(?s:.*)the newest checkpoint is .*/2\n"):
        job(LORA, "args.train_iters=4", "args.save_interval=2", "args.async_save=true")
    assert newest_state(only_run(tmp_path / "runs")) == "2"


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(job, monkeypatch, tmp_path):
    monkeypatch.setattr(sgm.training.save, "_are_finite", lambda weights: False)
    with pytest.raises(RunError, match="after iteration 1 the weights are not finite and were not saved"):
        job(LORA, *EACH)
    assert not list(only_run(tmp_path / "runs").glob("*/*.pt"))


@pytest.mark.slow
def test_the_copies_are_counted_in_the_estimate(job, monkeypatch):
    runs = []
    monkeypatch.setattr(TrainingRun, "close", lambda run: runs.append(run))
    job(LORA, *EACH, "args.train_iters=1", "deepspeed.zero_optimization.stage=2")
    plan, saver = runs[0].parts.plan, runs[0].saver
    found = training_estimate(plan.config, plan.dtype, plan.trainable.names, vae=False, text_encoder=False)
    assert found.host["save"] == pytest.approx(saver._memory.nbytes - len(torch.get_rng_state()), rel=0.01)


def test_a_state_on_nvme_is_refused(training_yaml):
    zero = "deepspeed.zero_optimization"
    words = [f"{zero}.stage=3", f"{zero}.offload_optimizer.device=nvme", f"{zero}.offload_optimizer.nvme_path=/tmp"]
    with pytest.raises(ConfigError, match=r"args.async_save.*is true, and DeepSpeed copies a state on NVMe itself"):
        prepare(load_config(training_yaml(LORA), [*words, "args.async_save=true"], mode="train"))
