"""Print the tables of docs/parallelism.md: memory and traffic by model, number of devices and configuration files.

Run from the project's folder:
    python tools/parallel_table.py

Memory and traffic are estimated by `sgm.checks.estimate`, for the shipped model files, with clips and videos of
full length, and the text encoder offloaded to the machine's memory.
"""

import os
import sys
from pathlib import Path

from sgm.checks.estimate import Estimate, sampling_estimate, training_estimate
from sgm.config.load import Config, Mode, load_config
from sgm.util import PRECISIONS, instantiate_from_config, prepare_import, without_allocating

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {
    "2B": "cogvideox_2b",
    "5B": "cogvideox_5b",
    "1.5-5B": "cogvideox1.5_5b",
    "5B, LoRA": "cogvideox_5b_lora",
}
VAE_PHASE: dict[Mode, str] = {"inference": "decode", "train": "encode"}
# Mode → (model, number of devices, files after those of the model and the task).
ROWS: dict[Mode, list[tuple[str, int, tuple[str, ...]]]] = {
    "inference": [
        (model, devices, (f"parallel/sample_{devices}",) if devices > 1 else ())
        for model in ("2B", "5B", "1.5-5B")
        for devices in (1, 2, 4, 8)
    ],
    "train": [
        ("2B", 1, ("deepspeed/zero2_offload",)),
        ("2B", 2, ("deepspeed/zero2",)),
        ("2B", 8, ("deepspeed/zero2",)),
        ("2B", 64, ("deepspeed/zero1",)),
        ("5B, LoRA", 1, ()),
        ("5B, LoRA", 8, ()),
        ("5B", 1, ("deepspeed/zero2_offload",)),
        ("5B", 2, ("deepspeed/zero3_offload", "parallel/train_2")),
        ("5B", 8, ("deepspeed/zero3",)),
        ("5B", 8, ("deepspeed/zero3", "parallel/train_2")),
        ("5B", 64, ("deepspeed/zero2", "parallel/train_2")),
        ("1.5-5B", 8, ("deepspeed/zero3", "parallel/train_8")),
        ("1.5-5B", 64, ("deepspeed/zero3", "parallel/train_8")),
    ],
}


def config_of(model: str, files: tuple[str, ...], mode: Mode) -> Config:
    """Read the configuration of a row: the files of the model, of the task, and its own."""
    own = "inference" if mode == "inference" else "sft"
    bases = [CONFIGS / f"{name}.yaml" for name in (MODELS[model], own, *files)]
    return load_config(bases, ["args.text_encoder_offload=cpu"] if mode == "train" else [], mode=mode)


def estimate(model: str, devices: int, files: tuple[str, ...], mode: Mode) -> Estimate:
    """Estimate a row: memory and traffic of one of `devices` processes."""
    os.environ["WORLD_SIZE"] = str(devices)  # as a launcher sets it
    config = config_of(model, files, mode)
    dtype = PRECISIONS[config.model["precision"]]
    if mode == "inference":
        return sampling_estimate(config, dtype)
    with without_allocating():
        network = instantiate_from_config(config.model["network_config"])
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    adapters = [name for name in names if ".matrix_" in name]
    return training_estimate(config, dtype, adapters or names)


def row(mode: Mode, model: str, devices: int, files: tuple[str, ...]) -> str:
    """Return a line of the table for ``inference`` or ``train``."""
    found = estimate(model, devices, files, mode)
    sizes = [f"{sum(found.phases[phase].values()) / 2**30:.1f}" for phase in ("network", VAE_PHASE[mode])]
    names = ", ".join(f"`{name}.yaml`" for name in files)
    return f"| {model} | {devices} | {names} | {' | '.join(sizes)} | {sum(found.traffic.values()) / 1e9:.1f} |"


def table(mode: Mode) -> str:
    """Return the table for ``inference`` or ``train``."""
    titles = [f"in {phase}, GiB" for phase in ("network", VAE_PHASE[mode])]
    lines = ["| model | devices | files | " + " | ".join(titles) + " | sent, GB a step |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [row(mode, *case) for case in ROWS[mode]]) + "\n"


def main() -> None:
    """Print both tables."""
    prepare_import()
    sys.stdout.write("\n".join(map(table, ROWS)))


if __name__ == "__main__":
    main()
