"""How time and memory grow with frames, resolution, batch, ranks, and with the rows of a data set.

    python -m benchmarks.growth
    python -m benchmarks.growth --only data --rows 10 1000 100000
    python -m benchmarks.growth --plot docs/growth.png

Memory is the planner's, of the released CogVideoX1.5-5B on one of several ranks, by meta tensors. Times are processor
times on this machine, of a small network; where several gloo ranks share its tokens, those of one of them. A data set
is a metadata.jsonl with empty files for clips.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import HostMemory
from benchmarks.models import NetworkSize, build_network, network_section
from benchmarks.runs import random, sampling_config, seconds_of_ranks, write_shared_seconds
from data_video import SFTDataset
from sgm.checks.estimate import sampling_estimate, training_estimate
from sgm.checks.meta_run import build
from sgm.config.load import load_config
from sgm.data.buckets.assign import clip_sizes
from sgm.data.buckets.config import parse_buckets
from sgm.data.buckets.plan import BucketPlan, Division
from sgm.data.clips.index import remember
from sgm.data.order import TrainingOrder
from sgm.data.rows import VideoInfo
from sgm.training.optim.trainable import choose_trainable
from sgm.util import RunError

GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "configs"
MODEL = "cogvideox1.5_5b"
FRAMES, SIZE = 11, (384, 672)  # latent frames, pixels: where one of the others grows
# Axis → values: latent frames, (height, width), samples, ranks that share the tokens.
AXES: dict[str, Sequence[Any]] = {
    "frames": (6, 11, 21),
    "resolution": ((192, 336), (384, 672), (768, 1360)),
    "batch": (1, 2, 4),
    "ranks": (1, 2, 4, 8),
}
# Of the small network: latents (T, H, W), and samples or ranks.
SMALL = NetworkSize(256, 4, 4, 256, latents=(16, 32, 48), text_length=226, text_hidden_size=512)
TIMES: dict[str, Sequence[tuple[int, int, int, int]]] = {
    "frames": ((2, 16, 24, 1), (4, 16, 24, 1), (8, 16, 24, 1), (16, 16, 24, 1)),
    "resolution": ((4, 8, 12, 1), (4, 16, 24, 1), (4, 32, 48, 1)),
    "batch": ((4, 16, 24, 1), (4, 16, 24, 2), (4, 16, 24, 4)),
    "ranks": ((16, 16, 24, 1), (16, 16, 24, 2), (16, 16, 24, 4)),
}


@dataclass(frozen=True)
class Point:
    """One value on an axis.

    Attributes:
        axis: what grows.
        shown: the value as text.
        tokens: patches, times the samples; rows of a data set.
        figures: name → seconds or bytes.
    """

    axis: str
    shown: str
    tokens: int
    figures: dict[str, float]


def memory_points() -> Iterator[Point]:
    """Yield the bytes on a rank's device while the network samples, and in a step of LoRA, with recomputation."""
    for axis, values in AXES.items():
        for value in values:
            frames, size, batch, ranks = FRAMES, SIZE, 1, 1
            frames = value if axis == "frames" else frames
            size = value if axis == "resolution" else size
            batch, ranks = value if axis == "batch" else batch, value if axis == "ranks" else ranks
            shared = f"args.sampling_image_size=[{size[0]},{size[1]}]", f"args.sequence_parallel_size={ranks}"
            sampling = [*shared, f"args.sampling_num_frames={frames}", f"args.batch_size={batch}"]
            config = sampling_config(MODEL, "released", *sampling)
            sampled = sampling_estimate(config, torch.bfloat16).device["network"]
            step = _lora_step(
                *shared,
                f"data.params.max_num_frames={4 * (frames - 1) + 1}",
                f"deepspeed.train_micro_batch_size_per_gpu={batch}",
            )
            tokens = batch * -(-frames // 2) * (size[0] // 16) * (size[1] // 16)
            shown = "×".join(map(str, value)) if axis == "resolution" else str(value)
            yield Point(axis, shown, tokens, {"sampling": sampled, "LoRA step": step})


def _lora_step(*settings: str) -> float:
    bases = [CONFIGS / f"{MODEL}_lora.yaml", CONFIGS / "sft.yaml"]
    # The estimate of an evaluation, which is not shown, would take as long again.
    more = ["args.eval_interval=null", "args.eval_batch_size=null"]
    config = load_config(bases, [*settings, *more], mode="train")
    trained = choose_trainable(build(config.model["network_config"]), config.model).names
    return training_estimate(config, torch.bfloat16, trained, vae=False, text_encoder=False).device["network"]


def time_points() -> Iterator[Point]:
    """Yield the fewest seconds of a forward pass of the small network, on one of the ranks that share it."""
    for axis, values in TIMES.items():
        for *latents, number in values:
            frames, height, width = latents
            shown = {"frames": str(frames), "resolution": f"{8 * height}×{8 * width}"}.get(axis, str(number))
            ranks, batch = (number, 1) if axis == "ranks" else (1, number)
            if ranks == 1:
                seconds = forward_seconds(batch, *latents)
            else:
                words = ["-m", "benchmarks.growth", "--rank-of", *map(str, (batch, *latents))]
                seconds = seconds_of_ranks(ranks, words, OMP_NUM_THREADS="1")
            yield Point(axis, shown, batch * frames // 2 * height * width // 4, {"forward": seconds})


@torch.no_grad()
def forward_seconds(batch: int, frames: int, height: int, width: int, repeats: int = 3) -> float:
    """Return the fewest processor seconds of a forward pass of this process, shared with all ranks that there are."""
    network = build_network(network_section(MODEL, SMALL))
    cpu = torch.device("cpu")
    x = random(batch, frames, network.in_channels, height, width, device=cpu)
    context = random(1, SMALL.text_length, SMALL.text_hidden_size, device=cpu).expand(batch, -1, -1)
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        network(x, torch.full((batch,), 500), context)
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def make_rows(folder: Path, num: int) -> None:
    """Write a manifest and an empty file for each of its clips."""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for index in range(num):
            name = f"{index:06d}.mp4"
            (folder / name).touch()
            file.write(json.dumps({"file_name": name, "text": f"clip {index} of a growing data set"}) + "\n")


def data_points(counts: Sequence[int]) -> Iterator[Point]:
    """Yield the seconds and bytes of opening data sets, of their index and of dividing them among buckets."""
    buckets = parse_buckets(["49x480x720", "25x480x720", "49x720x480", "49x256x384"])
    for num in counts:
        figures: dict[str, float] = {}

        @contextmanager
        def timed(name: str, figures: dict[str, float] = figures) -> Iterator[None]:
            start = time.process_time()
            yield
            figures[name] = time.process_time() - start

        with tempfile.TemporaryDirectory(prefix="growth-") as folder:
            make_rows(Path(folder), num)
            with HostMemory() as memory:
                with timed("rows read"):
                    dataset = SFTDataset(data_dir=folder, video_size=(480, 720))
                sizes = ((480, 720), (720, 480), (256, 384))
                shapes = (sizes[index % 3] for index in range(num))
                infos = {row.path: VideoInfo(200, 16.0, 12.5, *shape) for row, shape in zip(dataset.rows, shapes)}  # noqa: B905
                if num >= 200:  # smaller data sets have no index
                    with timed("index written"):
                        remember(infos, folder)
                    with timed("index read"):
                        found: list[Any] = dataset.clip_infos()
                    assert found == list(infos.values()), "the index has what was written"
                with timed("buckets planned"):
                    clips = clip_sizes(list(infos.values()), fps=dataset.fps, skip=dataset.skip)
                    division = Division(buckets=buckets, ranks=2, micro_batch=2)
                    plan = BucketPlan(TrainingOrder([num], seed=0), division, clips)
                    steps = plan.steps(1)
                    next(iter(plan.rank_batches(0, first=0, stop=1)))
            figures |= {"memory": memory.own}
            assert steps > 0
        yield Point("rows", f"{num:,}", num, figures)


def table(points: Sequence[Point], form: Callable[[str, float], str]) -> list[str]:
    """Return a Markdown table: a row for each value on an axis."""
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    lines = [f"| what grows | value | tokens or rows | {' | '.join(names)} |", "|" + "---|" * (len(names) + 3)]
    for point in points:
        cells = (form(name, point.figures[name]) if name in point.figures else "" for name in names)
        lines.append(f"| {point.axis} | {point.shown} | {point.tokens:,} | {' | '.join(cells)} |")
    return lines


def plot(path: Path, memory: Sequence[Point], times: Sequence[Point], data: Sequence[Point]) -> None:
    """Draw a picture with five parts, from zero on linear axes; the rows of data sets on logarithmic ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 3)
    parts = (
        (grid[0, 0], "memory of a rank (planned), GiB", "tokens of all samples", memory, GIB),
        (grid[0, 1], "memory of a rank (planned), GiB", "ranks", memory, GIB),
        (grid[1, 0], "forward pass of a small network, CPU s", "tokens of all samples", times, 1.0),
        (grid[1, 1], "the same on one of the ranks, CPU s", "ranks", times, 1.0),
        (grid[0, 2], "opening a data set, CPU s", "rows", data, 1.0),
    )
    for axes, title, label, points, unit in parts:
        for axis in dict.fromkeys(point.axis for point in points if (point.axis == "ranks") == (label == "ranks")):
            those = [point for point in points if point.axis == axis]
            for name in dict.fromkeys(name for point in those for name in point.figures if name != "memory"):
                chosen = [point for point in those if name in point.figures]
                x = [int(point.shown) if axis == "ranks" else point.tokens for point in chosen]
                shown = name if axis in ("rows", "ranks") else f"{name}: {axis}"
                axes.plot(x, [point.figures[name] / unit for point in chosen], marker="o", label=shown)
                if axis == "ranks":
                    axes.set_xticks(x)
        axes.set(title=title, xlabel=label)
        axes.set(**(dict(xscale="log", yscale="log") if label == "rows" else dict(xlim=(0, None), ylim=(0, None))))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    grid[1, 2].axis("off")
    figure.savefig(path, dpi=80)


def _text(name: str, value: float) -> str:
    if name in ("sampling", "LoRA step"):
        return f"{value / GIB:.1f} GiB"
    if name == "memory":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.3f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "time", "data"), help="one of the tables")
    parser.add_argument("--rows", nargs="+", type=int, default=[10, 1000, 100_000], help="rows of the data sets")
    parser.add_argument("--plot", type=Path, help="also draw all of it into this picture")
    parser.add_argument("--rank-of", nargs=4, type=int, help=argparse.SUPPRESS)  # of the ranks that this starts
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args(argv)
    if words.rank_of:
        write_shared_seconds(words.json, partial(forward_seconds, *words.rank_of))
        return 0
    parts: dict[str, Callable[[], Iterator[Point]]] = {
        "memory": memory_points,
        "time": time_points,
        "data": lambda: data_points(words.rows),
    }
    try:
        found = {name: list(make()) if words.only in (None, name) else [] for name, make in parts.items()}
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for points in filter(None, found.values()):
        print("\n".join([*table(points, _text), ""]), flush=True)
    if words.plot:
        plot(words.plot, found["memory"], found["time"], found["data"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
