"""Measure the toy model through the sampling engine.

Samples of held-out combinations are judged by `scene.measure`, the autoencoder by its reconstruction. Videos are
``B T C H W`` in -1..1 in the engine, float arrays (T, H, W, C) in [0, 1] elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scene
import torch

from sgm.config.load import load_config
from sgm.modules.diffusionmodules.windows import led_in
from sgm.util import instantiate_from_config

LATENT_SHAPE = (5, 16, 8, 8)
BATCH = 12  # samples at a time


@dataclass(frozen=True)
class SampleQuality:
    """Shares (0 to 1) of the `samples` with the right colour, shape, direction and size; PSNR of their first frames.

    Attributes:
        size: of those whose prompts say a size; None if none does.
        everything: share of samples in which all is right.
        first_frame_psnr_db: mean over the samples, beside the image that they started from.
    """

    colour: float
    shape: float
    direction: float
    size: float | None
    everything: float
    samples: int
    first_frame_psnr_db: float | None = None


def load_engine(config: str | Path, overrides: Sequence[str] = (), *, with_network: bool = True) -> Any:
    """Build the engine of a toy YAML with its weights, float32 on the CPU."""
    loaded = load_config([config], overrides, mode="inference")
    engine = instantiate_from_config(loaded.engine, allocate=False)
    place = {"dtype": torch.float32, "device": torch.device("cpu")}
    if with_network:
        assert loaded.args.load is not None
        engine.load_weights(loaded.args.load, **place)
    engine.load_first_stage(**place)
    return engine


def held_out_clips(num_clips: int, *, seed: int = 1000) -> list[scene.Clip]:
    """Return clips of the held-out combinations, each equally often; every other round of them is big."""
    rng = np.random.default_rng([seed, 3])
    clips = scene.random_clips(scene.combinations(held_out=True), rng, tuple(scene.RADII))
    return [next(clips) for _ in range(num_clips)]


def to_engine(video: np.ndarray) -> torch.Tensor:
    """(T, H, W, C) in [0, 1] -> (T, C, H, W) in -1..1."""
    return torch.from_numpy(video).permute(0, 3, 1, 2) * 2.0 - 1.0


def to_arrays(videos: torch.Tensor) -> list[np.ndarray]:
    """(B, T, C, H, W) in -1..1 -> B arrays (T, H, W, C) in [0, 1]."""
    return list(((videos.clamp(-1.0, 1.0) + 1.0) / 2.0).permute(0, 1, 3, 4, 2).numpy())


@torch.no_grad()
def reconstruction_psnr(engine: Any, clips: Sequence[scene.Clip]) -> list[float]:
    """Return the PSNR in dB of each clip after encoding and chunked decoding."""
    values = []
    for clip in clips:
        video = scene.render(clip)
        latents = engine.encode_first_stage(to_engine(video)[None], sample=False)
        values.append(scene.psnr(to_arrays(engine.decode_first_stage(latents))[0], video))
    return values


@torch.no_grad()
def sample_together(engine: Any, clips: Sequence[scene.Clip], *, seed: int = 0, **given: Any) -> list[np.ndarray]:
    """Sample a video for each clip's caption, all at once; number i has seed `seed` + i.

    Args:
        engine: see `load_engine`.
        clips: whose captions are the prompts.
        seed: of the first one.
        **given: further arguments of the engine's `sample`; a `loop` is decoded as such.
    """
    cond, uncond = engine.conditioner.get_unconditional_conditioning({"txt": [clip.caption for clip in clips]})
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(clips))]
    latents = engine.sample(cond, uncond, generators=generators, **{"shape": LATENT_SHAPE} | given)
    if not given.get("loop"):
        return to_arrays(engine.decode_first_stage(latents))
    num_frames = engine.network.time_compressed_rate * latents.shape[1]
    return to_arrays(engine.decode_first_stage(led_in(latents))[:, -num_frames:])


@torch.no_grad()
def sample(
    engine: Any,
    clips: Sequence[scene.Clip],
    *,
    with_image: bool = False,
    num_steps: int | None = None,
    seed: int = 0,
) -> list[np.ndarray]:
    """Sample a video for each clip's caption (and, `with_image`, its first frame); number i has seed `seed` + i."""
    videos = []
    for first in range(0, len(clips), BATCH):
        batch = clips[first : first + BATCH]
        concat = None
        if with_image:
            images = torch.stack([to_engine(scene.render(clip))[0] for clip in batch])
            concat = engine.image_latents(images, LATENT_SHAPE[0])
        videos += sample_together(engine, batch, seed=seed + first, concat=concat, num_steps=num_steps)
    return videos


def judge(videos: Sequence[np.ndarray], clips: Sequence[scene.Clip], *, with_image: bool = False) -> SampleQuality:
    """Compare sampled videos with the clips that their captions (and first frames) are from."""
    right = {name: [] for name in ("colour", "shape", "direction", "size")}
    for video, clip in zip(videos, clips, strict=True):
        measured = scene.measure(video)
        for name, values in right.items():
            asked = getattr(clip, name)
            values.append(None if asked is None else getattr(measured, name) == asked)
    shares = {name: _share(values) for name, values in right.items()}
    everything = float(np.mean([all(v is not False for v in values) for values in zip(*right.values(), strict=True)]))
    psnr = [scene.psnr(v[0], scene.render(c)[0]) for v, c in zip(videos, clips, strict=True)] if with_image else []
    return SampleQuality(
        **shares,
        everything=everything,
        samples=len(clips),
        first_frame_psnr_db=float(np.mean(psnr)) if with_image else None,
    )


def _share(values: Sequence[bool | None]) -> float | None:
    said = [value for value in values if value is not None]
    return float(np.mean(said)) if said else None
