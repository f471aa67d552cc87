"""Estimate memory and traffic per rank before weights are read, or there at all.

Network and VAE run on fake tensors (`sgm.checks.fake_run`), at the size and in the dtype of the run. Weights, optimizer
state, DeepSpeed's buffers and its traffic are formulas, since DeepSpeed allocates those tensors only in a real engine.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sgm.distributed
from sgm.checks.fake_run import HOST, Usage, build, num_parameters, simulated_ranks, usage
from sgm.checks.frozen import base_storage, frozen_problems
from sgm.checks.mesh import mesh_of
from sgm.checks.sampling import SamplingPlan, check_sampling, params_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, digest_of
from sgm.distributed import Mesh
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.geometry import FREE_SIZE, SPATIAL_COMPRESSION, Geometry
from sgm.util import InputError, default, instantiate_from_config
from sgm.weights.adapters import is_adapter
from sgm.weights.offload import Offload
from sgm.weights.quantize import linear_layers, store

PATIENCE = 20_000  # operators without a new peak after which measuring a decoder stops, since chunks and tiles repeat


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
    "bitsandbytes.optim.AdamW8bit": 2.04,
    "came_pytorch.CAME": 4.03,
    "Muon": 4,
    "prodigyopt.Prodigy": 16,
    "torch.optim.SGD": 4,
}


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


# Settings that change what is measured of network and VAE, beside their sections.
NETWORK_ARGS = (
    "weights",
    "base_weights",
    "network_offload",
    "checkpoint_activations",
    "offload_activations",
    "sequence_attention",
    "model_parallel_size",
    "sequence_parallel_size",
    "cfg_parallel_size",
)
VAE_ARGS = ("vae_tiling", "vae_slicing")

Memo = dict[str, Usage]  # measurements by their settings: plans ask for the same ones again and again


def _once(memo: Memo | None, work: Callable[..., Usage], config: Config, *given: Any, **named: Any) -> Usage:
    """Return ``work(config, *given, **named)``, from `memo` if it is there."""
    if memo is None:
        return work(config, *given, **named)
    part, names = ("network_config", NETWORK_ARGS) if work is network_usage else ("first_stage_config", VAE_ARGS)
    settings = {name: getattr(config.args, name, None) for name in names}
    if work is network_usage:
        settings["network_offload"] = settings["network_offload"] == "blocks"
        if "trained" not in named:  # nothing is kept for a backward pass
            del settings["checkpoint_activations"], settings["offload_activations"]
    values = [sorted(value) if isinstance(value, frozenset) else str(value) for value in (*given, *named.values())]
    key = digest_of([work.__name__, config.model[part], settings, str(mesh_of(config)), values])
    if key not in memo:
        memo[key] = work(config, *given, **named)
    return memo[key]


def sampling_estimate(config: Config, dtype: torch.dtype, memo: Memo | None = None) -> Estimate:
    """Estimate a rank of a sampling run: text encoder, then network, then VAE.

    Args:
        config: of a checked run.
        dtype: of the network.
        memo: measurements that are not to be repeated.
    """
    args = config.args
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    plan: SamplingPlan = check_sampling(args, geometry)
    size = default(plan.size, geometry.nearest_size(*FREE_SIZE))
    network = _once(memo, network_usage, config, (plan.latents, *size), args.batch_size * _branches(config), dtype)
    text = text_encoder_bytes(config)
    stays = {"text encoder": text.device if args.text_encoder_offload == "none" else 0.0}
    # Blocks that pass through the device are counted in the peak, as what they are copied to.
    weights = {"weights": 0.0 if args.network_offload == "blocks" else network.stored, **stays}
    beside = {**weights, "weights": network.stored * (args.network_offload == "none")}
    phases: dict[str, Mapping[str, float]] = {"text": {"text encoder": text.device}} if text.stored else {}
    used = "blocks in use and activations" if args.network_offload == "blocks" else "activations"
    phases["network"], video = {**weights, used: network.peak}, 0.0
    if plan.image2video or not args.only_save_latents:
        decoded = _once(memo, _decode_usage, config, (args.batch_size, plan.latents, *size), dtype)
        held = decoded.weights * vae_dtype(dtype).itemsize
        phases["network"] = {**weights, "VAE": held, used: network.peak}
        if plan.image2video:
            image = _once(memo, _encode_usage, config, (1, *size), dtype)
            phases["encode"] = {**beside, "VAE": held, "activations": image.peak}
        if not args.only_save_latents:
            phases["decode"] = {**beside, "VAE": held, "activations": decoded.peak}
            video = decoded.sent.get("VAE", 0.0)
    host = {
        "weights": network.stored * (args.network_offload != "none"),
        "text encoder": text.stored * (args.text_encoder_offload in ("cpu", "blocks")),
    }
    return Estimate(phases, host=host, traffic=network.sent, video=video)


def training_estimate(
    config: Config,
    dtype: torch.dtype,
    trained: Collection[str],
    *,
    vae: bool = True,
    text_encoder: bool = True,
    memo: Memo | None = None,
) -> Estimate:
    """Estimate a rank of a training run.

    Args:
        config: of a checked run, with the size of clips in its data section.
        dtype: of the network.
        trained: names of the trained parameters.
        vae: whether the VAE is loaded; not if caches hold all latents.
        text_encoder: whether the text encoder is loaded.
        memo: measurements that are not to be repeated.
    """
    args, mesh, section = config.args, mesh_of(config), config.deepspeed
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    if problems := list(frozen_problems(config, trains_adapters=all(map(is_adapter, trained)))):
        raise ConfigError(problems)
    clip = clip_of(config)
    assert clip is not None, "checked by the caller"
    frames, size = clip
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    latents = (frames - 1) // geometry.time_compression + 1
    batch = section["train_micro_batch_size_per_gpu"]
    network = _once(memo, network_usage, config, (latents, *size), batch, dtype, trained=frozenset(trained))
    total, learned, width = network.weights, network.trained, dtype.itemsize
    zero, ranks = section["zero_optimization"], max(sgm.distributed.world_size() // mesh.tensor, 1)
    device, host, stepping = _state_bytes(args, section, network, ranks, width)
    stored = total * width if base_storage(config) is None else network.stored
    device, frozen = device + stored - total * width, stored - learned * width
    # Frozen weights wait in host memory: always, or while text encoder and VAE run.
    away = args.network_offload == "cpu" and (vae or text_encoder)
    device -= frozen * (args.network_offload == "blocks")
    text = text_encoder_bytes(config) if text_encoder else TextBytes(0.0, 0.0)
    # Without a cache, every batch has captions, and the encoder is never released.
    leaves = args.text_encoder_offload in ("cpu", "blocks", *(["release"] if args.text_cache else []))
    resident = {
        "weights, gradients, optimizer": device,
        "text encoder": 0.0 if leaves else text.device,
        "buffers": _buffers(zero, learned, width),
    }
    phases: dict[str, dict[str, float]] = {}
    if vae and config.model.get("first_stage_config") is not None:
        encoded = _once(memo, _encode_usage, config, (frames, *size), dtype)
        resident["VAE"] = encoded.weights * vae_dtype(dtype).itemsize
        if not config.model.get("latent_input"):
            phases["encode"] = {**_without(resident, frozen * away), "activations": encoded.peak}
    live = min(zero.get("stage3_max_live_parameters", 1e9), total) * width if zero["stage"] == 3 else 0.0
    # Gradients come while activations go: block by block, what is kept for a block makes room for its gradients.
    gradients = 0.0 if _is_offloaded(zero, "optimizer") else width * (learned if zero["stage"] < 2 else learned / ranks)
    room = min(network.kept, gradients)
    phases["network"] = {**_without(resident, stepping + room), "weights in use": live, "activations": network.peak}
    phases["optimizer"] = _without(resident, frozen * away)
    if text.stored:
        phases = {"text": {**_without(resident, frozen * away), "text encoder": text.device}, **phases}
    if args.eval_interval is not None:
        held = {**_without(resident, stepping + gradients), "weights in use": live}
        sampled, others = _validation_usage(config, batch, dtype, phases, memo)
        if sampled < others - frozen * away:
            held, sampled = _without(held, frozen * away), others
        phases["validation"] = {**held, "activations": sampled}
    traffic = {axis: section["gradient_accumulation_steps"] * num for axis, num in network.sent.items()}
    block = total / params_of(config.model["network_config"]).get("num_layers", 1)
    traffic["ZeRO"] = zero_traffic(total, learned, ranks, section, block=block, width=width)
    waits = {
        "frozen weights": frozen * (away or args.network_offload == "blocks"),
        "activations": network.host,
        "optimizer": host,
        "text encoder": text.stored * (args.text_encoder_offload in ("cpu", "blocks")),
    }
    return Estimate(phases, host=waits, traffic=traffic)


def _is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def _state_bytes(
    args: TrainingArgs, section: Mapping[str, Any], network: Usage, ranks: int, width: int
) -> tuple[float, float, float]:
    """Return bytes on the device and the host in the optimizer's step, and those of the device in this step alone."""
    zero, counts = section["zero_optimization"], (network.weights, network.trained, ranks)
    given: dict[str, Any] = {
        "ema": args.ema_decay is not None,
        "offload": _is_offloaded(zero, "optimizer"),
        "width": width,
        "moments": MOMENT_BYTES.get(section["optimizer"]["type"], 8),
    }
    device, host = bytes_per_rank(*counts, zero["stage"], **given)
    stepping = device - bytes_per_rank(*counts, zero["stage"], **given, step=False)[0]
    if zero["stage"] == 3 and given["offload"] and not _is_offloaded(zero, "param"):
        device = width * network.weights / ranks  # the formula assumes both on the CPU
        host -= device
    return device, host, stepping


