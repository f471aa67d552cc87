"""Videos asked for, and those finished: commands of sampling, and the sidecars of the output folder as history."""

import dataclasses
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sgm.config.yaml_files import override, override_value
from sgm.inference.record import RESULT_ARGS
from sgm.inference.results import read_record
from sgm.io import reason_of, require_writable
from sgm.util import RunError, default
from sgm.web.choices import Folders, Model, newest_first, presets
from sgm.web.controls import CONTROLS, STRENGTH, fits, loras_override, overrides
from sgm.web.jobs import PREVIEW, Command

MAX_HISTORY = 60
SCRIPT = "sample_video.py"
AUTO = "auto"  # of the memory presets: the one that fits
OWNER = ".owner"  # file: whose the results in its folder are
_NO_CONTROL = "video strength mask inversion start end held_frames control control_strength".split()  # in records


@dataclass(frozen=True)
class Request:
    """A video that is asked for.

    Attributes:
        model: to sample with.
        values: control → value.
        image: the first frame, for image to video.
        load: trained weights instead of the model's own.
        presets: files of ``configs/memory`` and ``configs/speed``.
        fit_memory: whether the settings of memory are chosen by what is free: ``args.memory: auto``.
        loras: with their strengths; None: 1.
        preview: whether a picture of the video is wanted while it is made.
    """

    model: Model
    values: Mapping[str, Any]
    image: Path | None = None
    load: Path | None = None
    presets: Sequence[Path] = ()
    fit_memory: bool = False
    loras: Sequence[tuple[Path, float | None]] = ()
    preview: bool = False

    def words(self, output: Path) -> list[str]:
        """Return the command, as words, for results in a folder.

        Raises:
            InputError: a value does not fit.
        """
        files = [str(self.model.file), *map(str, self.presets)]
        preview = output / PREVIEW if self.preview else None
        more = {"args.load": self.load, "args.image": self.image, "args.output_dir": output, "args.preview": preview}
        more["args.memory"] = AUTO if self.fit_memory else None
        given = [override(key, str(path)) for key, path in more.items() if path is not None]
        loras = loras_override([(str(path), strength) for path, strength in self.loras])
        return [SCRIPT, "--base", *files, *overrides(self.values), *loras, *given]

    def command(self, outputs: Path, owner: str) -> Command:
        """Return the command with a new folder in `outputs` for its results, which are the owner's.

        An image is copied into it: the command, and "use these again", outlive the window that has sent it.

        Raises:
            InputError: a value does not fit, or `outputs` is not writable.
            RunError: the folder cannot be filled: the disk is full, or the image is gone.
        """
        folder = outputs / f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{secrets.token_hex(2)}"
        kept = None if self.image is None else folder / self.image.name
        words = dataclasses.replace(self, image=kept).words(folder)
        require_writable(folder)
        try:
            folder.mkdir(parents=True)
            (folder / OWNER).write_text(owner, encoding="utf-8")
            if kept is not None:
                shutil.copyfile(str(self.image), kept)
        except OSError as error:
            discard_if_empty(folder)
            what = error.filename or folder
            raise RunError(f"a video cannot be prepared in {folder}: {what}: {reason_of(error)}") from error
        return Command(words, folder)


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
        loras = [
            f"{Path(str(entry.get('path'))).name} {entry.get('strength', STRENGTH.default)}"
            for entry in self.record.get("loras") or ()
        ]
        return ", ".join([asked, *loras, *(f"{name} {value}" for name, value in kept.items() if value is not None)])

    @property
    def when(self) -> str:
        """When it was finished."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.path.stat().st_mtime))


def belongs(path: Path, outputs: Path, owner: str, *, near: bool) -> bool:
    """Whether a file in `outputs` may be shown to an owner: their own, or nobody's on this machine (`near`)."""
    root, file = outputs.resolve(), path.resolve()
    if not file.is_relative_to(root):
        return False
    for folder in file.parents:
        if folder.is_relative_to(root) and (folder / OWNER).is_file():
            return (folder / OWNER).read_text(encoding="utf-8") == owner
    return near  # made by the command line


