"""Tiny training runs: golden networks on clips of coloured noise."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from sgm.config.load import load_config
from sgm.inference.video import write_video
from sgm.training.run import train

FRAMES, HEIGHT, WIDTH = 9, 64, 96
FIXED_SIZE = ("dit_t2v_2b", "dit_i2v_5b")  # position tables
CAPTIONS = ["a red circle moves left", "a blue square moves right", "a green triangle moves up"]


def write_clips(folder: Path, num: int) -> Path:
    """Write `num` clips with captions in the videos/ + labels/ layout: blurred noise that drifts, 8 fps."""
    (folder / "labels").mkdir(parents=True)
    for index in range(num):
        noise = np.random.default_rng(index).integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
        picture = np.kron(noise, np.ones((16, 16, 1), np.uint8))
        frames = np.stack([np.roll(picture, 4 * frame, axis=1) for frame in range(FRAMES)])
        write_video(folder / "videos" / f"{index:03d}.mp4", frames, 8)
        (folder / "labels" / f"{index:03d}.txt").write_text(CAPTIONS[index % 3])
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 8)


@pytest.fixture(scope="session")
def training_yaml(tiny_model, clips, tmp_path_factory):
    """Return a function: name of a golden network → YAML files for training it, full or LoRA."""
    folder = tmp_path_factory.mktemp("training")

    def make(name: str) -> list[str]:
        path = folder / f"{name}.yaml"
        if not path.exists():
            content = {
                "args": {
                    "mode": "finetune",
                    "train_data": [str(clips)],
                    "valid_data": [str(clips)],
                    "num_workers": 0,
                    "auto_warmup_iters": 0,
                    "warmup": 0.0,
                    "log_interval": 1,
                    "train_iters": 20,
                    "save_interval": 1000,
                },
                "model": {"latent_input": False, "precision": "fp32"},
                "data": {
                    "target": "data_video.SFTDataset",
                    "params": {
                        "video_size": [64, 96] if name in FIXED_SIZE else [16, 32],
                        "fps": 8,
                        "max_num_frames": 9 if "1.5" in name else 5,
                        "skip_frms_num": 0,
                    },
                },
                "deepspeed": {
                    "train_micro_batch_size_per_gpu": 2,
                    "gradient_clipping": 1.0,
                    "zero_optimization": {"stage": 0},
                    "optimizer": {"params": {"lr": 1e-3}},
                },
            }
            path.write_text(yaml.safe_dump(content, sort_keys=False))
        return [str(tiny_model(name)), str(path)]

    return make


@pytest.fixture
def job(training_yaml, tmp_path):
    """Return a function that trains a tiny network into a folder below tmp_path and returns the summary."""

    def start(name="dit_t2v_5b_lora", *overrides, save="runs"):
        config = load_config(training_yaml(name), [f"args.save={tmp_path / save}", *overrides], mode="train")
        return train(config)

    return start


@pytest.fixture(scope="session")
def kept_run(training_yaml, tmp_path_factory):
    """Return a function that trains a tiny network, cached per set of options, and returns the read-only run folder."""
    runs = {}

    def folder(name, *overrides) -> Path:
        if (name, overrides) not in runs:
            save = tmp_path_factory.mktemp("kept")
            config = load_config(training_yaml(name), [f"args.save={save}", *overrides], mode="train")
            runs[name, overrides] = train(config).folder
        return runs[name, overrides]

    return folder


@pytest.fixture
def begun(kept_run, tmp_path):
    """Return a function like `kept_run` that returns a copy in the folder of `job`."""
    return lambda name, *overrides: _copy(kept_run(name, *overrides), tmp_path / "runs")


def _copy(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / run.name)


@pytest.fixture
def log(caplog):
    """Capture the project's log: its logger does not propagate once a command line has configured it."""
    logger = logging.getLogger("sgm")
    propagates, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, "sgm")
    yield caplog
    logger.propagate = propagates