def _without(resident: Mapping[str, float], weights: float) -> dict[str, float]:
    return {**resident, "weights, gradients, optimizer": resident["weights, gradients, optimizer"] - weights}


def _validation_usage(
    config: Config, batch: int, dtype: torch.dtype, phases: Mapping[str, Mapping[str, float]], memo: Memo | None
) -> tuple[float, float]:
    """Return peaks of activations at an evaluation: of the network, and of encoding clips and decoding samples."""
    args = config.args
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    plan: SamplingPlan = check_sampling(args, geometry)
    size = default(plan.size, geometry.nearest_size(*FREE_SIZE))
    samples = args.batch_size * _branches(config)
    together = max(samples, args.eval_batch_size or batch)
    network = _once(memo, network_usage, config, (plan.latents, *size), together, dtype).peak
    peaks = [phases["encode"]["activations"]] if "encode" in phases else [0.0]
    if not args.only_log_video_latents and config.model.get("first_stage_config") is not None:
        peaks.append(_once(memo, _decode_usage, config, (args.batch_size, plan.latents, *size), dtype).peak)
    return network, max(peaks)


def _branches(config: Config) -> int:
    """Return how many samples of the network a guided sample takes."""
    guider = params_of(config.model.get("sampler_config")).get("guider_config") or {}
    return 1 if not guider or guider["target"].endswith("IdentityGuider") else 2


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
) -> tuple[float, float]:
    """Return (device, host) bytes of weights, gradients and optimizer state, in its step or before."""
    share = trained / ranks
    weights = width * total / (ranks if stage == 3 else 1)
    copy = 4 if stage or width == 2 else 0
    state = (copy + moments + 4 * ema) * (share if stage else trained)
    if not offload:
        gradients = width * (trained if stage < 2 else share)
        stepping = {0: (width + copy) * trained, 1: max(width * trained, 4 * share), 2: 4 * share}
        return weights + state + (stepping.get(stage, (width + 4) * share) if step else gradients), 0
    state += {1: width + 4, 2: 2 * width + 4, 3: width + 4}[stage] * share
    if stage == 3:
        return 0, weights + state
    return weights + (width * trained if stage == 1 else 0), state


