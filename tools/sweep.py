"""Train with several settings, one run after the other or one per device, and compare the runs.

    python tools/sweep.py --base configs/toy_lora.yaml configs/toy_sft.yaml --out outputs/sweep \
        --grid deepspeed.optimizer.params.lr=3e-4,1e-3 --grid lora_config.params.r=8,16 --prompts assets/toy/prompts.txt
    python tools/sweep.py --base configs/toy_lora.yaml configs/toy_sft.yaml --out outputs/sweep --runs my_runs.yaml

Every --grid names a key and its values; all combinations are trained. The end of a key is enough where only one key of
the files ends so. --runs names a YAML file with a list of overrides, a mapping from keys to values each; both multiply.
All runs are checked before the first one starts. The same command goes on where it stopped, and skips what is done.

OUT/<settings>/ holds the run folder, log.txt and the sampled videos of each run, OUT/table.md the comparison, sorted
by loss, OUT/contact_sheet.png the prompts at the same seeds.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgm.cli import add_trust, run_command, tool_parser
from sgm.io import atomic_file, content_digest, lock_folder, parse_json, reason_of, require_writable, write_json
from sgm.log import get_logger
from sgm.project import SOURCES
from sgm.util import InputError, RunError, default

logger = get_logger("sweep")

PYTHON = sys.executable
POLL_SECONDS = 0.5
RECORD = "sweep.json"
# Which devices a process sees, by the type of the accelerator.
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}
LAST_SHARE = 0.2  # of the lines of metrics, whose mean is the training loss of a run
MAX_NAME = 120  # bytes of a folder's name
OWN_KEYS = ("args.save", "args.experiment_name", "args.resume")  # that each run is given
MOST_RUNS = 1000  # more is a slip of the pen


@dataclass
class Run:
    """One run of a sweep.

    Attributes:
        name: its settings, as the folder is named.
        folder: of its files.
        overrides: ``section.key=value`` beyond those of all runs.
        digest: of its configuration.
        total: iterations; None if they are counted in epochs.
        state: ``waiting``, ``running``, ``stopped`` (early), ``failed`` or ``done``.
        seconds: of training and sampling, all attempts together.
        prompts: digest of the file of prompts that was sampled; None if none was, or older versions did it.
    """

    name: str
    folder: Path
    overrides: list[str]
    digest: str = ""
    total: int | None = None
    state: str = "waiting"
    seconds: float = 0.0
    prompts: str | None = None

    @property
    def run_folder(self) -> Path | None:
        """The folder of its training, once it has begun."""
        found = [path.parent for path in (self.folder / "runs").glob("*/metrics.jsonl")]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    @property
    def videos(self) -> Path:
        """The folder of its samples."""
        return self.folder / "videos"

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of its metrics."""
        from sgm.training.metrics import FILE, read_metrics

        folder = self.run_folder
        return [] if folder is None else read_metrics(folder / FILE)

    def read(self) -> None:
        """Take over state and seconds of an earlier command.

        Raises:
            InputError: the run was made with other settings.
        """
        try:
            record = parse_json((self.folder / RECORD).read_bytes())
            digest, state, seconds = record["digest"], record["state"], float(record["seconds"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{self.folder / RECORD} cannot be read ({reason_of(error)}); remove this folder"
            ) from error
        if digest != self.digest:
            raise InputError(
                f"{self.folder} was trained with another configuration (a file of --base, or an override, has changed "
                "since); give another --out, or remove that folder"
            )
        self.state = state if state in ("done", "stopped") else "waiting"
        self.seconds, self.prompts = seconds, record.get("prompts")

    def write(self) -> None:
        """Write what `read` takes over."""
        content = {"overrides": self.overrides, "digest": self.digest, "state": self.state, "prompts": self.prompts}
        write_json(self.folder / RECORD, {**content, "seconds": round(self.seconds, 1)})


@dataclass
class Job:
    """A run that is being computed on a device: its commands, one after the other."""

    run: Run
    device: str | None
    commands: Iterator[list[str]]
    process: Any = None  # subprocess.Popen, once a command was started
    num_started: int = 0  # commands; the first one trains
    began: float = field(default_factory=time.monotonic)


# Settings


def combinations(options: argparse.Namespace, keys: Sequence[str]) -> list[dict[str, str]]:
    """Return key → value, as overrides spell it, of every run of the sweep.

    Args:
        options: of the command line.
        keys: dotted keys of the files, which ends of keys are completed to.

    Raises:
        InputError: a key or a list of values is malformed.
    """
    axes: list[list[dict[str, str]]] = []
    for given in options.grid:
        key, equals, values = given.partition("=")
        listed = split_values(values)
        if not equals or not all(listed):
            raise InputError(f"--grid {given} is not of the form key=value,value,...; e.g. {_EXAMPLE}")
        if len({*listed}) < len(listed):
            raise InputError(f"--grid {given} names a value twice")
        axes.append([{full_key(key, keys): value} for value in listed])
    if options.runs is not None:
        axes.append([{full_key(key, keys): text for key, text in run.items()} for run in read_runs(options.runs)])
    if not axes:
        raise InputError(f"there is nothing to compare: give --grid {_EXAMPLE}, or --runs FILE.yaml")
    if (num_runs := math.prod(map(len, axes))) > MOST_RUNS:
        raise InputError(f"--grid and --runs ask for {num_runs:,} runs; give values for {MOST_RUNS:,} at most")
    runs = [dict(itertools.chain.from_iterable(part.items() for part in parts)) for parts in itertools.product(*axes)]
    named = [key for axis in axes for key in {key for part in axis for key in part}]
    if fixed := sorted({*named} & {*OWN_KEYS}):
        raise InputError(f"{fixed[0]} is set by the sweep for each run; compare other keys")
    if twice := sorted({key for key in named if named.count(key) > 1}):
        raise InputError(f"{twice[0]} is given by two of --grid and --runs; name it once")
    return runs


_EXAMPLE = "deepspeed.optimizer.params.lr=1e-4,3e-4"


def split_values(text: str) -> list[str]:
    """Split at the commas outside of brackets, braces and quotation marks."""
    values, depth, quote = [""], 0, ""
    for before, character in zip(f" {text}", text, strict=False):
        opens = character in "\"'" and not before.isalnum()  # not the apostrophe of a word
        quote = "" if character == quote else quote or (character if opens else "")
        depth += 0 if quote else (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def full_key(key: str, keys: Sequence[str]) -> str:
    """Return the key of the files that ends with `key`; one that begins with a section stays.

    Raises:
        InputError: no key ends so, or several do.
    """
    from sgm.config.load import SECTIONS
    from sgm.util import nearest

    key = key.lstrip(".…")
    if key.partition(".")[0] in SECTIONS and "." in key:
        return key
    found = [known for known in keys if known == key or known.endswith(f".{key}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{key} is the end of several keys, {', '.join(found[:4])}; give more of it")
    ends = [known.split(".", depth)[-1] for known in keys for depth in range(known.count(".") + 1)]
    raise InputError(f"{key} is no key of the files{nearest(key, ends)}; write it in full, as {_EXAMPLE.split('=')[0]}")


def read_runs(path: Path) -> list[dict[str, str]]:
    """Return key → value of every run in a YAML file: a list of mappings, whose keys are dotted or nested.

    Raises:
        InputError: the file is unreadable or malformed.
    """
    from sgm.config.yaml_files import read_list

    other = ("is no list of overrides", "write a line as  - {args.seed: 1}  for each run")
    content = read_list(path, option="--runs", other=other)
    if not content or not all(isinstance(run, dict) and run for run in content):
        raise InputError(f"--runs {path} {'; '.join(other)}")
    return [dict(_flat(run)) for run in content]


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    from sgm.config.yaml_files import override_value

    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:  # JSON is YAML; text that needs no quotes stays as it is, for the names of folders
            is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w/.-]*", value)
            is_plain = is_plain and override_value(value) == value  # not a word such as true
            yield f"{above}{key}", str(value) if is_plain else json.dumps(value, ensure_ascii=False)


def names_of(runs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a name for every run: the ends of its keys, as long as they need to be, with the values."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    names: list[str] = []
    for run in runs:
        plain = {key: re.sub(r"[^\w.+-]+", "_", value).strip("_") for key, value in run.items()}
        name = ",".join(f"{_short(key, keys)}={value}" for key, value in plain.items())
        short = name.encode()[:MAX_NAME].decode(errors="ignore")
        names.append(f"{short}-{len(names)}" if short != name or name in names else name)
    return names


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the shortest end of a key that is not the end of another one."""
    ends = [key.split(".", depth)[-1] for depth in range(key.count("."), -1, -1)]
    return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)


def _check(run: Run, options: argparse.Namespace) -> None:
    """Check a run as ``train_video.py --check`` does, but its clips; raise InputError for what it would refuse."""
    import sgm.distributed
    from sgm.config.load import load_config
    from sgm.training.inputs.precompute import before_encoding
    from sgm.training.prepare import prepare

    overrides = [*options.overrides, *run.overrides, *_own(run)]
    config = load_config(options.base, overrides, mode="train", trust=options.trust)
    with sgm.distributed.planned(options.nproc_per_node):
        prepare(before_encoding(config) if config.args.precompute else config)


def _own(run: Run) -> list[str]:
    """Return the overrides that give a run its folder, from which it is resumed."""
    from sgm.config.yaml_files import override

    return [override(*pair) for pair in zip(OWN_KEYS, (str(run.folder / "runs"), "run", "auto"), strict=True)]


def planned(options: argparse.Namespace) -> list[Run]:
    """Return the runs of the sweep, each with a checked configuration.

    Raises:
        InputError: a configuration is wrong, or was another one when its run was trained.
    """
    from sgm.config.load import load_config
    from sgm.config.yaml_files import dotted, read_merged

    keys = [dotted(path) for path in read_merged(options.base, options.overrides).origins]
    settings = combinations(options, keys)
    runs = []
    for name, given in zip(names_of(settings), settings, strict=True):
        overrides = [f"{key}={value}" for key, value in given.items()]
        try:
            config = load_config(options.base, [*options.overrides, *overrides], mode="train", trust=options.trust)
            run = Run(name, options.out / name, overrides, config.digest, getattr(config.args, "train_iters", None))
            run.read()
            if run.state == "waiting":
                _check(run, options)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        runs.append(run)
        if not runs[1:]:
            options.seed, options.valid_prompts = config.args.seed, getattr(config.args, "valid_prompts", None)
    same = [run.name for run in runs if [other.digest for other in runs].count(run.digest) > 1]
    if same:
        raise InputError(f"these runs are the same: {', '.join(same)}; each must differ in a value")
    return runs


# Commands


def commands(run: Run, options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the commands of a run: training, and sampling once that is done."""
    from sgm.config.yaml_files import override

    trust = [word for package in options.trust for word in ("--trust", package)]
    shared = ["--base", *options.base, *trust, *options.overrides, *run.overrides]
    launcher = [PYTHON]
    if options.nproc_per_node > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc_per_node}"]
    yield [*launcher, str(SOURCES / "train_video.py"), *shared, *_own(run)]
    if options.prompts is not None:
        paths = {"load": run.run_folder, "input_file": options.prompts, "output_dir": run.videos}
        sampling = [override(f"args.{key}", str(path)) for key, path in paths.items()]
        sampling += ["args.input_type=txt", "args.prompt=null", f"args.seed={options.seed}"]
        yield [PYTHON, str(SOURCES / "sample_video.py"), *shared, *sampling]


def environment(device: str | None) -> dict[str, str] | None:
    """Return the environment of a process that sees one device; None for that of this process."""
    if device is None:
        return None
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return {**os.environ, VISIBLE.get(accelerator.type if accelerator else "", VISIBLE["cuda"]): device}


def advance(job: Job) -> bool:
    """Start the next command of a job if none is running; return whether the job has ended, its run with a state."""
    run, process = job.run, job.process
    if process is not None:
        code = process.poll()
        if code is None:
            return False
        trained = job.num_started > 1 or run.state == "stopped" or _is_trained(run)
        if not trained or (code and not (job.num_started == 1 and run.state == "stopped")):
            run.state = "failed"
    words = None if run.state == "failed" else next(job.commands, None)
    if words is None:
        run.state = "done" if run.state == "running" else run.state
        run.seconds += time.monotonic() - job.began
        run.write()
        return True
    job.num_started += 1
    with (run.folder / "log.txt").open("ab") as log:
        log.write(f"$ {' '.join(words)}\n".encode())
        log.flush()
        job.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(job.device)
        )
    return False


def _is_trained(run: Run) -> bool:
    """Whether a training has reached its end; one that was asked to stop exits with 0 too."""
    lines = run.metrics()
    return bool(lines) and lines[-1]["iteration"] >= (run.total or 0)


def is_bad(run: Run, others: Sequence[Run], options: argparse.Namespace) -> bool:
    """Whether the loss of a run is above that of the best one at the same iteration, by more than is allowed.

    The validation loss decides where there is one, else the training loss of the last lines; all runs see the same
    samples in the same order, with the same noise.
    """
    if options.stop_above is None:
        return False
    lines = run.metrics()
    if not lines or (run.total and lines[-1]["iteration"] < options.stop_after * run.total):
        return False
    name = "validation_loss" if any("validation_loss" in line for line in lines) else "loss"
    own = _loss_until(lines, name, math.inf)
    if own is None:
        return False
    iteration, loss = own
    known = [_loss_until(other.metrics(), name, iteration) for other in others if other is not run]
    at_the_same = [value for reached, value in filter(None, known) if reached == iteration]
    return bool(at_the_same) and loss > min(at_the_same) * (1 + options.stop_above / 100)


def _loss_until(lines: Sequence[Mapping[str, Any]], name: str, iteration: float) -> tuple[int, float] | None:
    """Return the last iteration up to `iteration` with a loss, and the loss: training losses as a mean of lines."""
    found = [(line["iteration"], line[name]) for line in lines if line.get(name) is not None]
    found = [(reached, value) for reached, value in found if reached <= iteration]
    if not found:
        return None
    count = 1 if name == "validation_loss" else max(1, round(LAST_SHARE * len(found)))
    return found[-1][0], sum(value for _, value in found[-count:]) / count


def compute(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Train and sample all runs that are not done, on the devices of the command line."""
    waiting = [run for run in runs if run.state == "waiting"]
    free: list[str | None] = list(options.devices or [None])
    jobs: list[Job] = []
    begun = {run.name for run in runs if run.state != "waiting"}
    try:
        while waiting or jobs:
            while waiting and free:
                run = waiting.pop(0)
                run.state = "running"
                begun.add(run.name)
                run.folder.mkdir(parents=True, exist_ok=True)
                run.write()
                jobs.append(Job(run, free.pop(0), commands(run, options)))
                logger.info("%s begins (%d of %d); %s", run.name, len(begun), len(runs), run.folder / "log.txt")
            for job in list(jobs):
                if advance(job):
                    jobs.remove(job)
                    free.append(job.device)
                    logger.info("%s is %s after %.0f s", job.run.name, job.run.state, job.run.seconds)
                elif job.num_started == 1 and job.run.state == "running" and is_bad(job.run, runs, options):
                    job.run.state = "stopped"
                    job.process.send_signal(signal.SIGTERM)  # it saves and ends
            time.sleep(POLL_SECONDS if jobs else 0)
    finally:
        for job in jobs:
            _end(job)


def _end(job: Job) -> None:
    """End a job that is cut off: its training saves first."""
    if job.process is not None and job.process.poll() is None:
        job.process.send_signal(signal.SIGTERM)
        job.process.wait()
    job.run.state = "waiting"
    job.run.seconds += time.monotonic() - job.began
    job.run.write()


# Results


def row(run: Run) -> dict[str, Any]:
    """Return name → value of a run's line in the table; what was not measured is missing."""
    lines = run.metrics()
    values: dict[str, Any] = {"run": run.name, "state": run.state}
    if not lines:
        return values
    validated = any("validation_loss" in line for line in lines)
    prefix = "validation_" if validated else ""
    values["iteration"] = lines[-1]["iteration"]
    names = {name for line in lines for name in line if re.fullmatch(rf"{prefix}loss_\d+_\d+", name)}
    for name in ["loss", "validation_loss", *sorted(names, key=lambda name: int(name.split("_")[-2]))]:
        found = _loss_until(lines, name, math.inf)
        if found is not None:
            values[name.removeprefix("validation_") if name in names else name] = found[1]
    speeds = [line["step_seconds"] for line in lines if line.get("step_seconds") is not None]
    memory = [line["memory_gib"] for line in lines if line.get("memory_gib") is not None]
    if speeds:
        values["s/step"] = sorted(speeds)[len(speeds) // 2]
    values["minutes"] = run.seconds / 60
    if memory:
        values["GiB"] = max(memory)
    return values


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table, the lowest loss first."""
    ordered = sorted(rows, key=lambda one: one.get("validation_loss", one.get("loss", math.inf)))
    columns = list(dict.fromkeys(name for one in ordered for name in one))
    quarters = [name for name in columns if re.match(r"loss_\d", name)]
    last = [name for name in columns if name in ("s/step", "minutes", "GiB")]
    columns = [name for name in columns if name not in (*quarters, *last)] + quarters + last
    texts = [[_cell(one.get(name)) for name in columns] for one in ordered]
    lines = [columns, ["---"] * len(columns), *texts]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_sheet(runs: Sequence[Run], path: Path) -> int:
    """Draw the videos of all runs, those of a prompt below each other; return their number."""
    from sgm.inference.results import finished_videos
    from sgm.inference.video import contact_sheet

    sampled = [run for run in runs if any(run.videos.rglob("*.mp4"))]  # others failed, or have no prompts
    shown = [(run.name, finished_videos(run.videos)) for run in sampled]
    rows = [
        (f"{name}: {videos[number][0]}", videos[number][1])
        for number in range(max((len(videos) for _, videos in shown), default=0))
        for name, videos in shown
        if number < len(videos)
    ]
    if rows:
        contact_sheet(rows, path)
    return len(rows)


def _require_prompts(file: Path | None) -> None:
    if file is not None and not file.is_file():
        raise InputError(f"--prompts {file} is no file; name one with a prompt a line")
    if file is not None and not file.read_bytes().strip():
        raise InputError(f"--prompts {file} holds no prompt; write one a line")


def work(options: argparse.Namespace) -> None:
    """Run the sweep."""
    if options.nproc_per_node < 1:
        raise InputError(f"--nproc_per_node is {options.nproc_per_node}; give a number of at least 1")
    if options.nproc_per_node > 1 and options.devices:
        raise InputError("--devices gives every run one device, and --nproc_per_node every run several; keep one")
    if not 0 <= options.stop_after <= 1 or not 0 <= default(options.stop_above, 0) < math.inf:
        raise InputError("--stop_above is a percentage from 0 on, and --stop_after a share from 0 to 1")
    if twice := sorted({device for device in options.devices if options.devices.count(device) > 1}):
        raise InputError(f"--devices names {', '.join(twice)} twice; a device has one run at a time")
    if wrong := [device for device in options.devices if not device.isdigit()]:
        raise InputError(f"--devices names {', '.join(wrong)}; give the numbers of devices, such as --devices 0 1")
    require_writable(options.out)
    _require_prompts(options.prompts)
    runs = planned(options)
    if options.prompts is None and isinstance(options.valid_prompts, str):
        options.prompts = Path(options.valid_prompts)
    elif options.prompts is None and options.valid_prompts is not None:
        options.prompts = options.out / "prompts.txt"
        with atomic_file(options.prompts) as temporary:
            temporary.write_text("\n".join(options.valid_prompts) + "\n", encoding="utf-8")
    _require_prompts(options.prompts)
    digest = None if options.prompts is None else content_digest(options.prompts)
    for run in runs if digest is not None else ():
        sampled = run.prompts in (digest, None) and any(run.videos.rglob("*.mp4"))
        if run.state == "done" and not sampled:  # without prompts, or others; its training ends at once
            run.state = "waiting"
        if run.state == "waiting":
            run.prompts = digest
    if options.list:
        sys.stdout.write("".join(f"{run.name}: {run.state}\n" for run in runs))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(options.out, cure="give another --out")
    skipped = [run.name for run in runs if run.state != "waiting"]
    logger.info("%d runs in %s; %d are done already", len(runs), options.out, len(skipped))
    try:
        compute(runs, options)
    finally:
        if lock is not None:
            lock.close()
    rows = [row(run) for run in runs]
    with atomic_file(options.out / "table.md") as temporary:
        temporary.write_text(table(rows), encoding="utf-8")
    write_json(options.out / "results.json", rows)
    sys.stdout.write(f"{table(rows)}table: {options.out / 'table.md'}\n")
    sheet = options.out / "contact_sheet.png"
    if options.prompts is None:
        sys.stdout.write("no contact sheet: there is no file of prompts (--prompts, or args.valid_prompts)\n")
    elif write_sheet(runs, sheet):
        sys.stdout.write(f"contact sheet: {sheet}\n")
    if failed := [run for run in runs if run.state == "failed"]:
        logs = "\n".join(f"  {run.name}: {_last_words(run)} ({run.folder / 'log.txt'})" for run in failed)
        raise RunError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:\n{logs}")


def _last_words(run: Run) -> str:
    """Return the error in the log of a run, with the lines that belong to it, or its last line."""
    lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line for line in lines if line.strip()]
    starts = [number for number, line in enumerate(said) if line.startswith("error:")]
    if not starts:
        return said[-1].strip()[:300] if said else "it said nothing"
    more = itertools.takewhile(lambda line: line.startswith(" "), said[starts[-1] + 1 :])
    return " ".join(line.strip() for line in (said[starts[-1]], *more))[:600]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--base", nargs="+", required=True, metavar="YAML", help="files of the training, as for train")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values of all runs")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...", help="may be repeated")
    parser.add_argument("--runs", type=Path, metavar="YAML", help="a list of overrides")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="to sample from each run; else args.valid_prompts")
    parser.add_argument("--devices", nargs="+", metavar="N", help="numbers of devices: a run on each at a time")
    parser.add_argument("--nproc_per_node", type=int, default=1, metavar="N", help="processes of each run (1)")
    parser.add_argument(
        "--stop_above", type=float, metavar="PERCENT", help="stop a run whose loss is this much above the best's"
    )
    parser.add_argument("--stop_after", type=float, default=0.25, metavar="SHARE", help="but not before (0.25)")
    parser.add_argument("--list", action="store_true", help="list the runs and their states, and train none")
    add_trust(parser)
    options = parser.parse_intermixed_args(argv)
    for name in ("base", "devices"):  # which take all words that follow them
        words = getattr(options, name) or []
        moved = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word) and not Path(word).exists()]
        setattr(options, name, [word for word in words if word not in moved])
        options.overrides = moved + options.overrides
    return run_command(
        work, options, interrupted="interrupted; the same command goes on where this one stopped", output="--out"
    )


if __name__ == "__main__":
    sys.exit(main())
