"""How fast clips are decoded, caches read and checkpoints loaded, and how much host memory loading takes.

    python -m benchmarks.data
    python -m benchmarks.data --only load --gb 10

Clips are made for the run: moving noise and gradients in H.264 with B-frames. Readers give the same frames in the same
size, as floats, and alternate. Everything is read from the page cache, after a first round that does not count. CPU
times stay comparable on a busy machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from benchmarks.loading import Weights
from data_video import SFTDataset, as_samples
from sgm.data import cache
from sgm.data.clips.decode import scan
from sgm.data.clips.frames import select_frames
from sgm.weights.checkpoint import load_network
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import PREFIX

ROOT = Path(__file__).parents[1]
FPS = 8.0  # of training clips
SOURCES = {  # name → frames, height, width, frames per second, frames between keyframes
    "480p, GOP 250": (104, 480, 854, 16, 250),
    "720p, GOP 24": (160, 720, 1280, 24, 24),
    "720p, GOP 250": (160, 720, 1280, 24, 250),
}
TARGET = (49, 480, 720)
SIDE = 3072  # of the matrices of a checkpoint
SHARD = 32  # samples of a cache


def make_clips(folder: Path, num: int, shape: tuple[int, int, int], fps: int, gop: int) -> None:
    """Write clips with captions in the layout of a training folder."""
    frames, height, width = shape
    for name in ("videos", "labels"):
        (folder / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(num):
        texture = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
        moved = (np.roll(texture, (frame, 2 * frame), (0, 1))[:height, :width] for frame in range(frames))
        video = np.stack([picture // 2 + ramp // 2 for picture in moved])
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
        encoder = ["-c:v", "libx264", "-preset", "fast", "-bf", "3", "-g", str(gop), "-pix_fmt", "yuv420p"]
        words = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *encoder]
        subprocess.run([*words, str(folder / "videos" / f"{index}.mp4")], input=video.data.cast("B"), check=True)
        (folder / "labels" / f"{index}.txt").write_text("a texture that moves\n", encoding="utf-8")


def readers(folder: Path, target: tuple[int, int, int]) -> dict[str, Callable[[int], Any]]:
    """Return functions that read clip n of a folder: ours, decord for ours, and as diffusers' training script reads it.

    The second gets the same frames of decord, and resizes and crops them as ours; the third lets decord scale them.
    """
    from decord import VideoReader  # of the extra "dev"

    frames, height, width = target
    dataset = SFTDataset(data_dir=folder, video_size=(height, width), fps=FPS, max_num_frames=frames)
    paths, indices = dataset.paths, []
    for path in paths:
        scanned = scan(path)
        end = scanned.times[0] + scanned.info.duration
        found = select_frames(scanned.times, fps=FPS, max_num_frames=frames, skip=dataset.skip, end=end)
        indices.append(list(found.indices))

    def decord(index: int) -> torch.Tensor:
        pictures = VideoReader(paths[index], num_threads=1).get_batch(indices[index]).asnumpy()
        return as_samples(pictures, (height, width))

    def stretched(index: int) -> torch.Tensor:
        reader = VideoReader(paths[index], width=width, height=height, num_threads=1)
        video = torch.from_numpy(reader.get_batch(indices[index]).asnumpy()).float()
        return video.permute(0, 3, 1, 2).contiguous() / 127.5 - 1

    def ours(index: int) -> torch.Tensor:
        return dataset[index]["mp4"]

    for index in range(len(paths)):
        assert torch.allclose(ours(index), decord(index), atol=0.1), "decord gives other frames than those asked for"
    return {"ours": ours, "decord, resized as ours": decord, "as diffusers reads": stretched}


def clip_lines(num: int, rounds: int) -> Iterator[str]:
    """Measure reading clips, in turns; yield the lines of the table."""
    yield "| clips | reader | clips/s | frames/s | CPU seconds a clip | CPU time to ours |"
    yield "|---|---|---|---|---|---|"
    for source, (frames, height, width, fps, gop) in SOURCES.items():
        with tempfile.TemporaryDirectory(prefix="data-") as folder:
            make_clips(Path(folder) / "clips", num, (frames, height, width), fps, gop)
            functions = readers(Path(folder) / "clips", TARGET)
            walls: dict[str, list[float]] = {name: [] for name in functions}
            cpus: dict[str, list[float]] = {name: [] for name in functions}
            for turn, index, (name, function) in product(range(rounds + 1), range(num), functions.items()):
                wall, cpu = time.perf_counter(), time.process_time()
                function(index)
                if turn:
                    walls[name].append(time.perf_counter() - wall)
                    cpus[name].append(time.process_time() - cpu)
        for name, times in cpus.items():
            ratio = statistics.median(a / b for a, b in zip(times, cpus["ours"], strict=True))
            speed, seconds = 1 / statistics.median(walls[name]), statistics.median(times)
            yield f"| {source} | {name} | {speed:.2f} | {TARGET[0] * speed:.0f} | {seconds:.2f} | {ratio:.2f} |"


def cache_lines(num: int, rounds: int) -> Iterator[str]:
    """Measure reading cached moments in random order, with their checks; yield the lines of the table."""
    yield "| cached moments, bf16 | MB each | samples/s | GB/s | samples per CPU second |"
    yield "|---|---|---|---|---|"
    for frames, height, width in (TARGET, (17, 256, 384)):
        latents = 32, (frames - 1) // 4 + 1, height // 8, width // 8
        keys = [str(index) for index in range(num)]
        shards = tuple(tuple(keys[start : start + SHARD]) for start in range(0, num, SHARD))
        shape = f"{frames}x{height}x{width}"
        description = cache.Description("latents", "bf16", {"precision": "bf16"}, shards, (shape,) * num)
        generator = torch.Generator().manual_seed(0)
        with tempfile.TemporaryDirectory(prefix="data-") as folder:
            cache.begin(Path(folder), description)
            for number, shard in enumerate(shards):
                results = (torch.randn(latents, generator=generator) for _ in shard)
                cache.write_shard(Path(folder), description, number, results)
            tensors = cache.CachedTensors(folder, "latents")
            order = torch.randperm(num, generator=generator).tolist()
            walls, cpus = [], []
            for _ in range(rounds + 1):
                wall, cpu = time.perf_counter(), time.process_time()
                size = sum(tensors[keys[index]].nbytes for index in order)
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
        each, speed = size / num, num / min(walls[1:])
        figures = f"{speed:.0f} | {speed * each / 1e9:.1f} | {num / min(cpus[1:]):.0f}"
        yield f"| {shape} | {each / 1e6:.2f} | {figures} |"


class HostMemory(threading.Thread):
    """Context that watches this process's memory, every few milliseconds.

    Attributes:
        own: the most bytes beyond those at the beginning that only this process has.
        all: the same with pages of mapped files, which the system may drop at any time.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.own = self.all = 0
        self._start_values = self._read()

    def __enter__(self) -> "HostMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self._compare()

    def run(self) -> None:
        """Watch until the end of the context."""
        while not self._ended.wait(0.005):
            self._compare()

    def _compare(self) -> None:
        own, files = (now - then for now, then in zip(self._read(), self._start_values, strict=True))
        self.own, self.all = max(self.own, own), max(self.all, own + files)

    @staticmethod
    def _read() -> tuple[int, int]:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        values = dict(line.split(":", 1) for line in lines)
        return tuple(1024 * int(values[name].split()[0]) for name in ("RssAnon", "RssFile"))  # pyright: ignore


