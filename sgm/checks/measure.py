"""Measure network and VAE of a run on meta tensors (`sgm.checks.meta_run`), at the size and in the dtype of the run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from sgm.checks.frozen import base_storage
from sgm.checks.mesh import mesh_of
from sgm.checks.meta_run import DEVICE, HOST, LiveBytes, Usage, build, simulated_ranks, usage
from sgm.checks.sampling import enable_memory_savers, params_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, digest_of
from sgm.distributed import Mesh
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.geometry import SPATIAL_COMPRESSION, Geometry
from sgm.util import InputError
from sgm.weights.offload import Offload
from sgm.weights.quantize import Storage, linear_layers, store

# Settings that change what is measured of the network, beside its section and the recomputation that is part of it.
NETWORK_ARGS = (
    "network_offload",
    "offload_activations",
    "keep_attention",
    "sequence_attention",
    "model_parallel_size",
    "sequence_parallel_size",
    "cfg_parallel_size",
)

Result = TypeVar("Result")

_measured: dict[str, Any] = {}  # by settings: plans and tables ask for the same ones again and again


def once(work: Callable[..., Usage], config: Config, *given: Any, **named: Any) -> Usage:
    """Return ``work(config, *given, **named)``, which this process measures once."""
    part = (_network_part if work is network_usage else _vae_part)(config, work, bool(named))
    values = [sorted(value) if isinstance(value, frozenset) else str(value) for value in (*given, *named.values())]
    return _remembered([work.__name__, part, str(mesh_of(config)), values], lambda: work(config, *given, **named))


def _remembered(settings: list[Any], work: Callable[[], Result]) -> Result:
    if (key := digest_of(settings)) not in _measured:
        _measured[key] = work()
    return _measured[key]


def _network_part(config: Config, _: Any, trains: bool) -> list[Any]:
    """Return what a measurement of the network depends on."""
    recomputes = getattr(config.args, "checkpoint_activations", None) if trains else None
    return [config.model["network_config"], recomputes, settings_of(config, trains=trains)]


def settings_of(config: Config, *, trains: bool) -> dict[str, Any]:
    """Return the settings that change what is measured of the network, beside its section."""
    settings = {name: getattr(config.args, name, None) for name in NETWORK_ARGS}
    settings |= {"network_offload": settings["network_offload"] == "blocks", "storage": storage_of(config)}
    settings["fused_attention"] = _is_fused(config)
    if not trains:  # nothing is kept for a backward pass
        del settings["offload_activations"], settings["keep_attention"]
    return settings


def _is_fused(config: Config) -> bool:
    """Whether attention is a kernel that makes no tensor of its scores; ``math`` makes several."""
    return config.args.attention != "math"


def _vae_part(config: Config, work: Any, _: bool) -> list[Any]:
    """Return what a measurement of encoding or decoding depends on."""
    section = config.model["first_stage_config"]
    if work is encode_usage:
        return [section, _encodes_tiles(config) and config.args.vae_tiling]
    params = {name: value for name, value in params_of(section).items() if name != "encode_chunk"}
    channels = Geometry.from_network(params_of(config.model["network_config"])).out_channels
    together = config.model.get("en_and_decode_n_samples_a_time")
    return [{**section, "params": params}, channels, together, config.args.vae_tiling, config.args.vae_slicing]


def storage_of(config: Config) -> Storage | None:
    """Return how the linear layers of the network's blocks are stored; None keeps the precision of the run."""
    return base_storage(config) if isinstance(config.args, TrainingArgs) else config.args.weights


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
    section["params"] = params = dict(params_of(section))
    transformer = params["transformer_args"] = _transformer_args(config, params)
    modules, geometry = params.get("modules") or {}, Geometry.from_network(params)
    area = (side // SPATIAL_COMPRESSION for side in video[1:])
    latents = batch, geometry.padded_latents(video[0]), geometry.in_channels + geometry.control_channels, *area
    text = params_of(modules.get("pos_embed_config")).get("text_length", 0)
    text_size = params_of(modules.get("patch_embed_config")).get("text_hidden_size", 0)

    def run(network: Any) -> torch.Tensor:
        if config.args.network_offload != "blocks":
            return forward(network)
        offload = Offload(network, DEVICE, network.blocks, backward=trained is not None)
        network.use_blocks_within(offload.block)
        with offload:
            return forward(network)

    def forward(network: Any) -> torch.Tensor:
        if hasattr(network, "ring_attention"):
            network.ring_attention = {"ulysses": False, "ring": True}.get(config.args.sequence_attention)
        x, context = (torch.empty(size, dtype=dtype, device=DEVICE) for size in (latents, (batch, text, text_size)))
        if trained is not None and getattr(config.args, "offload_activations", False):
            network.offload_activations(DEVICE, HOST)
        if trained is not None and getattr(config.args, "keep_attention", None):
            network.keep_attention()
        one = torch.ones(1, device=DEVICE).expand(batch)
        ofs = {} if params.get("ofs_embed_dim") is None else {"ofs": one}
        return OpenAIWrapper(network)(x, one, {"crossattn": context}, **ofs)

    def measured(depth: int | None, kept: int = 0) -> Usage:
        shallow = {"num_layers": depth, "transformer_args": {**transformer, "checkpoint_skip_layers": kept}}
        params_here = params if depth is None else {**params, **shallow}
        with simulated_ranks(mesh):
            network = build({**section, "params": params_here})
        # Networks of other depths, and with other numbers of recomputed blocks, are measured at the same small depths.
        learned = None if trained is None else sorted(trained.intersection(dict(network.named_parameters())))
        settings = [params_here, settings_of(config, trains=trained is not None), str(mesh), video, batch, str(dtype)]
        more: dict[str, Any] = {"trained": trained, "fused_attention": _is_fused(config)}
        more["prepare"] = partial(_store_blocks, storage_of(config))
        work = partial(usage, network, run, dtype, mesh, **more)
        return _remembered([section["target"], *settings, learned], work)

    depth = params.get("num_layers")
    skipped = transformer.get("checkpoint_skip_layers", 0) if transformer.get("checkpoint_activations") else 0
    kept = min(skipped, 2)  # of the blocks measured; with two, the peak is where they are and others are not recomputed
    offloads = getattr(config.args, "offload_activations", False)
    few = 2 + kept + offloads  # copies of one block come back while another runs its backward pass
    if isinstance(depth, int) and depth > few + 2 and skipped < depth:
        sizes = sizes_of(section, mesh)
        whole = sum(sizes.values()), sum(size for name, size in sizes.items() if name in (trained or ()))
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


def sizes_of(section: Mapping[str, Any], mesh: Mesh) -> dict[str, int]:
    """Return the elements of every parameter of a network."""

    def count() -> dict[str, int]:
        with simulated_ranks(mesh):
            return {name: parameter.numel() for name, parameter in build(section).named_parameters()}

    return _remembered(["sizes", dict(section), str(mesh)], count)


def _store_blocks(storage: Storage | None, network: Any, _: LiveBytes) -> None:
    if storage is not None:
        for layer in linear_layers(module for block in network.blocks for module in block):
            store(layer, storage)


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

    def lines(begin: Mapping[str, float], a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {axis: line(begin.get(axis, 0), a.get(axis, 0), num) for axis, num in b.items()}

    return Usage(
        weights=line(start.weights, first.weights, second.weights),
        trained=line(start.trained, first.trained, second.trained),
        peak=line(start.peak, first.peak, second.peak),
        sent=lines(start.sent, first.sent, second.sent),
        stored=line(start.stored, first.stored, second.stored),
        host=line(start.host, first.host, second.host),
        pinned=line(start.pinned, first.pinned, second.pinned),
        kept=steps * max(second.peak - first.peak, 0),
        messages=lines(start.messages, first.messages, second.messages),
        cost=start.cost.plus(second.cost.plus(first.cost, -1), steps),
    )


def decode_usage(config: Config, latents: tuple[int, int, int, int], dtype: torch.dtype) -> Usage:
    """Measure decoding of latents (B, T, H, W), H and W in pixels of the video, as in the engine."""
    args = config.args
    channels = Geometry.from_network(params_of(config.model["network_config"])).out_channels
    batch, frames, height, width = latents

    def run(vae: Any) -> torch.Tensor:
        enable_memory_savers(vae, args)
        sliced = getattr(vae, "slicing", False)  # as `decode_each` of the engine asks
        together = config.model.get("en_and_decode_n_samples_a_time") or (1 if sliced else batch)
        if hasattr(vae, "decodes_everywhere"):
            vae.decodes_everywhere = False
        area = height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION
        latents = torch.empty(min(together, batch), channels, frames, *area, dtype=dtype, device=DEVICE)
        if not hasattr(vae, "decode_in_chunks"):
            return torch.cat([vae.decode(latents)]).float()
        for _ in map(torch.Tensor.float, vae.decode_in_chunks(latents)):  # which leave the device one by one
            pass
        return latents

    return _vae_usage(config, run, dtype)


def encode_usage(config: Config, video: tuple[int, int, int], dtype: torch.dtype, batch: int = 1) -> Usage:
    """Measure encoding `batch` clips at once: frames, height, width of each."""

    def run(vae: Any) -> torch.Tensor:
        if _encodes_tiles(config):
            enable_memory_savers(vae, config.args)
        clips = torch.empty(batch, video[0], 3, *video[1:], device=DEVICE)
        return vae.encode_moments(clips.transpose(1, 2).to(dtype))

    return _vae_usage(config, run, dtype)


def _encodes_tiles(config: Config) -> bool:
    """Whether clips are encoded in tiles: in sampling alone, since they change what training learns from."""
    return bool(config.args.vae_tiling) and config.mode == "inference"


def _vae_usage(config: Config, run: Callable[[Any], torch.Tensor], dtype: torch.dtype) -> Usage:
    mesh = mesh_of(config)
    with simulated_ranks(mesh):
        vae = build(config.model["first_stage_config"])
    return usage(vae, run, dtype, mesh, prepare=with_equal_parts_once if mesh.context == 1 else lambda *_: None)


def with_equal_parts_once(vae: Any, live: LiveBytes) -> None:
    """Let a VAE run one of its equal tiles, and one of the equal chunks of a clip, see `LiveBytes.once`."""
    for part in (vae.encoder, vae.decoder) if hasattr(vae, "decode_in_chunks") else ():
        part.forward = live.once(part.forward, lambda x, stream: (x.shape, stream.is_first, stream.is_last))
    for name in ("encode_tile", "decode_tile"):
        if hasattr(vae, name):
            setattr(vae, name, live.once(getattr(vae, name), lambda x: x.shape))
