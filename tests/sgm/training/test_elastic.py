"""A machine is lost: the launchers of the others restart their ranks, and the run goes on from its last save."""

import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from sgm.training.metrics import read_metrics
from sgm.training.state import newest_state
from tests.processes import ENV, ROOT

LORA, ITERATIONS = "dit_t2v_5b_lora", 60


def kill(launcher: subprocess.Popen) -> None:
    """Kill a launcher with its ranks, which have sessions of their own."""
    for process in [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]:
        process.send_signal(signal.SIGKILL)
    launcher.wait()


@pytest.mark.slow  # minutes: two launchers, which wait for the lost one before they go on
def test_a_lost_machine_costs_a_restart_from_the_last_save(training_yaml, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    words = [f"args.train_iters={ITERATIONS}", "args.save_interval=1", f"args.save={tmp_path / 'runs'}"]
    words += ["args.resume=auto", "deepspeed.train_micro_batch_size_per_gpu=1", "args.async_save=true"]
    words += ["deepspeed.zero_optimization.stage=2", "args.keep_last=1", "deepspeed.train_batch_size=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1"]
    command += ["--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "elastic"]
    script, launchers = ["train_video.py", "--base", *training_yaml(LORA), *words], []
    for name, hosts in (("stays", 1), ("lost", 0)):  # the rendezvous must be where a launcher stays
        place = ["--rdzv_conf", f"is_host={hosts},last_call_timeout=5"]
        with (tmp_path / name).open("w") as log:
            launchers.append(subprocess.Popen([*command, *place, *script], cwd=ROOT, env=ENV, stdout=log, stderr=log))
    try:
        end, runs = time.monotonic() + 300, tmp_path / "runs"
        while not (runs.is_dir() and any(newest_state(run) for run in runs.glob("[!.]*"))):
            assert time.monotonic() < end and launchers[0].poll() is None, (tmp_path / "stays").read_text()[-3000:]
            time.sleep(0.05)
        kill(launchers[1])
        (run,) = runs.glob("[!.]*")
        lost_after = int(newest_state(run) or 0)
        assert launchers[0].wait(400) == 0, (tmp_path / "stays").read_text()[-3000:]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                kill(launcher)
    said = (tmp_path / "stays").read_text()
    assert newest_state(run) == str(ITERATIONS) and lost_after < ITERATIONS
    assert f"resuming {run} after iteration" in said and "dividing it over 1 rank" in said
    assert "an iteration takes" not in said, "accumulation follows the batch"
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1)), "each iteration once"
    assert [line["samples"] for line in lines] == list(range(2, 2 * ITERATIONS + 1, 2))
