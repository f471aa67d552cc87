"""Records of a sampling run: timings, digest of the settings that change samples, summary."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from sgm.config.args import SamplingArgs
from sgm.config.load import Config
from sgm.io import content_digest, reason_of
from sgm.util import InputError
from sgm.weights.files import find_weights, shard_files
from sgm.weights.lora.files import find_any_lora

# The arguments that change a sample.
RESULT_ARGS = (
    "negative_prompt sampling_image_size sampling_num_frames sampling_fps num_steps guidance_scale seed fp16 bf16 base "
    "force_inference vae_tiling"
).split()
# Those left out where they are not set, so that records of older versions stay valid.
_LATER_RESULT_ARGS = (
    "video strength mask inversion start end held_frames control_strength loras weights text_encoder_weights "
    "guidance_interval step_cache step_cache_threshold attention time_scaling time_window time_window_overlap loop"
).split()


def clock() -> float:
    """Return the wall time in seconds, once the device has finished the work that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass
class Timings:
    """Wall time in seconds of each part of one prompt."""

    text: float = 0.0
    image: float = 0.0
    video: float = 0.0
    control: float = 0.0
    sample: float = 0.0
    decode: float = 0.0


@dataclass
class Summary:
    """The results of a run.

    Attributes:
        written: videos (or latents) written.
        skipped: existing results.
        sheet: contact sheet, if any.
        scope: the rank, if the prompts are divided among several.
        seconds: wall time of the whole run.
        peak_bytes: see `sgm.util.peak_memory`.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    sheet: Path | None = None
    scope: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        """Return the final message of a run."""
        lines = [f"  {path} (was there already)" for path in self.skipped]  # what was written has been said
        counts = f"{len(self.written)} written, {len(self.skipped)} skipped"
        lines.append(f"{self.scope}{counts}, {self.seconds:.1f} s, peak memory {self.peak_bytes / 2**30:.2f} GiB")
        if self.sheet is not None:
            lines.append(f"contact sheet: {self.sheet}")
        return "\n".join(lines)


def later_settings(args: SamplingArgs) -> dict[str, Any]:
    """Return name → value, as JSON has it, of the settings that change a sample only where they are set."""
    given = {name: getattr(args, name) for name in _LATER_RESULT_ARGS}
    given["strength"] = None if args.video is None else args.noise_strength
    given["held_frames"] = None if args.start is None and args.end is None else args.num_held
    given["loop"] = args.loop or None
    as_json = TypeAdapter(Any)
    return {
        name: as_json.dump_python(value, mode="json", exclude_none=True)
        for name, value in given.items()
        if value not in (None, ())
    }


def result_digest(config: Config) -> str:
    """SHA-256 of everything in `config` that changes a sample."""
    args = {name: getattr(config.args, name) for name in RESULT_ARGS}
    args |= later_settings(config.args)
    assert config.args.load is not None, "the dry run refuses a run without weights"
    args["load"] = str(find_weights(config.args.load).resolve())  # 'latest' may change
    if config.args.loras:
        args["lora_files"] = [str(find_any_lora(entry.path).resolve()) for entry in config.args.loras]
    return hashlib.sha256(json.dumps([args, config.model], sort_keys=True, default=str).encode()).hexdigest()


def content_of(path: str | Path) -> str:
    """Return `sgm.io.content_digest` of a file that decides samples.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return content_digest(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); it is needed for sampling") from error


def contents(config: Config) -> dict[str, str]:
    """Return key → digest of what the files of a run hold that change every sample.

    Raises:
        InputError: one cannot be read.
    """
    args = config.args
    assert args.load is not None, "the dry run refuses a run without weights"
    files = {key: [Path(path)] for key in ("video", "mask", "start", "end") if (path := getattr(args, key)) is not None}
    files["load"] = shard_files(find_weights(args.load))
    if args.base is not None:
        files["base"] = shard_files(find_weights(args.base))
    if args.loras:
        files["loras"] = [find_any_lora(entry.path) for entry in args.loras]
    files |= {key: [path] for key, path in _files_of_model(config.model, "model")}
    return {key: "-".join(map(content_of, paths)) for key, paths in files.items()}


def _files_of_model(section: Any, key: str) -> Iterator[tuple[str, Path]]:
    """Yield (key, path) of the files and folders that a section names: text encoder and VAE, whatever they are."""
    if isinstance(section, Mapping):
        for name, value in section.items():
            if str(name).endswith(("_path", "_dir")) and isinstance(value, str) and value:
                path = Path(value).expanduser()
                if path.exists():
                    yield f"{key}.{name}", path
            yield from _files_of_model(value, f"{key}.{name}")
    elif isinstance(section, list | tuple):
        for index, value in enumerate(section):
            yield from _files_of_model(value, f"{key}[{index}]")