def finished(folder: Path, shown: Callable[[Path], bool] = Path.is_file) -> list[Video]:
    """Return the finished videos in a folder and the folders in it, the newest first, of those that are shown."""
    found = [path for path in folder.rglob("*.mp4") if path.with_suffix(".json").is_file() and shown(path)]
    return [video for path in newest_first(found)[:MAX_HISTORY] if (video := read_video(path)) is not None]


def read_video(path: Path) -> Video | None:
    """Return a finished video; None if the file beside it is no record of ours."""
    record = read_record(path) if path.suffix == ".mp4" else None
    if record is None or not isinstance(record.get("prompt"), str):
        return None
    lists = ((record.get(name, []), kind) for name, kind in (("configs", str), ("overrides", str), ("loras", dict)))
    is_ours = all(isinstance(found, list) and all(isinstance(one, kind) for one in found) for found, kind in lists)
    return Video(path, record) if is_ours else None


def settings_of(video: Video, models: Mapping[str, Model], folders: Folders) -> dict[str, Any]:
    """Return what made a video: control → value, and ``model``, ``load``, ``memory`` and ``speed`` by name.

    The overrides of its command have what its files do not; a video of a command line may have been made with files
    that are not among the choices, whose values then come from its record.
    """
    record = video.record
    known: dict[str, Any] = {name: control.default for name, control in CONTROLS.items()}
    known |= {name: record[name] for name in CONTROLS if name in record}  # a prompt as a language model has written it
    if record.get("height") and record.get("width"):
        known["sampling_image_size"] = [record["height"], record["width"]]
    files = [str(name) for name in record.get("configs", ())]
    model = next((model for model in models.values() if str(model.file) in files), None)
    if model is not None:
        frames, loop = record.get("num_frames"), bool(record.get("loop"))
        made = model.latent_frames(frames, loop=loop) if isinstance(frames, int) else None
        known["sampling_num_frames"] = default(made, model.values["sampling_num_frames"])
    fit_memory = False
    for word in record.get("overrides", ()):
        key, _, value = str(word).partition("=")
        name = key.removeprefix("args.")
        fit_memory = fit_memory or (key == "args.memory" and _read(value) == AUTO)
        # What a record has is what a reference has become.
        if key.startswith("args.") and name in CONTROLS and name not in record and fits(name, _read(value)):
            known[name] = _read(value)
    for kind in ("memory", "speed"):
        known[kind] = next((name for name, path in presets(folders.configs, kind).items() if str(path) in files), None)
    known["memory"] = AUTO if fit_memory else known["memory"]
    known["model"] = None if model is None else model.name
    known["load"] = (
        record.get("load") if any(str(word).startswith("args.load=") for word in record.get("overrides", ())) else None
    )
    known["loras"] = record.get("loras") or []
    return known


def beyond_the_page(video: Video, models: Mapping[str, Model]) -> list[str]:
    """Return the settings that made a video and have no control on the page, as ``key value``."""
    record = video.record
    found = {f"args.{name}": record[name] for name in _NO_CONTROL if record.get(name) is not None}
    for word in record.get("overrides", ()):
        key, _, value = str(word).partition("=")
        name = key.removeprefix("args.")
        if key == name or (name in RESULT_ARGS and name not in CONTROLS):
            found[key] = value
    files = [str(name) for name in record.get("configs", ())]
    model = next((model for model in models.values() if str(model.file) in files), None)
    if model is not None and record.get("fps") not in (None, model.fps):
        found["args.sampling_fps"] = record["fps"]
    return [f"{key} {value}" for key, value in found.items()]


def plain_loras(loras: Sequence[Mapping[str, Any]], most: int) -> list[tuple[str, float]] | None:
    """Return path and strength of the entries of ``args.loras``; None if they are more, or say more than that."""
    entries = [(str(entry.get("path")), entry.get("strength", STRENGTH.default)) for entry in loras]
    are_plain = all(set(entry) <= {"path", "strength"} for entry in loras)
    fits = are_plain and len(entries) <= most and all(isinstance(value, int | float) for _, value in entries)
    return entries if fits else None


def _read(text: str) -> Any:
    """Return the value of an override; text where it is none."""
    try:
        return override_value(text)
    except yaml.YAMLError:
        return text


def discard_if_empty(folder: Path) -> None:
    """Remove the folder of a command that made no video."""
    if not any(folder.rglob("*.mp4")):
        shutil.rmtree(folder, ignore_errors=True)
