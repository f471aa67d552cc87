"""Estimate memory and traffic per rank before weights are read, or there at all.

Network and VAE run on meta tensors (`sgm.checks.meta_run`), at the size and in the dtype of the run. Weights, optimizer
state, DeepSpeed's buffers and its traffic are formulas, since DeepSpeed allocates those tensors only in a real engine.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import sgm.distributed
from sgm.checks.frozen import base_storage, frozen_problems
from sgm.checks.measure import decode_usage, encode_usage, network_usage, once
from sgm.checks.mesh import mesh_of
from sgm.checks.meta_run import Usage
from sgm.checks.sampling import params_of
from sgm.checks.sampling_plan import SamplingPlan, check_sampling
from sgm.checks.training import takes_pairs
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError
from sgm.config.precision import autoencoder_dtype
from sgm.distributed import Mesh
from sgm.modules.diffusionmodules.guiders import has_effect
from sgm.modules.geometry import FREE_SIZE, Geometry
from sgm.util import default, instantiate_from_config
from sgm.weights.adapters import is_added
from sgm.weights.offload import pinned_pieces

# T5 v1.1 XXL, the text encoder of all released models, in 16 bits: assumed if its folder is not there yet.
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
T5_XXL_BYTES = 2 * 4_762_310_656


# Bytes of state for each trained parameter, see docs/optimizers.md; AdamW and unknown ones: 8.
MOMENT_BYTES = {
    "torchao.optim.AdamW8bit": 2.04,
    "torchao.optim.AdamW4bit": 1.07,
    "bitsandbytes.optim.AdamW8bit": 2.04,
    "came_pytorch.CAME": 4.03,
    "Muon": 4,
    "prodigyopt.Prodigy": 16,
    "torch.optim.SGD": 4,
}
# What an encoder does beside training: it encodes clips or captions in each step, first frames alone, what evaluations
# need alone, or nothing.
Encodes = bool | Literal["first frames", "validation"]

STEPS_AT_ONCE = ("prodigyopt.", "bitsandbytes.")  # the others: `sgm.training.optim.slices`


def with_vae(config: Config, encodes: Encodes) -> Encodes:
    """Return what the VAE does: nothing in a configuration without one."""
    return False if config.model.get("first_stage_config") is None else encodes


def in_step(encodes: Encodes) -> bool:
    """Whether an encoder works in a step of training."""
    return bool(encodes) and encodes != "validation"


@dataclass(frozen=True)
class Estimate:
    """Memory and traffic of one rank, in bytes.

    Attributes:
        phases: phase of the run (``text``, ``encode``, ``network``, ``optimizer``, ``decode``, ``validation``) → part →
            device memory.
        host: part → host memory, during the whole run.
        traffic: axis → bytes sent per step of the sampler or the optimizer.
        video: bytes sent in the VAE for the videos of a prompt.
    """

    phases: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float] = field(default_factory=dict)
    traffic: Mapping[str, float] = field(default_factory=dict)
    video: float = 0.0

    @property
    def device(self) -> dict[str, float]:
        """Phase → device memory."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """The most device memory of all phases."""
        return max(self.device.values())

    def rows(self) -> dict[str, str]:
        """Return the rows of the report."""
        device = self.device
        largest = max(device, key=lambda name: device[name])
        rows = {"memory": f"estimated {memory_text(device[largest])} a rank, in {largest}"}
        host = sum(self.host.values())
        beside = f"; host memory {memory_text(host)}" if host else ""
        for name, parts in self.phases.items():
            shown = ", ".join(f"{part} {memory_text(size)}" for part, size in parts.items() if size)
            rows[f"  {name}"] = f"{memory_text(device[name])}: {shown}{beside}"
        sent = [f"{axis} {_traffic(size)}" for axis, size in self.traffic.items() if size]
        traffic = [f"estimated for a rank and step: {', '.join(sent)}"] if sent else []
        traffic += [f"VAE {_traffic(self.video)} per video"] if self.video else []
        return rows | ({"traffic": "; ".join(traffic)} if traffic else {})


def memory_text(size: float) -> str:
    """Return bytes in GiB, or in MiB below half a GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _traffic(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.1f} MB" if size >= 5e5 else f"{size / 1e3:.1f} kB"


