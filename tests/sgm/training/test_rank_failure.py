"""One rank dies: the others end in time and name it, and what torchrun starts again goes on exactly. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sgm.weights.files import find_weights, read_tensors
from tests.processes import ENV, ROOT, Training, only_run, rank_environments

LORA = "dit_t2v_5b_lora"
TIMEOUT = 20  # seconds; the machine may be busy, and signs of life late
LAUNCHED = 60  # of those that start torch and SAT first, which ranks of a busy machine do not end together
RESTART = "PET_MAX_RESTARTS"  # how torchrun reads --max-restarts from the environment


def rank_process(training: Training, rank: int) -> psutil.Process:
    """Return the process of a rank; torchrun is its parent."""
    ranks = psutil.Process(training.process.pid).children()
    (found,) = (process for process in ranks if process.environ().get("RANK") == str(rank))
    return found


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"args.save={folder}",
        "args.save_interval=2",
        "args.resume=auto",
        "args.num_workers=1",
        f"args.distributed_timeout={LAUNCHED}",
        "deepspeed.train_micro_batch_size_per_gpu=1",
        *more,
    ]


def same_weights(runs: list[Path]) -> bool:
    first, second = (read_tensors(find_weights(run)) for run in runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_restart_goes_on_exactly(training_yaml, tmp_path):
    stage, iters = "deepspeed.zero_optimization.stage=2", "args.train_iters=8"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    Training(training_yaml(LORA), overrides(straight, stage, iters), 2).finish()
    training = Training(training_yaml(LORA), overrides(killed, stage, iters), 2, **{RESTART: "1"})
    training.wait_for(lambda: len(lines_of(killed)) >= 3)
    victim, other = rank_process(training, 1), rank_process(training, 0)
    victim.kill()
    other.wait(LAUNCHED)
    messages = training.finish()
    assert f"rank 1 (process {victim.pid} on " in messages and "is gone: no sign of life for" in messages
    assert "going on with" in messages and "is in use by" not in messages
    runs = [only_run(straight), only_run(killed)]
    assert same_weights(runs)
    losses = [{line["iteration"]: line["loss"] for line in lines_of(folder)} for folder in (straight, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
def test_a_polite_end_of_all_ranks_saves(training_yaml, tmp_path):
    training = Training(training_yaml(LORA), overrides(tmp_path, "args.train_iters=1000"), 2)
    training.wait_for(lambda: len(lines_of(tmp_path)) >= 3)
    training.process.terminate()
    messages = training.finish(code=1)  # torchrun's own
    run = only_run(tmp_path)
    assert "stopped by SIGTERM, saved" in messages and "is gone" not in messages
    assert (run / "resume" / "latest").read_text().strip() == str(max(line["iteration"] for line in lines_of(tmp_path)))


@pytest.mark.slow
def test_sampling_ends_when_a_rank_of_a_sample_is_killed(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    words = [
        f"args.input_file={prompts}",
        f"args.output_dir={tmp_path / 'out'}",
        "args.num_steps=900",
        "args.sequence_parallel_size=2",
        f"args.distributed_timeout={LAUNCHED}",
    ]
    sampling = Training([str(tiny_model("dit_t2v_1.5"))], words, 2, script="sample_video.py")
    sampling.wait_for(lambda: "steps" in sampling.messages() or "loaded" in sampling.messages())
    victim, start = rank_process(sampling, 1), time.monotonic()
    victim.kill()
    messages = sampling.finish(code=1)
    assert f"rank 1 (process {victim.pid} on " in messages and "is gone" in messages, messages[-3000:]
    assert time.monotonic() - start < LAUNCHED, "torchrun's own end included"


# Without a launcher that ends the others

SCRIPT = """
import os, sys, time
import torch.distributed as dist
import sgm.distributed as d
d.set_timeout({timeout})
d.initialize(mesh=d.Mesh(sequence=2))
dist.new_group([0, 1])
c10d = dist.distributed_c10d
backends = [group._get_backend(d.device()) for group in c10d._world.pg_map if group is not None]
assert len(backends) > 3 and {{backend.options._timeout.total_seconds() for backend in backends}} == {{{timeout}}}
print("ready", flush=True)
try:
    with d.explain_lost_ranks():
        {work}
except Exception as error:
    sys.exit(f"error: {{error}}")
finally:
    d.shutdown()
"""


def start_ranks(work: str) -> list[subprocess.Popen]:
    """Start two ranks that find each other through rank zero, and wait until they did."""
    ranks = []
    for env in rank_environments(2):
        words = [sys.executable, "-c", SCRIPT.format(timeout=TIMEOUT, work=work)]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(words, cwd=ROOT, env=ENV | env, stdout=pipe, stderr=pipe, text=True))
    for process in ranks:
        assert process.stdout.readline() == "ready\n", process.communicate()
    return ranks


@pytest.mark.slow
def test_a_rank_that_waits_for_nothing_learns_of_a_loss(tmp_path):
    """No launcher, no collective that fails: signs of life alone; at the clean end, rank zero waits with the store."""
    ranks = start_ranks("time.sleep(300)")
    start = time.monotonic()
    ranks[1].kill()
    _, messages = ranks[0].communicate(timeout=2 * TIMEOUT)
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and f"error: rank 1 (process {ranks[1].pid} on " in messages
    assert TIMEOUT / 2 < time.monotonic() - start < TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_hanging_collective_and_a_silent_rank(lost):
    """A rank is stopped, not killed: its connections stay open, as when a machine loses its power."""
    ranks = start_ranks("time.sleep(1); d.barrier(); time.sleep(3); d.barrier(); time.sleep(60); d.barrier()")
    time.sleep(2)
    start = time.monotonic()
    ranks[lost].send_signal(signal.SIGSTOP)
    _, messages = ranks[1 - lost].communicate(timeout=2 * TIMEOUT)
    seconds = time.monotonic() - start
    ranks[lost].kill()
    ranks[lost].communicate()
    assert ranks[1 - lost].returncode == 1 and f"rank {lost} (process {ranks[lost].pid} on " in messages
    assert seconds < TIMEOUT


@pytest.mark.slow
def test_a_rank_that_fails_is_named_by_the_others():
    ranks = start_ranks("d.rank() == 1 and 1 / 0; time.sleep(300)")
    results = [process.communicate(timeout=TIMEOUT) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert f"rank 1 (process {ranks[1].pid} on " in results[0][1] and "ended before its work was done" in results[0][1]
    assert "division by zero" in results[1][1] and "rank 0" not in results[1][1]


@pytest.mark.slow
def test_ranks_that_end_apart_or_pause_raise_no_alarm():
    ranks = start_ranks(f"time.sleep(0 if d.rank() == 0 else {TIMEOUT})")
    ranks[1].send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT / 4)
    ranks[1].send_signal(signal.SIGCONT)
    results = [process.communicate(timeout=3 * TIMEOUT) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0] and not any("error" in text for _, text in results)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_launcher_ends_its_ranks(training_yaml, tmp_path, rank):
    training = Training(training_yaml(LORA), overrides(tmp_path, "args.train_iters=100000"), 2)
    training.wait_for(lambda: len(lines_of(tmp_path)) >= 2)
    process = rank_process(training, rank)
    os.kill(training.process.pid, signal.SIGKILL)
    process.wait(TIMEOUT)
    assert "launcher" in training.messages() and "does not answer" in training.messages()
