"""Run several trainings sequentially, on one rank or several: a JSON file lists their configurations.

Not a test: tests start it, since starting Python and importing torch takes longer than a tiny training.
"""

import contextlib
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sgm.distributed
import sgm.training.run
from sgm.config.load import load_config
from sgm.log import configure_logging
from sgm.modules.diffusionmodules.sigma_sampling import LossMoments
from sgm.training import timing
from sgm.training.evaluate import Evaluation
from sgm.training.run import TrainingRun, train
from tests.processes import restore_linear


def leave_out_plots() -> None:
    """Replace the plot of the losses, which takes as long as several steps of a tiny training."""
    sgm.training.run.draw_curve = lambda _metrics, picture: Path(picture).touch()


@contextlib.contextmanager
def ask_to_stop(call: int | None) -> Iterator[None]:
    """Context in which the last rank gets SIGTERM before the `call`-th time that its evaluation looks for one."""
    original, calls = Evaluation._stop_if_asked, itertools.count(1)

    def look(evaluation: Evaluation) -> None:
        if next(calls) == call and sgm.distributed.rank() == sgm.distributed.world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        original(evaluation)

    Evaluation._stop_if_asked = look
    yield
    Evaluation._stop_if_asked = original


@contextlib.contextmanager
def late_data(seconds: Mapping[str, float]) -> Iterator[None]:
    """Context in which the last rank waits for the data of iterations; steps of a second count as stalls soon."""
    original, limits = TrainingRun._next_inputs, (timing._LEAST_STALL, timing._STALL_FACTOR)

    def late(run: TrainingRun, batches: Iterator[Any], taken: list[Any]) -> Any:
        def wait() -> Iterator[Any]:
            time.sleep(seconds.get(str(run.iteration + 1), 0))
            yield next(batches)

        is_last = sgm.distributed.rank() == sgm.distributed.world_size() - 1
        return original(run, wait() if is_last else batches, taken)

    if seconds:
        TrainingRun._next_inputs, timing._LEAST_STALL, timing._STALL_FACTOR = late, 1.0, 1.0
    yield
    TrainingRun._next_inputs, (timing._LEAST_STALL, timing._STALL_FACTOR) = original, limits


@contextlib.contextmanager
def known_soon(constants: Mapping[str, int]) -> Iterator[None]:
    """Context in which a sampler that draws timesteps by their loss has other constants, for few samples."""
    original = {name: getattr(LossMoments, name) for name in constants}
    for name, value in constants.items():
        setattr(LossMoments, name, value)
    yield
    for name, value in original.items():
        setattr(LossMoments, name, value)


def main() -> None:
    """Run the jobs of the file given on the command line."""
    configure_logging()
    leave_out_plots()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        soon = known_soon(job.get("moments", {}))
        with ask_to_stop(job.get("stop_at")), late_data(job.get("late", {})), soon:
            train(load_config(job["bases"], job["overrides"], mode="train"))
        restore_linear()


if __name__ == "__main__":
    main()