def rank_row(mesh: Mesh) -> str:
    """Return the text of the report about the groups of ranks."""
    world = sgm.distributed.world_size()
    if world == 1:
        return "1 process"
    names = {"tensor": "layers", "sequence": "tokens", "cfg": "guidance"}
    axes = [f"{words} by {getattr(mesh, axis)}" for axis, words in names.items() if getattr(mesh, axis) > 1]
    axes += [f"VAE by {mesh.context}"] if mesh.context > 1 else []
    groups = world // mesh.ranks
    shared = f", each shared by {mesh.ranks} ({', '.join(axes)})" if axes else ""
    return f"{world} processes, {groups} sample{'s' * (groups > 1)} at a time{shared}"


def sampling_estimate(config: Config, dtype: torch.dtype) -> Estimate:
    """Estimate a rank of a sampling run: text encoder, then network, then VAE.

    Args:
        config: of a checked run.
        dtype: of the network.
    """
    args = config.args
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    plan: SamplingPlan = check_sampling(args, geometry)
    size = default(plan.size, geometry.nearest_size(*FREE_SIZE))
    network = once(network_usage, config, (plan.latents_at_once, *size), args.batch_size * _branches(config), dtype)
    text = text_encoder_bytes(config)
    stays = {"text encoder": text.device if args.text_encoder_offload == "none" else 0.0}
    # Blocks that pass through the device are counted in the peak, as what they are copied to.
    weights = {"weights": 0.0 if args.network_offload == "blocks" else network.stored, **stays}
    beside = {**weights, "weights": network.stored * (args.network_offload == "none")}
    phases: dict[str, Mapping[str, float]] = {"text": {"text encoder": text.device}} if text.stored else {}
    used = "blocks in use and activations" if args.network_offload == "blocks" else "activations"
    phases["network"], video = {**weights, used: network.peak}, 0.0
    encodes_whole = args.video is not None or geometry.control_channels > 0
    encodes = plan.image2video or args.encodes_clips or encodes_whole
    if encodes or not args.only_save_latents:
        decoded = once(decode_usage, config, (args.batch_size, plan.decoded_latents, *size), autoencoder_dtype(dtype))
        held = decoded.weights * autoencoder_dtype(dtype).itemsize
        phases["network"] = {**weights, "VAE": held, used: network.peak}
        if encodes:
            known = args.num_held if args.start or args.end else 1
            frames = plan.video_frames if encodes_whole else known
            encoded = once(encode_usage, config, (frames, *size), autoencoder_dtype(dtype))
            phases["encode"] = {**beside, "VAE": held, "activations": encoded.peak}
        if not args.only_save_latents:
            phases["decode"] = {**beside, "VAE": held, "activations": decoded.peak}
            video = decoded.sent.get("VAE", 0.0)
    phases["network"] = {
        **phases["network"],
        "step cache": _step_cache_bytes(config, geometry, plan.latents, size, dtype),
    }
    host = {
        "weights": network.pinned * (args.network_offload != "none"),
        "text encoder": text.pinned * (args.text_encoder_offload in ("cpu", "blocks")),
    }
    return Estimate(phases, host=host, traffic=network.sent, video=video)


def _step_cache_bytes(
    config: Config, geometry: Geometry, latents: int, size: tuple[int, int], dtype: torch.dtype
) -> float:
    """Return the bytes of the four tensors of patches that `sgm.modules.step_cache` has at most."""
    if config.args.step_cache is None:
        return 0.0
    mesh, width = mesh_of(config), params_of(config.model["network_config"])["hidden_size"]
    rows = config.args.batch_size * _branches(config) / mesh.cfg
    return 4 * rows * geometry.num_patches(latents, size) / mesh.sequence * width * dtype.itemsize


