"""Peak memory at released sizes, without weights and without an accelerator, as the tables of docs/memory.md.

    python -m benchmarks.memory
    python -m benchmarks.memory --only vae cards
    python -m benchmarks.memory --write docs/memory.md

Networks and VAE run on meta tensors (see `sgm.checks.meta_run`): shapes and types flow, numbers do not. T5, optimizer
and DeepSpeed's buffers are formulas (`sgm.checks.estimate`). Workspaces of kernels and unused memory of the allocator
are not counted: leave a tenth of a card free.
"""

import argparse
import csv
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.models import vae_section
from sgm.checks.estimate import Estimate, sampling_estimate, training_estimate
from sgm.checks.measure import network_usage, once, with_equal_parts_once
from sgm.checks.meta_run import build, usage
from sgm.checks.planner import PRESETS, ROOM, SAMPLING, TRAINING, fit, recomputed_blocks
from sgm.config.load import Config, load_config
from sgm.distributed import Mesh
from sgm.training.optim.trainable import choose_trainable
from sgm.util import PRECISIONS, InputError

GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = Path(__file__).with_name("memory_published.csv")

# Model → the longest clip or video: frames, height, width.
CLIPS = {
    "cogvideox_2b": (49, 480, 720),
    "cogvideox_5b": (49, 480, 720),
    "cogvideox_5b_i2v": (49, 480, 720),
    "cogvideox1.5_5b": (81, 768, 1360),
    "cogvideox1.5_5b_i2v": (81, 768, 1360),
}
Task = Literal["sample", "LoRA", "full"]
TASKS: tuple[Task, ...] = ("sample", "LoRA", "full")
# Models that are measured by one process, since they share a VAE; those that take longest come first.
GROUPS = (("cogvideox_5b", "cogvideox_5b_i2v"), ("cogvideox1.5_5b", "cogvideox1.5_5b_i2v"), ("cogvideox_2b",))
_results: dict[tuple[Any, ...], Any] = {}  # name of a function, and its arguments → its result


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which computes what is not among `_results`."""

    @wraps(function)
    def run(*args: Any) -> Any:
        key = (function.__name__, *args)
        if key not in _results:
            _results[key] = function(*args)
        return _results[key]

    return run


def clip_text(model: str) -> str:
    """Return frames × height × width of a model's longest video."""
    return "×".join(map(str, CLIPS[model]))


