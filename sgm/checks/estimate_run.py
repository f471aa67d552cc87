"""What a run will take of a rank, by its configuration: the rows of the dry run about ranks, memory and traffic."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sgm.distributed
from sgm.checks.estimate import Autoencoder, Network, bytes_per_rank, zero_traffic
from sgm.checks.mesh import mesh_of
from sgm.checks.sampling import SamplingPlan, check_sampling, params_of
from sgm.checks.training import with_largest_bucket
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.distributed import Mesh
from sgm.modules.geometry import FREE_SIZE, Geometry
from sgm.util import default, instantiate_from_config, without_allocating
from sgm.weights.partition import partition_of
from vae_modules.autoencoder import Tiling

_NETWORK, _VAE = "dit_video_concat.DiffusionTransformer", "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"


@dataclass(frozen=True)
class Estimate:
    """What one rank needs, in bytes.

    Attributes:
        phases: what happens one after the other → what lies on the device meanwhile.
        traffic: axis → what the rank sends in a step of the sampler or the optimizer.
        machine: in the machine's memory, for this rank.
        video: sent in the VAE for the videos of a prompt.
    """

    phases: Mapping[str, Mapping[str, float]]
    traffic: Mapping[str, float] = field(default_factory=dict)
    machine: float = 0.0
    video: float = 0.0

    @property
    def most(self) -> float:
        """The most that lies on the device at any time."""
        return max(sum(parts.values()) for parts in self.phases.values())

    def rows(self) -> dict[str, str]:
        """Return the rows of the dry run."""
        sums = {name: sum(parts.values()) for name, parts in self.phases.items()}
        largest = max(sums, key=lambda name: sums[name])
        parts = ", ".join(f"{name} {_memory(size)}" for name, size in self.phases[largest].items() if size)
        rows = {"memory": f"estimated {_memory(self.most)} a rank, in {largest}: {parts}"}
        if others := ", ".join(f"in {name} {_memory(size)}" for name, size in sums.items() if name != largest):
            rows["memory"] += f" ({others})"
        if self.machine:
            rows["memory"] += f"; {_memory(self.machine)} a rank in the machine's memory"
        sent = [f"{axis} {_traffic(size)}" for axis, size in self.traffic.items() if size]
        traffic = [f"estimated for a rank and step: {', '.join(sent)}"] if sent else []
        traffic += [f"VAE {_traffic(self.video)} per video"] if self.video else []
        return rows | ({"traffic": "; ".join(traffic)} if traffic else {})


def _memory(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _traffic(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e8 else f"{size / 1e6:.1f} MB" if size >= 5e5 else f"{size / 1e3:.1f} kB"


def mesh_row(mesh: Mesh) -> str:
    """Return how the processes are divided, in words."""
    world = sgm.distributed.world_size()
    if world == 1:
        return "1 process"
    names = {"tensor": "layers", "sequence": "tokens", "cfg": "guidance"}
    axes = [f"{words} by {getattr(mesh, axis)}" for axis, words in names.items() if getattr(mesh, axis) > 1]
    axes += [f"VAE by {mesh.context}"] if mesh.context > 1 else []
    groups = world // mesh.ranks
    shared = f", each shared by {mesh.ranks} ({', '.join(axes)})" if axes else ""
    return f"{world} processes, {groups} sample{'s' * (groups > 1)} at a time{shared}"


def sampling_rows(config: Config, dtype: torch.dtype) -> dict[str, str]:
    """Return the rows about ranks, memory and traffic of a sampling run that has been checked."""
    rows = {"ranks": mesh_row(mesh_of(config))}
    unknown = _unknown(config)
    return rows | ({"memory": unknown} if unknown else sampling_estimate(config, dtype).rows())


def training_rows(
    config: Config, dtype: torch.dtype, trained: Collection[str], *, vae: bool = True, text_encoder: bool = True
) -> dict[str, str]:
    """Return the rows about ranks, memory and traffic of a training run that has been checked.

    With buckets, those of the bucket that takes most.

    Args:
        config: of the run.
        dtype: of the network.
        trained: names of the parameters that are trained.
        vae: whether the VAE is loaded.
        text_encoder: whether the text encoder is.
    """
    rows = {"ranks": mesh_row(mesh_of(config))}
    unknown = _unknown(config)
    if not unknown:
        config, largest = with_largest_bucket(config, Geometry.from_network(params_of(config.model["network_config"])))
        rows |= {"largest bucket": largest} if largest else {}
    if not unknown and _clip(config) is None:
        unknown = "not estimated: data.params do not say how large clips are"
    if unknown:
        return rows | {"memory": unknown}
    return rows | training_estimate(config, dtype, trained, vae=vae, text_encoder=text_encoder).rows()


def _unknown(config: Config) -> str:
    """Say why nothing is estimated, if so: the formulas know the classes of this project."""
    for part, known in (("network_config", _NETWORK), ("first_stage_config", _VAE)):
        section = config.model.get(part)
        if section is not None and section.get("target") != known:
            return f"not estimated: model.{part}.target is no {known}"
    return ""


def sampling_estimate(config: Config, dtype: torch.dtype) -> Estimate:
    """Return what a rank needs in sampling: text encoder, then network, then VAE.

    Args:
        config: of a run, checked.
        dtype: of the network.
    """
    args, mesh = config.args, mesh_of(config)
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    plan: SamplingPlan = check_sampling(args, geometry)
    size = default(plan.size, geometry.nearest_size(*FREE_SIZE))
    network = network_of(config, geometry.num_patches(plan.latents, size), dtype, mesh)
    guider = params_of(config.model.get("sampler_config")).get("guider_config") or {}
    branches = 1 if not guider or guider["target"].endswith("IdentityGuider") else 2
    together = args.batch_size * branches // mesh.cfg
    text = text_encoder_bytes(config)
    stays = {"text encoder": text if args.text_encoder_offload == "none" else 0.0}
    weights = {"weights": parameters(_built(config), mesh.tensor)[0] * dtype.itemsize, **stays}
    decodes = plan.image2video or not args.only_save_latents
    vae = autoencoder_of(config, size, dtype, tiles=args.vae_tiling) if decodes else None
    if vae is not None:
        weights["VAE"] = vae.parameters * vae.width
    phases = {"the network": {**weights, "activations": network.forward_bytes(together)}}
    if text:
        phases["the text encoder"] = {"text encoder": text}
    video = 0.0
    if vae is not None and not args.only_save_latents:
        a_time = args.batch_size if args.vae_slicing is False else 1
        phases["the VAE"] = {**weights, "activations": vae.decode_bytes(plan.latents, a_time)}
        video = vae.decode_traffic(plan.latents, args.batch_size)
    return Estimate(phases, network.traffic(together, trains=False), video=video)


def training_estimate(
    config: Config, dtype: torch.dtype, trained: Collection[str], *, vae: bool = True, text_encoder: bool = True
) -> Estimate:
    """Return what a rank needs in training.

    Args:
        config: of a run, checked; its data say how large clips are.
        dtype: of the network.
        trained: names of the parameters that are trained.
        vae: whether the VAE is loaded; it is not where all that it would encode comes from a cache.
        text_encoder: whether the text encoder is.
    """
    args, mesh, section = config.args, mesh_of(config), config.deepspeed
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    clip = _clip(config)
    assert clip is not None, "the caller has looked"
    frames, size = clip
    geometry = Geometry.from_network(params_of(config.model["network_config"]))
    latents = (frames - 1) // geometry.time_compression + 1
    network = network_of(config, geometry.num_patches(latents, size), dtype, mesh)
    built = _built(config)
    total, learned = parameters(built, mesh.tensor, trained)
    zero, ranks = section["zero_optimization"], max(sgm.distributed.world_size() // mesh.tensor, 1)
    offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")]
    device, machine = bytes_per_rank(
        total, learned, ranks, zero["stage"], ema=args.ema_decay is not None, offload=offloads[0], width=dtype.itemsize
    )
    if offloads == [True, False] and zero["stage"] == 3:  # the formula has both on the CPU
        device = dtype.itemsize * total / ranks
        machine -= device
    text = text_encoder_bytes(config) if text_encoder else 0.0
    # Without a cache, captions come with every batch, and the encoder is not read anew for each.
    leaves = args.text_encoder_offload == "cpu" or (args.text_encoder_offload == "release" and args.text_cache)
    stays = 0.0 if leaves else text
    resident = {"weights, gradients, optimizer": device, "text encoder": stays}
    block = parameters(built.transformer.layers[0], mesh.tensor)[0]
    activations = network.backward_bytes(section["train_micro_batch_size_per_gpu"])
    resident["buffers"] = _buffers(zero, learned, dtype)
    passing: dict[str, dict[str, float]] = {}
    if vae and config.model.get("first_stage_config") is not None:
        autoencoder = autoencoder_of(config, size, dtype, tiles=False)
        resident["VAE"] = autoencoder.parameters * autoencoder.width
        if not config.model.get("latent_input"):
            passing["the VAE"] = {**resident, "activations": autoencoder.encode_bytes(frames)}
    live = min(zero.get("stage3_max_live_parameters", 1e9), total) * dtype.itemsize if zero["stage"] == 3 else 0.0
    phases = {"the network": {**resident, "weights in use": live, "activations": activations}, **passing}
    if text and not stays:
        phases["the text encoder"] = {**resident, "text encoder": text}
    batches = section["gradient_accumulation_steps"]
    micro = network.traffic(section["train_micro_batch_size_per_gpu"], trains=True)
    traffic = {axis: batches * size for axis, size in micro.items()}
    traffic["ZeRO"] = zero_traffic(total, learned, ranks, section, block=block, width=dtype.itemsize)
    return Estimate(phases, traffic, machine=machine)


def _buffers(zero: Mapping[str, Any], learned: float, dtype: torch.dtype) -> float:
    """Bytes of the buffers in which DeepSpeed collects gradients: one, or two in turn; see its ZeRO stages."""
    stage, bucket = zero["stage"], zero.get("reduce_bucket_size", 5e8)
    if stage == 0 or not zero.get("contiguous_gradients", True):
        return min(bucket, learned) * dtype.itemsize
    return bucket * dtype.itemsize * (2 if zero.get("overlap_comm") and stage < 3 else 1)


def _clip(config: Config) -> tuple[int, tuple[int, int]] | None:
    """Return frames and size of the clips; None where the data do not say."""
    params = config.data.get("params") or {}
    frames, size = params.get("max_num_frames"), params.get("video_size")
    return None if frames is None or size is None else (frames, (size[0], size[1]))


def _built(config: Config) -> Any:
    with without_allocating():
        return instantiate_from_config(config.model["network_config"])


def parameters(module: nn.Module, tensor: int, trained: Collection[str] = ()) -> tuple[float, float]:
    """Return how many parameters a rank has, and how many of those it trains.

    Args:
        module: the whole network, or a part of it.
        tensor: ranks that share its layers.
        trained: names of trained parameters.
    """
    sizes = {name: p.numel() / (tensor if partition_of(name) else 1) for name, p in module.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name in set(trained))


def text_encoder_bytes(config: Config) -> float:
    """Return the bytes of the text encoders' weights, by the sizes of their files; 0 where there are none."""
    section = config.model.get("conditioner_config")
    embedders = instantiate_from_config(section).embedders if section is not None else ()
    folders = [embedder.folder for embedder in embedders if hasattr(embedder, "folder")]
    return float(sum(file.stat().st_size for folder in folders if Path(folder.path).is_dir() for file in folder.shards))