def zero_traffic(
    total: float, trained: float, ranks: int, section: Mapping[str, Any], *, block: float, width: int
) -> float:
    """Return the bytes sent by a rank per iteration to reduce gradients and gather weights.

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
    numbers = {
        0: 2 * trained,
        1: 3 * trained,
        2: ((1 if once else 2) * batches + 1) * trained,
        3: batches * (fetches * total + trained),
    }[zero["stage"]]
    return numbers * width * (ranks - 1) / ranks


def _buffers(zero: Mapping[str, Any], learned: float, width: int) -> float:
    """Return the bytes of DeepSpeed's gradient buckets: one, or two with overlapping; see its ZeRO stages."""
    stage, bucket = zero["stage"], zero.get("reduce_bucket_size", 5e8)
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return min(bucket, learned) * width
    return bucket * width * (2 if zero.get("overlap_comm") and stage < 3 else 1)


def clip_of(config: Config) -> tuple[int, tuple[int, int]] | None:
    """Return frames and (height, width) of the clips; None if the data section does not state them."""
    params = config.data.get("params") or {}
    frames, size = params.get("max_num_frames"), params.get("video_size")
    return None if frames is None or size is None else (frames, (size[0], size[1]))


@dataclass(frozen=True)
class TextBytes:
    """Bytes of the text encoders: on the device while they encode, and as they are stored."""

    device: float
    stored: float


