"""Data batch → inputs of the loss: encoded or cached latents, conditions, timesteps, noise.

Legend: ``B T C H W`` latents, ``B F 3 H W`` videos, ``B 2C T H W`` moments of the autoencoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs
from sgm.util import InputError

# Noise on the first frame of image-to-video training: its standard deviation is exp(N(mean, std²)).
IMAGE_NOISE_LOG_MEAN, IMAGE_NOISE_LOG_STD = -3.0, 0.5


@torch.no_grad()
def training_inputs(
    engine: SATVideoDiffusionEngine,
    batch: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    *,
    rank: int = 0,
    num_ranks: int = 1,
    idx: Sequence[int] | None = None,
) -> TrainingInputs:
    """Encode a batch and draw all random numbers, per sample.

    Samples are independent of their batch. Each generator draws, in this order: whether the text is dropped, level and
    noise of the first frame, whether the image is dropped, posterior noise, timestep, diffusion noise.

    Args:
        engine: the model.
        batch: the conditioner's texts, and under `input_key` videos (B, F, 3, H, W) in −1..1, or with `latent_input`
            unscaled latents (B, T, C, H, W). Instead of these, ``moments``: B of (2C, T, H, W). Optional ``image``: B
            of (3, H, W), None for the first frame; or ``image_moments``: B of (2C, 1, H, W), used without noise.
        generators: one CPU generator per sample.
        rank: data-parallel rank, for a loss with ``uniform_sampling``.
        num_ranks: number of data-parallel ranks.
        idx: fixed timesteps instead of drawn ones.
    """
    loss_fn, conditioner, device = engine.require_loss(), engine.require_conditioner(), engine.device
    samples = []
    for i, generator in enumerate(generators):
        cond = dict(conditioner({key: [batch[key][i]] for key in engine.text_keys}, generator=generator))
        name = "moments" if "moments" in batch else engine.input_key
        clip = batch[name][i][None].to(device, non_blocking=True)
        if engine.noised_image_input:
            cond["concat"] = _image_condition(engine, batch, i, clip, generator)
        latents = _clean_latents(engine, clip, generator, encoded=name == "moments")
        drawn = loss_fn.sigma_sampler.draw_idx(1, generator=generator, rank=rank, num_ranks=num_ranks)
        step = drawn if idx is None else torch.tensor(idx[i : i + 1])
        samples.append((latents, cond, step.to(device), loss_fn.draw_noise(latents, generator)))
    latents, conds, steps, noise = zip(*samples, strict=True)
    joined = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
    return TrainingInputs(torch.cat(latents), joined, torch.cat(steps), torch.cat(noise))


def _clean_latents(
    engine: SATVideoDiffusionEngine, clip: torch.Tensor, generator: torch.Generator, *, encoded: bool
) -> torch.Tensor:
    """Return the latents of a clip (1, F, 3, H, W) or of its moments, front-padded with copies of the first frame."""
    if encoded:
        latents = engine.latents_of(clip, generator=generator)
    elif engine.latent_input:
        if clip.shape[2] != engine.network.out_channels:
            raise InputError(
                f"model.latent_input is true, but the data gives {clip.shape[2]} channels and latents have "
                f"{engine.network.out_channels}; set model.latent_input=false to train on videos"
            )
        latents = clip.float() * engine.scale_factor
    else:
        latents = engine.encode_first_stage(clip, generator=generator)
    padding = engine.front_padding(latents.shape[1])
    return torch.cat((latents[:, :1].expand(-1, padding, -1, -1, -1), latents), dim=1) if padding else latents


def _image_condition(
    engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], i: int, clip: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Return the image latents of clip `i`, with noise on the image unless it comes from a cache; zeros if dropped."""
    if engine.latent_input:
        raise InputError("model.latent_input has no first frame to condition on; set noised_image_input: false")
    num_latents = clip.shape[2] if "moments" in batch else (clip.shape[1] - 1) // 4 + 1
    if "image_moments" in batch:
        dropped = torch.rand(1, generator=generator).item() < engine.noised_image_dropout
        moments = batch["image_moments"][i][None].to(clip.device, non_blocking=True)
        first = engine.latents_of(moments, sample=False, scale=engine.scale_image_latents)
        latents = engine.image_condition(first, num_latents)
    else:
        image = batch["image"][i] if "image" in batch else None
        first = clip[:, 0] if image is None else image[None].to(clip.device)
        level = torch.exp(IMAGE_NOISE_LOG_MEAN + IMAGE_NOISE_LOG_STD * torch.randn(1, generator=generator))
        noise = torch.randn(first.shape, generator=generator)
        dropped = torch.rand(1, generator=generator).item() < engine.noised_image_dropout
        latents = engine.image_latents(first + (level * noise).to(first.device), num_latents)
    return torch.zeros_like(latents) if dropped else latents
