"""Verify a converted pipeline: compare outputs of the diffusers components and of the original model.

All comparisons are in float32, on small random inputs from fixed seeds. The networks have their full size: the
transformer is loaded twice, one after the other.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sgm.config.load import Config
from sgm.conversion.diffusers.from_sat import FOLDED, position_table
from sgm.conversion.lora import FILE
from sgm.modules.geometry import Geometry
from sgm.util import InputError, RunError, instantiate_from_config, without_allocating
from sgm.weights.adapters import is_adapter, with_adapters
from sgm.weights.checkpoint import load_autoencoder, load_network
from sgm.weights.files import read_file, read_metadata

TOLERANCE = 2e-5
SCHEDULE_TOLERANCE = 1e-6


def require_diffusers() -> Any:
    """Import diffusers.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(
            f"diffusers cannot be imported ({error}); install it: pip install -e '.[diffusers]'"
        ) from error


def verify(config: Config, folder: Path) -> dict[str, float]:
    """Compare the components in a pipeline folder with the model.

    Args:
        config: of the original model.
        folder: as `sgm.conversion.diffusers.from_sat.Pipeline` writes it.

    Returns:
        The largest absolute difference by component.

    Raises:
        InputError: diffusers is not installed.
        RunError: a difference is above the tolerance: `TOLERANCE` times the largest output where that is above 1, and
            twice the rounding of a weight where adapters were merged in 16 bits.
    """
    require_diffusers()
    config = with_adapters(config)
    found, limits = {}, {}
    checks = {"transformer": _transformer, "vae": _autoencoder, "tokenizer": _tokenizer, "scheduler": _schedule}
    for name, check in checks.items():
        if (folder / name).is_dir():
            found[name], limits[name] = check(config, folder / name)
    wrong = [
        f"{name}: {found[name]:.2e}, at most {limits[name]:.2e}" for name in found if not found[name] <= limits[name]
    ]
    if wrong:
        raise RunError(f"diffusers does not compute what this model does ({'; '.join(wrong)}); nothing was written")
    return found


@torch.no_grad()
def _transformer(config: Config, folder: Path) -> tuple[float, float]:
    diffusers = require_diffusers()
    section = config.model["network_config"]
    geometry = Geometry.from_network(section["params"])
    stored = _stored_dtype(folder)
    x, timesteps, context = _inputs(section["params"], geometry)
    ofs = torch.tensor([2.0]) if section["params"].get("ofs_embed_dim") else None
    with without_allocating():
        network = instantiate_from_config(section)
    assert config.args.load is not None
    load_network(network, config.args.load, base=config.args.base, dtype=torch.float32, device=torch.device("cpu"))
    for name, tensor in network.eval().state_dict().items():
        if not is_adapter(name):  # the file of adapters has them unrounded
            tensor.copy_(tensor.to(stored))
    if geometry.positions == "sincos":  # diffusers computes it; do not use the rounded table of a 16-bit file
        network.get_mixin("pos_embed").pos_embedding.copy_(position_table(section["params"]))
    ours = network(x, timesteps, context, ofs=ofs)
    is_merged = any(map(is_adapter, network.state_dict()))
    del network

    peer = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    kept_apart = (folder.parent / FILE).is_file()
    if kept_apart:
        peer.load_lora_adapter(str(folder.parent), weight_name=FILE, prefix="transformer")
    if geometry.positions == "learned":
        # With fewer frames diffusers would compute a new table; SAT takes the first rows.
        rows = context.shape[1] + x.shape[3] * x.shape[4] // peer.config.patch_size**2
        peer.patch_embed.pos_embedding = peer.patch_embed.pos_embedding[:, :rows]
        peer.patch_embed.sample_frames = 1
    folded = read_metadata(_first_file(folder)).get(FOLDED)
    if folded is not None:
        own = geometry.out_channels
        x = torch.cat((x[:, :, :own], x[:, :, own:] / float(folded)), dim=2)
    theirs = peer.eval()(
        hidden_states=x,
        encoder_hidden_states=context,
        timestep=timesteps,
        ofs=ofs,
        image_rotary_emb=peer_rope(peer, x),
        return_dict=False,
    )[0]
    limit = TOLERANCE
    if stored != torch.float32 and (folded is not None or (is_merged and not kept_apart)):
        limit = 2 * torch.finfo(stored).eps
    return float((ours - theirs).abs().max()), limit * max(1.0, float(ours.abs().max()))


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a part's weights."""
    return next(iter(read_file(_first_file(folder)).values())).dtype


