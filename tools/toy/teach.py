"""Trainings of the toy by the tools that measure what it has learned."""

from pathlib import Path
from typing import Any

from sgm.training.main import main as train
from sgm.util import RunError

# Of the shipped LoRA.
TARGETS = "model.network_config.params.modules.lora_config.params.targets=[attention,ff,patch,text]"


def run_training(*words: str) -> None:
    """Train with the words of a command line.

    Raises:
        RunError: it failed.
    """
    code = train([*words])
    if code:
        raise RunError(f"training ended with the exit code {code}")


def trained(folder: Path, name: str, steps: int, *words: str, **settings: Any) -> Path:
    """Train from the start on the clips in ``<folder>/clips``; return the run folder.

    Args:
        folder: for the run too.
        name: of the run.
        steps: of training, 8 clips each.
        words: ``--base``, YAML files and other words of the command line.
        settings: further ones of the section ``args``.
    """
    settings = {
        "train_data": f"[{folder / 'clips'}]",
        "train_iters": steps,
        "save_interval": steps,
        "precompute": "true",
        "resume": "none",
        "save": folder,
        "experiment_name": name,
        **settings,
    }
    batch = "deepspeed.train_micro_batch_size_per_gpu=8"
    run_training(*words, batch, *(f"args.{key}={value}" for key, value in settings.items()))
    return max(folder.glob(f"{name}-*"))
