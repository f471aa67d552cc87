"""Measure with the toy what approximate settings of memory change: weights in fewer bits, and the VAE's tiles.

    python tools/toy/low_memory.py --write assets/toy/low_memory.json

Captions that training never saw are sampled with each storage of the network's linear layers, from the same noise, and
judged like the samples of assets/toy/README.md. Tiles decode pictures of the scene, magnified above 480x720; the PSNR
is between those decoded whole and in tiles.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import quality
import scene
import torch

from sgm.cli import run_command, tool_parser
from sgm.io import write_json
from sgm.weights.quantize import Storage, linear_layers, store

MAGNIFIED = 9, 12  # height and width of a picture, times


def sampled(storage: Storage | None, num_clips: int, *, num_steps: int | None = None) -> list[np.ndarray]:
    """Sample captions that training never saw, with the network's linear layers in `storage`."""
    engine = quality.load_engine("configs/toy.yaml")
    if storage is not None:
        for layer in linear_layers(module for block in engine.network.blocks for module in block):
            store(layer, storage)
    return quality.sample(engine, quality.held_out_clips(num_clips), num_steps=num_steps)


def compared(videos: list[np.ndarray], plain: list[np.ndarray]) -> dict[str, Any]:
    """Judge videos, and say how far they are from those of the weights as they are: PSNR in dB, mean and least."""
    found = {name: value for name, value in asdict(quality.judge(videos, quality.held_out_clips(len(videos)))).items()}
    found = {name: round(value, 4) for name, value in found.items() if value is not None}
    if videos is plain:
        return found
    near = [scene.psnr(one, other) for one, other in zip(videos, plain, strict=True)]
    return found | {"psnr_db": round(float(np.mean(near)), 2), "least_psnr_db": round(min(near), 2)}


@torch.no_grad()
def tiles(num_clips: int, *, magnified: tuple[int, int] = MAGNIFIED) -> dict[str, float]:
    """Return the PSNR in dB between encoded pictures decoded whole and in tiles: mean and least."""
    engine = quality.load_engine("configs/toy.yaml", with_network=False)
    vae, found = engine.first_stage_model, []
    for clip in quality.held_out_clips(num_clips):
        large = scene.render(clip)[:1].repeat(magnified[0], axis=1).repeat(magnified[1], axis=2)
        latents = engine.encode_first_stage(quality.to_engine(large)[None], sample=False)
        vae.tiling = None
        whole = quality.to_arrays(engine.decode_first_stage(latents))[0]
        vae.enable_tiling()
        found.append(scene.psnr(quality.to_arrays(engine.decode_first_stage(latents))[0], whole))
    return {"psnr_db": round(float(np.mean(found)), 2), "least_psnr_db": round(min(found), 2), "pictures": num_clips}


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    result: dict[str, Any] = {}

    def say(name: str, found: dict[str, Any]) -> None:
        result[name] = found
        sys.stdout.write(f"{name}: {', '.join(f'{key} {value:g}' for key, value in found.items())}\n")
        sys.stdout.flush()

    say("tiles", tiles(options.num_tiled))
    plain = sampled(None, options.num_clips)
    say("as released", compared(plain, plain))
    for storage in get_args(Storage):
        say(storage, compared(sampled(storage, options.num_clips), plain))
    if options.write is not None:
        write_json(options.write, result)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_clips", type=int, default=24, help="of combinations that training never saw (24)")
    parser.add_argument("--num_tiled", type=int, default=2, help="pictures that are decoded in tiles (2)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