def text_encoder_bytes(config: Config) -> TextBytes:
    """Return the bytes of the text encoders' weights, by the sizes of their files.

    A T5 whose folder is missing is taken to be that of the released models, if the network takes its embeddings.
    """
    args, found = config.args, [0.0, 0.0]
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
    return TextBytes(*found)


def t5_bytes(t5: Mapping[str, Any], total: float, storage: str | None = None, blocks: bool = False) -> float:
    """Return the bytes of a T5 encoder on the device.

    Args:
        t5: its ``config.json``.
        total: bytes of its files.
        storage: of the linear layers of its blocks, as in ``args.text_encoder_weights``.
        blocks: two blocks at most are on the device.
    """
    missing = {"num_layers", "num_heads", "d_kv", "d_ff", "d_model", "vocab_size"} - t5.keys()
    if missing or (storage is None and not blocks):
        return total
    depth, size = t5["num_layers"], t5["d_model"]
    matrices = 3 if str(t5.get("feed_forward_proj", "")).startswith("gated") else 2
    linear = depth * size * (4 * t5["num_heads"] * t5["d_kv"] + matrices * t5["d_ff"])  # numbers
    width = total / (linear + size * t5["vocab_size"])  # bytes of a number; the norms are a few thousand
    rest, layers = total - linear * width, linear * (width if storage is None else 1 + 10 / size)
    return rest + layers * (min(2 / depth, 1) if blocks else 1)


