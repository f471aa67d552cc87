"""Train the toy autoencoder and the toy diffusion transformers on clips rendered on demand.

Shapes: ``B C T H W`` in -1..1 for the autoencoder, ``B T C H W`` for the transformers. The autoencoder runs in bfloat16
autocast, several times faster on CPUs that have it; its weights, optimizer and losses are float32, as are the
transformers.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scene
import torch
from torch import nn

from sgm.weights.files import find_weights, read_weights

Log = Callable[[str], None]

NUM_WORKERS = 2  # threads that share a batch; part of the recipe: with another number, sums round differently


@dataclass(frozen=True)
class VaeRecipe:
    """Training of the autoencoder: first on small, cheap crops, then on whole frames.

    Attributes:
        crop_steps: steps on 32x32 crops around the moving shape.
        full_steps: steps on whole frames.
        crop_batch: crops per step.
        full_batch: whole clips per step.
        lr: peak learning rate of Adam; cosine decay to a hundredth.
        kl_weight: weight of the KL divergence per latent component, in nats.
    """

    crop_steps: int = 800
    full_steps: int = 200
    crop_batch: int = 4
    full_batch: int = 2
    lr: float = 1e-3
    kl_weight: float = 1e-4


def to_tensor(video: np.ndarray) -> torch.Tensor:
    """(T, H, W, C) in [0, 1] -> (C, T, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(3, 0, 1, 2) * 2.0 - 1.0


def cosine_lr(step: int, num_steps: int, peak: float, *, warmup: int = 50, floor: float = 0.01) -> float:
    """Linear warm-up to `peak`, then half a cosine down to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _crop(clip: scene.Clip, size: int, rng: np.random.Generator) -> np.ndarray:
    """Render a clip and cut a square of `size` pixels near a random point of the shape's path."""
    step = np.asarray(scene.DIRECTIONS[clip.direction])
    centre = np.asarray(clip.start) + step * rng.uniform(0.0, clip.travel) + rng.uniform(-14.0, 14.0, size=2)
    x, y = np.clip(centre - size / 2, 0, scene.SIZE - size).astype(int)
    return scene.render(clip)[:, y : y + size, x : x + size]


Gradients = tuple[list[torch.Tensor], list[float]]


def _sum_halves(work: Callable[[Any], Gradients], halves: Sequence[Any], pool: ThreadPoolExecutor) -> Gradients:
    """Run `work` on each half of a batch in its own thread; sum gradients and metrics in order.

    Faster than two torch threads for the whole batch: the threads synchronise once a step, not in each operation.
    """
    results = list(pool.map(work, halves))
    gradients = [torch.stack(parts).sum(dim=0) for parts in zip(*(r[0] for r in results), strict=True)]
    return gradients, [sum(parts) for parts in zip(*(r[1] for r in results), strict=True)]


def _apply(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], lr: float) -> None:
    """Take one optimizer step with the gradient clipped to norm 1."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_vae(vae: nn.Module, recipe: VaeRecipe, *, seed: int, log: Log) -> None:
    """Train the autoencoder in place, through the chunked decoding that sampling uses.

    The loss is L1 + L2 of the pixels plus a small KL term that keeps the latents near unit scale.
    """
    rng = np.random.default_rng([seed, 1])
    clips = scene.random_clips(scene.combinations(held_out=False), rng)
    parameters = list(vae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.9, 0.99))
    num_steps = recipe.crop_steps + recipe.full_steps
    started, errors = time.monotonic(), []

    def work(job: tuple[torch.Tensor, int, float]) -> Gradients:
        video, noise_seed, weight = job
        with torch.autocast(video.device.type, dtype=torch.bfloat16):
            distribution = vae.regularization.distribution(vae.encode_moments(video).float())
            latents = distribution.sample(generator=torch.Generator().manual_seed(noise_seed))
            difference = vae.decode(latents).float() - video
        kl = distribution.kl().sum() / distribution.mean.numel()
        loss = difference.abs().mean() + difference.square().mean() + recipe.kl_weight * kl
        figures = [weight * difference.detach().square().mean().item() / 4.0, weight * kl.item()]
        return list(torch.autograd.grad(weight * loss, parameters)), figures

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for step in range(num_steps):
            if step < recipe.crop_steps:
                videos = [_crop(next(clips), scene.SIZE // 2, rng) for _ in range(recipe.crop_batch)]
            else:
                videos = [scene.render(next(clips)) for _ in range(recipe.full_batch)]
            halves = torch.stack([to_tensor(video) for video in videos]).chunk(NUM_WORKERS)
            jobs = [(half, int(rng.integers(2**31)), len(half) / len(videos)) for half in halves]
            gradients, (mse, kl) = _sum_halves(work, jobs, pool)
            _apply(optimizer, gradients, cosine_lr(step, num_steps, recipe.lr))
            errors.append(mse)
            if (step + 1) % 50 == 0 or step + 1 == num_steps:
                psnr = -10 * math.log10(sum(errors) / len(errors))
                log(f"vae {step + 1}/{num_steps}: {psnr:.2f} dB, KL {kl:.2f}, {time.monotonic() - started:.0f} s")
                errors.clear()


@dataclass(frozen=True)
class NetworkRecipe:
    """Training of a diffusion transformer.

    Attributes:
        num_steps: optimizer steps.
        batch_size: clips per step.
        lr: peak learning rate of AdamW; cosine decay to a hundredth.
        weight_decay: of AdamW.
        ema_decay: decay of the EMA weights, which are saved.
        text_dropout: fraction of samples with zeroed text embedding, for classifier-free guidance.
    """

    num_steps: int = 4400
    batch_size: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.01
    ema_decay: float = 0.995
    text_dropout: float = 0.1


@dataclass(frozen=True)
class EncodedClips:
    """Training clips of the transformers, unscaled.

    Attributes:
        mean: means of the posteriors (N, T, C, H, W).
        noise_std: standard deviations of the posteriors, of the same shape.
        first: latents of the first frame (N, 1, C, H, W), encoded separately: the image condition.
        captions: N captions.
    """

    mean: torch.Tensor
    noise_std: torch.Tensor
    first: torch.Tensor
    captions: list[str]

    @property
    def std(self) -> float:
        """Standard deviation of a draw from the posteriors around the mean of its channel."""
        return math.sqrt(self.mean.var(dim=(0, 1, 3, 4)).mean().item() + self.noise_std.square().mean().item())


def encode_clips(vae: nn.Module, num_clips: int, *, seed: int, batch_size: int = 4) -> EncodedClips:
    """Render and encode `num_clips` clips of the training combinations, each combination equally often."""
    endless = scene.random_clips(scene.combinations(held_out=False), np.random.default_rng([seed, 2]))
    clips = [next(endless) for _ in range(num_clips)]

    @torch.no_grad()
    def encode(batch: list[scene.Clip]) -> tuple[torch.Tensor, ...]:
        video = torch.stack([to_tensor(scene.render(clip)) for clip in batch])
        with torch.autocast(video.device.type, dtype=torch.bfloat16):
            distribution = vae.regularization.distribution(vae.encode_moments(video).float())
            first = vae.encode(video[:, :, :1], sample=False).float()
        return distribution.mean, (0.5 * distribution.logvar).exp(), first

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        encoded = list(pool.map(encode, [clips[i : i + batch_size] for i in range(0, num_clips, batch_size)]))
    mean, std, first = (torch.cat(parts).transpose(1, 2).contiguous() for parts in zip(*encoded, strict=True))
    return EncodedClips(mean, std, first, [clip.caption for clip in clips])


def train_network(
    engine: nn.Module, clips: EncodedClips, recipe: NetworkRecipe, *, seed: int, log: Log
) -> dict[str, torch.Tensor]:
    """Train the engine's network on encoded clips with the loss of its YAML; return the moving average of its weights.

    For image-to-video the first frame is an input as in sampling, dropped with probability `noised_image_dropout`.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    network = engine.network.train()
    unique = sorted(set(clips.captions))
    table = engine.conditioner({"txt": unique})["crossattn"]
    caption_ids = torch.tensor([unique.index(caption) for caption in clips.captions])
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    started, losses = time.monotonic(), []

    def work(job: tuple[torch.Tensor, dict[str, torch.Tensor], int]) -> Gradients:
        latents, cond, noise_seed = job
        noise = torch.Generator().manual_seed(noise_seed)
        per_sample = engine.loss_fn(engine.model, engine.denoiser, latents, cond, generator=noise)
        loss = per_sample.sum() / recipe.batch_size
        return list(torch.autograd.grad(loss, parameters)), [loss.item()]

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for step, chosen in enumerate(_batches(len(clips.captions), recipe, generator)):
            context = table[caption_ids[chosen]]
            latents, cond = _training_batch(engine, clips, chosen, context, recipe.text_dropout, generator)
            parts = [{key: value.chunk(NUM_WORKERS)[i] for key, value in cond.items()} for i in range(NUM_WORKERS)]
            seeds = torch.randint(2**31, (NUM_WORKERS,), generator=generator).tolist()
            jobs = list(zip(latents.chunk(NUM_WORKERS), parts, seeds, strict=True))
            gradients, (loss,) = _sum_halves(work, jobs, pool)
            _apply(optimizer, gradients, cosine_lr(step, recipe.num_steps, recipe.lr, warmup=100))
            decay = min(recipe.ema_decay, (step + 1) / (step + 10))
            for name, value in network.state_dict().items():
                average[name].lerp_(value.detach(), 1.0 - decay)
            losses.append(loss)
            if (step + 1) % 100 == 0 or step + 1 == recipe.num_steps:
                mean = sum(losses) / len(losses)
                log(f"step {step + 1}/{recipe.num_steps}: loss {mean:.4f}, {time.monotonic() - started:.0f} s")
                losses.clear()
    network.load_state_dict(average)
    network.eval()
    return average


