"""Measure with the toy how a part of a clip is sampled anew within a mask, and what becomes of the rest.

    python tools/toy/inpainting.py --write assets/toy/inpainting.json

The mask of each clip covers its shape and 4 pixels around it, frame by frame; the caption is of another colour. What is
outside of all latents that the mask touches is compared with the clip, and so is its reconstruction.
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
from sgm.data.clips.masks import latent_mask
from sgm.io import write_json


@torch.no_grad()
def measured(engine: Any, num_clips: int, strength: float) -> dict[str, float]:
    """Return the shares with the colour of the prompt and the motion of the clip, and PSNR outside of the mask, in dB.

    The motion stays if the centre of the shape is within 3 pixels of that in the clip, on average over the frames.
    """
    clips = quality.held_out_clips(num_clips, seed=7)
    wanted, sources = from_video.other_colours(clips), [scene.render(clip) for clip in clips]
    source = engine.encode_first_stage(torch.stack([quality.to_engine(video) for video in sources]), sample=False)
    mask = torch.cat([latent_mask(torch.from_numpy(scene.around(video))) for video in sources])
    videos = quality.sample_together(engine, wanted, source=source, mask=mask, strength=strength)
    colour, motion = from_video.judged(videos, wanted, sources)
    decoded = quality.to_arrays(engine.decode_first_stage(source))
    stays = [_pixels(~each) for each in mask[:, :, 0].numpy()]

    def beside_the_clips(made: list[np.ndarray]) -> float:
        triples = zip(made, sources, stays, strict=True)
        return float(np.mean([scene.psnr(video[place], clip[place]) for video, clip, place in triples]))

    outside, alone = beside_the_clips(videos), beside_the_clips(decoded)
    found = {"colour": colour, "motion": motion, "psnr_db": outside, "autoencoder_psnr_db": alone}
    return {name: round(value, 4) for name, value in found.items()}


def _pixels(latents: np.ndarray) -> np.ndarray:
    """(T, h, w) of latent frames → (F, H, W): those of one frame, then of four each."""
    frames = np.concatenate((latents[:1], np.repeat(latents[1:], 4, axis=0)))
    return frames.repeat(8, axis=1).repeat(8, axis=2)


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    engine = quality.load_engine("configs/toy.yaml")
    result: dict[str, Any] = {"clips": options.num_clips}
    for strength in options.strength:
        found = result[f"{strength:g}"] = measured(engine, options.num_clips, strength)
        sys.stdout.write(f"{strength:g}: {', '.join(f'{name} {value:.2f}' for name, value in found.items())}\n")
        sys.stdout.flush()
    if options.write is not None:
        write_json(options.write, result)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--strength", type=float, nargs="+", default=[0.8, 1.0], help="one or several (0.8 1)")
    parser.add_argument("--num_clips", type=int, default=12, help="of combinations that training never saw (12)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
