"""Records of a sampling run: timings, digest of the settings that change samples, summary."""

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from sgm.config.args import SamplingArgs
from sgm.config.load import Config
from sgm.weights.files import find_weights
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