def network_usage(
    config: Config,
    video: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    trained: frozenset[str] | None = None,
) -> Usage:
    """Measure a forward pass of the network, with `trained` also the backward pass.

    A deep network is measured at two small depths and extrapolated linearly.

    Args:
        config: of a checked run.
        video: latent frames without padding, height and width in pixels.
        batch: samples of a group of ranks, counting both branches of guidance.
        dtype: of the network.
        trained: names of the trained parameters; None for a run without gradients.
    """
    section, mesh = dict(config.model["network_config"]), mesh_of(config)
    params = section["params"] = dict(params_of(section))
    transformer = params["transformer_args"] = _transformer_args(config, params)
    modules, geometry = params.get("modules") or {}, Geometry.from_network(params)
    frames, side = geometry.padded_latents(video[0]), SPATIAL_COMPRESSION
    text = params_of(modules.get("pos_embed_config")).get("text_length", 0)
    text_size = params_of(modules.get("patch_embed_config")).get("text_hidden_size", 0)

    storage = base_storage(config) if isinstance(config.args, TrainingArgs) else config.args.weights

    def store_weights(network: Any) -> None:
        if storage is not None:
            for layer in linear_layers(module for block in network.blocks for module in block):
                store(layer, storage)

    def run(network: Any) -> torch.Tensor:
        if config.args.network_offload != "blocks":
            return forward(network)
        offload = Offload(network, torch.device("cpu"), network.blocks, backward=trained is not None)
        network.use_blocks_within(offload.block)
        with offload:
            return forward(network)

    def forward(network: Any) -> torch.Tensor:
        if hasattr(network, "ring_attention"):
            network.ring_attention = {"ulysses": False, "ring": True}.get(config.args.sequence_attention)
        x = torch.empty(batch, frames, geometry.in_channels, video[1] // side, video[2] // side, dtype=dtype)
        context, one = torch.empty(batch, text, text_size, dtype=dtype), torch.ones(batch)
        if trained is not None and getattr(config.args, "offload_activations", False):
            network.offload_activations(x.device, HOST)
        ofs = {} if params.get("ofs_embed_dim") is None else {"ofs": one}
        return OpenAIWrapper(network)(x, one, {"crossattn": context}, **ofs)

    def measured(depth: int | None, kept: int = 0) -> Usage:
        shallow = {"num_layers": depth, "transformer_args": {**transformer, "checkpoint_skip_layers": kept}}
        params_here = params if depth is None else {**params, **shallow}
        with simulated_ranks(mesh):
            network = build({**section, "params": params_here})
        return usage(network, run, dtype, mesh, trained=trained, prepare=store_weights)

    depth = params.get("num_layers")
    skipped = transformer.get("checkpoint_skip_layers", 0) if transformer.get("checkpoint_activations") else 0
    kept = min(skipped, 2)  # of the blocks measured; with two, the peak is where they are and others are not recomputed
    offloads = getattr(config.args, "offload_activations", False)
    few = 2 + kept + offloads  # copies of one block come back while another runs its backward pass
    if isinstance(depth, int) and depth > few + 2 and skipped < depth:
        with simulated_ranks(mesh):
            whole = num_parameters(build(section), trained or frozenset())
        try:
            first, second = measured(few, kept), measured(few + 1, kept)
            found = _continued(first, first, second, depth - few)
            if skipped > kept:
                found = _continued(found, second, measured(few + 1, kept + 1), skipped - kept)
        except InputError:  # a setting names a layer missing from the small network
            return measured(None)
        if (found.weights, found.trained) == whole:
            return found
    return measured(None)


def _transformer_args(config: Config, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``transformer_args`` of the network's `params` as they are in a run."""
    section, recomputes = (
        dict(params.get("transformer_args") or {}),
        getattr(config.args, "checkpoint_activations", None),
    )
    if recomputes in (None, "auto"):
        return section
    if isinstance(recomputes, bool):
        return section | {"checkpoint_activations": recomputes}
    # Of a shorter network all blocks but the last ones.
    return section | {
        "checkpoint_activations": True,
        "checkpoint_skip_layers": max(params["num_layers"] - recomputes, 0),
    }


def _continued(start: Usage, first: Usage, second: Usage, steps: int) -> Usage:
    """Extrapolate from `start` by `steps` times the difference of two measurements, of which one block differs."""

    def line(begin: float, a: float, b: float) -> float:
        return begin + steps * (b - a)

    return Usage(
        weights=line(start.weights, first.weights, second.weights),
        trained=line(start.trained, first.trained, second.trained),
        peak=line(start.peak, first.peak, second.peak),
        sent={axis: line(start.sent.get(axis, 0), first.sent.get(axis, 0), num) for axis, num in second.sent.items()},
        stored=line(start.stored, first.stored, second.stored),
        host=line(start.host, first.host, second.host),
        kept=steps * max(second.peak - first.peak, 0),
    )


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the VAE, which overflows in float16, for a network of `dtype`."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _decode_usage(config: Config, latents: tuple[int, int, int, int], dtype: torch.dtype) -> Usage:
    """Measure decoding of latents (B, T, H, W), H and W in pixels of the video, as in the engine."""
    args, dtype = config.args, vae_dtype(dtype)
    channels = Geometry.from_network(params_of(config.model["network_config"])).out_channels
    batch, frames, height, width = latents
    together = config.model.get("en_and_decode_n_samples_a_time") or (1 if args.vae_slicing else batch)

    def run(vae: Any) -> torch.Tensor:
        if hasattr(vae, "decodes_everywhere"):
            vae.decodes_everywhere = False
        if args.vae_tiling and hasattr(vae, "enable_tiling"):
            vae.enable_tiling()
        area = height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION
        latents = torch.empty(min(together, batch), channels, frames, *area, dtype=dtype)
        if not hasattr(vae, "decode_in_chunks"):
            return torch.cat([vae.decode(latents)]).float()
        # A chunk's frames leave the device before the next chunk, and the third chunk is as large as any.
        alone = not args.vae_tiling and mesh_of(config).context == 1
        for _ in map(torch.Tensor.float, vae.decode_in_chunks(latents[:, :, : 6 + frames % 2] if alone else latents)):
            pass
        return latents

    return _vae_usage(config, run, dtype, tiles=args.vae_tiling)


def _encode_usage(config: Config, video: tuple[int, int, int], dtype: torch.dtype) -> Usage:
    """Measure encoding one clip: frames, height, width."""
    dtype = vae_dtype(dtype)

    def run(vae: Any) -> torch.Tensor:
        clip = torch.empty(1, video[0], 3, *video[1:])
        return vae.encode_moments(clip.transpose(1, 2).to(dtype))

    return _vae_usage(config, run, dtype)


def _vae_usage(config: Config, run: Callable[[Any], torch.Tensor], dtype: torch.dtype, *, tiles: bool = False) -> Usage:
    mesh = mesh_of(config)
    with simulated_ranks(mesh):
        vae = build(config.model["first_stage_config"])
    return usage(vae, run, dtype, mesh, patience=PATIENCE if tiles and mesh.context == 1 else None)
