"""The time of a training iteration on one of many devices, added up from what it computes, moves and sends.

Network and VAE run on meta tensors as for the estimate of memory: their FLOPs, the bytes that their kernels move and
those that they send are counted for one rank of the mesh. What DeepSpeed, the optimizer, the loader and saves do is a
formula. docs/scaling.md has all of them, and what is left out.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

import sgm.distributed
from sgm.checks.cost import Cost, sample_flops
from sgm.checks.estimate import (
    MOMENT_BYTES,
    Encodes,
    Estimate,
    clip_of,
    in_step,
    is_offloaded,
    saved_bytes,
    state_bytes,
    text_encoder_bytes,
    training_estimate,
    with_vae,
    zero_traffic,
)
from sgm.checks.measure import encode_usage, network_usage, once, sizes_of
from sgm.checks.mesh import mesh_of
from sgm.checks.meta_run import Usage, build
from sgm.checks.sampling import params_of
from sgm.checks.scaling.cards import Card
from sgm.checks.training import takes_pairs
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, digest_of
from sgm.config.precision import autoencoder_dtype
from sgm.distributed import Mesh
from sgm.modules.geometry import Geometry
from sgm.util import default
from sgm.weights.adapters import is_added

# Part of an iteration → what limits it.
LIMITS: Mapping[str, str] = {
    "products": "compute",
    "attention": "compute",
    "VAE": "compute",
    "text encoder": "compute",
    "traffic": "memory traffic",
    "optimizer": "memory traffic",
    "kernels": "starting kernels",
    "groups": "network",
    "ZeRO": "network",
    "host memory": "copies to host memory",
    "data": "data",
    "saves": "saves",
}
CURES: Mapping[str, str] = {
    "compute": "faster or more devices are what helps; fewer recomputed blocks (args.checkpoint_activations=auto) if "
    "memory is left",
    "memory traffic": "a larger micro batch shares the optimizer's traffic; args.compile=true fuses kernels",
    "starting kernels": "larger clips or micro batches, or args.compile=true",
    "network": "raise deepspeed.gradient_accumulation_steps or the micro batch, or take a faster network",
    "copies to host memory": "let less wait there: more devices, or a higher ZeRO stage",
    "data": "raise args.num_workers, or encode ahead (tools/prepare_dataset.py, args.latent_cache)",
    "saves": "set args.async_save=true, or raise args.save_interval",
}
_flops: dict[tuple[str, int, bool], float | None] = {}  # by network, tokens, and whether adapters are trained
CONTROL = 3  # small all-reduces of an iteration: the norm of the gradients, and flags


@dataclass(frozen=True)
class Prediction:
    """An iteration of a training run, modelled.

    Attributes:
        seconds: part of `LIMITS` → seconds of an iteration; what others hide is left out.
        samples: of an iteration, on all ranks.
        devices: ranks.
        flops: of the model for a sample, see `sample_flops`; None for a network of another kind.
        peak: FLOP/s of a device.
        estimate: memory and traffic of a rank.
    """

    seconds: Mapping[str, float]
    samples: int
    devices: int
    flops: float | None
    peak: float
    estimate: Estimate

    @property
    def step(self) -> float:
        """Seconds of an iteration."""
        return sum(self.seconds.values())

    @property
    def samples_per_second(self) -> float:
        """Samples of all devices in a second."""
        return self.samples / self.step

    @property
    def utilization(self) -> float | None:
        """Model FLOPs utilization, of the peak."""
        return None if self.flops is None else self.flops * self.samples_per_second / self.devices / self.peak

    @property
    def limits(self) -> dict[str, float]:
        """What limits → its share of an iteration, the largest first."""
        found: Counter[str] = Counter()
        for part, seconds in self.seconds.items():
            found[LIMITS[part]] += seconds  # pyright: ignore[reportArgumentType] (floats)
        return {name: seconds / self.step for name, seconds in found.most_common() if seconds}


def predict(
    config: Config,
    dtype: torch.dtype,
    trained: Collection[str],
    card: Card,
    *,
    vae: Encodes = True,
    text_encoder: Encodes = True,
) -> Prediction:
    """Predict an iteration on as many ranks as `sgm.distributed.world_size` says.

    Args:
        config: of a training run on clips of one size, see `sgm.checks.training.with_largest_bucket`.
        dtype: of the network.
        trained: names of the trained parameters.
        card: every rank's.
        vae: what the VAE encodes; nothing if caches hold all latents.
        text_encoder: what the text encoder encodes.

    Raises:
        ConfigError: the settings do not go together.
    """
    estimate = training_estimate(config, dtype, trained, vae=vae, text_encoder=text_encoder)
    clip = clip_of(config)
    assert clip is not None, "the estimate has seen it"
    work = _Work(config, dtype, frozenset(trained), card, estimate, clip)
    seconds = work.seconds(vae=with_vae(config, vae), text_encoder=text_encoder)
    return Prediction(seconds, work.samples, work.world, work.sample_flops(), card.peak, estimate)


class _Work:
    """The work of an iteration on the first rank of a sample group."""

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        trained: frozenset[str],
        card: Card,
        estimate: Estimate,
        clip: tuple[int, tuple[int, int]],
    ) -> None:
        assert isinstance(config.args, TrainingArgs), "the configuration was loaded for training"
        self.config, self.section, self.dtype = config, config.deepspeed, dtype
        self.args: TrainingArgs = config.args
        self.card, self.estimate, (self.frames, self.size) = card, estimate, clip
        self.mesh: Mesh = mesh_of(config)
        self.world = sgm.distributed.world_size()
        self.shards = max(self.world // self.mesh.tensor, 1)  # ranks that ZeRO shards over
        self.batches = self.section["gradient_accumulation_steps"]
        self.geometry = Geometry.from_network(params_of(config.model["network_config"]))
        self.latents = (self.frames - 1) // self.geometry.time_compression + 1
        micro = self.section["train_micro_batch_size_per_gpu"]
        self.samples = micro * self.batches * (self.world // self.mesh.ranks)
        # Of a group: samples, and the videos that belong to them.
        self.own = micro * self.batches
        self.clips = self.own * (1 + takes_pairs(config) + (self.geometry.control_channels > 0))
        self.trained, self.adapters = trained, all(map(is_added, trained))
        batch = micro * (1 + takes_pairs(config))
        self.network: Usage = once(network_usage, config, (self.latents, *self.size), batch, dtype, trained=trained)
        self.sharing = card.sharing(self.world)

    def seconds(self, *, vae: Encodes, text_encoder: Encodes) -> dict[str, float]:
        """Return the seconds of each part."""
        card, cost, k = self.card, self.network.cost, self.batches
        parts = dict.fromkeys(LIMITS, 0.0)
        parts["products"] = k * cost.products / (card.peak * card.products)
        parts["attention"] = k * cost.attention / (card.peak * card.attention)
        parts["traffic"] = k * cost.moved / card.memory_bandwidth
        parts["optimizer"] = self._state_bytes() / default(card.state_bandwidth, card.memory_bandwidth)
        parts["kernels"] = k * cost.kernels * card.kernel_seconds + self._tensor_seconds()
        parts["groups"] = k * self._group_seconds(self.network, attention=parts["attention"] / k)
        if in_step(vae) and not self.config.model.get("latent_input"):
            parts["VAE"], sent = self._encoding(vae)
            parts["groups"] += sent
        if in_step(text_encoder):
            parts["text encoder"] = self._text_seconds()
        forward_and_backward = sum(parts[name] for name in ("products", "attention", "traffic", "kernels", "groups"))
        parts["ZeRO"] = self._zero_seconds(forward_and_backward)
        parts["host memory"] = self._host_seconds(forward_and_backward, vae=vae, text_encoder=text_encoder)
        parts = {name: value * self.sharing for name, value in parts.items()}
        parts["data"] = self._data_seconds(vae, sum(parts.values())) if in_step(vae) else 0.0
        parts["saves"] = self._save_seconds(sum(parts.values()))
        return parts

    def sample_flops(self) -> float | None:
        """Return the FLOPs of the model for a sample."""
        section = self.config.model["network_config"]
        tokens = self.geometry.num_patches(self.latents, self.size) + self._text_length()
        if (key := (digest_of([section]), tokens, self.adapters)) not in _flops:
            _flops[key] = sample_flops(build(section), tokens, trains_all=not self.adapters)
        found = _flops[key]
        return None if found is None else found * (1 + takes_pairs(self.config))

    def _text_length(self) -> int:
        modules = params_of(self.config.model["network_config"]).get("modules") or {}
        return params_of(modules.get("pos_embed_config")).get("text_length", 0)

    def _state_bytes(self) -> float:
        """Return the bytes that gradients, clipping and the update move, on the device, and stage 3 for its weights."""
        zero, width, k, usage = self.section["zero_optimization"], self.dtype.itemsize, self.batches, self.network
        stage = zero["stage"]
        moved = 3 * width * usage.trained * (k - 1)  # added to those of the batches before
        if stage:  # copied into a bucket, averaged, copied out
            moved += 6 * width * usage.trained * (k if stage >= 2 else 1)
        if stage == 3:  # copied from what is gathered, for the forward and for the backward pass
            moved += 2 * 3 * width * usage.weights * k
        if is_offloaded(zero, "optimizer"):
            return moved
        # Norm, clipping and update; in 16 bits and with ZeRO also to float32 and back.
        update = 3 * width + 12 + 2 * self._moments() + (16 if stage or width == 2 else 0)
        return moved + self._updated() * (update + 12 * (self.args.ema_decay is not None))

    def _tensor_seconds(self) -> float:
        """Return the seconds of DeepSpeed's host code, which handles tensors one by one."""
        stage, k = self.section["zero_optimization"]["stage"], self.batches
        seconds = len(self.trained) * self.card.tensor_seconds * (k if stage >= 2 else stage)
        if stage == 3 and self.card.gather_seconds:
            seconds += 2 * k * len(sizes_of(self.config.model["network_config"], self.mesh)) * self.card.gather_seconds
        return seconds

    def _updated(self) -> float:
        """Return the parameters that this rank's optimizer updates."""
        return self.network.trained / (self.shards if self.section["zero_optimization"]["stage"] else 1)

    def _moments(self) -> float:
        return MOMENT_BYTES.get(self.section["optimizer"]["type"], 8)

    def _group_seconds(self, usage: Usage, *, attention: float = 0.0) -> float:
        """Return the seconds of what ranks of a sample group exchange, as far as kernels do not hide it."""
        card, total = self.card, 0.0
        for axis, sent in usage.sent.items():
            size = {"layers": self.mesh.tensor, "tokens": self.mesh.sequence, "VAE": self.mesh.context}[axis]
            stride = self.mesh.tensor if axis == "tokens" else 1
            rings = axis == "layers" or (axis == "tokens" and self._uses_ring())
            rounds = 2 * card.latency(size, stride) if axis == "layers" else self._link(size * stride)[1]
            speed = card.bandwidth(size, stride) if rings else self._link(size * stride)[0]
            seconds = sent / speed + usage.messages.get(axis, 0) * rounds
            hidden = attention if axis == "tokens" and self._uses_ring() and card.overlaps else 0.0
            total += max(seconds - hidden, 0.0)
        return total

    def _link(self, span: int) -> tuple[float, float]:
        """Return bandwidth and latency of messages between any two of neighbouring ranks."""
        card = self.card
        if span <= card.per_node:
            return card.intra_bandwidth, card.intra_latency
        away = (span - card.per_node) / (span - 1)  # share of the messages that leave the machine
        return min(card.intra_bandwidth, card.inter_bandwidth / away), card.inter_latency

    def _uses_ring(self) -> bool:
        heads = params_of(self.config.model["network_config"]).get("num_attention_heads", 0) // self.mesh.tensor
        given = self.args.sequence_attention
        return given == "ring" or (given == "auto" and heads < self.mesh.sequence)

    def _encoding(self, vae: Encodes) -> tuple[float, float]:
        """Return the seconds in which the VAE encodes the clips of a group, and of what its ranks exchange for it."""
        images, clips = self.own * self.geometry.image_conditioned, self.clips * (vae is True)
        seconds = sent = 0.0
        for frames, number in ((1, images), (self.frames, clips)):
            if number:
                usage = once(encode_usage, self.config, (frames, *self.size), autoencoder_dtype(self.dtype))
                seconds += number * self._busy(usage.cost)
                sent += number * self._group_seconds(usage)
        return seconds, sent

    def _busy(self, cost: Cost) -> float:
        card = self.card
        shares = {"products": card.products, "attention": card.attention, "convolutions": card.convolutions}
        seconds = sum(getattr(cost, name) / (card.peak * share) for name, share in shares.items())
        return seconds + cost.moved / card.memory_bandwidth + cost.kernels * card.kernel_seconds

    def _text_seconds(self) -> float:
        """Return the seconds in which T5 encodes the captions of a group, each of them alone."""
        stored = text_encoder_bytes(self.config).stored  # in 16 bits
        products = self._text_length() * stored / (self.card.peak * self.card.products)
        return self.own * max(products, stored / self.card.memory_bandwidth)

    def _zero_seconds(self, network: float) -> float:
        """Return the seconds of DeepSpeed's collectives, as far as forward and backward passes do not hide them."""
        card, zero, stage = self.card, self.section["zero_optimization"], self.section["zero_optimization"]["stage"]
        if self.world == 1:
            return 0.0
        layers, usage = params_of(self.config.model["network_config"]).get("num_layers", 1), self.network
        sent = zero_traffic(
            usage.weights,
            usage.trained,
            self.shards,
            self.section,
            block=usage.weights / layers,
            width=self.dtype.itemsize,
        )
        speed = card.bandwidth(self.shards, self.mesh.tensor)
        latency = card.latency(self.shards, self.mesh.tensor)
        passes = self.batches if stage >= 2 else 1  # in which gradients are reduced
        buckets = passes * math.ceil(usage.trained / zero.get("reduce_bucket_size", 5e8))
        # At stage 3 each block is gathered for the forward pass and again for the backward pass.
        gathers = self.batches * 2 * layers if stage == 3 else 1 if stage else 0
        reduced, gathered = sent.reduced / speed + 2 * buckets * latency, sent.gathered / speed + gathers * latency
        control = CONTROL * 2 * card.latency(self.world)
        overlaps = card.overlaps and bool(zero.get("overlap_comm", stage == 3)) and stage > 0
        if not overlaps:
            return reduced + gathered + control
        if stage == 3:
            return max(reduced + gathered - network, 0.0) + control
        backward = network / self.batches * passes * self._backward_share()
        return max(reduced - backward, 0.0) + gathered + control

    def _backward_share(self) -> float:
        """Return the share of the backward pass, with what it computes again."""
        backward = 1 if self.adapters else 2
        backward += bool(self.args.checkpoint_activations)
        return backward / (1 + backward)

    def _host_seconds(self, network: float, *, vae: Encodes, text_encoder: Encodes) -> float:
        """Return the seconds of copies to and from host memory, as far as the network does not hide them."""
        args, card, waits, zero = self.args, self.card, self.estimate.host, self.section["zero_optimization"]
        copied = self.batches * waits["text encoder"] * in_step(text_encoder)
        beside = self.batches * 2 * waits["activations"]
        if args.network_offload == "blocks":
            beside += self.batches * 3 * waits["frozen weights"]
        elif in_step(vae) or in_step(text_encoder):
            copied += self.batches * waits["frozen weights"]
        if is_offloaded(zero, "optimizer"):
            share, width = self.network.trained / self.shards, self.dtype.itemsize
            gradients = self.batches if zero["stage"] >= 2 else 1
            copied += share * (width * (gradients + 1) + 28 + 2 * self._moments())  # the update runs in host memory
        if is_offloaded(zero, "param"):
            beside += self.batches * 3 * self.dtype.itemsize * self.network.weights / self.shards
        hidden = network if card.overlaps else 0.0
        return copied / card.host_bandwidth + max(beside / card.host_bandwidth - hidden, 0.0)

    def _data_seconds(self, vae: Encodes, others: float) -> float:
        """Return the seconds that a step waits for clips, which worker processes read beside it."""
        frames = self.clips * self.frames if vae is True else self.own
        args, pixels = self.args, frames * self.size[0] * self.size[1]
        if args.num_workers == 0:
            return pixels / self.card.clip_pixels
        workers = min(args.num_workers, self.card.cores * self.mesh.ranks)
        return max(pixels / (self.card.clip_pixels * workers) - others, 0.0)

    def _save_seconds(self, step: float) -> float:
        """Return the seconds of an iteration's share of a save, in which training waits."""
        args, card, usage, width = self.args, self.card, self.network, self.dtype.itemsize
        if not isinstance(args.save_interval, int):  # epochs, whose length the data decides
            return 0.0
        first = saved_bytes(args, self.section, usage, self.shards, width, self.adapters)
        others = state_bytes(args, self.section, usage, self.shards, width, first=False)
        everything = self.mesh.tensor * first + (self.world - self.mesh.tensor) * others
        written = max(first / card.disk_bandwidth, everything / card.shared_bandwidth)
        if not args.async_save:
            return written / args.save_interval
        waits = first / card.host_bandwidth + max(written - args.save_interval * step, 0.0)
        return waits / args.save_interval
