"""What can be chosen on the page: models, trained weights, presets, and the folders that it may read."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sgm.config.args import SamplingArgs
from sgm.log import get_logger
from sgm.modules.geometry import Geometry
from sgm.project import shipped
from sgm.util import InputError
from sgm.weights.adapters import read_adapter_info
from sgm.weights.files import read_tensors

logger = get_logger(__name__)

LATEST = "latest"  # the file that names the newest checkpoint of a folder
MAX_DEPTH = 4  # of folders that are searched for trained weights


@dataclass(frozen=True)
class Folders:
    """The folders that the page works on; nothing outside of them is read or shown.

    Attributes:
        outputs: of videos; each sampling gets a folder of its own in it, and all in it are the history.
        configs: of model files, with the presets in ``memory/`` and ``speed/``.
        runs: of trained weights, and of trainings to watch.
        data: of clips for training.
    """

    outputs: Path
    configs: Path = Path("configs")
    runs: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()


def inside(path: str | Path, folders: Sequence[Path]) -> Path:
    """Return a path that a browser has sent, if it is one of `folders` or in one of them, links followed.

    Raises:
        InputError: it is elsewhere, does not exist, or is no text.
    """
    try:
        found = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError, TypeError):  # no file, a null byte, links in circles, no text
        found = None
    if found is None or not any(found.is_relative_to(folder.resolve()) for folder in folders):
        shown = ", ".join(map(str, folders)) or "none"
        raise InputError(f"'{path}' is not in the folders of this page ({shown}); name others on its command line")
    return Path(path)


@dataclass(frozen=True)
class Model:
    """A model file.

    Attributes:
        name: of the file, without suffix.
        file: its path.
        adapters: whether it has a ``lora_config``: such files train, and trained adapters bring their own.
        image2video: whether it needs an image.
        ready: whether its weights are there.
        values: control → what the file sets, of those that the page shows.
        geometry: its frame counts; None for a file whose network cannot be read, which sampling explains.
        fps: frames per second of its videos.
        example: the first prompt of its prompt file, or of ``test.txt`` beside it; empty if there is none.
    """

    name: str
    file: Path
    adapters: bool
    image2video: bool
    ready: bool
    values: dict[str, Any] = field(default_factory=dict)
    geometry: Geometry | None = None
    fps: int = SamplingArgs.sampling_fps
    example: str = ""

    def video_frames(self, latents: int, *, loop: bool = False) -> int | None:
        """Return the video frames of a value of ``args.sampling_num_frames``; None if there are none, or unknown."""
        if self.geometry is None or latents < 1:
            return None
        kept = self.geometry.kept_latents(latents)
        if not loop:
            return self.geometry.video_frames(kept)
        looped = self.geometry.padded_latents(kept) - self.geometry.patch_size[0]
        return self.geometry.time_compression * looped or None

    def latent_frames(self, frames: int, *, loop: bool = False) -> int | None:
        """Return the value of ``args.sampling_num_frames`` of a video of so many frames; None if unknown."""
        if self.geometry is None:
            return None
        rate = self.geometry.time_compression
        return frames // rate + self.geometry.patch_size[0] if loop else (frames - 1) // rate + 1


def find_models(configs: Path) -> dict[str, Model]:
    """Return the models in a folder of YAML files by name, those with weights first.

    Raises:
        InputError: there is none.
    """
    found = [model for path in sorted(configs.glob("*.yaml")) if (model := _read_model(path))]
    if not found:
        raise InputError(f"there is no model file in {configs}; give a folder of YAML files with a model section")
    return {model.name: model for model in sorted(found, key=lambda model: not model.ready)}


def _read_model(path: Path) -> Model | None:
    """Return the model of a YAML file; None if it holds none, or cannot be read (sampling with it says why)."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        args, model = content.get("args") or {}, content["model"]
        adapters = "lora_config" in model["network_config"]["params"]["modules"]
        sampler = model["sampler_config"]["params"]
        scale = (sampler.get("guider_config", {}).get("params") or {}).get("scale")
        values = {
            "sampling_image_size": args.get("sampling_image_size"),
            "sampling_num_frames": args.get("sampling_num_frames"),
            "num_steps": args.get("num_steps", sampler.get("num_steps")),
            "guidance_scale": args.get("guidance_scale", scale),
        }
        ready = bool(args.get("load")) and os.path.exists(shipped(args["load"]))
        return Model(
            path.stem,
            path,
            adapters,
            image2video=bool(args.get("image2video")),
            ready=ready,
            values=values,
            geometry=Geometry.from_network(model["network_config"]["params"]),
            fps=int(args.get("sampling_fps", SamplingArgs.sampling_fps)),
            example=_first_prompt(shipped(args.get("input_file") or str(path.with_name("test.txt")))),
        )
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None


def _first_prompt(file: str) -> str:
    """Return the first line of a prompt file, without its image; empty if it cannot be read."""
    try:
        with open(file, encoding="utf-8") as lines:
            return next(lines, "").partition("@@")[0].strip()
    except (OSError, ValueError):
        return ""


def find_folders(folders: Sequence[Path], name: str) -> list[Path]:
    """Return the folders in `folders` that hold a file of this name, those where it is newest first.

    ``latest`` is in folders of trained weights, ``metrics.jsonl`` in those of trainings.
    """
    return [path.parent for path in newest_first(_in_depth(folders, name))]


def _in_depth(folders: Sequence[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        for depth in range(MAX_DEPTH):
            yield from folder.glob("/".join(["*"] * depth + [name]))


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Return paths by their time, each once, without links to nothing and what was removed meanwhile."""
    found: dict[Path, float] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime
    return sorted(found, key=found.__getitem__, reverse=True)


def find_loras(folders: Sequence[Path]) -> list[Path]:
    """Return the LoRAs in `folders`, for ``args.loras``, newest first: folders of trainings, then files of others."""
    runs = find_folders(folders, LATEST)
    files = newest_first(_in_depth(folders, "*.safetensors"))
    others = [path for path in files if not any(map(path.is_relative_to, runs)) and _holds(_names_lora, path)]
    return [*(run for run in runs if _holds(_has_adapters, run)), *others]


def find_trained(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of trained weights in `folders` that are no LoRAs, for ``args.load``, the newest first."""
    return [run for run in find_folders(folders, LATEST) if not _holds(_has_adapters, run)]


def _holds(question: Callable[[Path], bool], path: Path) -> bool:
    """Ask about weights; no to those that cannot be read: sampling with them says why."""
    try:
        return question(path)
    except (InputError, OSError):
        return False


def _has_adapters(run: Path) -> bool:
    return read_adapter_info(run) is not None


def _names_lora(file: Path) -> bool:
    return any(kind in name.lower() for name in read_tensors(file) for kind in ("lora", "lokr"))


def presets(configs: Path, kind: str) -> dict[str, Path]:
    """Return the presets in the folder ``memory`` or ``speed`` of `configs` by name."""
    return {path.stem: path for path in sorted((configs / kind).glob("*.yaml"), key=_by_size)}


def _by_size(path: Path) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, path.stem))
    return int(digits or 0), path.stem