def _batches(num_clips: int, recipe: NetworkRecipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield the clips of every step: all of them in random order, then again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.num_steps):
        while len(order) < recipe.batch_size:
            order = torch.cat((order, torch.randperm(num_clips, generator=generator)))
        yield order[: recipe.batch_size]
        order = order[recipe.batch_size :]


def _training_batch(
    engine: nn.Module,
    clips: EncodedClips,
    chosen: torch.Tensor,
    context: torch.Tensor,
    text_dropout: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw latents from the posteriors and drop conditions: latents (B, T, C, H, W) and the network's conditions."""
    mean = clips.mean[chosen]
    latents = (mean + clips.noise_std[chosen] * torch.randn(mean.shape, generator=generator)) * engine.scale_factor
    dropped = torch.rand(len(chosen), generator=generator) < text_dropout
    cond = {"crossattn": context.masked_fill(dropped[:, None, None], 0.0)}
    if engine.noised_image_input:
        image = torch.zeros_like(latents)
        image[:, :1] = clips.first[chosen] * engine.scale_factor
        dropped = torch.rand(len(chosen), generator=generator) < engine.noised_image_dropout
        cond["concat"] = image.masked_fill(dropped[:, None, None, None, None], 0.0)
    return latents, cond


@torch.no_grad()
def start_from(network: nn.Module, load: str) -> None:
    """Start an image-to-video network from a text-to-video checkpoint; the image latents have no effect at first."""
    stored = read_weights(find_weights(load))
    for name, parameter in network.state_dict().items():
        value = stored[f"model.diffusion_model.{name}"].compute().to(parameter.dtype)
        if name == "mixins.patch_embed.proj.weight":
            # (D, C, p, p) of the noisy latents; the C channels of the image follow them in the network.
            value = value.flatten(1)
            parameter.zero_()
            parameter[:, : value.shape[1]] = value
        else:
            parameter.copy_(value)