def line(*cells: Any) -> str:
    """Return a row of a Markdown table; numbers are bytes, shown in GiB."""
    texts = (f"{cell / GIB:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def header(*names: str) -> list[str]:
    """Return the head of a Markdown table."""
    return [line(*names), "|" + "---|" * len(names)]


@dataclass(frozen=True)
class Training:
    """A training run: configuration, dtype of the network, names of the trained parameters."""

    config: Config
    dtype: torch.dtype
    trained: tuple[str, ...]


def training(task: Task, model: str, settings: Sequence[str] = (), files: Sequence[str] = ()) -> Training:
    """Return the training of a released model at its full size; see `estimate`."""
    frames, height, width = CLIPS[model]
    names = (f"{model}_lora" if task == "LoRA" else model, "sft", *files)
    size = [f"args.sampling_image_size=[{height},{width}]", f"data.params.max_num_frames={frames}"]
    config = load_config([CONFIGS / f"{name}.yaml" for name in names], [*size, *settings], mode="train")
    return Training(config, PRECISIONS[config.model["precision"]], _trained(names[0]))


@cache
def _trained(name: str) -> tuple[str, ...]:
    model = load_config([CONFIGS / f"{name}.yaml", CONFIGS / "inference.yaml"], mode="inference").model
    return choose_trainable(build(model["network_config"]), model).names


def estimate(
    task: Task, model: str, settings: Sequence[str] = (), *, files: Sequence[str] = (), cached: bool = False
) -> Estimate:
    """Estimate a released model at its full size.

    Args:
        task: sample, train adapters, or train all weights.
        model: a key of `CLIPS`.
        settings: ``section.key=value``.
        files: of configs/, without suffix, after those of model and task.
        cached: clips, first frames and captions were encoded before training, those of validation too.
    """
    return _estimate(task, model, tuple(settings), tuple(files), cached)


@kept
def _estimate(task: Task, model: str, settings: tuple[str, ...], files: tuple[str, ...], cached: bool) -> Estimate:
    if task == "sample":
        size = f"args.sampling_image_size=[{CLIPS[model][1]},{CLIPS[model][2]}]"
        bases = [CONFIGS / f"{name}.yaml" for name in (model, "inference", *files)]
        config = load_config(bases, [size, *settings], mode="inference")
        return sampling_estimate(config, PRECISIONS[config.model["precision"]])
    run = training(task, model, settings, files)
    loaded = {"vae": not cached, "text_encoder": not cached}
    return training_estimate(run.config, run.dtype, run.trained, **loaded)


# The VAE

ENCODE = {"whole clip": (None, "exact"), "`encode_chunk: 8`": (8, "approximate")}
DECODE = {"whole frames": ((), "exact"), "`vae_tiling: true`": (("args.vae_tiling=true",), "approximate")}
VAE_DTYPE = torch.bfloat16


def vae_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table; the 2B and the 5B share a VAE."""
    yield from header("what", "model", "clip", "settings", "result", "weights", "peak of the rest")
    for model in ("cogvideox_5b", "cogvideox1.5_5b"):
        if model not in models:
            continue
        for phase, settings in (("VAE encode", ENCODE), ("VAE decode", DECODE)):
            for how in settings:
                yield vae_row(phase, model, how)


def vae_row(phase: str, model: str, how: str) -> str:
    """Return a line of the table."""
    weights, peak = vae_peak(phase, model, how)
    effect = (ENCODE if phase == "VAE encode" else DECODE)[how][1]
    figures = f"{weights / GIB:.2f}", f"{peak / GIB:.2f}"
    return line(phase, model, clip_text(model), how, effect, *figures)


@kept
def vae_peak(phase: str, model: str, how: str) -> tuple[float, float]:
    """Return the bytes of the VAE's weights, and of all else at the peak of encoding or decoding a clip."""
    if phase == "VAE decode":
        parts = estimate("sample", model, DECODE[how][0]).phases["decode"]
        return parts["VAE"], parts["activations"]
    vae = build(vae_section(model))
    vae.encode_chunk, _ = ENCODE[how]

    def encode(vae: Any) -> torch.Tensor:
        return vae.encode_moments(torch.empty((1, 3, *CLIPS[model]), dtype=VAE_DTYPE, device="meta"))

    found = usage(vae, encode, VAE_DTYPE, Mesh(), prepare=with_equal_parts_once)
    return found.weights * VAE_DTYPE.itemsize, found.peak


# Sampling

STORED = {
    "16 bits": (),
    "`int8`": ("args.weights=int8",),
    "`fp8`": ("args.weights=fp8",),
    "`nf4`": ("args.weights=nf4",),
    "`int8` in blocks": ("args.weights=int8", "args.network_offload=blocks"),
}


def sampling_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of presets."""
    yield from header("preset", "model", "video", "T5 encodes", "the network samples", "the VAE decodes")
    for preset in PRESETS:
        for model in models:
            yield sampling_row(preset, model)


def sampling_row(preset: str, model: str) -> str:
    """Return a line of the table."""
    device = estimate("sample", model, [f"args.{key}={value}" for key, value in PRESETS[preset].items()]).device
    return line(f"`{preset}`", model, clip_text(model), device["text"], device["network"], device["decode"])


def stored_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of the network in eight and in four bits."""
    yield from header("model", "video", *STORED)
    for model in models:
        yield stored_row(model)


def stored_row(model: str) -> str:
    """Return a line of the table."""
    phases = [estimate("sample", model, settings).phases["network"] for settings in STORED.values()]
    return line(model, clip_text(model), *(sum(phase.values()) - phase["VAE"] for phase in phases))


# Cards

CARDS = {
    "8 GB": 8,
    "12 GB (3060, 4070)": 12,
    "16 GB (4060 Ti, 4080)": 16,
    "24 GB (3090, 4090)": 24,
    "32 GB (5090)": 32,
    "48 GB (A6000, L40S)": 48,
    "80 GB (A100, H100)": 80,
    "141 GB (H200)": 141,
}


def card_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table: for each card, task and model the settings that make it fit."""
    yield from header("card", "task", *models)
    for card in CARDS:
        for task in TASKS:
            yield card_row(card, task, models)


def card_row(card: str, task: Task, models: Collection[str] = CLIPS) -> str:
    """Return a line of the table."""
    return line(card, task, *(_settings_for(task, model, ROOM * CARDS[card] * GIB) for model in models))


def _settings_for(task: Task, model: str, room: float) -> str:
    for cached in (False, True) if task != "sample" else (False,):
        chosen, found = fit(
            lambda settings, cached=cached: estimate(task, model, settings, cached=cached),
            room,
            SAMPLING if task == "sample" else TRAINING,
        )
        if found.peak <= room:
            names = ", ".join(f"`{_short(change.setting)}`" for change in chosen)
            return "; ".join(filter(None, ["from caches" if cached else "", names])) or "as it is"
    return "—"


def _short(setting: str) -> str:
    """Return a setting without what tells nothing: ``args.`` and the path to it."""
    return setting.removeprefix("args.").removeprefix("model.first_stage_config.params.").removeprefix("deepspeed.")


# Training

STEPS = {
    "nothing recomputed": ("args.checkpoint_activations=false",),
    "recomputed": ("args.checkpoint_activations=true",),
    "recomputed, attention kept": ("args.checkpoint_activations=true", "args.keep_attention=true"),
    "recomputed, offloaded": ("args.checkpoint_activations=true", "args.offload_activations=true"),
    "and `base_weights=int8`": (
        "args.checkpoint_activations=true",
        "args.offload_activations=true",
        "args.base_weights=int8",
    ),
    "and `network_offload=blocks`": (
        "args.checkpoint_activations=true",
        "args.offload_activations=true",
        "args.network_offload=blocks",
    ),
}


def step_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of a training step: weights, adapters and activations of the network."""
    yield from header("model", "clip", *STEPS)
    for model in models:
        yield step_row(model)


def step_row(model: str) -> str:
    """Return a line of the table."""
    return line(f"{model}_lora", clip_text(model), *(float(step_peak(model, how)) for how in STEPS))


@kept
def step_peak(model: str, how: str) -> float:
    """Return the bytes on the device of a step of LoRA training, without the state of the optimizer."""
    run, (frames, height, width) = training("LoRA", model, STEPS[how]), CLIPS[model]
    video = ((frames - 1) // 4 + 1, height, width)
    found = once(network_usage, run.config, video, 1, run.dtype, trained=frozenset(run.trained))
    waits = run.config.args.network_offload == "blocks"
    return found.peak + (run.dtype.itemsize * found.trained if waits else found.stored)


# Presets in training: GB of a card → the files with these settings
TRAINING_PRESETS = {8: "`8gb`, `12gb`, `16gb`", 24: "`24gb`", 48: "`48gb`", 80: "`80gb`"}


def preset_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of presets in training of adapters, from clips and from caches."""
    yield from header("preset", "model", "from", "recomputed", *TRAINING_PHASES, "host memory")
    for card in TRAINING_PRESETS:
        for model in models:
            for cached in (False, True):
                yield preset_row(card, model, cached)


TRAINING_PHASES = {
    "T5 encodes": "text",
    "the VAE encodes": "encode",
    "the network": "network",
    "the optimizer": "optimizer",
    "an evaluation": "validation",
}


def preset_row(card: int, model: str, cached: bool) -> str:
    """Return a line of the table."""
    recomputed, found = preset_peak(card, model, cached)
    phases = [found.device.get(phase, "—") for phase in TRAINING_PHASES.values()]
    source = "caches" if cached else "clips"
    return line(TRAINING_PRESETS[card], f"{model}_lora", source, recomputed, *phases, float(sum(found.host.values())))


@kept
def preset_peak(card: int, model: str, cached: bool) -> tuple[str, Estimate]:
    """Return how many blocks are recomputed, and the estimate."""
    files, run = [f"memory/{card}gb"], training("LoRA", model, (), [f"memory/{card}gb"])
    if run.config.args.checkpoint_activations != "auto":  # pyright: ignore[reportAttributeAccessIssue] (of training)
        return "all", estimate("LoRA", model, files=files, cached=cached)
    encodes = {"vae": not cached, "text_encoder": not cached}
    number, keeps = recomputed_blocks(run.config, run.dtype, run.trained, ROOM * card * GIB, **encodes)
    settings = f"args.checkpoint_activations={number or 'false'}", f"args.keep_attention={str(keeps).lower()}"
    beside = " without attention" if number and keeps else ""
    return f"{number or 'none'}{beside}", estimate("LoRA", model, settings, files=files, cached=cached)


# Bars

RAW, CACHED = "from clips", "from caches"


@dataclass(frozen=True)
class Bar:
    """A figure of this project and the most that it may be.

    Attributes:
        what: is measured.
        model: a key of `CLIPS`.
        most: GiB.
        how: the settings.
        ours: measures it, in bytes.
    """

    what: str
    model: str
    most: float
    how: str
    ours: Callable[[], float]


def bars() -> Iterator[Bar]:
    """Yield the bars, in the order of the table."""
    small, large = "cogvideox_5b", "cogvideox1.5_5b"
    for phase, model, how, most in (
        ("VAE encode", small, "whole clip", 9.5),
        ("VAE encode", small, "`encode_chunk: 8`", 4.0),
        ("VAE decode", small, "whole frames", 5.0),
        ("VAE decode", large, "whole frames", 15.0),
        ("VAE decode", large, "`vae_tiling: true`", 5.0),
    ):
        yield Bar(phase, model, most, how, partial(_vae_activations, phase, model, how))
    yield Bar("sampling in blocks, VAE included", small, 6.0, "`8gb`", partial(_sampling_peak, small, "8gb"))
    for card, preset, model in ((8, "8gb", small), (24, "24gb", small), (16, "8gb", large)):
        what = f"sampling in {card} GB"
        yield Bar(what, model, ROOM * card, f"`{preset}`", partial(_sampling_peak, model, preset))
    for how, most in zip(STEPS, (71.0, 17.0, None, 13.0, 8.5, 5.0), strict=True):
        if most is not None:
            yield Bar("a step of LoRA training, rank 128", small, most, how, partial(step_peak, small, how))
    trainings: tuple[tuple[Task, str, int, str, str], ...] = (
        ("LoRA", small, 24, "memory/24gb", RAW),
        ("LoRA", "cogvideox_5b_i2v", 24, "memory/24gb", RAW),
        ("LoRA", small, 12, "memory/12gb", CACHED),
        ("LoRA", large, 24, "memory/24gb", CACHED),
        ("LoRA", "cogvideox_2b", 10, "memory/12gb", CACHED),
        ("full", "cogvideox_2b", 24, "optimizer/cpu_offload", CACHED),
        ("full", small, 24, "optimizer/cpu_offload", CACHED),
    )
    for task, model, card, file, source in trainings:
        what = f"{task} training in {card} GB, {source}"
        ours = partial(_training_peak, task, model, file, source)
        yield Bar(what, model, ROOM * card, f"`configs/{file}.yaml`", ours)


def _vae_activations(phase: str, model: str, how: str) -> float:
    return vae_peak(phase, model, how)[1]


def _sampling_peak(model: str, preset: str) -> float:
    return estimate("sample", model, [f"args.{key}={value}" for key, value in PRESETS[preset].items()]).peak


def _training_peak(task: Task, model: str, file: str, source: str) -> float:
    return estimate(task, model, files=[file], cached=source == CACHED).peak


def bar_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of bars."""
    yield from header("what", "model", "settings", "at most", "ours")
    for bar in bars():
        if bar.model in models:
            yield bar_row(bar)


def bar_row(bar: Bar) -> str:
    """Return a line of the table."""
    return line(bar.what, bar.model, bar.how, f"{bar.most:.1f}", float(bar.ours()))


# Published figures

OPTIMIZERS: Mapping[str, Sequence[str]] = {  # in the published table → files
    "adamw": (),
    "adamw8bit": ("optimizer/adamw_8bit",),
    "cpuoffload+grads": ("optimizer/cpu_offload",),
    "zero2+offload": ("deepspeed/zero2_offload",),
}


def published_table(models: Collection[str]) -> Iterator[str]:
    """Yield the lines of the table of figures that were published for another trainer, beside ours."""
    compared = ("published", "ours", "ratio", "published with validation", "ours", "ratio")
    yield from header("what", "optimizer", "batch", "rank", "recomputed", *compared)
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if f"cogvideox_{row['model']}" in models:
                yield published_row(row)


def published_row(row: Mapping[str, str]) -> str:
    """Return a line of the table."""
    recomputed, task = "yes" if row["grad_ckpt"] == "1" else "no", "LoRA" if row["kind"] == "lora" else "full"
    cells = []
    for name, ours in zip(("before_validation", "after_validation"), published_peaks(row), strict=True):
        published = row[name]
        given = "> 80" if published == "OOM" else f"{float(published):.1f}"
        cells += [given, ours, "" if published == "OOM" else f"{ours / GIB / float(published):.2f}"]
    return line(f"{row['model']}, {task}", row["optimizer"], row["batch"], row["rank"], recomputed, *cells)


def published_peaks(row: Mapping[str, str]) -> tuple[float, float]:
    """Return the most bytes on the device in our training step of the same settings, from caches, and in the run."""
    settings = [
        f"args.checkpoint_activations={'true' if row['grad_ckpt'] == '1' else 'false'}",
        f"deepspeed.train_micro_batch_size_per_gpu={row['batch']}",
    ]
    if row["kind"] == "lora" and row["rank"] != "-":
        settings.append(f"model.network_config.params.modules.lora_config.params.r={row['rank']}")
    task: Task = "LoRA" if row["kind"] == "lora" else "full"
    files = OPTIMIZERS[row["optimizer"]]
    found = estimate(task, f"cogvideox_{row['model']}", settings, files=files, cached=True)
    return max(found.device[phase] for phase in ("network", "optimizer")), found.peak


TABLES: dict[str, Callable[[Collection[str]], Iterator[str]]] = {
    "vae": vae_table,
    "sampling": sampling_table,
    "stored": stored_table,
    "step": step_table,
    "training": preset_table,
    "cards": card_table,
    "published": published_table,
    "bars": bar_table,
}


def _measured(models: Sequence[str], tables: Sequence[str]) -> dict[tuple[Any, ...], Any]:
    """Measure what tables say about some models."""
    for name in tables:
        for _ in TABLES[name](models):
            pass
    return _results


MARKS = "<!-- {}: written by benchmarks/memory.py -->\n\n", "\n\n<!-- end of {} -->"


def write_tables(path: Path, tables: Mapping[str, Sequence[str]], *, dry: bool = False) -> None:
    """Put the lines of tables between the marks of their names in a page; `dry` only looks for the marks.

    Raises:
        InputError: a mark is missing or repeated.
    """
    page = path.read_text(encoding="utf-8")
    for name, lines in tables.items():
        start, end = (mark.format(name) for mark in MARKS)
        if page.count(start) != 1 or page.count(end) != 1:
            raise InputError(f"{path} must hold the lines '{start.strip()}' and '{end.strip()}', each once")
        before, _, rest = page.partition(start)
        page = "".join([before, start, "\n".join(lines), end, rest.partition(end)[2]])
    if not dry:
        path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Print the tables, measured by as many processes as there are cores and groups of models, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables in this file")
    options = parser.parse_args(argv)
    try:
        if options.write is not None:
            write_tables(options.write, dict.fromkeys(options.only, ()), dry=True)  # before the work
        workers = min(os.cpu_count() or 1, len(GROUPS))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(_measured, GROUPS, [options.only] * len(GROUPS)):
                _results.update(found)
        tables = {name: list(TABLES[name](CLIPS)) for name in options.only}
        if options.write is not None:
            write_tables(options.write, tables)
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if options.write is None:
        sys.stdout.writelines("\n".join([*lines, "", ""]) for lines in tables.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
