"""Train the toy autoencoder and the toy diffusion transformers on clips rendered on demand.

Shapes: ``B C T H W`` in -1..1 for the autoencoder, ``B T C H W`` for the transformers. Both run in bfloat16 autocast,
faster on CPUs that have it; weights, optimizers and losses are float32, and so is the attention, which is slower in
bfloat16 there.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scene
import torch
from torch import nn

from sgm.io import atomic_file
from sgm.parallel.attention import torch_attention
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

    @property
    def num_steps(self) -> int:
        """Steps on crops and whole frames."""
        return self.crop_steps + self.full_steps


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


class Progress:
    """The state of a training in a file, so that it goes on where it was stopped.

    What a step draws depends on the seed and the number of the step only, so an interrupted training ends with the same
    weights as another.

    Args:
        path: the file; it stays when the training has ended, which then is not repeated.
        interval: seconds between two saves.
    """

    def __init__(self, path: Path, interval: float = 60.0) -> None:
        self.path, self.interval = path, interval
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state, or None at the start."""
        return torch.load(self.path, weights_only=True) if self.path.is_file() else None

    def save(self, state: dict[str, Any], optimizer: torch.optim.Optimizer, *, is_last: bool) -> None:
        """Write the state if it is time, or the last one."""
        if is_last or time.monotonic() - self._saved >= self.interval:
            with atomic_file(self.path) as temporary:
                torch.save({**state, "optimizer": optimizer.state_dict()}, temporary)
            self._saved = time.monotonic()


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


def train_vae(vae: nn.Module, recipe: VaeRecipe, progress: Progress, *, seed: int, log: Log) -> None:
    """Train the autoencoder in place, through the chunked decoding that sampling uses.

    The loss is L1 + L2 of the pixels plus a small KL term that keeps the latents near unit scale.
    """
    parameters = list(vae.parameters())
    optimizer = torch.optim.Adam(parameters, lr=recipe.lr, betas=(0.9, 0.99))
    first, errors, started = 0, [], time.monotonic()
    if state := progress.load():
        first = state["step"]
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def work(job: tuple[torch.Tensor, int, float]) -> Gradients:
        video, noise_seed, weight = job
        video = video.contiguous(memory_format=torch.channels_last_3d)  # faster by a third
        with torch.autocast(video.device.type, dtype=torch.bfloat16):
            distribution = vae.regularization.distribution(vae.encode_moments(video).float())
            latents = distribution.sample(generator=torch.Generator().manual_seed(noise_seed))
            difference = vae.decode(latents).float() - video
        kl = distribution.kl().sum() / distribution.mean.numel()
        loss = difference.abs().mean() + difference.square().mean() + recipe.kl_weight * kl
        figures = [weight * difference.detach().square().mean().item() / 4.0, weight * kl.item()]
        return list(torch.autograd.grad(weight * loss, parameters)), figures

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for step in range(first, recipe.num_steps):
            rng = np.random.default_rng([seed, 1, step])
            halves = _vae_batch(recipe, rng, crop=step < recipe.crop_steps).chunk(NUM_WORKERS)
            total = sum(map(len, halves))
            jobs = [(half, int(rng.integers(2**31)), len(half) / total) for half in halves]
            gradients, (mse, kl) = _sum_halves(work, jobs, pool)
            _apply(optimizer, gradients, cosine_lr(step, recipe.num_steps, recipe.lr))
            errors.append(mse)
            is_last = step + 1 == recipe.num_steps
            if (step + 1) % 50 == 0 or is_last:
                psnr = -10 * math.log10(sum(errors) / len(errors))
                seconds = time.monotonic() - started
                log(f"vae {step + 1}/{recipe.num_steps}: {psnr:.2f} dB, KL {kl:.2f}, {seconds:.0f} s")
                errors.clear()
            progress.save({"step": step + 1, "model": vae.state_dict()}, optimizer, is_last=is_last)


