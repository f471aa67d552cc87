"""The engine: network, denoiser, conditioner, autoencoder, sampler and loss.

Legend: ``B T C H W`` latents and videos, converted here to ``B C T H W`` for the autoencoder. ``T`` counts latent
frames, ``F`` video frames.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import nn
from torch.utils._pytree import register_dataclass

from sgm.config.precision import autoencoder_dtype, conv3d_warnings
from sgm.config.values import AtLeast1, Positive, Share
from sgm.log import get_logger, warn_once
from sgm.modules.diffusionmodules.windows import TimeLoop, TimeWindows
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.geometry import SPATIAL_COMPRESSION
from sgm.modules.lora import scale_adapters, without_adapters
from sgm.modules.step_cache import DEFAULT_THRESHOLDS, StepCache
from sgm.util import PRECISIONS, InputError, default, instantiate_from_config, to_device, without_allocating
from sgm.weights.checkpoint import LoadReport, load_autoencoder, load_network
from sgm.weights.lora.several import LoraStack
from sgm.weights.quantize import Storage

logger = get_logger(__name__)

Progress = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of the loss for B samples: encoded, with all random numbers drawn.

    Attributes:
        latents: clean latents (B, T, C, H, W), float32, padded to full temporal patches.
        cond: ``crossattn`` (B, L, D_text) and, for image-to-video, ``concat`` (B, T, C, H, W); ``control`` likewise.
        idx: timesteps (B,), int64.
        noise: of the shape of `latents`, float32.
        seeds: of the network's dropout (B,), int64; None draws from the generator of the process.
        of_loss: further inputs of the loss by name, (B, ...): ``rejected``, the latents of the clips that are not
            preferred, of a loss that takes pairs; ``mask`` (B, T, 1, H, W), 1 where the loss counts, else 0.
    """

    latents: torch.Tensor
    cond: dict[str, torch.Tensor]
    idx: torch.Tensor
    noise: torch.Tensor
    seeds: torch.Tensor | None = None
    of_loss: dict[str, torch.Tensor] = field(default_factory=dict)


register_dataclass(TrainingInputs)  # for `sgm.distributed.broadcast_in_sample_group`