def network_of(config: Config, patches: int, dtype: torch.dtype, mesh: Mesh) -> Network:
    """Return what the estimates know of the network.

    Args:
        config: of a run, checked.
        patches: of a sample.
        dtype: of the network.
        mesh: which ranks share a sample.
    """
    params: Mapping[str, Any] = params_of(config.model["network_config"])
    modules, geometry = params["modules"], Geometry.from_network(params)
    transformer, patch = params.get("transformer_args") or {}, geometry.patch_size
    asked = getattr(config.args, "checkpoint_activations", None)
    recomputes = default(asked, transformer.get("checkpoint_activations", False))
    attention, heads = config.args.sequence_attention, params["num_attention_heads"]
    return Network(
        text=params_of(modules["pos_embed_config"])["text_length"],
        patches=patches,
        hidden=params["hidden_size"],
        layers=params["num_layers"],
        recomputed=max(params["num_layers"] - transformer.get("checkpoint_skip_layers", 0), 0) * bool(recomputes),
        rotary=geometry.positions != "sincos",
        adapter_rank=params_of(modules.get("lora_config")).get("r", 0),
        outputs=patch[0] * patch[1] * patch[2] * geometry.out_channels,
        text_size=params_of(modules["patch_embed_config"])["text_hidden_size"],
        width=dtype.itemsize,
        ring=attention == "ring" or (attention == "auto" and heads // mesh.tensor < mesh.sequence),
        mesh=mesh,
    )


def autoencoder_of(config: Config, size: tuple[int, int], dtype: torch.dtype, *, tiles: bool) -> Autoencoder:
    """Return what the estimates know of the VAE.

    Args:
        config: of a run, checked.
        size: (height, width) of the videos in pixels.
        dtype: of the network.
        tiles: whether the VAE works in tiles.
    """
    section = config.model["first_stage_config"]
    params = params_of(section)
    decoder = params_of(params["decoder_config"])
    with without_allocating():
        vae = instantiate_from_config(section)
    if tiles:
        size = (min(size[0], Tiling().size[0]), min(size[1], Tiling().size[1]))
    return Autoencoder(
        channels=tuple(decoder["ch"] * factor for factor in decoder.get("ch_mult", (1, 2, 2, 4))),
        blocks=decoder.get("num_res_blocks", 3),
        latent_channels=decoder.get("z_channels", 16),
        parameters=sum(parameter.numel() for parameter in vae.parameters()),
        width=dtype.itemsize,
        size=size,
        ranks=params.get("cp_size") or 1,
        encode_chunk=params.get("encode_chunk"),
    )
