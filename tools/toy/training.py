"""Train the toy autoencoder and the toy diffusion transformers on clips rendered on demand.

Shapes: ``B C T H W`` in -1..1 for the autoencoder, ``B T C H W`` for the transformers. Both run in bfloat16 autocast
on CPUs that compute in it, and in float32 on others, which are slower by much in it; weights, optimizers and losses are
float32, and so is the attention, which is slower in bfloat16 everywhere.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
Optimizers = Sequence[torch.optim.Optimizer]

BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
NUM_WORKERS = 4  # threads that share a batch; part of the recipe: with another number, sums round differently


@dataclass(frozen=True)
class VaeCycle:
    """A cycle of the autoencoder's training: first small, cheap crops, then whole frames.

    Attributes:
        crop_steps: steps on 32x32 crops around the moving shape.
        full_steps: steps on whole frames.
        full_batch: whole clips per step.
        lr: peak learning rate of Adam; warm-up, then cosine decay to a hundredth.
        warmup: steps of it.
        crop_frames: frames of a crop, from anywhere in the clip.
        latent_noise: most noise that the decoder gets beside that of the posterior, as a standard deviation. It learns
            to forgive errors of the networks, and the encoder to tell shapes apart by more than that.
        edge_weight: weight of the L1 error of the differences between neighbours, which sharpens edges.
        decoder_only: the encoder stays as it is, and with it the latents.
        square_weight: weight of the L2 error of the pixels, which counts edges more than the ground.
        lattice: share of clips from the world of the transformers; the others have any place, size and speed.
        land: share of clips with land, which the transformers do not know, so that a LoRA can teach it to them.
    """

    crop_steps: int = 800
    full_steps: int = 200
    full_batch: int = 2
    lr: float = 1e-3
    warmup: int = 50
    crop_frames: int = scene.NUM_FRAMES
    latent_noise: float = 0.0
    edge_weight: float = 0.0
    square_weight: float = 1.0
    decoder_only: bool = False
    lattice: float = 0.0
    land: float = 0.0


_WITH_LAND = VaeCycle(
    0,
    130,
    full_batch=4,
    lr=7e-4,
    warmup=20,
    latent_noise=0.1,
    edge_weight=1.0,
    square_weight=10.0,
    decoder_only=True,
    lattice=0.875,
    land=0.25,
)


@dataclass(frozen=True)
class VaeRecipe:
    """Training of the autoencoder.

    Attributes:
        cycles: one after the other.
        crop_batch: crops per step.
        kl_weight: weight of the KL divergence per latent component, in nats.
    """

    cycles: tuple[VaeCycle, ...] = (
        VaeCycle(),
        VaeCycle(540, 80, lr=7e-4, crop_frames=9, latent_noise=0.2, edge_weight=1.0),
        VaeCycle(0, 200, lr=7e-4, latent_noise=0.1, edge_weight=1.0, decoder_only=True, lattice=1.0),
        _WITH_LAND,
        replace(_WITH_LAND, full_steps=400, square_weight=30.0),
    )
    crop_batch: int = 4
    kl_weight: float = 1e-4

    @property
    def num_steps(self) -> int:
        """Steps of all cycles."""
        return sum(cycle.crop_steps + cycle.full_steps for cycle in self.cycles)


def to_tensor(video: np.ndarray) -> torch.Tensor:
    """(T, H, W, C) in [0, 1] -> (C, T, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(3, 0, 1, 2) * 2.0 - 1.0


def rate_share(step: int, num_steps: int, *, warmup: int = 50, floor: float = 0.01) -> float:
    """Return the share of the peak learning rate: linear warm-up to 1, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _crop(clip: scene.Clip, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Render a clip and cut a square of half the size near a random point of the shape's path, at a random time."""
    size, start = scene.SIZE // 2, int(rng.integers(scene.NUM_FRAMES - num_frames + 1))
    step = np.asarray(scene.DIRECTIONS[clip.direction])
    middle = clip.travel * (start + rng.uniform(0.0, num_frames - 1)) / (scene.NUM_FRAMES - 1)
    centre = np.asarray(clip.start) + step * middle + rng.uniform(-14.0, 14.0, size=2)
    x, y = np.clip(centre - size / 2, 0, scene.SIZE - size).astype(int)
    return scene.render(clip)[start : start + num_frames, y : y + size, x : x + size]


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

    def save(self, state: dict[str, Any], optimizers: Optimizers, *, is_last: bool) -> None:
        """Write the state if it is time, or the last one."""
        if is_last or time.monotonic() - self._saved >= self.interval:
            with atomic_file(self.path) as temporary:
                torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, temporary)
            self._saved = time.monotonic()


