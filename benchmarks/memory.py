"""Peak memory at released sizes, without an accelerator and without the memory.

    python -m benchmarks.memory
    python -m benchmarks.memory --only vae --json memory.json

Weights and inputs are fake tensors in bfloat16 (see `sgm.checks.fake_run`): shapes and types flow, numbers do not.
Counted are the bytes of all tensors alive at once but the weights, which have a column of their own. Workspaces of
kernels and unused memory of the allocator are not counted: leave a tenth of a card free.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import vae_section
from sgm.checks.estimate import PATIENCE
from sgm.checks.fake_run import build, usage
from sgm.distributed import Mesh

GIB = 2**30
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """A figure of the table.

    Attributes:
        phase: what is run: the key of `PHASES`.
        model: names ``configs/<model>.yaml``.
        clip: (F, height, width) of the video.
        how: settings, in words.
        effect: "exact" or "approximate": whether the settings change results.
        weights: bytes.
        peak: bytes of everything else.
    """

    phase: str
    model: str
    clip: tuple[int, int, int]
    how: str
    effect: str
    weights: float
    peak: float


CLIPS = {"cogvideox_2b": (49, 480, 720), "cogvideox_5b": (49, 480, 720), "cogvideox1.5_5b": (81, 768, 1360)}
ENCODE = {  # settings in words → (attributes of the VAE, tiled, effect)
    "whole clip": ({"encode_chunk": None}, False, "exact"),
    "`encode_chunk: 8`": ({"encode_chunk": 8}, False, "approximate"),
}
DECODE = {"whole frames": ({}, False, "exact"), "`vae_tiling: true`": ({}, True, "approximate")}


def vae_rows() -> Iterator[Row]:
    """Measure the VAE; the 2B and the 5B share one."""
    for model in ("cogvideox_5b", "cogvideox1.5_5b"):
        for phase, settings in (("VAE encode", ENCODE), ("VAE decode", DECODE)):
            for how, (attributes, tiled, effect) in settings.items():
                weights, peak = vae_peak(phase, model, CLIPS[model], attributes, tiled=tiled)
                yield Row(phase, model, CLIPS[model], how, effect, weights, peak)


def vae_peak(
    phase: str, model: str, clip: tuple[int, int, int], attributes: dict[str, Any], *, tiled: bool = False
) -> tuple[float, float]:
    """Return the bytes of the VAE's weights, and of all else at the peak of encoding or decoding a clip."""
    frames, height, width = clip
    vae = build(vae_section(model))
    for name, value in attributes.items():
        setattr(vae, name, value)
    if tiled:
        vae.enable_tiling()

    def encode(vae: Any) -> torch.Tensor:
        return vae.encode_moments(torch.empty(1, 3, frames, height, width, dtype=DTYPE))

    def decode(vae: Any) -> torch.Tensor:
        latents = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, dtype=DTYPE)
        if tiled:
            return vae.decode(latents)
        for _ in vae.decode_in_chunks(latents[:, :, : 6 + latents.shape[2] % 2]):  # the third chunk is as large as any
            pass
        return latents

    patience = PATIENCE if tiled else None
    found = usage(vae, encode if phase == "VAE encode" else decode, DTYPE, Mesh(), patience=patience)
    return found.weights * DTYPE.itemsize, found.peak


PHASES: dict[str, Callable[[], Iterator[Row]]] = {"vae": vae_rows}
HEADER = (
    "| what | model | clip | settings | result | weights, GiB | peak of the rest, GiB |\n|---|---|---|---|---|---|---|"
)


def shown(row: Row) -> str:
    """Return a row of the Markdown table."""
    clip = "×".join(map(str, row.clip))
    figures = f"{row.weights / GIB:.2f} | {row.peak / GIB:.2f}"
    return f"| {row.phase} | {row.model} | {clip} | {row.how} | {row.effect} | {figures} |"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(PHASES), help="measure one phase")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    rows = []
    sys.stdout.write(f"{HEADER}\n")
    for name, phase in PHASES.items():
        for row in phase() if args.only in (None, name) else ():
            rows.append(row)
            sys.stdout.write(f"{shown(row)}\n")
            sys.stdout.flush()
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
