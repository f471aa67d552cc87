"""What the files of configs/speed leave out and change, on the toy models, as the table of docs/speed.md.

python -m benchmarks.step_cache
python -m benchmarks.step_cache --samples 4 --configs toy
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools" / "toy"))  # its modules import each other by name, as scripts do

import quality  # noqa: E402
from scene import Clip, psnr  # noqa: E402

from sgm.config.load import load_config  # noqa: E402

SPEEDS = ("exact", "balanced", "fast")


@dataclass(frozen=True)
class Row:
    """One model with one file of configs/speed; PSNR against the exact videos, of all together and of the worst."""

    model: str
    speed: str
    share_run: float
    time: float
    psnr: float
    psnr_least: float
    quality: quality.SampleQuality

    def __str__(self) -> str:
        """Return a row of the table."""
        near = "equal" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB (worst {self.psnr_least:.1f})"
        right = ", ".join(f"{getattr(self.quality, name):.0%}" for name in ("colour", "shape", "direction"))
        return f"| {self.model} | `{self.speed}` | {self.share_run:.0%} | {self.time:.2f} | {near} | {right} |"


def measure(model: str, clips: Sequence[Clip], speeds: Sequence[str] = SPEEDS) -> Iterator[Row]:
    """Sample the captions of `clips` one by one with each speed; `speeds` begin with ``exact``."""
    base = f"configs/{model}.yaml"
    engine = quality.load_engine(base)
    exact: list[np.ndarray] = []
    exact_seconds = 0.0
    for speed in speeds:
        args = load_config([base, f"configs/speed/{speed}.yaml"], mode="inference").args
        engine.use_step_cache(args.step_cache, args.step_cache_threshold)
        videos, shares, start = [], [], time.process_time()
        for clip in clips:
            videos += quality.sample(engine, [clip], with_image="i2v" in model)
            shares.append(1.0 if engine.step_cache is None else engine.step_cache.share_run)
        seconds = time.process_time() - start
        if not exact:
            exact, exact_seconds = videos, seconds
        near = [psnr(a, b) for a, b in zip(videos, exact, strict=True)]
        judged: Any = quality.judge(videos, clips, with_image="i2v" in model)
        yield Row(
            model,
            speed,
            float(np.mean(shares)),
            seconds / exact_seconds,
            psnr(np.stack(videos), np.stack(exact)),
            min(near),
            judged,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["toy", "toy_i2v"], help="model files (default: both toys)")
    parser.add_argument("--samples", type=int, default=24, help="held-out clips sampled of each (default: 24)")
    words = parser.parse_args(argv)
    print("| model | file | blocks run | CPU time | PSNR to exact | colour, shape, direction right |")
    print("|---|---|---|---|---|---|")
    for model in words.configs:
        for row in measure(model, quality.held_out_clips(words.samples)):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
