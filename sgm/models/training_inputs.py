"""Data batch → inputs of the loss: encoded or cached latents, conditions, timesteps, noise.

Legend: ``B T C H W`` latents, ``B F 3 H W`` videos, ``B 2C T H W`` moments of the autoencoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgm.data.clips.frames import TIME_COMPRESSION
from sgm.models.video_diffusion import SATVideoDiffusionEngine, TrainingInputs
from sgm.modules.geometry import SPATIAL_COMPRESSION
from sgm.util import InputError, to_device

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

    No copy to the device makes the host wait, and none is made of numbers that are drawn in vain.

    Samples are independent of their batch. Each generator draws, in this order: whether the text is dropped, level and
    noise of the first frame, whether the image is dropped, posterior noise, timestep, diffusion noise, the seed of the
    network's dropout.

    Args:
        engine: the model.
        batch: the conditioner's texts, and under ``mp4`` videos (B, F, 3, H, W) in −1..1, or with `latent_input`
            unscaled latents (B, T, C, H, W). Instead of these, ``moments``: B of (2C, T, H, W). Optional ``image``: B
            of (3, H, W), None for the first frame; or ``image_moments``: B of (2C, 1, H, W), used without noise. For a
            network with a control ``control``: B of (F, 3, H, W), or ``control_moments``: B of (2C, T, H, W).
            ``rejected`` for a loss that takes pairs: videos as under ``mp4``, for which the same is drawn. And
            ``mask``: B of (T, 1, H, W), bool, the latents that the loss counts.
        generators: one CPU generator per sample.
        rank: data-parallel rank, for a loss with ``uniform_sampling``.
        num_ranks: number of data-parallel ranks.
        idx: fixed timesteps instead of drawn ones.
    """
    loss_fn, conditioner, device = engine.require_loss(), engine.require_conditioner(), engine.device
    encoded = "moments" in batch
    pairs = getattr(loss_fn, "takes_pairs", False)
    samples, rejected = [], []
    with conditioner.keep_loaded():  # each generator draws first whether its text is dropped
        conds = [
            dict(conditioner({key: [batch[key][i]] for key in engine.text_keys if key in batch}, generator=generator))
            for i, generator in enumerate(generators)
        ]
    for i, (generator, cond) in enumerate(zip(generators, conds, strict=True)):
        clip = batch["moments" if encoded else "mp4"][i][None]
        size = _latent_size(engine, clip, encoded=encoded)
        # Everything is drawn and sent before the clip is encoded, so that the device never waits for the host.
        image = _draw_image(engine, batch, i, clip, generator) if engine.noised_image_input else None
        posterior = _draw_posterior(engine, clip, size, generator, encoded=encoded)
        sampler = loss_fn.sigma_sampler
        # Only a sampler with strata takes the number of the sample.
        more = {"number": batch["number"][i]} if getattr(sampler, "strata", 1) > 1 and idx is None else {}
        drawn = sampler.draw_idx(1, generator=generator, rank=rank, num_ranks=num_ranks, **more)
        step = drawn if idx is None else torch.tensor(idx[i : i + 1])
        shape = (1, size[0] + engine.front_padding(size[0]), engine.network.out_channels, *size[1:])
        noise = loss_fn.draw_noise(torch.empty(()).expand(shape), generator)
        step, noise, clip = (to_device(x, device) for x in (step, noise, clip))
        posterior = None if posterior is None else to_device(posterior, device)
        if image is not None:
            cond["concat"] = _image_condition(engine, batch, i, clip, image, size)
        if getattr(engine.network, "control_channels", 0):
            cond["control"] = _control_condition(engine, batch, i)
        latents = _clean_latents(engine, clip, posterior, encoded=encoded)
        seed = to_device(torch.randint(2**32, (1,), generator=generator), device)
        samples.append((latents, cond, step, noise, seed))
        if pairs:
            other = to_device(batch["rejected"][i][None], device)
            rejected.append(_clean_latents(engine, other, posterior, encoded=False))
    latents, conds, steps, noises, seeds = zip(*samples, strict=True)
    joined = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
    others = {"rejected": torch.cat(rejected)} if pairs else {}
    if "mask" in batch:
        others["mask"] = torch.cat([engine.padded(to_device(mask[None], device).float()) for mask in batch["mask"]])
    return TrainingInputs(torch.cat(latents), joined, torch.cat(steps), torch.cat(noises), torch.cat(seeds), others)


@dataclass(frozen=True)
class _ImageDraws:
    """What is drawn for the image of one sample.

    Attributes:
        dropped: whether the image condition is zero.
        noise: added to the image (1, 3, H, W); None if that is not encoded.
    """

    dropped: bool
    noise: torch.Tensor | None


