"""Measure what the checks of weights files add to loading: checksums and NaN, in weights and in a resume state.

    python -m benchmarks.loading
    python -m benchmarks.loading --gb 0.5 --dtype float32

Random weights are written to a temporary folder, and are in the page cache when they are read. Loading with and without
checks alternates. Checks run in a second thread: on a machine with a free core, a load takes the time of the main
thread. "own" files are written by this project; "other" ones lack its checksums.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sgm.training.state import read_checked
from sgm.weights.checkpoint import load_network
from sgm.weights.checksums import save_torch, write_safetensors
from sgm.weights.files import PREFIX

CLOCKS = time.process_time, time.thread_time, time.perf_counter
SIDE = 3072  # of the matrices, as in the 5B models


class Weights(nn.Module):
    """Matrices of a 5B model."""

    def __init__(self, num: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ParameterList([torch.empty(SIDE, SIDE, dtype=dtype) for _ in range(num)])


def tensors_of(num: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return random matrices by their names in a file."""
    generator = torch.Generator().manual_seed(0)
    return {f"{PREFIX}layers.{index}": torch.randn(SIDE, SIDE, generator=generator).to(dtype) for index in range(num)}


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Path]]:
    """Write each kind of file; yield its name and path while it is there."""
    content = {"module": dict(tensors)}
    writers: dict[str, Callable[[Path], None]] = {
        "own .pt": lambda path: save_torch(content, path),
        "own .safetensors": lambda path: write_safetensors(path, tensors),
        "other .pt": lambda path: torch.save(content, path),
        "other .safetensors": lambda path: save_file(dict(tensors), path),
    }
    for name, writer in writers.items():
        path = folder / f"weights{name.partition(' ')[2]}"
        writer(path)
        yield name, path
        path.unlink()


def plainly(path: Path, num: int, dtype: torch.dtype) -> None:
    """Load weights as `load_network` does, without checks."""
    with torch.device("meta"):
        network = Weights(num, dtype)
    if path.suffix == ".pt":
        found = torch.load(path, mmap=True, weights_only=True)["module"]
    else:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for index in range(num):
        network.layers[index] = nn.Parameter(found[f"{PREFIX}layers.{index}"].detach().clone())


def checked(path: Path, num: int, dtype: torch.dtype) -> None:
    """Load weights with their checks."""
    with torch.device("meta"):
        network = Weights(num, dtype)
    load_network(network, path, dtype=dtype)


def compare(first: Callable[[], object], second: Callable[[], object], runs: int) -> list[tuple[float, float, float]]:
    """Return seconds of all threads, of the main thread and of the clock.

    The fewest of each, and the median of what the second adds to the first of its turn. They are run alternately, after
    a turn that does not count.
    """
    measured: list[list[tuple[float, ...]]] = [[], []]
    for turn in range(runs + 1):
        for times, run in zip(measured, (first, second), strict=True):
            before = [clock() for clock in CLOCKS]
            run()
            if turn:
                times.append(tuple(clock() - start for clock, start in zip(CLOCKS, before, strict=True)))
    found = []
    for kind in range(len(CLOCKS)):
        one, two = ([each[kind] for each in times] for times in measured)
        added = statistics.median(b / a - 1 for a, b in zip(one, two, strict=True))
        found.append((min(one), min(two), added))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of the weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=5, help="runs of each")
    options = parser.parse_args(argv)
    if options.runs < 1:
        parser.error(f"--runs={options.runs}: give 1 or more")
    dtype = getattr(torch, options.dtype)
    num = max(1, round(options.gb * 1e9 / (SIDE * SIDE * dtype.itemsize)))
    sys.stdout.write(f"{num * SIDE * SIDE * dtype.itemsize / 1e9:.1f} GB of {options.dtype}; seconds without / with\n")
    tensors = tensors_of(num, dtype)

    def report(name: str, first: Callable[[], object], second: Callable[[], object]) -> None:
        shown = [f"{one:6.2f} {two:6.2f} {added:+6.1%}" for one, two, added in compare(first, second, options.runs)]
        sys.stdout.write(f"{name:20} CPU {shown[0]}   main thread {shown[1]}   wall {shown[2]}\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="loading-") as folder:
        for name, path in write(Path(folder), tensors):
            report(name, lambda path=path: plainly(path, num, dtype), lambda path=path: checked(path, num, dtype))
            if name == "own .pt":
                report(
                    "resume state",
                    lambda path=path: torch.load(path, weights_only=True),
                    lambda path=path: read_checked(path, "cpu"),
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
