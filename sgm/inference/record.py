"""What a sampling run tells about itself: timings, memory, a digest of what its samples depend on, a summary."""

import hashlib
import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sgm.config.load import Config
from sgm.weights.files import find_weights

# What a sample depends on; the other arguments say where, how many and how much at a time.
RESULT_ARGS = (
    "negative_prompt sampling_image_size sampling_num_frames sampling_fps num_steps guidance_scale seed fp16 bf16"
).split()


@dataclass
class Timings:
    """Seconds of wall time that each part of one prompt took."""

    text: float = 0.0
    image: float = 0.0
    sample: float = 0.0
    decode: float = 0.0


@dataclass
class Summary:
    """What a run did.

    Attributes:
        written: videos (or latents) written.
        skipped: results that were there already.
        sheet: contact sheet, if one was asked for and there was something to show.
        scope: whose work this is, where several ranks share the prompts.
        seconds: wall time of the whole run.
        peak_bytes: most memory in use: of the accelerator, or of the process on a CPU.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    sheet: Path | None = None
    scope: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        """Return the table that ends a run."""
        lines = [f"  {path}" for path in self.written]
        lines += [f"  {path} (was there already)" for path in self.skipped]
        counts = f"{len(self.written)} written, {len(self.skipped)} skipped"
        lines.append(f"{self.scope}{counts}, {self.seconds:.1f} s, peak memory {self.peak_bytes / 2**30:.2f} GiB")
        if self.sheet is not None:
            lines.append(f"contact sheet: {self.sheet}")
        return "\n".join(lines)


def result_digest(config: Config) -> str:
    """SHA-256 of everything in `config` that changes a sample."""
    args = {name: getattr(config.args, name) for name in RESULT_ARGS}
    assert config.args.load is not None, "the dry run refuses a run without weights"
    args["load"] = str(find_weights(config.args.load))  # 'latest' may move on
    return hashlib.sha256(json.dumps([args, config.model], sort_keys=True, default=str).encode()).hexdigest()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated on an accelerator, or resident in this process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        # Not getrusage: a process starts there with the peak of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):  # another system than Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return what is recorded beside a result; None where there is nothing readable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
