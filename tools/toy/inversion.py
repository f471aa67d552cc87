"""Measure with the toy how well the noise of a clip is found, and what it is good for.

    python tools/toy/inversion.py --write assets/toy/inversion.json

Clips that training never saw are inverted with their captions. With the same captions they should come back; with
those of another colour, the colour should change and the motion stay, as judged by from_video.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import from_video
import numpy as np
import quality
import scene
import torch

from sgm.cli import run_command, tool_parser
from sgm.io import write_json

DDIM = "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"


@torch.no_grad()
def measured(engine: Any, num_clips: int, strength: float, *, num_steps: int | None = None) -> dict[str, float]:
    """Return PSNR in dB of clips sampled from their noise and of the autoencoder, and the shares of changed clips."""
    clips = quality.held_out_clips(num_clips, seed=7)
    wanted, videos = from_video.other_colours(clips), [scene.render(clip) for clip in clips]
    source = engine.encode_first_stage(torch.stack([quality.to_engine(video) for video in videos]), sample=False)
    described, _ = engine.conditioner.get_unconditional_conditioning({"txt": [clip.caption for clip in clips]})
    given = {"source": source, "inversion": described, "num_steps": num_steps}

    def psnr(found: list[np.ndarray]) -> float:
        return float(np.mean([scene.psnr(video, clip) for video, clip in zip(found, videos, strict=True)]))

    others = quality.sample_together(engine, wanted, strength=strength, **given)
    back = quality.sample_together(
        engine, clips, strength=1.0, scale=0.0, **given
    )  # without guidance: see `DynamicCFG`
    colour, motion = from_video.judged(others, wanted, videos)
    return {
        "psnr_db": psnr(back),
        "autoencoder_psnr_db": psnr(quality.to_arrays(engine.decode_first_stage(source))),
        "colour": colour,
        "motion": motion,
    }


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    found = measured(quality.load_engine("configs/toy.yaml", [DDIM]), options.num_clips, options.strength)
    found = {"clips": options.num_clips, "strength": options.strength} | {k: round(v, 4) for k, v in found.items()}
    sys.stdout.write(f"{', '.join(f'{name} {value:.4g}' for name, value in found.items())}\n")
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_clips", type=int, default=12, help="of combinations that training never saw (12)")
    parser.add_argument("--strength", type=float, default=0.8, help="when the colour is changed (0.8)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
