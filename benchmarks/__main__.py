"""Print all figures of docs/benchmarks.md that a CPU has, part by part, each in a process of its own.

    python -m benchmarks
    python -m benchmarks --only traffic steps

With fewer repetitions and smaller files than those of some tables in the document, whose commands it states. Each part
prints its time. One that fails is named at the end, and the others still run.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Name → the words after ``python -m``; FOLDER is for files that are not kept.
FOLDER = "FOLDER"
PARTS: Mapping[str, Sequence[str]] = {
    "traffic": ("benchmarks.traffic",),
    "network and VAE": ("benchmarks.bench", "--sizes", "cpu", "--repeats", "3"),
    "compiled": ("benchmarks.bench", "--sizes", "cpu", "--only", "dit", "--compile", "--repeats", "3"),
    "accelerator code": ("benchmarks.accelerator_code",),
    "steps": ("benchmarks.steps", "--repeats", "3"),
    "step cache": ("benchmarks.step_cache", "--samples", "4", "--configs", "toy"),
    "ranks": (
        *("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
        *("benchmarks.shared_decode", "--latents", "7", "6", "8", "--turns", "1"),
    ),
    "peaks": ("benchmarks.gpu", "--size", "tiny", "--only", "full step", "--json", f"{FOLDER}/gpu.json"),
    "start": ("benchmarks.start_time", "--runs", "3"),
    "loading": ("benchmarks.loading", "--gb", "0.5", "--runs", "3"),
    "saves": ("benchmarks.saves", "--gb", "0.3", "--saves", "2", "--interval", "3"),
    "data": ("benchmarks.data", "--clips", "1", "--rounds", "2", "--gb", "1"),
    "growth": ("benchmarks.growth",),
}


def run(words: Sequence[str]) -> tuple[int, float, float]:
    """Run a module; return its exit code, seconds, and seconds of processor time."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # A thread for each rank: the cores are shared by them.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if words[0].startswith("torch.") else {})
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, "-m", *(word.replace(FOLDER, folder) for word in words)]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, time.perf_counter() - started, spent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some of the parts")
    names, failed = parser.parse_args(argv).only, []
    for name in names:
        print(f"\n## {name}: python -m {' '.join(PARTS[name])}\n", flush=True)
        code, seconds, spent = run(PARTS[name])
        print(f"\n({seconds:.0f} s, processor time {spent:.0f} s)", flush=True)
        if code:
            failed.append(name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}; see the messages above\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
