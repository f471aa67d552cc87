"""Print the run time of ``--help`` of the scripts, and of ``--check`` of the toy.

    python -m benchmarks.start_time
    python -m benchmarks.start_time --runs 3

Each run is a new process; the median counts.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "sample_video.py --help",
    "sample_video.py --base configs/toy.yaml configs/toy_inference.yaml --check",
    "train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml --check",
)


def seconds(command: str) -> float:
    """Return the run time of `command` (space-separated words) in a new Python process.

    Raises:
        SystemExit: the command fails; with its messages.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Print the median time of each command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each command; the median counts")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error(f"--runs={options.runs}: give 1 or more")
    for command in COMMANDS:
        median = statistics.median(seconds(command) for _ in range(options.runs))
        sys.stdout.write(f"{median:7.2f} s  {command}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