def _first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _inputs(params: Mapping[str, Any], geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents (1, T, C, H, W) of a few patches or of the fixed size, timesteps (1,) and text (1, L, size)."""
    pt, ph, pw = geometry.patch_size
    height, width = geometry.max_latent_size if geometry.fixed_size else (4 * ph, 6 * pw)
    generator = torch.Generator().manual_seed(0)
    modules = params["modules"]
    length = modules["pos_embed_config"]["params"]["text_length"]
    size = modules["patch_embed_config"]["params"]["text_hidden_size"]
    shape = (pt if geometry.fixed_size else 2 * pt, geometry.in_channels + geometry.control_channels, height, width)
    x = torch.randn(1, *shape, generator=generator)
    return x, torch.tensor([500]), torch.randn(1, length, size, generator=generator)


def peer_rope(peer: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cosines and sines for latents (B, T, C, H, W) with positions 0, 1, 2, ..., as in SAT; None for 2B."""
    if not peer.config.use_rotary_positional_embeddings:
        return None
    embeddings = importlib.import_module("diffusers.models.embeddings")
    frames = latents.shape[1] // (peer.config.patch_size_t or 1)
    height, width = latents.shape[3] // peer.config.patch_size, latents.shape[4] // peer.config.patch_size
    head = peer.config.attention_head_dim
    return embeddings.get_3d_rotary_pos_embed(
        head, ((0, 0), (height, width)), (height, width), frames, device=latents.device
    )


@torch.no_grad()
def _autoencoder(config: Config, folder: Path) -> tuple[float, float]:
    diffusers = require_diffusers()
    section = config.model["first_stage_config"]
    with without_allocating():
        vae = instantiate_from_config(section)
    load_autoencoder(
        vae,
        section["params"]["ckpt_path"],
        ignore_keys=section["params"].get("ignore_keys") or (),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    peer = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, peer.config.latent_channels, 3, 4, 6, generator=generator)
    video = torch.randn(1, peer.config.in_channels, 9, 32, 48, generator=generator)
    vae.eval().encode_chunk = 8  # as diffusers encodes
    ours = torch.cat([vae.decode(latents).flatten(), vae.encode_moments(video).flatten()])
    theirs = torch.cat(
        [peer.eval().decode(latents).sample.flatten(), peer.encode(video).latent_dist.parameters.flatten()]
    )
    return float((ours - theirs).abs().max()), TOLERANCE * max(1.0, float(ours.abs().max()))


def _tokenizer(config: Config, folder: Path) -> tuple[float, float]:
    """Return the fraction of different tokens in a short text."""
    from transformers import AutoTokenizer

    text = "a red circle moves left"  # in small vocabularies too: transformers has no byte fallback for T5
    embedder = next(iter(config.model["conditioner_config"]["params"]["emb_models"]))
    length = embedder["params"].get("max_length", 226)
    ours = instantiate_from_config(embedder).tokenize([text])[0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs = tokenizer(text, padding="max_length", max_length=length, truncation=True)["input_ids"]
    different = sum(a != b for a, b in zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else length
    return different / length, 0.0


def _schedule(config: Config, folder: Path) -> tuple[float, float]:
    """Compare √ᾱ of all timesteps."""
    diffusers = require_diffusers()
    discretization = instantiate_from_config(config.model["denoiser_config"]["params"]["discretization_config"])
    scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(folder, local_files_only=True)
    ours = torch.as_tensor(discretization.levels(discretization.num_timesteps)[::-1].copy())
    return float((ours - scheduler.alphas_cumprod.double().sqrt()).abs().max()), SCHEDULE_TOLERANCE
