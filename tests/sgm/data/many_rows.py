"""Start training on a data set of many rows, up to the first batch, then check the rows; print time and memory.

Not a test: a test runs it in its own process, to measure the peak memory.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import check_dataset  # noqa: E402

from sgm.config.load import load_config  # noqa: E402
from sgm.data.loader import SampleStream, make_loader  # noqa: E402
from sgm.data.order import TrainingOrder  # noqa: E402
from sgm.training.bad_clips import usable_data  # noqa: E402
from sgm.training.inputs.clips import open_data  # noqa: E402


def memory(kind: str) -> int:
    """Return VmRSS, the present memory, or VmHWM, the peak, in bytes; getrusage includes that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


@contextmanager
def timed(found: dict[str, float], name: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found |= {f"{name}_wall": time.perf_counter() - wall, f"{name}_cpu": time.process_time() - cpu}


def main(root: str, runs: Path) -> None:
    """Run with the settings of the toy models."""
    bases = [ROOT / "configs" / f"{name}.yaml" for name in ("toy", "toy_sft")]
    config, found = load_config(bases, [f"args.train_data=[{root}]"], mode="train"), {}
    before = memory("VmRSS")
    with timed(found, "start"):
        data, _ = usable_data(open_data(config), config.args, runs, resumed=False)
        order = TrainingOrder([len(dataset) for dataset in data.train], seed=0)
        stream = SampleStream(data.train, order)
        loader = make_loader(stream, first=0, stop=8, rank=0, world=1, micro_batch=4, num_workers=2)
        batch = next(iter(loader))
    found |= {"rows": data.num_train + len(data.validation), "batch": list(batch["mp4"].shape)}
    found["bytes"] = memory("VmHWM") - before
    del data, order, stream, loader, batch
    with timed(found, "check"), (runs / "rows.txt").open("w") as file, redirect_stdout(file):
        found["exit"] = check_dataset.main([root, "--video_size", "64", "64", "--rows_only"])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
