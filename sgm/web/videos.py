"""Videos asked for, and those finished: commands of sampling, and the sidecars of the output folder as history."""

import json
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.inference.results import read_record
from sgm.io import refusing_denied
from sgm.web.choices import Folders, Model, presets
from sgm.web.controls import CONTROLS, override, overrides
from sgm.web.jobs import LOG

MAX_HISTORY = 60
SCRIPT = "sample_video.py"


@dataclass(frozen=True)
class Request:
    """A video that is asked for.

    Attributes:
        model: to sample with.
        values: control → value.
        image: the first frame, for image to video.
        load: trained weights instead of the model's own.
        presets: files of ``configs/memory`` and ``configs/speed``.
    """

    model: Model
    values: Mapping[str, Any]
    image: Path | None = None
    load: Path | None = None
    presets: Sequence[Path] = ()

    def words(self, output: Path) -> list[str]:
        """Return the command, as words, for results in a folder.

        Raises:
            InputError: a value does not fit.
        """
        files = [str(self.model.file), *map(str, self.presets)]
        more = {"args.load": self.load, "args.image": self.image, "args.output_dir": output}
        given = [override(key, str(path)) for key, path in more.items() if path is not None]
        return [SCRIPT, "--base", *files, *overrides(self.values), *given]


def new_folder(outputs: Path) -> Path:
    """Make a folder for the results of one command.

    Raises:
        InputError: `outputs` is not writable.
    """
    folder = outputs / f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{secrets.token_hex(2)}"
    with refusing_denied():
        folder.mkdir(parents=True)
    return folder


@dataclass(frozen=True)
class Video:
    """A finished video.

    Attributes:
        path: its file.
        record: the sidecar beside it.
    """

    path: Path
    record: Mapping[str, Any]

    @property
    def caption(self) -> str:
        """What distinguishes it."""
        asked = self.record.get("original_prompt") or self.record["prompt"]
        kept = {name: self.record.get(name) for name in ("seed", "num_steps", "guidance_scale")}
        return ", ".join([asked, *(f"{name} {value}" for name, value in kept.items() if value is not None)])

    @property
    def when(self) -> str:
        """When it was finished."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.path.stat().st_mtime))


def finished(folder: Path) -> list[Video]:
    """Return the finished videos in a folder and the folders in it, the newest first."""
    found = [path for path in folder.rglob("*.mp4") if path.with_suffix(".json").is_file()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    videos = [(path, read_record(path)) for path in found[:MAX_HISTORY]]
    return [Video(path, record) for path, record in videos if record is not None and "prompt" in record]


def settings_of(video: Video, models: Mapping[str, Model], folders: Folders) -> dict[str, Any]:
    """Return what made a video: control → value, and ``model``, ``load``, ``memory`` and ``speed`` by name.

    The overrides of its command have what its files do not; a video of a command line may have been made with files
    that are not among the choices, whose values then come from its record.
    """
    record = video.record
    known: dict[str, Any] = {name: control.default for name, control in CONTROLS.items()}
    known |= {name: record[name] for name in CONTROLS if name in record}
    known["prompt"] = record.get("original_prompt") or record["prompt"]
    if record.get("height") and record.get("width"):
        known["sampling_image_size"] = [record["height"], record["width"]]
    files = [str(name) for name in record.get("configs", ())]
    model = next((model for model in models.values() if str(model.file) in files), None)
    known |= {} if model is None else {"sampling_num_frames": model.values["sampling_num_frames"]}
    for word in record.get("overrides", ()):
        key, _, value = str(word).partition("=")
        name = key.removeprefix("args.")
        if key.startswith("args.") and name in CONTROLS and name != "prompt":
            known[name] = _read(value)
    for kind in ("memory", "speed"):
        known[kind] = next((name for name, path in presets(folders.configs, kind).items() if str(path) in files), None)
    known["model"] = None if model is None else model.name
    known["load"] = (
        record.get("load") if any(str(word).startswith("args.load=") for word in record.get("overrides", ())) else None
    )
    return known


def _read(text: str) -> Any:
    """Return the value of an override, as JSON where it is, else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def discard_if_empty(folder: Path) -> None:
    """Remove the folder of a command that left nothing but its messages."""
    if not any(path.is_file() and path.name != LOG for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)