def _latent_size(engine: SATVideoDiffusionEngine, clip: torch.Tensor, *, encoded: bool) -> tuple[int, int, int]:
    """Return (T, H, W) of the latents of a clip or of moments, without padding."""
    if encoded:
        return clip.shape[2], clip.shape[3], clip.shape[4]
    frames, _, height, width = clip.shape[1:]
    if engine.latent_input:
        return frames, height, width
    return (frames - 1) // TIME_COMPRESSION + 1, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION


def _draw_image(
    engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], i: int, clip: torch.Tensor, generator: torch.Generator
) -> _ImageDraws:
    """Draw noise for the image, unless it comes from a cache, and whether it is dropped."""
    if engine.latent_input:
        raise InputError("model.latent_input has no first frame to condition on; set noised_image_input: false")
    noise = None
    if "image_moments" not in batch:
        level = torch.exp(IMAGE_NOISE_LOG_MEAN + IMAGE_NOISE_LOG_STD * torch.randn(1, generator=generator))
        noise = level * torch.randn(_image(batch, i, clip).shape, generator=generator)
    dropped = torch.rand(1, generator=generator).item() < engine.noised_image_dropout
    return _ImageDraws(dropped, None if dropped else noise)


def _draw_posterior(
    engine: SATVideoDiffusionEngine,
    clip: torch.Tensor,
    size: tuple[int, int, int],
    generator: torch.Generator,
    *,
    encoded: bool,
) -> torch.Tensor | None:
    """Draw the noise (1, C, T, H, W) of the latents' distribution, in its dtype; None for latents as input."""
    if encoded:
        return torch.randn((1, clip.shape[1] // 2, *size), generator=generator, dtype=clip.dtype)
    if engine.latent_input:
        return None
    dtype = engine.first_stage_dtype
    return torch.randn((1, engine.network.out_channels, *size), generator=generator, dtype=dtype)


def _clean_latents(
    engine: SATVideoDiffusionEngine, clip: torch.Tensor, noise: torch.Tensor | None, *, encoded: bool
) -> torch.Tensor:
    """Return the latents of a clip (1, F, 3, H, W) or of its moments, front-padded with copies of the first frame."""
    if encoded:
        latents = engine.latents_of(clip, noise=noise)
    elif engine.latent_input:
        if clip.shape[2] != engine.network.out_channels:
            raise InputError(
                f"model.latent_input is true, but the data gives {clip.shape[2]} channels and latents have "
                f"{engine.network.out_channels}; set model.latent_input=false to train on videos"
            )
        latents = clip.float() * engine.scale_factor
    else:
        latents = engine.encode_first_stage(clip, noise=noise)
    return engine.padded(latents)


def _control_condition(engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], i: int) -> torch.Tensor:
    """Return the latents of the control of clip `i`: the mean of the posterior, as in sampling."""
    if "control_moments" in batch:
        latents = engine.latents_of(to_device(batch["control_moments"][i][None], engine.device), sample=False)
    elif "control" in batch:
        latents = engine.encode_first_stage(to_device(batch["control"][i][None], engine.device), sample=False)
    else:
        raise InputError("the network takes a control video, and the samples of the data have none, under control")
    return engine.padded(latents)


def _image_condition(
    engine: SATVideoDiffusionEngine,
    batch: Mapping[str, Any],
    i: int,
    clip: torch.Tensor,
    drawn: _ImageDraws,
    size: tuple[int, int, int],
) -> torch.Tensor:
    """Return the image latents of clip `i`, with noise on the image unless it comes from a cache; zeros if dropped."""
    num_latents, height, width = size
    if drawn.dropped:
        first = torch.zeros((1, 1, engine.network.out_channels, height, width), device=clip.device)
        return engine.image_condition(first, num_latents)
    if "image_moments" in batch:
        moments = to_device(batch["image_moments"][i][None], clip.device)
        first = engine.latents_of(moments, sample=False, scale=engine.scale_image_latents)
        return engine.image_condition(first, num_latents)
    assert drawn.noise is not None, "an image that is encoded has noise"
    image = to_device(_image(batch, i, clip), clip.device)
    return engine.image_latents(image + to_device(drawn.noise, clip.device), num_latents)


def _image(batch: Mapping[str, Any], i: int, clip: torch.Tensor) -> torch.Tensor:
    """Return the image (1, 3, H, W) of clip `i`: that of the data, else the first frame, which moments do not have."""
    image = batch["image"][i] if "image" in batch else None
    return clip[:, 0] if image is None else image[None]