def training_estimate(
    config: Config,
    dtype: torch.dtype,
    trained: Collection[str],
    *,
    vae: Encodes = True,
    text_encoder: Encodes = True,
) -> Estimate:
    """Estimate a rank of a training run.

    Args:
        config: of a checked run, with the size of clips in its data section.
        dtype: of the network.
        trained: names of the trained parameters.
        vae: what the VAE encodes; if caches hold all latents, it only comes for the samples of evaluations.
        text_encoder: what the text encoder encodes.
    """
    args, mesh, section = config.args, mesh_of(config), config.deepspeed
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    if problems := list(frozen_problems(config, trains_adapters=all(map(is_added, trained)))):
        raise ConfigError(problems)
    clip = clip_of(config)
    assert clip is not None, "checked by the caller"
    frames, size = clip
    latents = (frames - 1) // Geometry.from_network(params_of(config.model["network_config"])).time_compression + 1
    batch = section["train_micro_batch_size_per_gpu"] * (1 + takes_pairs(config))
    network = once(network_usage, config, (latents, *size), batch, dtype, trained=frozenset(trained))
    total, learned, width = network.weights, network.trained, dtype.itemsize
    zero, ranks = section["zero_optimization"], max(sgm.distributed.world_size() // mesh.tensor, 1)
    device, host, stepping = _state_bytes(args, section, network, ranks, width)
    stored = total * width if base_storage(config) is None else network.stored
    device, frozen = device + stored - total * width, stored - learned * width
    vae = with_vae(config, vae)
    # Frozen weights wait in host memory: always, or while text encoder and VAE run.
    away = args.network_offload == "cpu" and (bool(vae or text_encoder) or _samples_need_vae(config))
    device -= frozen * (args.network_offload == "blocks")
    text = text_encoder_bytes(config) if text_encoder else TextBytes(0.0, 0.0, 0.0)
    # Without a cache, every batch has captions, and the encoder is never released.
    leaves = args.text_encoder_offload in ("cpu", "blocks", *(["release"] if args.text_cache else []))
    resident = {
        "weights, gradients, optimizer": device,
        "text encoder": 0.0 if leaves else text.device,
        "buffers": _buffers(zero, learned, width) if zero["stage"] == 3 else 0.0,  # of others in the backward pass only
    }
    phases: dict[str, dict[str, float]] = {}
    gradients = 0.0 if is_offloaded(zero, "optimizer") else width * (learned if zero["stage"] < 2 else learned / ranks)
    before = stepping + frozen * away + gradients * (section["gradient_accumulation_steps"] == 1)  # a batch
    if vae:
        encoded = once(encode_usage, config, (1 if vae == "first frames" else frames, *size), autoencoder_dtype(dtype))
        resident["VAE"] = encoded.weights * autoencoder_dtype(dtype).itemsize
        if not config.model.get("latent_input"):
            phases["encode"] = {**_without(resident, before), "activations": encoded.peak}
    live = min(zero.get("stage3_max_live_parameters", 1e9), total) * width if zero["stage"] == 3 else 0.0
    # Gradients come while activations go: block by block, what is kept for a block makes room for its gradients, and
    # for the buffers in which they are reduced.
    room = min(network.kept, gradients)
    buffers = max(_buffers(zero, learned, width) - (network.kept - room), resident["buffers"])
    held = {**_without(resident, stepping + room), "buffers": buffers, "weights in use": live}
    phases["network"] = {**held, "activations": network.peak}
    phases["optimizer"] = _without(resident, frozen * (away and (in_step(vae) or in_step(text_encoder))))
    if text.stored:
        phases = {"text": {**_without(resident, before), "text encoder": text.device}, **phases}
    if args.eval_interval is not None:
        held = {**_without(resident, stepping + gradients), "weights in use": live}
        usage = _validation_usage(config, batch, (latents, *size), dtype, phases)
        phases["validation"] = _validation_phase(held, usage, frozen * away)
    traffic = {axis: section["gradient_accumulation_steps"] * num for axis, num in network.sent.items()}
    traffic["ZeRO"] = zero_traffic(total, learned, ranks, section, block=_block(config, total), width=width).total
    waits = {
        "frozen weights": network.pinned * (away or args.network_offload == "blocks"),
        "activations": network.host,
        "optimizer": host,
        "VAE": 0.0 if "VAE" in resident else phases.get("validation", {}).get("VAE", 0.0),
        "text encoder": text.pinned * (args.text_encoder_offload in ("cpu", "blocks")),
        "save": args.async_save * saved_bytes(args, section, network, ranks, width, all(map(is_added, trained))),
    }
    return Estimate(phases, host=waits, traffic=traffic)


def _block(config: Config, total: float) -> float:
    """Return the parameters of a block, of a network with `total`."""
    return total / params_of(config.model["network_config"]).get("num_layers", 1)


def is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """Whether an ``offload_*`` of a ZeRO section names a device."""
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def _state_bytes(
    args: TrainingArgs, section: Mapping[str, Any], network: Usage, ranks: int, width: int
) -> tuple[float, float, float]:
    """Return bytes on the device and the host in the optimizer's step, and those of the device in this step alone."""
    zero, counts = section["zero_optimization"], (network.weights, network.trained, ranks)
    given: dict[str, Any] = {
        "ema": args.ema_decay is not None,
        "offload": is_offloaded(zero, "optimizer"),
        "width": width,
        "moments": MOMENT_BYTES.get(section["optimizer"]["type"], 8),
    }
    if section["optimizer"]["type"].startswith(STEPS_AT_ONCE):
        given["slices"] = math.inf
    device, host = bytes_per_rank(*counts, zero["stage"], **given)
    stepping = device - bytes_per_rank(*counts, zero["stage"], **given, step=False)[0]
    if zero["stage"] == 3 and given["offload"] and not is_offloaded(zero, "param"):
        device = width * network.weights / ranks  # the formula assumes both on the CPU
        host -= device
    return device, host, stepping


def saved_bytes(
    args: TrainingArgs, section: Mapping[str, Any], network: Usage, ranks: int, width: int, adapters: bool
) -> float:
    """Return the bytes that rank zero, which also writes weights, saves, and copies before for ``args.async_save``."""
    trained = network.trained
    weights = width * (trained if adapters and not args.save_full else network.weights)
    averages = 4 * trained * (args.ema_decay is not None)
    return weights + averages + state_bytes(args, section, network, ranks, width)


def state_bytes(
    args: TrainingArgs, section: Mapping[str, Any], network: Usage, ranks: int, width: int, *, first: bool = True
) -> float:
    """Return the bytes that a rank saves to resume from; up to stage 2, the `first` one saves the whole weights too."""
    trained, stage = network.trained, section["zero_optimization"]["stage"]
    moments = MOMENT_BYTES.get(section["optimizer"]["type"], 8)
    numbers = (4 if stage or width == 2 else 0) + moments + 4 * (args.ema_decay is not None)
    share = trained / ranks
    return width * (share if stage == 3 else trained * first) + numbers * (share if stage else trained * first)


def _without(resident: Mapping[str, float], weights: float) -> dict[str, float]:
    return {**resident, "weights, gradients, optimizer": resident["weights, gradients, optimizer"] - weights}


def _validation_phase(held: dict[str, float], usage: tuple[float, float, float], away: float) -> dict[str, float]:
    """Return an evaluation's phase, from what is `held`, `_validation_usage`, and weights that leave for the VAE."""
    network, vae, weights = usage
    held = {**held, "VAE": max(held.get("VAE", 0.0), weights)}
    if network < vae - away:
        return {**_without(held, away), "activations": vae}
    return {**held, "activations": network}


def _samples_need_vae(config: Config) -> bool:
    """Whether evaluations decode samples, or encode what they start from."""
    args, model = config.args, config.model
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    geometry = Geometry.from_network(params_of(model["network_config"]))
    uses = not args.only_log_video_latents or geometry.image_conditioned or geometry.control_channels > 0
    return args.eval_interval is not None and model.get("first_stage_config") is not None and uses


def _validation_usage(
    config: Config,
    batch: int,
    clip: tuple[int, int, int],
    dtype: torch.dtype,
    phases: Mapping[str, Mapping[str, float]],
) -> tuple[float, float, float]:
    """Return peaks of activations at an evaluation, of the network and of the VAE, and the bytes of the VAE's weights.

    The network computes the loss of `batch` clips (T, H, W), or of ``args.eval_batch_size``, and then samples. The VAE
    encodes clips, if it does so in training, what the samples start from, and decodes these.
    """
    args = config.args
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    plan: SamplingPlan = check_sampling(args, geometry)
    size = default(plan.size, geometry.nearest_size(*FREE_SIZE))
    samples = args.batch_size * _branches(config)
    clips = (args.eval_batch_size or 0) * (1 + takes_pairs(config)) or batch
    network = max(
        once(network_usage, config, clip, clips, dtype).peak,
        once(network_usage, config, (plan.latents_at_once, *size), samples, dtype).peak
        + _step_cache_bytes(config, geometry, plan.latents, size, dtype),
    )
    peaks = [phases["encode"]["activations"]] if "encode" in phases else [0.0]
    if not _samples_need_vae(config):
        return network, max(peaks), 0.0
    usages = []
    if plan.image2video or geometry.control_channels:
        frames = plan.video_frames if geometry.control_channels else 1
        usages.append(once(encode_usage, config, (frames, *size), autoencoder_dtype(dtype)))
    if not args.only_log_video_latents:
        usages.append(
            once(decode_usage, config, (args.batch_size, plan.decoded_latents, *size), autoencoder_dtype(dtype))
        )
    weights = max((usage.weights for usage in usages), default=0) * autoencoder_dtype(dtype).itemsize
    return network, max(peaks + [usage.peak for usage in usages]), weights


def _branches(config: Config) -> int:
    """Return how many samples of the network a guided sample takes."""
    section = params_of(config.model.get("sampler_config")).get("guider_config") or {}
    if not section or section["target"].endswith("IdentityGuider"):
        return 1
    return 1 + has_effect(instantiate_from_config(section), config.args.guidance_scale)


def bytes_per_rank(
    total: float,
    trained: float,
    ranks: int,
    stage: int,
    *,
    ema: bool = False,
    offload: bool = False,
    width: int = 2,
    moments: float = 8,
    step: bool = True,
    slices: float = 2**26,
) -> tuple[float, float]:
    """Return (device, host) bytes of weights, gradients and optimizer state, in its step or before."""
    share = trained / ranks
    weights = width * total / (ranks if stage == 3 else 1)
    copy = 4 if stage or width == 2 else 0
    state = (copy + moments + 4 * ema) * (share if stage else trained)
    if not offload:
        gradients = width * (trained if stage < 2 else share)
        # Without ZeRO, gradients are reduced in a copy of up to 5e8 numbers; stage 1 copies those of its share.
        reduced = width * (trained + (min(trained, 5e8) if ranks > 1 else 0))
        stepping = {
            0: max((width + copy) * trained, reduced),
            1: max(width * (trained + share), width * share + 4 * min(share, slices)),
            2: width * share + 4 * min(share, slices),
            3: (2 * width + (4 if width == 2 else 0)) * share,  # flattened, then converted to float32
        }
        return weights + state + (stepping[stage] if step else gradients), 0
    state += {1: width + 4, 2: 2 * width + 4, 3: width + 4}[stage] * share
    if stage == 3:
        return 0, weights + state
    return weights + (width * trained if stage == 1 else 0), state


@dataclass(frozen=True)
class ZeroTraffic:
    """What ZeRO sends, in bytes of a rank and iteration.

    Attributes:
        reduced: gradients, in the backward pass or after it.
        gathered: weights; at stage 3 around their use, else after the optimizer.
    """

    reduced: float
    gathered: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.reduced + self.gathered


def zero_traffic(
    total: float, trained: float, ranks: int, section: Mapping[str, Any], *, block: float, width: int
) -> ZeroTraffic:
    """Return what a rank sends per iteration to reduce gradients and gather weights.

    Args:
        total: parameters of this rank's network.
        trained: trained parameters among them.
        ranks: ranks that ZeRO shards over.
        section: ``Config.deepspeed`` of a training run.
        block: parameters of a block.
        width: bytes of a parameter.
    """
    zero, batches = section["zero_optimization"], section["gradient_accumulation_steps"]
    fetches = 3 if zero.get("stage3_max_live_parameters", 1e9) < block else 2
    once = not zero.get("use_multi_rank_bucket_allreduce", True)
    reduced, gathered = {
        0: (2 * trained, 0),
        1: (2 * trained, trained),
        2: ((1 if once else 2) * batches * trained, trained),
        3: (batches * trained, batches * fetches * total),
    }[zero["stage"]]
    share = width * (ranks - 1) / ranks
    return ZeroTraffic(reduced * share, gathered * share)


def _buffers(zero: Mapping[str, Any], learned: float, width: int) -> float:
    """Return the bytes of DeepSpeed's gradient buckets: one, or two with overlapping; see its ZeRO stages."""
    stage, bucket = zero["stage"], zero.get("reduce_bucket_size", 5e8)
    if stage == 0:
        return 0.0  # `bytes_per_rank` has them
    if not zero.get("contiguous_gradients", True):
        return min(bucket, learned) * width
    return bucket * width * (2 if zero.get("overlap_comm") and stage < 3 else 1)


def clip_of(config: Config) -> tuple[int, tuple[int, int]] | None:
    """Return frames and (height, width) of the clips; None if the data section does not state them."""
    params = config.data.get("params") or {}
    frames, size = params.get("max_num_frames"), params.get("video_size")
    return None if frames is None or size is None else (frames, (size[0], size[1]))


@dataclass(frozen=True)
class TextBytes:
    """Bytes of the text encoders: on the device while they encode, as they are stored, and in pinned memory."""

    device: float
    stored: float
    pinned: float


def text_encoder_bytes(config: Config) -> TextBytes:
    """Return the bytes of the text encoders' weights, by the sizes of their files.

    A T5 whose folder is missing is taken to be that of the released models, if the network takes its embeddings.
    """
    args, found = config.args, [0.0, 0.0, 0.0]
    section = config.model.get("conditioner_config")
    modules = params_of(config.model.get("network_config")).get("modules") or {}
    released = params_of(modules.get("patch_embed_config")).get("text_hidden_size") == T5_XXL["d_model"]
    for embedder in instantiate_from_config(section).embedders if section is not None else ():
        if not hasattr(embedder, "folder"):
            continue
        if Path(embedder.folder.path).is_dir():
            known = embedder.folder.config, sum(file.stat().st_size for file in embedder.folder.shards)
        elif released:
            known = T5_XXL, T5_XXL_BYTES
        else:
            continue
        for index, blocks in enumerate((args.text_encoder_offload == "blocks", False)):
            found[index] += t5_bytes(*known, args.text_encoder_weights, blocks)
        found[2] += pinned_t5_bytes(*known, args.text_encoder_weights)
    return TextBytes(*found)


def t5_bytes(t5: Mapping[str, Any], total: float, storage: str | None = None, blocks: bool = False) -> float:
    """Return the bytes of a T5 encoder on the device.

    Args:
        t5: its ``config.json``.
        total: bytes of its files.
        storage: of the linear layers of its blocks, as in ``args.text_encoder_weights``.
        blocks: two blocks at most are on the device.
    """
    sizes = _t5_sizes(t5, total, storage)
    if sizes is None:
        return total
    rest, block, depth = sizes
    return rest + sum(block) * (min(2, depth) if blocks else depth)


def pinned_t5_bytes(t5: Mapping[str, Any], total: float, storage: str | None = None) -> float:
    """Return the bytes of a T5 encoder that waits in host memory; arguments as of `t5_bytes`."""
    sizes = _t5_sizes(t5, total, storage)
    if sizes is None:
        return total
    rest, block, depth = sizes
    # The norms make the numbers a little too large, which must not be rounded up.
    return sum(pinned_pieces([int(rest)])[0]) + depth * sum(pinned_pieces([int(0.999 * size) for size in block])[0])


def _t5_sizes(t5: Mapping[str, Any], total: float, storage: str | None) -> tuple[float, list[float], int] | None:
    """Return the bytes outside of T5's blocks, those of each matrix of a block, and the number of blocks."""
    if {"num_layers", "num_heads", "d_kv", "d_ff", "d_model", "vocab_size"} - t5.keys():
        return None
    depth, size = t5["num_layers"], t5["d_model"]
    wide = 3 if str(t5.get("feed_forward_proj", "")).startswith("gated") else 2
    numbers = [size * t5["num_heads"] * t5["d_kv"]] * 4 + [size * t5["d_ff"]] * wide
    width = total / (depth * sum(numbers) + size * t5["vocab_size"])  # bytes; the norms are a few thousand numbers
    rest = total - depth * sum(numbers) * width
    kept = width if storage is None else 1 + 10 / size
    return rest, [count * kept for count in numbers], depth