def write_checkpoint(path: Path, num: int) -> None:
    """Write a random matrix in bfloat16 under many names."""
    matrix = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    write_safetensors(path, {f"{PREFIX}layers.{index}": matrix for index in range(num)})


def load_and_report(path: Path, num: int) -> None:
    """Load a checkpoint in this process; print seconds and bytes as JSON."""
    with torch.device("meta"):
        network = Weights(num, torch.bfloat16)
    with HostMemory() as memory:
        start = time.perf_counter()
        load_network(network, path, dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    sys.stdout.write(json.dumps({"seconds": seconds, "own": memory.own, "all": memory.all}) + "\n")


def load_lines(gb: float) -> Iterator[str]:
    """Measure loading a checkpoint in a process of its own; yield the lines of the table."""
    yield "| file | seconds | GB/s | reading alone, GB/s | peak of own memory/file | with mapped pages |"
    yield "|---|---|---|---|---|---|"
    num = max(1, round(gb * 1e9 / (2 * SIDE * SIDE)))
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        path = Path(folder) / "weights.safetensors"
        write_checkpoint(path, num)
        size, start = path.stat().st_size, time.perf_counter()
        with path.open("rb", buffering=0) as file:
            block = bytearray(2**24)
            while file.readinto(block):
                pass
        alone = size / (time.perf_counter() - start) / 1e9
        words = [sys.executable, "-m", "benchmarks.data", "--loads", str(path), "--matrices", str(num)]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    speed = size / found["seconds"] / 1e9
    shares = " | ".join(f"{found[name] / size:.3f}" for name in ("own", "all"))
    yield f"| {size / 1e9:.1f} GB | {found['seconds']:.1f} | {speed:.2f} | {alone:.2f} | {shares} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("clips", "cache", "load"), help="one of the tables")
    parser.add_argument("--clips", type=int, default=4, help="clips that are read")
    parser.add_argument("--samples", type=int, default=128, help="samples of a cache")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all of them")
    parser.add_argument("--gb", type=float, default=10, help="size of the checkpoint")
    parser.add_argument("--loads", type=Path, help=argparse.SUPPRESS)  # the process that `load_lines` starts
    parser.add_argument("--matrices", type=int, help=argparse.SUPPRESS)
    words = parser.parse_args(argv)
    if words.loads:
        load_and_report(words.loads, words.matrices)
        return 0
    tables = {
        "clips": lambda: clip_lines(words.clips, words.rounds),
        "cache": lambda: cache_lines(words.samples, words.rounds),
        "load": lambda: load_lines(words.gb),
    }
    for name, lines in tables.items():
        for line in lines() if words.only in (None, name) else ():
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