def _vae_batch(recipe: VaeRecipe, rng: np.random.Generator, *, crop: bool) -> torch.Tensor:
    """Render the clips of a step: (B, C, T, H, W)."""
    combos = scene.combinations(held_out=False)
    chosen = rng.integers(len(combos), size=recipe.crop_batch if crop else recipe.full_batch)
    clips = [scene.random_clip(combos[i], rng) for i in chosen]
    videos = [_crop(clip, scene.SIZE // 2, rng) if crop else scene.render(clip) for clip in clips]
    return torch.stack([to_tensor(video) for video in videos])


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

    def save(self, path: Path) -> None:
        """Write them into a file."""
        with atomic_file(path) as temporary:
            torch.save(vars(self), temporary)

    @property
    def std(self) -> float:
        """Standard deviation of a draw from the posteriors around the mean of its channel."""
        return math.sqrt(self.mean.var(dim=(0, 1, 3, 4)).mean().item() + self.noise_std.square().mean().item())


def encode_clips(vae: nn.Module, num_clips: int, *, seed: int, batch_size: int = 4) -> EncodedClips:
    """Render and encode `num_clips` clips of the training combinations, each equally often."""
    rng = np.random.default_rng([seed, 2])
    endless = scene.random_clips(scene.combinations(held_out=False), rng)
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
    engine: nn.Module, clips: EncodedClips, recipe: NetworkRecipe, progress: Progress, *, seed: int, log: Log
) -> dict[str, torch.Tensor]:
    """Train the engine's network on encoded clips with the loss of its YAML; return the moving average of its weights.

    For image-to-video the first frame is an input as in sampling, dropped with probability `noised_image_dropout`.
    """
    network, attention = engine.network.train(), engine.network.attention
    network.attention = _float32_attention
    unique = sorted(set(clips.captions))
    table = engine.conditioner({"txt": unique})["crossattn"]
    caption_ids = torch.tensor([unique.index(caption) for caption in clips.captions])
    parameters = [p for p in network.parameters() if p.requires_grad]
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    first, losses, started = 0, [], time.monotonic()
    if state := progress.load():
        first, average = state["step"], state["average"]
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def work(job: tuple[torch.Tensor, dict[str, torch.Tensor], int]) -> Gradients:
        latents, cond, noise_seed = job
        noise = torch.Generator().manual_seed(noise_seed)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16):
            per_sample = engine.loss_fn(engine.model, engine.denoiser, latents, cond, generator=noise)
        loss = per_sample.sum() / recipe.batch_size
        return list(torch.autograd.grad(loss, parameters)), [loss.item()]

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for step in range(first, recipe.num_steps):
            generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
            chosen = torch.randint(len(clips.captions), (recipe.batch_size,), generator=generator)
            context = table[caption_ids[chosen]]
            latents, cond = _training_batch(engine, clips, chosen, context, recipe.text_dropout, generator)
            parts = [{key: value.chunk(NUM_WORKERS)[k] for key, value in cond.items()} for k in range(NUM_WORKERS)]
            seeds = torch.randint(2**31, (NUM_WORKERS,), generator=generator).tolist()
            jobs = list(zip(latents.chunk(NUM_WORKERS), parts, seeds, strict=True))
            gradients, (loss,) = _sum_halves(work, jobs, pool)
            _apply(optimizer, gradients, cosine_lr(step, recipe.num_steps, recipe.lr, warmup=100))
            decay = min(recipe.ema_decay, (step + 1) / (step + 10))
            for name, value in network.state_dict().items():
                average[name].lerp_(value.detach(), 1.0 - decay)
            losses.append(loss)
            is_last = step + 1 == recipe.num_steps
            if (step + 1) % 100 == 0 or is_last:
                mean = sum(losses) / len(losses)
                log(f"step {step + 1}/{recipe.num_steps}: loss {mean:.4f}, {time.monotonic() - started:.0f} s")
                losses.clear()
            kept = {"step": step + 1, "model": network.state_dict(), "average": average}
            progress.save(kept, optimizer, is_last=is_last)
    network.attention = attention
    network.load_state_dict(average)
    network.eval()
    return average


def _float32_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return torch_attention(q.float(), k.float(), v.float())


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
