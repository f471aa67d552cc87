"""Lost ranks or launchers under torchrun: the others name the lost rank, and restarts resume exactly. Real processes.

tests/sgm/parallel/test_heartbeat.py tests this without a launcher.
"""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from sgm.weights.files import find_weights, read_tensors
from tests.processes import Training, only_run

LORA = "dit_t2v_5b_lora"
TIMEOUT = 60  # seconds; on a busy machine, ranks finish importing torch and SAT at different times
RESTART = "PET_MAX_RESTARTS"  # torchrun's environment variable for --max-restarts


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
        f"args.distributed_timeout={TIMEOUT}",
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
    other.wait(TIMEOUT)
    messages = training.finish()
    assert f"rank 1 (process {victim.pid} on " in messages and "is gone: no heartbeat for" in messages
    assert "resuming" in messages and "is in use by" not in messages
    runs = [only_run(straight), only_run(killed)]
    assert same_weights(runs)
    losses = [{line["iteration"]: line["loss"] for line in lines_of(folder)} for folder in (straight, killed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
def test_a_polite_end_of_all_ranks_saves(training_yaml, tmp_path):
    training = Training(training_yaml(LORA), overrides(tmp_path, "args.train_iters=1000"), 2)
    training.wait_for(lambda: len(lines_of(tmp_path)) >= 3)
    training.process.terminate()
    messages = training.finish(code=1)  # exit code of torchrun
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
        f"args.distributed_timeout={TIMEOUT}",
    ]
    sampling = Training([str(tiny_model("dit_t2v_1.5"))], words, 2, script="sample_video.py")
    sampling.wait_for(lambda: "steps" in sampling.messages() or "loaded" in sampling.messages())
    victim, start = rank_process(sampling, 1), time.monotonic()
    victim.kill()
    messages = sampling.finish(code=1)
    assert f"rank 1 (process {victim.pid} on " in messages and "is gone" in messages, messages[-3000:]
    assert time.monotonic() - start < TIMEOUT, "torchrun's own end included"


@pytest.mark.slow
def test_a_lost_launcher_ends_its_ranks(training_yaml, tmp_path):
    training = Training(training_yaml(LORA), overrides(tmp_path, "args.train_iters=100000"), 2)
    training.wait_for(lambda: len(lines_of(tmp_path)) >= 2)
    ranks = [rank_process(training, rank) for rank in range(2)]
    os.kill(training.process.pid, signal.SIGKILL)
    for process in ranks:
        process.wait(TIMEOUT)
    assert "launcher" in training.messages() and "does not answer" in training.messages()
