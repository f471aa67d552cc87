"""End commands at random times, start them again, and compare the results with undisturbed ones.

    python -m benchmarks.kills
    python -m benchmarks.kills --kinds training sampling --kills 30 --seed 2

SIGKILL, SIGTERM and SIGINT in turn, three at a random time of the command, then three when it has just begun a random
one of its files. Prints for each kind how many of the restarted results are equal byte for byte (of sidecars, all but
times and memory), after how many something half written is left beside or in the output, and after how many kills a
process was still alive. Commands are forks of a process that has imported everything, so most of their time is work.
Exit codes: 0 all are equal and nothing is left, 1 not.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LORA = ("--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml")
MODULES = (
    "dit_video_concat", "data_video", "vae_modules.autoencoder", "sgm.modules.encoders.modules", "deepspeed",
    "sgm.training.run", "sgm.training.inputs.precompute", "sgm.inference.run", "sgm.conversion.lora",
    "sgm.conversion.diffusers.from_sat",
)  # fmt: skip
VARYING = ("seconds", "peak_memory_bytes", "overrides")  # values of a sidecar that differ between runs
AT_A_WRITE_S = 0.05  # at most this long after a file is begun
END_S, LIMIT_S = 60, 600  # seconds until a signalled command must have ended, and an undisturbed one
PROMPTS = "a red circle moves left\na blue square moves up\n"


@dataclass(frozen=True)
class Kind:
    """A command.

    Attributes:
        module: with its `main`.
        words: work folder and output → arguments.
        pattern: the files that must be equal, below the output.
    """

    module: str
    words: Callable[[Path, Path], Sequence[str]]
    pattern: str = "**/*"


def _training(work: Path, out: Path) -> list[str]:
    few = ["args.train_iters=6", "args.save_interval=1", "args.log_interval=1", "args.num_workers=1"]
    plain = ["args.eval_interval=null", "args.valid_prompts=null", "args.split=1,0,0", "args.check_clips=none"]
    return [*LORA, f"args.save={out}", f"args.train_data=[{work / 'clips'}]", *few, *plain]


def _saving_beside(work: Path, out: Path) -> list[str]:
    return [*_training(work, out), "args.async_save=true"]


def _sampling(work: Path, out: Path) -> list[str]:
    given = [f"args.output_dir={out}", f"args.input_file={work / 'prompts.txt'}", "args.num_steps=4"]
    return ["--base", "configs/toy.yaml", "configs/toy_inference.yaml", *given]


def _precomputing(work: Path, out: Path) -> list[str]:
    return [*LORA, "--out", str(out), "--shard_mb", "0.05", f"args.train_data=[{work / 'clips'}]"]


def _conversion(_: Path, out: Path) -> list[str]:
    given = [
        "--transformer_ckpt_path",
        "assets/toy/transformer",
        "--output_path",
        str(out),
        "--max_shard_size",
        "500KB",
    ]
    return ["--base", "configs/toy.yaml", *given]


def _export(work: Path, out: Path) -> list[str]:
    (run,) = (work / "training").glob("toy-*")
    return ["--sat_pt_path", str(run), "--lora_save_directory", str(out)]


KINDS = {
    "training": Kind("train_video", _training, "*/6/*"),
    "async_saves": Kind("train_video", _saving_beside, "*/6/*"),
    "precomputing": Kind("tools.prepare_dataset", _precomputing),
    "conversion": Kind("tools.convert_weight_sat2hf", _conversion),
    "export": Kind("tools.export_sat_lora_weight", _export),
    "sampling": Kind("sample_video", _sampling),
}


def start(kind: Kind, words: Sequence[str], log: Path) -> int:
    """Run the command in a fork with a session of its own; return its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (handle, 1), (handle, 2)):
            os.dup2(number, target)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = importlib.import_module(kind.module).main(list(words))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
    """Return the exit code (negative for a signal), or None if the command still runs after `seconds`, or `until`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        if (found := os.waitpid(pid, os.WNOHANG)) != (0, 0):
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.01)
    return None


def alive(session: int, seconds: float = 5) -> list[int]:
    """Return the processes of a session that live on for `seconds`: an encoder may finish, a loader may notice."""
    end = time.monotonic() + seconds
    while found := [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _session(pid) == session]:
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return found


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def digests(out: Path, pattern: str) -> dict[str, str]:
    """Return path → digest of the files of an output; of a run folder without its time."""
    found = {}
    for path in sorted(out.glob(pattern)):
        if path.is_file() and not path.name.startswith("."):
            content = path.read_bytes()
            if path.suffix == ".json" and path.with_suffix(".mp4").is_file():
                sidecar = {name: value for name, value in json.loads(content).items() if name not in VARYING}
                content = json.dumps(sidecar, sort_keys=True).encode()
            name = path.relative_to(out).as_posix()
            found[name.partition("/")[2] if pattern.startswith("*/") else name] = hashlib.sha256(content).hexdigest()
    return found


def leftovers(out: Path) -> list[str]:
    """Return what is half written in an output or beside it."""
    beside = [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    return [str(path) for path in [*beside, *out.rglob(".*")] if path.name != ".lock"]


def begun(out: Path) -> int:
    """Return how many files of a command there are, half written ones included."""
    places = [out, *out.parent.glob(f".{out.name}.*")]
    return sum(len(files) for place in places for _, _, files in os.walk(place))


@dataclass(frozen=True)
class Moment:
    """When a command is signalled: `delay` seconds after its start, or after it has begun its `file`-th file."""

    delay: float
    file: int = 0

    @classmethod
    def drawn(cls, draw: random.Random, index: int, whole: float, num_files: int) -> "Moment":
        """Draw that of a kill: three in time, then three at files, and so on."""
        if index // len(SIGNALS) % 2 == 0:
            return cls(draw.uniform(0, whole))
        return cls(draw.uniform(0, AT_A_WRITE_S), draw.randint(1, num_files))


def kill(
    kind: Kind, words: Sequence[str], out: Path, log: Path, number: signal.Signals, moment: Moment
) -> tuple[int | None, int]:
    """Start the command, signal it at a moment; return exit code and number of processes that live on."""
    pid = start(kind, words, log)
    code = wait(pid, LIMIT_S, lambda: begun(out) >= moment.file) if moment.file else None
    code = wait(pid, moment.delay) if code is None else code
    if code is None:
        os.kill(pid, number)
        code = wait(pid, END_S)
    living = alive(pid)
    for process in living:
        os.kill(process, signal.SIGKILL)
    if code is None:
        os.waitpid(pid, 0)
    return code, len(living)


def sweep(name: str, work: Path, num: int, draw: random.Random) -> bool:
    """Kill one kind of command `num` times and print what was found; return whether all is right."""
    kind, log, reference = KINDS[name], work / f"{name}.log", work / name
    started = time.monotonic()
    if (code := wait(start(kind, kind.words(work, reference), log), LIMIT_S)) != 0:
        sys.exit(f"{name}: the undisturbed command ended with {code}; see {log}")
    whole, expected = time.monotonic() - started, digests(reference, kind.pattern)
    counts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    for index in range(num):
        # Of the same name, which headers of converted files hold as their title.
        out, number = work / str(index) / name, SIGNALS[index % len(SIGNALS)]
        out.parent.mkdir()
        moment = Moment.drawn(draw, index, whole, begun(reference))
        code, living = kill(kind, kind.words(work, out), out, log, number, moment)
        codes[f"{number.name} {code}"] += 1
        done = digests(out, kind.pattern) == expected
        again = wait(start(kind, kind.words(work, out), log), LIMIT_S)
        if again == 2 and done:
            again = 0  # it was done before the signal, and a conversion does not overwrite
        equal, left = digests(out, kind.pattern) == expected, leftovers(out)
        counts += Counter(equal=equal and again == 0, left=bool(left), alive=bool(living))
        if not equal or again != 0 or left or living:
            sys.stdout.write(f"{name} {index}: {number.name}, exit code {code}, then {again}; equal {equal}; {left}\n")
        else:
            shutil.rmtree(out.parent)
    sys.stdout.write(
        f"{name}: {num} kills in {whole:.1f} s each, {counts['equal']} equal, {counts['left']} with something left, "
        f"{counts['alive']} with a process alive; first exit codes: {dict(sorted(codes.items()))}\n"
    )
    sys.stdout.flush()
    return counts["equal"] == num and not counts["left"] and not counts["alive"]


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep the kinds that were asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--kills", type=int, default=30, help="of each kind")
    parser.add_argument("--seed", type=int, default=1, help="of the random times")
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "tools"))
    torch.set_num_threads(1)
    for module in MODULES:
        importlib.import_module(module)
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    for part in ("videos", "labels"):
        (work / "clips" / part).mkdir(parents=True)
        for path in sorted((ROOT / "assets/toy" / part).iterdir())[:6]:
            shutil.copy(path, work / "clips" / part)
    (work / "prompts.txt").write_text(PROMPTS)
    names = [*dict.fromkeys(["training", *options.kinds])] if "export" in options.kinds else options.kinds
    draw = random.Random(options.seed)
    right = [sweep(name, work, options.kills if name in options.kinds else 0, draw) for name in names]
    if not all(right):
        sys.stdout.write(f"outputs and messages: {work}\n")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
