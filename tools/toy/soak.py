"""Train and sample with the toy for hours, and report whether memory and open files grow.

    python tools/toy/soak.py --minutes 120
    python tools/toy/soak.py --minutes 4 --csv outputs/soak.csv

Half of the time goes to a training with evaluations and saves in between, on clips of which a part cannot be decoded;
the other half to sampling a long list of prompts. Memory (resident, in MB) and descriptors of all processes of a
command are read from /proc while it works. Exit codes: 0 both are flat, 1 one grows, or a command failed.
"""

import argparse
import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgm.cli import run_command, tool_parser
from sgm.util import RunError

ROOT = Path(__file__).parents[2]
CLIPS, EVERY_DAMAGED = 300, 3  # clips of the training, and one of how many is damaged
STOP_SECONDS = 600  # for a step and a save, on a busy machine too
GROWTH_MB, GROWTH_FILES = 40, 2  # between the medians of the second and the last quarter
COLOURS, SHAPES = ("red", "green", "blue", "cyan"), ("circle", "square", "triangle")


@dataclass(frozen=True)
class Reading:
    """Memory and descriptors of all processes of a command at a time."""

    seconds: float
    megabytes: float
    descriptors: int


def read(session: int, start: float) -> Reading | None:
    """Return the state of the processes of a session; None without any."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.getsid(int(pid)) == session:
                pages = int(Path("/proc", pid, "statm").read_text().split()[1])
                found.append((pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))))
        except OSError:  # it has ended
            continue
    if not found:
        return None
    memory, descriptors = zip(*found, strict=True)
    return Reading(time.monotonic() - start, sum(memory), sum(descriptors))


def watch(words: Sequence[str], seconds: float, log: Path) -> list[Reading]:
    """Run a command of the project for some time, then stop it with SIGTERM; return the readings.

    Raises:
        RunError: it ends by itself, or not within `STOP_SECONDS` after SIGTERM.
    """
    readings, start = [], time.monotonic()
    with log.open("w") as file:
        command = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=file, stderr=file, start_new_session=True, env=_environment()
        )
    try:
        while time.monotonic() < start + seconds:
            if command.poll() is not None:
                raise RunError(f"{words[0]} ended with {command.returncode}:\n{log.read_text()[-2000:]}")
            readings += filter(None, [read(command.pid, start)])
            time.sleep(1)
        command.send_signal(signal.SIGTERM)
        try:
            code = command.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"{words[0]} still runs {STOP_SECONDS} s after SIGTERM:\n{log.read_text()[-2000:]}"
            ) from error
        if code not in (0, 128 + signal.SIGTERM):
            raise RunError(f"{words[0]} ended with {code} after SIGTERM:\n{log.read_text()[-2000:]}")
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
            command.wait()
    return readings


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def write_clips(folder: Path) -> None:
    """Write copies of the toy's clips, some of them cut off."""
    toy = sorted((ROOT / "assets/toy/videos").iterdir())
    for part in ("videos", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(CLIPS):
        source = toy[number % len(toy)]
        content = source.read_bytes()
        damaged = number % EVERY_DAMAGED == 0
        (folder / f"videos/{number:04d}.mp4").write_bytes(content[: len(content) // 2] if damaged else content)
        shutil.copy(ROOT / f"assets/toy/labels/{source.stem}.txt", folder / f"labels/{number:04d}.txt")


def training(work: Path) -> list[str]:
    """Return the command of a training without an end, with evaluations, saves and clips that fail."""
    write_clips(work / "clips")
    often = ["args.save_interval=10", "args.keep_last=2", "args.eval_interval=20", "args.eval_iters=1"]
    clips = [f"args.train_data=[{work / 'clips'}]", "args.check_clips=none", "args.max_bad_share=1"]
    more = [f"args.save={work / 'runs'}", "args.train_iters=1000000", "args.num_workers=1", "args.log_interval=1"]
    valid = ["args.valid_data=[assets/toy]", "args.valid_prompts=[a red circle moves left]"]
    return ["train_video.py", "--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", *often, *clips, *more, *valid]


def sampling(work: Path) -> list[str]:
    """Return the command of sampling more prompts than it can finish."""
    directions = ("left", "right", "up", "down")
    scenes = [f"a {colour} {shape} moves {way}" for colour in COLOURS for shape in SHAPES for way in directions]
    (work / "prompts.txt").write_text("\n".join(scenes * 100))
    words = [f"args.output_dir={work / 'videos'}", f"args.input_file={work / 'prompts.txt'}", "args.num_steps=4"]
    return ["sample_video.py", "--base", "configs/toy.yaml", "configs/toy_inference.yaml", *words]


def verdict(name: str, readings: Sequence[Reading]) -> tuple[str, bool]:
    """Return a line with the medians of each quarter, and whether the second and the last are alike."""
    size = len(readings) // 4
    quarters = [readings[size * index : size * (index + 1)] for index in range(4)] if size else []
    if not quarters:
        raise RunError(f"{name}: there are {len(readings)} readings, too few; give more --minutes")
    memory = [statistics.median(each.megabytes for each in quarter) for quarter in quarters]
    files = [statistics.median(each.descriptors for each in quarter) for quarter in quarters]
    flat = memory[3] - memory[1] <= GROWTH_MB and files[3] - files[1] <= GROWTH_FILES
    shown = f"{' -> '.join(f'{each:.0f}' for each in memory)} MB, {' -> '.join(f'{each:.0f}' for each in files)} files"
    return f"{name}: {shown} (medians of quarters of {readings[-1].seconds:.0f} s): {'flat' if flat else 'GROWS'}", flat


def work(options: argparse.Namespace) -> None:
    """Run both commands and print the verdicts.

    Raises:
        RunError: a command failed, or memory or descriptors grow.
    """
    flat, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("training", training(Path(folder))), ("sampling", sampling(Path(folder)))):
            readings = watch(words, options.minutes * 30, Path(folder, f"{name}.log"))
            line, is_flat = verdict(name, readings)
            iterations = sum(len(path.read_text().splitlines()) for path in Path(folder).glob("runs/*/metrics.jsonl"))
            done = f"{iterations} iterations, {len([*Path(folder).rglob('*.mp4')]) - CLIPS} videos by then"
            sys.stdout.write(f"{line}; {done}\n")
            sys.stdout.flush()
            flat.append(is_flat)
            rows += [(name, *vars(reading).values()) for reading in readings]
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("command", "seconds", "megabytes", "descriptors"), *rows])
    if not all(flat):
        raise RunError(f"memory or descriptors grow by more than {GROWTH_MB} MB or {GROWTH_FILES} files")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=120, help="for both together")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the readings there")
    return run_command(work, parser.parse_args(argv), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