class SATVideoDiffusionEngine(nn.Module):
    """A model, from the ``model:`` section of a YAML file.

    Args:
        network_config: section of the network.
        denoiser_config: section of the denoiser.
        sampler_config: section of the sampler; needed to sample.
        conditioner_config: section of the conditioner.
        first_stage_config: section of the autoencoder.
        loss_fn_config: section of the loss; needed to train.
        scale_factor: multiplier from autoencoder latents to diffusion latents (about 1/σ).
        latent_input: the data are latents, not videos.
        noised_image_input: the network takes image latents besides the noisy ones (image-to-video).
        noised_image_all_concat: repeat the image latents for every frame, instead of zeros after the first.
        noised_image_dropout: fraction of training samples with zeroed image latents.
        scale_image_latents: multiply image latents by `scale_factor`, like video latents; None follows the released
            models: yes with a temporal patch of 1, no (raw latents) with 2.
        not_trainable_prefixes: prefixes of frozen parameters; ``all`` freezes everything but the adapters.
        input_key: key of the video in a batch of the data; all data sets use this one.
        en_and_decode_n_samples_a_time: batch size of the autoencoder; None for the whole batch.
        precision: ``fp16``, ``bf16`` or ``fp32``: training precision of the released weights.
        lora_train: train and save only the adapters.
        ofs: value of the ``ofs`` input of the 1.5 image-to-video network.
        compile_model: compile the network with ``torch.compile``, as args.compile does.
        allocate: False builds network and autoencoder on the meta device, for `load_weights`.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        "augmentation_dropout": "the reference reads it nowhere; see noised_image_dropout",
        "disable_first_stage_autocast": "the autoencoder never runs under autocast",
        "log_keys": "logs show the prompt",
        "network_wrapper": "there is one wrapper, OpenAIWrapper",
        "use_pd": "progressive distillation is not part of this project",
        "lr_scale": "the learning rate is set in the deepspeed section",
        "use_ema": "the moving average is set in the args section",
        "ckpt_path": "weights are loaded from args.load",
    }

    def __init__(
        self,
        *,
        network_config: Mapping[str, Any],
        denoiser_config: Mapping[str, Any],
        sampler_config: Mapping[str, Any] | None = None,
        conditioner_config: Mapping[str, Any] | None = None,
        first_stage_config: Mapping[str, Any] | None = None,
        loss_fn_config: Mapping[str, Any] | None = None,
        scale_factor: Positive = 1.0,
        latent_input: bool = False,
        noised_image_input: bool = False,
        noised_image_all_concat: bool = False,
        noised_image_dropout: Share = 0.0,
        scale_image_latents: bool | None = None,
        not_trainable_prefixes: Sequence[str] = (),
        input_key: Literal["mp4"] = "mp4",
        en_and_decode_n_samples_a_time: AtLeast1 | None = None,
        precision: Literal["fp16", "bf16", "fp32"] | None = None,
        lora_train: bool = False,
        ofs: float = 2.0,
        compile_model: bool = False,
        allocate: bool = True,
    ) -> None:
        super().__init__()
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f"model.precision: {precision!r} is not one of {', '.join(PRECISIONS)}, or null")
        with nullcontext() if allocate else without_allocating():
            network = instantiate_from_config(network_config)
            self.first_stage_model = instantiate_from_config(first_stage_config) if first_stage_config else None
        self.model = OpenAIWrapper(network)
        if compile_model:
            network.compile()
        self.denoiser = instantiate_from_config(denoiser_config)
        self.sampler = instantiate_from_config(sampler_config) if sampler_config else None
        self.conditioner = instantiate_from_config(conditioner_config) if conditioner_config else None
        self.loss_fn = instantiate_from_config(loss_fn_config) if loss_fn_config else None
        if self.first_stage_model is not None:
            self.first_stage_model.eval().requires_grad_(False)
        self.scale_factor = scale_factor
        self.latent_input = latent_input
        self.noised_image_input = noised_image_input
        self.noised_image_all_concat = noised_image_all_concat
        self.noised_image_dropout = noised_image_dropout
        self.scale_image_latents = network.patch_size[0] == 1 if scale_image_latents is None else scale_image_latents
        self.not_trainable_prefixes = tuple(not_trainable_prefixes)
        self.samples_a_time = en_and_decode_n_samples_a_time
        self.precision = precision
        self.lora_train = lora_train
        self.ofs = ofs
        self.step_cache: StepCache | None = None  # of the network, for sampling
        self.windows: TimeWindows | None = None  # in which clips are denoised when sampling; None: whole
        self.loras: LoraStack | None = None  # whose strengths the adapters of the network get, for sampling
        self.run_device: torch.device | None = None  # set if parameters are offloaded between forward passes

    @property
    def network(self) -> Any:
        """The diffusion transformer."""
        return self.model.diffusion_model

    @property
    def device(self) -> torch.device:
        """Device of the inputs: `run_device`, or that of the network's parameters."""
        return next(self.network.parameters()).device if self.run_device is None else self.run_device

    @property
    def first_stage_dtype(self) -> torch.dtype:
        """The dtype in which the autoencoder encodes and decodes."""
        return next(self._require_first_stage().parameters()).dtype

    @property
    def text_keys(self) -> list[str]:
        """The entries of a batch that the conditioner reads."""
        return [key for entry in self.require_conditioner().entries for key in entry.input_keys]

    def require_conditioner(self) -> Any:
        """Return the conditioner.

        Raises:
            InputError: there is none.
        """
        if self.conditioner is None:
            raise InputError("the model section has no conditioner_config; add one to train or to sample")
        return self.conditioner

    def use_step_cache(self, kind: str | None, threshold: float | None) -> None:
        """Skip blocks of the network when sampling, see `StepCache`; None: run them all, or the default threshold."""
        threshold = DEFAULT_THRESHOLDS.get(kind or "") if threshold is None else threshold
        self.step_cache = None if kind is None else self.network.use_step_cache(kind, threshold)

    def load_weights(
        self,
        load: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        base: str | None = None,
        loras: LoraStack | None = None,
        allow_missing_adapters: bool = True,
        allow_missing: bool = False,
        generator: torch.Generator | None = None,
        storage: Storage | None = None,
        storage_device: torch.device | None = None,
    ) -> LoadReport:
        """Load the network from a checkpoint, see `sgm.weights.checkpoint.load_network`; its adapters from `loras`."""
        report = load_network(
            self.network,
            load,
            base=base,
            adapters=None if loras is None else loras.tensors(),
            dtype=dtype,
            device=device,
            allow_missing_adapters=allow_missing_adapters,
            allow_missing=allow_missing,
            generator=generator,
            storage=storage,
            storage_device=storage_device,
        )
        self.network.eval()
        self.loras = loras
        return report

    def load_first_stage(self, *, dtype: torch.dtype, device: torch.device) -> LoadReport:
        """Load the autoencoder from the ``ckpt_path`` of its section.

        Args:
            dtype: of the network; see `sgm.config.precision.autoencoder_dtype`.
            device: of the autoencoder.

        Raises:
            InputError: there is no autoencoder, or its file is missing or does not fit.
        """
        vae = self._require_first_stage()
        if vae.ckpt_path is None:
            raise InputError(
                "model.first_stage_config.params.ckpt_path is not set; give the autoencoder's file, as in .../3d-vae.pt"
            )
        dtype = autoencoder_dtype(dtype)
        warn_once(logger, conv3d_warnings(dtype, device))
        return load_autoencoder(vae, vae.ckpt_path, ignore_keys=vae.ignore_keys, dtype=dtype, device=device)

    def _require_first_stage(self) -> Any:
        if self.first_stage_model is None:
            raise InputError("the model section has no first_stage_config; add one to encode or decode video")
        return self.first_stage_model

    @torch.no_grad()
    def encode_first_stage(
        self,
        video: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        sample: bool = True,
        scale: bool = True,
    ) -> torch.Tensor:
        """Video (B, F, 3, H, W) in −1..1 → latents (B, T, C, H/8, W/8).

        Args:
            video: F = 4k+1 frames.
            generator: source of the posterior noise.
            noise: posterior noise on the video's device, instead of drawn noise.
            sample: draw from the posterior; otherwise take its mean.
            scale: multiply by `scale_factor`.
        """
        vae, dtype = self._require_first_stage(), self.first_stage_dtype
        pieces = [
            vae.encode_moments(rearrange(piece, "b t c h w -> b c t h w").to(dtype))
            for piece in video.split(self.samples_a_time or len(video))
        ]
        moments = torch.cat(pieces)
        frames, _, height, width = video.shape[1:]
        wanted = (2 * self.network.out_channels, (frames - 1) // self.network.time_compressed_rate + 1)
        self._require_shape(moments, (*wanted, height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION))
        return self.latents_of(moments, generator=generator, noise=noise, sample=sample, scale=scale)

    def _require_shape(self, made: torch.Tensor, wanted: Sequence[int]) -> None:
        """Refuse what an autoencoder has made that compresses otherwise than the network needs; without the batch."""
        found = tuple(made.shape[1:])
        if found != (*wanted,):
            side, rate = SPATIAL_COMPRESSION, self.network.time_compressed_rate
            raise InputError(
                f"model.first_stage_config: {type(self.first_stage_model).__name__} made (channels, frames, height, "
                f"width) = {found}, and {(*wanted,)} is needed: the network takes latents of {side}x{side} pixels and "
                f"{rate} frames, with {self.network.out_channels} channels; give the autoencoder of its training"
            )

    @torch.no_grad()
    def latents_of(
        self,
        moments: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        sample: bool = True,
        scale: bool = True,
    ) -> torch.Tensor:
        """Mean and log-variance (B, 2C, T, H/8, W/8) → latents (B, T, C, H/8, W/8); see `encode_first_stage`."""
        distribution = self._require_first_stage().regularization.distribution(moments)
        latents = distribution.sample(generator=generator, noise=noise) if sample else distribution.mean
        latents = rearrange(latents, "b c t h w -> b t c h w").float()
        return latents * self.scale_factor if scale else latents

    @torch.no_grad()
    def decode_first_stage(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, T, C, H, W) → video (B, 4(T−1)+1, 3, 8H, 8W), float32, nominally in −1..1."""
        vae, dtype = self._require_first_stage(), self.first_stage_dtype
        latents = rearrange(latents / self.scale_factor, "b t c h w -> b c t h w").to(dtype)
        video = torch.cat([vae.decode(piece) for piece in latents.split(self.samples_a_time or len(latents))])
        self._require_video(video, latents, self.network.time_compressed_rate * (latents.shape[2] - 1) + 1)
        return rearrange(video, "b c t h w -> b t c h w").float()

    def _require_video(self, video: torch.Tensor, latents: torch.Tensor, num_frames: int) -> None:
        height, width = latents.shape[3:]
        self._require_shape(video, (3, num_frames, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION))

    @torch.no_grad()
    def decode_each(self, latents: torch.Tensor, convert: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Decode B samples and convert each in chunks, as soon as they are decoded, so that no whole video is kept.

        Args:
            latents: (B, T, C, H, W).
            convert: takes consecutive frames (F, 3, 8H, 8W), float32 and nominally in −1..1.

        Returns:
            For each sample, what `convert` made of its frames, joined.
        """
        vae, dtype = self._require_first_stage(), self.first_stage_dtype
        latents = rearrange(latents / self.scale_factor, "b t c h w -> b c t h w").to(dtype)
        together = self.samples_a_time or (1 if getattr(vae, "slicing", False) else len(latents))

        def converted(chunk: torch.Tensor) -> list[torch.Tensor]:
            self._require_video(chunk, latents, chunk.shape[2])
            # A few frames at a time: of tiles, the chunk is the whole video, and float32 is twice as large.
            whole = rearrange(chunk, "b c t h w -> b t c h w")
            return [torch.cat([convert(frames.float()) for frames in one.split(8)]) for one in whole]

        videos: list[torch.Tensor] = []
        for part in latents.split(together):
            if hasattr(vae, "decode_in_chunks"):
                chunks = vae.decode_in_chunks(part)
            else:
                chunks = [vae.decode(part)]
                self._require_video(chunks[0], part, self.network.time_compressed_rate * (part.shape[2] - 1) + 1)
            videos += map(torch.cat, zip(*map(converted, chunks), strict=True))
        return videos

    @torch.no_grad()
    def decode_alone(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode single latent frames (B, C, H, W), each as if a clip began with it: pictures (B, 3, 8H, 8W).

        One after the other, on this rank alone: the others may be at something else.
        """
        vae, dtype = self._require_first_stage(), self.first_stage_dtype
        decode = getattr(vae, "decode_on_this_rank", vae.decode)
        clips = rearrange(latents / self.scale_factor, "b c h w -> b c 1 h w").to(dtype)
        return torch.cat([decode(clip)[:, :, 0].float() for clip in clips.split(1)])

    def image_latents(self, image: torch.Tensor, num_latents: int) -> torch.Tensor:
        """Condition of image-to-video: the first frame's latents, then zeros.

        The posterior mean is used, so that the condition does not depend on the seed. With a temporal patch of 2 and an
        odd `num_latents`, the front padding repeats the first frame, as in training.

        Args:
            image: (B, 3, H, W) in −1..1.
            num_latents: latent frames of the sample, without padding.

        Returns:
            (B, T, C, H/8, W/8), T = `num_latents` plus padding.
        """
        first = self.encode_first_stage(image[:, None], sample=False, scale=self.scale_image_latents)
        return self.image_condition(first, num_latents)

    def image_condition(self, first: torch.Tensor, num_latents: int) -> torch.Tensor:
        """Return the condition of `image_latents` for the first frame's latents (B, 1, C, h, w)."""
        padding = self.front_padding(num_latents)
        if self.noised_image_all_concat:
            return first.expand(-1, num_latents + padding, -1, -1, -1).contiguous()
        rest = first.new_zeros(first.shape[0], num_latents - 1, *first.shape[2:])
        return torch.cat((first.expand(-1, 1 + padding, -1, -1, -1), rest), dim=1)

    def padded(self, latents: torch.Tensor) -> torch.Tensor:
        """Repeat the first of the latents (B, T, C, H, W) in front, to full temporal patches."""
        padding = self.front_padding(latents.shape[1])
        return torch.cat((latents[:, :1].expand(-1, padding, -1, -1, -1), latents), dim=1) if padding else latents

    def front_padding(self, num_latents: int) -> int:
        """Front padding of `num_latents` latent frames to full temporal patches."""
        return -num_latents % self.network.patch_size[0]

    def network_kwargs(self, num: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return further inputs of the network for `num` samples: ``ofs`` for a network with that embedding."""
        of_all = torch.tensor([self.ofs], device=device).expand(num)
        return {} if self.network.ofs_embed_dim is None else {"ofs": of_all}

    def training_losses(self, inputs: TrainingInputs) -> torch.Tensor:
        """Return the loss of each sample, float32 (B,)."""
        more: dict[str, Any] = dict(inputs.of_loss)
        seeds = inputs.seeds
        if "rejected" in more:
            more["reference"] = partial(without_adapters, self.network)
            seeds = None if seeds is None else seeds.repeat(2)
        if hasattr(self.network, "adapter_dropout"):
            self.network.adapter_dropout.seeds = seeds  # kept, since blocks may be recomputed in the backward pass
        return self.require_loss()(
            self.model,
            self.denoiser,
            inputs.latents,
            inputs.cond,
            idx=inputs.idx,
            noise=inputs.noise,
            **more,
            **self.network_kwargs(len(inputs.latents), inputs.latents.device),
        )

    def require_loss(self) -> Any:
        """Return the loss.

        Raises:
            InputError: there is none over timesteps.
        """
        if not hasattr(getattr(self.loss_fn, "sigma_sampler", None), "draw_idx"):
            raise InputError(
                "training needs model.loss_fn_config with a loss over timesteps; take "
                "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss from a shipped model configuration"
            )
        return self.loss_fn

    @torch.no_grad()
    def sample(
        self,
        cond: Mapping[str, torch.Tensor],
        uncond: Mapping[str, torch.Tensor] | None,
        *,
        shape: tuple[int, int, int, int],
        generators: Sequence[torch.Generator],
        concat: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        strength: float = 1.0,
        mask: torch.Tensor | None = None,
        inversion: Mapping[str, torch.Tensor] | None = None,
        start: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
        num_steps: int | None = None,
        scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        loop: bool = False,
        progress: Progress | None = None,
        after_step: Callable[[torch.Tensor], object] | None = None,
    ) -> torch.Tensor:
        """Sample latents, from noise or from a noised video, all of them or with some held.

        Args:
            cond: conditions, each (B, ...).
            uncond: conditions of the unconditional branch.
            shape: (T, C, H, W) of one sample, without padding.
            generators: one CPU generator per sample, for its initial noise and then the noise of the steps; a sample
                depends only on its own seed.
            concat: image latents from `image_latents`, of the padded length.
            control: latents (B or 1, T, C, H, W) of a clip to follow, without padding; both branches of guidance, and
                an inversion, see them.
            source: latents (B, T, C, H, W) to start from, noised, see `encode_first_stage`.
            strength: share of the steps that run then (Meng et al. 2022, SDEdit): 1 starts from noise alone.
            mask: bool (B or 1, T, 1, H, W): where the result is sampled; elsewhere it is `source`.
            inversion: conditions that describe `source`, each (B, ...): its noise is found by
                `VideoDDIMSampler.invert`, but for that of the last step, which is drawn.
            start: latents (B or 1, t, C, H, W) that the result begins with.
            end: latents (B or 1, t, C, H, W) that it ends with.
            num_steps: overrides the configured number of steps.
            scale: overrides the configured guidance scale.
            guidance_interval: see `VideoSampler`.
            loop: let the last latent frame lead into the first, see `TimeLoop`; all of them hold as many video frames,
                so nothing is padded, and T is a multiple of the temporal patch. Not with `concat`, `control`, `source`,
                `start` or `end`.
            progress: wraps the sequence of steps, as tqdm does.
            after_step: called with the denoised latents (B, T, C, H, W) after each step, without padding.

        Returns:
            (B, T, C, H, W) float32, in the network's scale.
        """
        if self.sampler is None:
            raise InputError("the model section has no sampler_config; add one to sample")
        padding = 0 if loop else self.front_padding(shape[0])
        padded = (shape[0] + padding, *shape[1:])
        noise = torch.stack([torch.randn(padded, generator=generator) for generator in generators])
        x = to_device(noise, self.device)
        first_step = 0 if source is None else self.sampler.first_step(strength, num_steps)
        if source is not None:
            levels = self.sampler.schedule(num_steps).alphas_cumprod_sqrt
            x = self._noised(source, x, levels[first_step if inversion is None else -2], padding)
        cond, uncond = dict(cond), None if uncond is None else dict(uncond)
        beside = {} if concat is None else {"concat": concat}
        if control is not None:
            beside["control"] = self.padded(control).to(x).expand(len(x), -1, -1, -1, -1)
        cond |= beside
        uncond = None if uncond is None else uncond | beside
        optional: dict[str, Any] = {} if guidance_interval is None else {"guidance_interval": guidance_interval}
        optional |= {"first_step": first_step} if first_step else {}
        if after_step is not None:
            optional["after_step"] = lambda denoised: after_step(denoised[:, padding:])
        before_step: dict[str, Any] = {}
        if self.loras is not None:
            self._set_strengths(0.0)
            before_step = {"before_step": self._set_strengths} if self.loras.changes else {}
        if inversion is not None:
            given = {"num_steps": num_steps, "first_step": first_step, "progress": progress, **before_step}
            x = self.sampler.invert(
                self._denoise, x, {**inversion, **beside}, **given, **self.network_kwargs(len(x), x.device)
            )
        denoise = self._holding(start, end, padding)
        if source is not None and mask is not None:
            denoise = partial(self._keep, denoise, self.padded(source), self.padded(mask))
        if loop:
            denoise = partial(TimeLoop(self.network.patch_size[0]).denoise, denoise)
        cache = self.step_cache
        num = 0 if cache is None else default(num_steps, self.sampler.num_steps) - first_step
        with nullcontext() if cache is None else cache.sampling(num, len(x)):
            latents = self.sampler(
                denoise,
                x,
                cond,
                uncond,
                num_steps=num_steps,
                scale=scale,
                generators=generators,
                progress=progress,
                **optional,
                **before_step,
                **self.network_kwargs(len(x), x.device),
            )
        return latents[:, padding:]

    @staticmethod
    def _noised(source: torch.Tensor, noise: torch.Tensor, level: float, padding: int) -> torch.Tensor:
        """Return `source` (B or 1, T, C, H, W) at a noise level; padding in front repeats its first frame."""
        source = torch.cat((source[:, :1].expand(-1, padding, -1, -1, -1), source), dim=1)
        return level * source.to(noise) + (1 - level**2) ** 0.5 * noise

    def _set_strengths(self, share: float) -> None:
        """Set the strengths of the network's adapters at a share of the steps."""
        assert self.loras is not None
        factors, shares = self.loras.factors(share), self.loras.shares(share)
        scale_adapters(self.network, self.loras.layers, factors, self.device, shares)

    def _holding(
        self, start: torch.Tensor | None, end: torch.Tensor | None, padding: int
    ) -> Callable[..., torch.Tensor]:
        """Return `_denoise` with the answers known for the held frames (the replacement of Ho et al. 2022).

        Every sampler then brings them from noise to themselves, at the noise level of each step; the network sees them
        there and fits the other frames to them.
        """
        if start is None and end is None:
            return self._denoise
        if start is not None:  # padding in front repeats the first frame, as in training
            start = torch.cat((start[:, :1].expand(-1, padding, -1, -1, -1), start), dim=1)

        def denoise(x: torch.Tensor, levels: torch.Tensor, cond: Mapping[str, torch.Tensor], **kwargs: Any):
            denoised = self._denoise(x, levels, cond, **kwargs)
            stop = denoised.shape[1] if end is None else denoised.shape[1] - end.shape[1]
            rest = denoised[:, 0 if start is None else start.shape[1] : stop]
            parts = [part.to(denoised) for part in (start, rest, end) if part is not None]
            # Guidance doubles the batch, one branch after the other.
            return torch.cat([part.repeat(len(x) // len(part), 1, 1, 1, 1) for part in parts], dim=1)

        return denoise

    @staticmethod
    def _keep(
        denoise_fn: Callable[..., torch.Tensor],
        source: torch.Tensor,
        mask: torch.Tensor,
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what `denoise_fn` answers where `mask` is true, and elsewhere the answer that is known: `source`."""
        denoised = denoise_fn(x, *args, **kwargs)
        mask, source = (each.repeat(len(x) // len(each), 1, 1, 1, 1).to(x.device) for each in (mask, source))
        return torch.where(mask, denoised, source.to(denoised))

    def _denoise(self, x: torch.Tensor, levels: torch.Tensor, cond: Mapping[str, torch.Tensor], **kwargs: Any):
        denoise = partial(self.denoiser, self.model)
        windows = self.windows
        return (denoise if windows is None else partial(windows.denoise, denoise))(x, levels, cond, **kwargs)
