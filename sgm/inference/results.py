"""Where the results of a sampling run go, and which of them are finished.

``OUT/<index>_<prompt>/<k>/000000.mp4`` is sample k of a prompt, with its record ``000000.json`` beside it, which is
written last. A finished result of other settings is never replaced, unless ``args.overwrite`` is set: the new one goes
beside it as ``000000-<digest>.mp4``. What cannot be written there goes to ``OUT/sample-<index>-<k>-<digest>.mp4``.
"""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgm.config.args import SamplingArgs
from sgm.inference.prompts import Prompt, output_folder_name
from sgm.inference.record import content_of
from sgm.inference.video import read_video
from sgm.io import flock, parse_json, remove_leftovers, write_json
from sgm.log import get_logger
from sgm.util import InputError, RunError, default

logger = get_logger(__name__)


def sample_folder(output_dir: str | Path, prompt: Prompt, k: int) -> Path:
    """Return the folder of sample `k` of a prompt."""
    return Path(output_dir) / output_folder_name(prompt.index, prompt.title) / str(k)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what killed runs left half written in an output folder, of whichever prompts."""
    folder = Path(output_dir)
    for path in (folder, *(path for path in folder.glob("[0-9]*/[0-9]*") if path.is_dir())):
        remove_leftovers(path)


class Results:
    """The files of one run.

    Args:
        args: of the run.
        settings: name → value of what decides a sample, beside its prompt, image and seed; recorded with each result.
        name: of the file of a sample.
        contents: key → digest of what the files of the run hold, see `sgm.inference.record.contents`; recorded too,
            with those of the image and control of a prompt.
    """

    def __init__(
        self,
        args: SamplingArgs,
        settings: Mapping[str, Any],
        *,
        name: str,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        self.args, self.settings, self.name = args, settings, name
        self._contents = dict(contents or {})
        self._of_prompts: dict[tuple[Path, int, int], str] = {}  # path, time and size → content

    def identity(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """Return name → value of everything that decides a sample, as its record holds it.

        Raises:
            InputError: the image or control of the prompt cannot be read.
        """
        image = None if prompt.image is None else str(prompt.image)
        control = {} if prompt.control is None else {"control": str(prompt.control)}
        own = {"prompt": prompt.text, "image": image, **control, "seed": self.args.seed + k, **self.settings}
        return {**own, "contents": self._contents_for(prompt)}

    def _contents_for(self, prompt: Prompt) -> dict[str, str]:
        files = {key: path for key, path in (("image", prompt.image), ("control", prompt.control)) if path is not None}
        return {**self._contents, **{key: self.content_now(path) for key, path in files.items()}}

    def content_now(self, path: Path) -> str:
        """Return what a file of prompts holds now: between two prompts that are typed, another may be put there.

        Raises:
            InputError: it cannot be read.
        """
        try:
            stat = path.stat()
        except OSError:
            return content_of(path)  # says what is wrong
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._of_prompts:
            self._of_prompts[key] = content_of(path)
        return self._of_prompts[key]

    def finished(self, prompt: Prompt, k: int) -> Path | None:
        """Return the finished result of a sample with these settings, or None."""
        # Records of older versions hold no contents, nor do the names of results that went beside others.
        places = (*self._places(prompt, k), *self._places(prompt, k, contents=False))
        return next((path for path in places if self._is_own(path, prompt, k)), None)

    def place(self, prompt: Prompt, k: int) -> Path:
        """Return the path for a sample; a result there is unfinished, of the same settings, or to be replaced."""
        first, beside, _ = self._places(prompt, k)
        if self.args.overwrite:
            return first
        return default(self.finished(prompt, k), beside if _is_taken(first) else first)

    def announce(self, prompt: Prompt, k: int) -> None:
        """Log what becomes of a finished result of other settings in the place of a sample."""
        first = self._places(prompt, k)[0]
        if not _is_taken(first) or self._is_own(first, prompt, k):
            return
        made = read_record(first) or {}
        now = self.identity(prompt, k)
        differ = [name for name in now if name not in ("config_digest", "contents") and made.get(name) != now[name]]
        shown = [f"{name} {_shown(made.get(name))}, now {_shown(now[name])}" for name in differ]
        shown += [f"another content of {key}" for key in _changed(made, now)]
        shown = shown or ["another model, other weights, or an argument of the model"]
        if self.args.overwrite:
            logger.warning("%s was made with other settings (%s) and will be replaced", first, "; ".join(shown))
        else:
            beside = self.place(prompt, k).name
            text = "%s was made with other settings (%s) and stays; %s goes beside it (args.overwrite=true replaces it)"
            logger.warning(text, first, "; ".join(shown), beside)

    def write(self, prompt: Prompt, k: int, save: Callable[[Path], None], record: Mapping[str, Any]) -> Path:
        """Write a finished sample and its record; return its path.

        Args:
            prompt: of the sample.
            k: its number.
            save: writes the sample to a path, atomically.
            record: more entries of the record.

        Raises:
            RunError: it cannot be written into the output folder; the message says where it is kept, if anywhere.
        """
        with _locked(sample_folder(self.args.output_dir, prompt, k)):
            path = self.place(prompt, k)  # again: another run may have finished meanwhile
            safe = self._places(prompt, k)[-1]
            if not self._is_own(path, prompt, k):  # a killed run must not leave the record of a video that it replaced
                with contextlib.suppress(OSError):
                    path.with_suffix(".json").unlink(missing_ok=True)
            return write_or_keep(path, save, {**self.identity(prompt, k), **record}, beside=safe)

    def _places(self, prompt: Prompt, k: int, *, contents: bool = True) -> tuple[Path, Path, Path]:
        """Return the usual path of a sample, the one beside a result of other settings, and the safe one."""
        identity = self.identity(prompt, k)
        if not contents or not identity["contents"]:
            del identity["contents"]
        text = json.dumps(identity, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = sample_folder(self.args.output_dir, prompt, k)
        usual = folder / self.name
        safe = Path(self.args.output_dir) / f"sample-{prompt.index}-{k}-{digest}{usual.suffix}"
        return usual, usual.with_stem(f"{usual.stem}-{digest}"), safe

    def _is_own(self, path: Path, prompt: Prompt, k: int) -> bool:
        made = read_record(path) if path.is_file() else None
        now = self.identity(prompt, k)
        if made is None or any(made.get(name) != now[name] for name in now if name != "contents"):
            return False
        return not _changed(made, now)


def write_or_keep(
    path: Path, save: Callable[[Path], None], record: Mapping[str, Any], *, beside: Path | None = None
) -> Path:
    """Write a finished sample and its record; where that fails, keep it elsewhere, since it cost minutes.

    Args:
        path: its place.
        save: writes it to a path, atomically.
        record: for the JSON file beside it, which is written last.
        beside: another path in the output folder, tried next.

    Returns:
        The path of the two that it was written to.

    Raises:
        RunError: neither takes it; the message says where it is kept, if anywhere.
    """
    failure = None
    kept = Path(tempfile.gettempdir()) / (beside.name if beside else f"{secrets.token_hex(4)}-{path.name}")
    for place in filter(None, (path, beside, kept)):
        try:
            save(place)
            write_json(place.with_suffix(".json"), record)
        except (OSError, RunError) as error:
            failure = failure or error
            continue
        if place == kept:
            said = f"{failure}; the finished sample is kept as {kept}: move it where you want it"
            raise RunError(said) from failure
        if failure is not None:
            logger.warning("%s; the sample goes beside, to %s", failure, place)
        return place
    raise failure if isinstance(failure, RunError) else RunError(f"{path} could not be written: {failure}")


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record beside a result; None if it is missing or unreadable."""
    try:
        content = parse_json(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished_videos(folder: Path) -> list[tuple[str, np.ndarray]]:
    """Return caption and frames (T, H, W, 3) of every finished video in the folder of a run.

    Raises:
        InputError: there is none, or one whose record says no prompt.
    """
    found = []
    sidecars = [*folder.glob("*/*/000000*.json"), *folder.glob("sample-*.json")]
    for sidecar in sorted(sorted(sidecars), key=_order):
        video = sidecar.with_suffix(".mp4")
        if video.is_file():
            content = read_record(video) or {}
            if not {"prompt", "seed"} <= content.keys():
                raise InputError(f"{sidecar} is no record of sampling; sample the video again, or remove both")
            start = " (from an image)" if content.get("image") else ""
            found.append((f"{content['prompt']}{start}, seed {content['seed']}", read_video(video)))
    if not found:
        raise InputError(f"there is no finished video in {folder}; give the args.output_dir of a sampling run")
    return found


def _order(sidecar: Path) -> tuple[int, int]:
    """Return prompt and number of a sample, see `sgm.inference.results`."""
    prompt, k = sidecar.parent.parent.name.split("_")[0], sidecar.parent.name
    if sidecar.name.startswith("sample-"):
        prompt, k = sidecar.name.split("-")[1:3]
    return int(prompt) if prompt.isdigit() else 0, int(k) if k.isdigit() else 0


def _changed(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys of files that hold something else than when a record was made, as far as it says."""
    recorded = made.get("contents")
    recorded = recorded if isinstance(recorded, dict) else {}
    return [key for key, value in now["contents"].items() if recorded.get(key, value) != value]


def _shown(value: Any) -> str:
    return repr(value) if not isinstance(value, str) or len(value) <= 60 else f"{value[:28]!r}...{value[-28:]!r}"


def _is_taken(path: Path) -> bool:
    """Whether there is a finished result, as video or latents; without a record, it is a killed run's."""
    record = path.with_suffix(".json")
    return record.is_file() and any(other != record for other in path.parent.glob(f"{path.stem}.*"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which no other process writes the samples of a folder; without effect where there are no locks."""
    with contextlib.ExitStack() as stack:
        # Network file systems lock no folders; and if the folder cannot be made, writing says so.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            flock(handle)
        yield
