"""Measure how long training waits for its saves, written before it goes on or beside it (args.async_save).

    python -m benchmarks.saves
    python -m benchmarks.saves --gb 0.3 --ranks 1

Trains a network with random weights of the toy's kind on the CPU, with ZeRO 2 and AdamW in float32, once for each way
of saving. A save writes the weights and the state to resume from, about `--gb` in all. Prints the mean seconds that
training waited for a save, and the longest; the last save, for which the end of a run waits, is left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runs import launch
from sgm.util import RunError

WAYS = {"false": "before training goes on", "true": "beside training"}
BYTES = 20  # of a parameter: twice in float32 (weights, state), its master copy and two moments
LAYERS, WIDTH = 4, 128  # hidden sizes are multiples


def hidden_size(num_bytes: float) -> int:
    """Return the hidden size of a network whose save has about this many bytes."""
    # A block has 4 matrices of attention, 8 of the MLP and a modulation of a width of 64: 12 D² + 12 · 64 D.
    return WIDTH * max(1, round((num_bytes / BYTES / LAYERS / 12) ** 0.5 / WIDTH))


def train(folder: Path, way: str, gigabytes: float, ranks: int, saves: int, interval: int) -> Path:
    """Train with one way of saving; return the run folder."""
    network = "model.network_config.params"
    size = hidden_size(gigabytes * 1e9)
    words = [
        *("--base", "configs/toy.yaml", "configs/toy_sft.yaml"),
        *("args.mode=pretrain", "args.load=null", f"args.save={folder / way}", f"args.async_save={way}"),
        *(f"args.train_iters={(saves + 1) * interval}", f"args.save_interval={interval}", "args.keep_last=1"),
        *("args.log_interval=1", "args.eval_interval=null", "args.valid_prompts=null", "args.num_workers=0"),
        *(f"{network}.hidden_size={size}", f"{network}.num_layers={LAYERS}"),
        f"{network}.num_attention_heads={size // 32}",
        *("deepspeed.train_micro_batch_size_per_gpu=1", "data.params.max_num_frames=5"),
    ]
    for line in launch(ranks, ["train_video.py", *words]).splitlines():
        if "waited" in line:
            sys.stdout.write(f"{line}\n")
    (run,) = (folder / way).iterdir()
    return run


def waits(run: Path, interval: int) -> list[float]:
    """Return the seconds that training waited for each save but the last, by the lines of metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # A line is written before the save of its iteration.
    return [line["save_seconds"] for line in lines if line["iteration"] % interval == 1 and line["iteration"] > 1]


def measure(options: argparse.Namespace) -> None:
    """Train each way, and print the waits for its saves."""
    with tempfile.TemporaryDirectory() as folder:
        for way, words in WAYS.items():
            run = train(Path(folder), way, options.gb, options.ranks, options.saves, options.interval)
            files = [path for part in run.glob("[0-9]*") for path in part.iterdir()]
            files += [path for path in (run / "resume").glob("*/*") if path.is_file()]
            size = sum(path.stat().st_size for path in files) / 1e9
            found = waits(run, options.interval)
            shown = ", ".join(f"{seconds:.2f}" for seconds in found)
            sys.stdout.write(
                f"{words}: {size:.2f} GB on {options.ranks} ranks, training waited {sum(found) / len(found):.2f} s for "
                f"a save, {max(found):.2f} s for the longest ({shown})\n"
            )
            sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both ways and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="of a save")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5, help="that are measured")
    parser.add_argument("--interval", type=int, default=20, help="iterations between saves")
    options = parser.parse_args(argv)
    try:
        measure(options)
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
