"""Checkpoints of runs killed at random moments."""

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.training import state
from sgm.training.metrics import read_metrics
from sgm.training.save import Saver, _best_kept, gather_parameters
from sgm.training.state import checkpoint_engine, find_resume_point
from sgm.util import InputError, RunError
from sgm.weights.files import find_weights, read_tensors
from tests.processes import Training

ROOT = Path(__file__).parents[3]
LORA = "dit_t2v_5b_lora"


@dataclass
class Harvest:
    """Observations of many kills.

    Attributes:
        inside: kills during a save, which left temporary files or an incomplete state.
        iterations: the newest resume point after each kill.
        lost: iterations logged after it.
    """

    inside: int = 0
    iterations: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def test_the_newest_checkpoint_stays_though_a_killed_save_left_a_later_one(tmp_path):
    for name in ("100", "100-ema", "120", "120-ema", "150", "150-ema"):
        (tmp_path / name).mkdir()
    saver = SimpleNamespace(
        args=SimpleNamespace(keep_last=1), parts=SimpleNamespace(folder=tmp_path), best=None, former_best=()
    )
    Saver._remove_old(saver, 120)  # pyright: ignore[reportArgumentType]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["120", "120-ema"]


@pytest.mark.parametrize(
    ("now", "best", "former", "said"),
    [
        ("b", (3, 2.0), {1}, None),
        ("a", (1, 1.0), {3}, f"than before iteration 5.*and keeps .*{os.sep}3, the best of those before"),
        ("c", None, {1, 3}, "than before iteration 5"),
        (None, None, {1, 3}, None),
    ],
)
def test_the_best_checkpoint_is_that_of_the_present_validation_samples(tmp_path, caplog, now, best, former, said):
    losses = {1: (1.0, "a"), 2: (3.0, "b"), 3: (2.0, "b"), 4: (2.5, "b"), 5: (0.5, "b")}
    lines = [{"iteration": n, "validation_loss": loss, "validation_set": of} for n, (loss, of) in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name in losses:
        (tmp_path / str(name)).mkdir()
    network = SimpleNamespace(state_dict=dict)
    plan = SimpleNamespace(
        args=SimpleNamespace(keep_best=True, keep_last=1, save_full=False),
        trainable=SimpleNamespace(names=(), adapters=True),
    )
    point: Any = SimpleNamespace(iteration=4, has_weights=lambda: True)
    parts: Any = SimpleNamespace(plan=plan, folder=tmp_path, point=point, engine=SimpleNamespace(network=network))
    with caplog.at_level("WARNING"):
        saver = Saver(parts, now)
    assert (saver.best, saver.former_best) == (best, former)
    assert bool(caplog.messages) == (said is not None) and (said is None or re.search(said, caplog.text))
    saver._remove_old(4)
    assert {int(path.name) for path in tmp_path.iterdir() if path.is_dir()} == {4} | former | {best[0] if best else 4}


def test_lines_that_do_not_say_their_validation_samples_are_of_the_present_ones(tmp_path):
    lines = [{"iteration": 1, "validation_loss": 1.0}, {"iteration": 2, "validation_loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "1").mkdir()
    assert _best_kept(tmp_path, 2, "a") == {"a": (1, 1.0)}


@pytest.mark.parametrize("error", [RunError("full"), RuntimeError("connection closed by peer"), KeyboardInterrupt()])
@pytest.mark.parametrize("newest", ["100", "120"])
def test_nothing_is_left_of_a_save_that_fails_on_any_rank(tmp_path, error, newest):
    for name in ("100", "120", "120-ema", "resume/120"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "resume" / "latest").write_text(newest)
    saver = object.__new__(Saver)
    saver.parts = SimpleNamespace(folder=tmp_path)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(type(error)), saver._removed_if_it_fails(120):
        raise error
    assert (tmp_path / "100").is_dir()
    for name in ("120", "120-ema", "resume/120"):
        assert (tmp_path / name).exists() is (newest == "120"), "its state is complete"


def test_ranks_wait_for_slow_files_without_the_timeout_of_collectives(monkeypatch, tmp_path):
    """They wait in the store, and no rank writes between two collectives."""
    done: list[str] = []

    def noted(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: (done.append(name), result)[1]

    for name in ("wait_for_all", "gather_objects", "barrier"):
        monkeypatch.setattr(sgm.distributed, name, noted(name))
    monkeypatch.setattr(state, "write_state_file", noted("write"))

    def visit(_engine: Any, _point: Any, visit: Callable[[Path, Any], None], **_: Any) -> None:
        for name in ("model", "optim"):
            visit(tmp_path / name, {})
        done.append("collectives of DeepSpeed")

    monkeypatch.setattr(state, "visit_state", visit)
    saver = object.__new__(Saver)
    saver.args = TrainingArgs(train_data=("clips",), load="weights", train_iters=1)
    saver.parts = SimpleNamespace(deepspeed=None)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(saver, "_write", noted("weights"))
    monkeypatch.setattr(saver, "_point", noted("point"))
    monkeypatch.setattr(saver, "_set_latest", noted("latest"))
    saver._write_all(1, {}, None)
    assert done[:2] == ["weights", "wait_for_all"]
    expected = ["collectives of DeepSpeed", "write", "write", "wait_for_all", "gather_objects", "barrier", "latest"]
    assert [name for name in done[2:] if name != "point"] == expected


def test_buffers_are_saved_with_the_parameters():
    network = torch.nn.Linear(2, 1)
    network.register_buffer("table", torch.arange(3.0))
    network.register_buffer("cache", torch.zeros(1), persistent=False)
    found = gather_parameters(SimpleNamespace(module=network), tuple(network.state_dict()))
    assert found.keys() == {"weight", "bias", "table"}
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    assert found["table"].data_ptr() != network.table.data_ptr()


def changed(folder: Path) -> float:
    """Return the time of the last line of metrics; 0 without one."""
    return max((path.stat().st_mtime for path in folder.glob("*/metrics.jsonl") if path.stat().st_size), default=0.0)


def kill_at_random(training, folder: Path, delay: float) -> bool:
    """Kill a run `delay` seconds after its first step; return whether it was still running."""
    before, end = changed(folder), time.monotonic() + 120
    lines = sum(len(read_metrics(path)) for path in folder.glob("*/metrics.jsonl"))
    while not training.ended():
        now = sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))
        if now > lines or (changed(folder) > before and now < lines):
            break
        assert time.monotonic() < end, "the run is too slow"
        time.sleep(0.005)
    time.sleep(delay)
    if training.ended():
        return False
    training.kill()
    return True


def inspect(folder: Path, harvest: Harvest) -> None:
    """Load the newest checkpoint of a killed run."""
    (run,) = folder.iterdir()
    temporary = [path for path in run.rglob(".*") if path.is_file() and path.name != ".lock"]
    names = {path.name for path in (run / "resume").glob("*") if path.is_dir()} if (run / "resume").is_dir() else set()
    if not (run / "resume" / "latest").is_file():
        harvest.inside += 1
        return  # killed in its first save
    args = TrainingArgs(train_data=("x",), load="x", train_iters=1, resume=str(run))
    point = find_resume_point(args)
    assert point is not None
    latest = (run / "latest").read_text().strip() if (run / "latest").is_file() else ""
    harvest.inside += bool(temporary or names != {str(point.iteration)} or latest != str(point.iteration))
    for path in point.folder.glob("*.pt"):
        checkpoint_engine().load(str(path))
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(find_weights(run)).values())
    assert read_tensors(find_weights(run / str(point.iteration)))
    assert point.iteration >= max(harvest.iterations, default=0), "nothing that was saved is lost"
    logged = max(line["iteration"] for line in read_metrics(run / "metrics.jsonl"))
    harvest.iterations.append(point.iteration)
    harvest.lost.append(logged - point.iteration)


@pytest.mark.slow  # minutes: every kill restarts Python and torchrun
@pytest.mark.parametrize(("world", "kills", "beside"), [(1, 30, False), (2, 10, False), (2, 10, True)])
def test_kills_at_random_moments_lose_nothing_but_the_newest_steps(
    training_yaml, tmp_path, world, kills, beside, capsys
):
    overrides = [
        f"args.train_iters={6 * kills}",
        f"deepspeed.train_micro_batch_size_per_gpu={2 // world}",
        "deepspeed.zero_optimization.stage=2",
        "args.save_interval=1",
        "args.keep_last=2",
        "args.ema_decay=0.9",
        f"args.async_save={beside}",
    ]
    bases = training_yaml(LORA)
    Training(bases, [*overrides, "args.save_interval=1000", f"args.save={tmp_path / 'straight'}"], world).finish()
    moments, harvest, done = random.Random(7), Harvest(), 0
    resuming = [*overrides, f"args.save={tmp_path / 'killed'}", "args.resume=auto"]
    (tmp_path / "killed").mkdir()
    while done < kills:
        training = Training(bases, resuming, world)
        if not kill_at_random(training, tmp_path / "killed", moments.uniform(0.0, 0.6)):
            training.finish()
            break
        done += 1
        inspect(tmp_path / "killed", harvest)
    Training(bases, resuming, world).finish()
    (killed,), (straight,) = (tmp_path / "killed").iterdir(), (tmp_path / "straight").iterdir()
    with capsys.disabled():
        sys.stderr.write(f"\n{done} kills on {world} ranks: {json.dumps(vars(harvest))}\n")
    assert done >= kills * 2 // 3 and max(harvest.lost) <= 1 + beside
    weights = [read_tensors(find_weights(run)) for run in (killed, straight)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (killed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 6 * kills


class Other:
    """An object that a state does not hold."""


def test_a_pickle_in_the_state_is_refused_without_advice_to_read_it_all_the_same(tmp_path):
    torch.save({"x": Other()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="Python objects besides tensors, which could run code") as caught:
        checkpoint_engine().load(str(tmp_path / "x.pt"))
    assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)


def test_what_is_saved_does_not_depend_on_the_temporary_name(tmp_path):
    engine = checkpoint_engine()
    for name in ("a.pt", "b.pt"):
        engine.save({"x": torch.arange(5)}, str(tmp_path / name))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