Gradients = tuple[list[torch.Tensor], list[float]]


def _sum_parts(work: Callable[[Any], Gradients], pieces: Sequence[Any], pool: ThreadPoolExecutor) -> Gradients:
    """Run `work` on each piece of a batch in its own thread; sum gradients and metrics in order.

    Faster than two torch threads for the whole batch: the threads synchronise once a step, not in each operation.
    """
    results = list(pool.map(work, pieces))
    gradients = [torch.stack(parts).sum(dim=0) for parts in zip(*(r[0] for r in results), strict=True)]
    return gradients, [sum(parts) for parts in zip(*(r[1] for r in results), strict=True)]


def _apply(optimizers: Optimizers, parameters: list[torch.Tensor], gradients: list[torch.Tensor], share: float) -> None:
    """Take one step of each optimizer at this share of its rate, with the gradient clipped to norm 1."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share
        optimizer.step()


def train_vae(vae: nn.Module, recipe: VaeRecipe, progress: Progress, *, seed: int, log: Log) -> None:
    """Train the autoencoder in place, through the chunked decoding that sampling uses.

    The loss is L1 and L2 of the pixels, L1 of their differences, and a small KL term that keeps the latents near unit
    scale.
    """
    state = progress.load()
    first, errors, started, optimizer, parameters = 0, [], time.monotonic(), None, []
    if state:
        first = state["step"]
        vae.load_state_dict(state["model"])

    def work(job: tuple[torch.Tensor, int, float, VaeCycle]) -> Gradients:
        video, noise_seed, weight, cycle = job
        generator = torch.Generator().manual_seed(noise_seed)
        if BFLOAT16:
            video = video.contiguous(memory_format=torch.channels_last_3d)  # faster by a third; slower in float32
        with torch.autocast(video.device.type, dtype=torch.bfloat16, enabled=BFLOAT16):
            with torch.set_grad_enabled(not cycle.decoder_only):
                distribution = vae.regularization.distribution(vae.encode_moments(video).float())
                latents = distribution.sample(generator=generator)
            level = cycle.latent_noise * torch.rand(len(video), 1, 1, 1, 1, generator=generator)
            latents = latents + level * torch.randn(latents.shape, generator=generator)
            difference = vae.decode(latents).float() - video
        kl = distribution.kl().sum() / distribution.mean.numel()
        loss = difference.abs().mean() + cycle.square_weight * difference.square().mean() + recipe.kl_weight * kl
        if cycle.edge_weight:
            loss = loss + cycle.edge_weight * sum(difference.diff(dim=axis).abs().mean() for axis in (3, 4))
        figures = [weight * difference.detach().square().mean().item() / 4.0, weight * kl.item()]
        return list(torch.autograd.grad(weight * loss, _trained(vae, cycle))), figures

    schedule = [(i, cycle) for cycle in recipe.cycles for i in range(cycle.crop_steps + cycle.full_steps)]
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for step, (i, cycle) in list(enumerate(schedule))[first:]:
            if i == 0 or optimizer is None:
                parameters = _trained(vae, cycle)
                optimizer = torch.optim.Adam(parameters, lr=cycle.lr, betas=(0.9, 0.99))
                if i and state:
                    optimizer.load_state_dict(state["optimizers"][0])
            rng = np.random.default_rng([seed, 1, step])
            pieces = _vae_batch(recipe, cycle, rng, crop=i < cycle.crop_steps).chunk(NUM_WORKERS)
            total = sum(map(len, pieces))
            jobs = [(piece, int(rng.integers(2**31)), len(piece) / total, cycle) for piece in pieces]
            gradients, (mse, kl) = _sum_parts(work, jobs, pool)
            share = rate_share(i, cycle.crop_steps + cycle.full_steps, warmup=cycle.warmup)
            _apply([optimizer], parameters, gradients, share)
            errors.append(mse)
            if (step + 1) % 20 == 0 or step + 1 == recipe.num_steps:
                psnr = -10 * math.log10(sum(errors) / len(errors))
                seconds = time.monotonic() - started
                log(f"vae {step + 1}/{recipe.num_steps}: {psnr:.2f} dB, KL {kl:.2f}, {seconds:.0f} s")
                errors.clear()
            is_last = step + 1 == recipe.num_steps
            progress.save({"step": step + 1, "model": vae.state_dict()}, [optimizer], is_last=is_last)


def _trained(vae: nn.Module, cycle: VaeCycle) -> list[torch.Tensor]:
    return list((vae.decoder if cycle.decoder_only else vae).parameters())


def _vae_batch(recipe: VaeRecipe, cycle: VaeCycle, rng: np.random.Generator, *, crop: bool) -> torch.Tensor:
    """Render the clips of a step: (B, C, T, H, W)."""
    combos = scene.combinations(held_out=False)
    chosen = [combos[i] for i in rng.integers(len(combos), size=recipe.crop_batch if crop else cycle.full_batch)]
    sizes = rng.choice([None, None, "small", "big"], size=len(chosen))
    clips = [scene.free_clip(names, rng, size) for names, size in zip(chosen, sizes, strict=True)]
    if cycle.lattice:
        known = list(scene.RADII)
        lattice = [scene.random_clip(names, rng, known[rng.integers(len(known))]) for names in chosen]
        is_known = rng.random(len(clips)) < cycle.lattice
        clips = [ours if known else free for ours, free, known in zip(lattice, clips, is_known, strict=True)]
    videos = [_crop(clip, cycle.crop_frames, rng) if crop else scene.render(clip) for clip in clips]
    if cycle.land:
        with_land = rng.random(len(clips)) < cycle.land
        greens = rng.uniform(*scene.LAND_GREENS, size=len(clips))
        videos = [
            scene.with_land(video, (0.15, green, 0.2)) if land else video
            for video, green, land in zip(videos, greens, with_land, strict=True)
        ]
    return torch.stack([to_tensor(video) for video in videos])


@dataclass(frozen=True)
class NetworkRecipe:
    """Training of a diffusion transformer.

    Attributes:
        num_steps: optimizer steps; warm-up of the rates, then cosine decay to 0.
        batch_size: clips per step.
        lr: peak learning rate of AdamW.
        matrix_lr: peak learning rate of Muon (Jordan 2024), which trains the matrices of attention and MLP, in less
            than half the steps that AdamW takes.
        warmup: steps of it.
        weight_decay: of both.
        ema_decay: decay of the EMA weights, which are saved.
        text_dropout: fraction of samples with zeroed text embedding, for classifier-free guidance.
        timesteps: mean and standard deviation of a normal number n; timesteps are drawn at the share sigmoid(n) of the
            schedule. Where a shape is decided is above its middle; below, only fine noise is left.
        compiled: compile the blocks, which takes 20 seconds once, and a third from each step.
    """

    num_steps: int = 5000
    batch_size: int = 16
    lr: float = 2e-3
    matrix_lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.995
    text_dropout: float = 0.1
    timesteps: tuple[float, float] = (0.5, 1.2)
    compiled: bool = True


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


def encode_clips(vae: nn.Module, clips: Sequence[scene.Clip], *, batch_size: int = 4) -> EncodedClips:
    """Render and encode clips."""

    @torch.no_grad()
    def encode(batch: list[scene.Clip]) -> tuple[torch.Tensor, ...]:
        video = torch.stack([to_tensor(scene.render(clip)) for clip in batch])
        with torch.autocast(video.device.type, dtype=torch.bfloat16, enabled=BFLOAT16):
            distribution = vae.regularization.distribution(vae.encode_moments(video).float())
            first = vae.encode(video[:, :, :1], sample=False).float()
        return distribution.mean, (0.5 * distribution.logvar).exp(), first

    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        encoded = list(pool.map(encode, [clips[i : i + batch_size] for i in range(0, len(clips), batch_size)]))
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
    if recipe.compiled:
        network.compile()
    unique = sorted(set(clips.captions))
    table = engine.conditioner({"txt": unique})["crossattn"]
    caption_ids = torch.tensor([unique.index(caption) for caption in clips.captions])
    parameters = [p for p in network.parameters() if p.requires_grad]
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizers = _network_optimizers(network, recipe)
    first, losses, started = 0, [], time.monotonic()
    if state := progress.load():
        first, average = state["step"], state["average"]
        network.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    for step in range(first, recipe.num_steps):
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
        chosen = torch.randint(len(clips.captions), (recipe.batch_size,), generator=generator)
        context = table[caption_ids[chosen]]
        latents, cond = _training_batch(engine, clips, chosen, context, recipe.text_dropout, generator)
        idx = _spread_timesteps(recipe, engine.loss_fn.sigma_sampler.num_idx, generator)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=BFLOAT16):
            given = engine.network_kwargs(len(latents), latents.device)
            each = engine.loss_fn(engine.model, engine.denoiser, latents, cond, generator=generator, idx=idx, **given)
        loss = each.mean()
        share = rate_share(step, recipe.num_steps, warmup=recipe.warmup, floor=0.0)
        _apply(optimizers, parameters, list(torch.autograd.grad(loss, parameters)), share)
        decay = min(recipe.ema_decay, (step + 1) / (step + 10))
        current = network.state_dict()
        torch._foreach_lerp_([average[name] for name in current], list(current.values()), 1.0 - decay)
        losses.append(loss.item())
        is_last = step + 1 == recipe.num_steps
        if (step + 1) % 100 == 0 or is_last:
            mean = sum(losses) / len(losses)
            log(f"step {step + 1}/{recipe.num_steps}: loss {mean:.4f}, {time.monotonic() - started:.0f} s")
            losses.clear()
        kept = {"step": step + 1, "model": current, "average": average}
        progress.save(kept, optimizers, is_last=is_last)
    network.attention = attention
    network.load_state_dict(average)
    network.eval()
    return average


class Float32Muon(torch.optim.Muon):
    """Muon with the RMS of AdamW, whose Newton-Schulz iteration runs in float32.

    That of torch runs in bfloat16, in which a CPU without such instructions multiplies matrices twenty times slower.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in (matrix for matrix in group["params"] if matrix.grad is not None):
                state, gradient = self.state[matrix], matrix.grad
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                average = state["momentum_buffer"].lerp_(gradient, 1.0 - group["momentum"])
                update = gradient.lerp(average, group["momentum"])  # Nesterov
                update = _orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


def _orthogonalized(matrix: torch.Tensor, coefficients: Sequence[float], num_steps: int, eps: float) -> torch.Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz steps (Jordan 2024)."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _network_optimizers(network: nn.Module, recipe: NetworkRecipe) -> Optimizers:
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in named.items() if ".layers." in name and parameter.ndim == 2]
    others = [parameter for parameter in named.values() if not any(parameter is matrix for matrix in matrices)]
    decay = {"weight_decay": recipe.weight_decay}
    return [
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), fused=True, **decay),
        Float32Muon(matrices, lr=recipe.matrix_lr, **decay),
    ]


def _spread_timesteps(recipe: NetworkRecipe, num_idx: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a timestep from each of as many equal shares of their distribution as the batch has clips."""
    num = recipe.batch_size
    part = torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)
    normal = torch.special.ndtri((part / num).double().clamp(1e-4, 1.0 - 1e-4))
    mean, std = recipe.timesteps
    return (torch.sigmoid(mean + std * normal) * num_idx).long().clamp(max=num_idx - 1)


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
        first = clips.first[chosen] * (engine.scale_factor if engine.scale_image_latents else 1.0)
        image = engine.image_condition(first, latents.shape[1])
        dropped = torch.rand(len(chosen), generator=generator) < engine.noised_image_dropout
        cond["concat"] = image.masked_fill(dropped[:, None, None, None, None], 0.0)
    return engine.padded(latents), cond


@torch.no_grad()
def start_from(engine: nn.Module, load: str) -> None:
    """Start the engine's network from that of a checkpoint with the same blocks, so that it first does what that did.

    What the other one lacks has no effect at first: image latents, and ``ofs``. A temporal patch of several frames
    starts from the mean of what each of them was embedded to, and with the same output for each; columns of image
    latents are multiplied by `scale_factor` if the latents are not. The other network has no temporal patches.
    """
    stored, network, patch = read_weights(find_weights(load)), engine.network, engine.network.patch_size
    for name, parameter in network.state_dict().items():
        if name.startswith("ofs_embed."):
            if name.startswith("ofs_embed.2."):  # the last layer
                parameter.zero_()
            continue
        value = stored[f"model.diffusion_model.{name}"].compute().to(parameter.dtype)
        if name == "mixins.patch_embed.proj.weight":
            # Columns are patches in the order c, pt, ph, pw; the C channels of the image follow those of the latents.
            value = value.reshape(len(value), -1, 1, *patch[1:]).repeat(1, 1, patch[0], 1, 1) / patch[0]
            if not engine.scale_image_latents:
                value[:, network.out_channels :] *= engine.scale_factor
            value = value.flatten(1)
            parameter.zero_()
            parameter[:, : value.shape[1]] = value
        elif name.startswith("mixins.final_layer.linear."):
            parts = value.unflatten(0, (network.out_channels, 1, -1))
            parameter.copy_(parts.repeat_interleave(patch[0], dim=1).flatten(0, 2))
        else:
            parameter.copy_(value)
