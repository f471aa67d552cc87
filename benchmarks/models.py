"""The released networks and the released VAE, at their own size or shrunk, with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from dit_video_concat import Basic3DPositionEmbeddingMixin, DiffusionTransformer
from sgm.modules.embeddings import sincos_positions_3d
from sgm.util import instantiate_from_config, without_allocating
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class NetworkSize:
    """The sizes of a shrunk network.

    Attributes:
        hidden_size: D.
        num_attention_heads: heads.
        num_layers: blocks.
        time_embed_dim: size of the embeddings of time and ``ofs``.
        latents: (T, H, W) of the largest latents; T even for a temporal patch of 2.
        text_length: text tokens.
        text_hidden_size: size of a text embedding.
    """

    hidden_size: int
    num_attention_heads: int
    num_layers: int
    time_embed_dim: int
    latents: tuple[int, int, int]
    text_length: int
    text_hidden_size: int


def network_section(model: str, size: NetworkSize | None = None) -> dict[str, Any]:
    """Return the ``network_config`` of ``configs/<model>.yaml``, shrunk to `size` if given."""
    section: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{model}.yaml").model.network_config)
    if size is None:
        return section
    params = section["params"]
    frames, params["latent_height"], params["latent_width"] = size.latents
    params["num_frames"] = (frames - 1) * params["time_compressed_rate"] + 1
    for name in ("hidden_size", "num_attention_heads", "num_layers", "time_embed_dim"):
        params[name] = getattr(size, name)
    if params.get("ofs_embed_dim"):
        params["ofs_embed_dim"] = size.time_embed_dim
    position = params["modules"]["pos_embed_config"]["params"]
    position["text_length"] = size.text_length
    if "hidden_size_head" in position:
        position["hidden_size_head"] = size.hidden_size // size.num_attention_heads
    params["modules"]["patch_embed_config"]["params"]["text_hidden_size"] = size.text_hidden_size
    return section


def vae_section(model: str, *, ch: int | None = None, num_res_blocks: int | None = None) -> dict[str, Any]:
    """Return the ``first_stage_config`` of ``configs/<model>.yaml``, shrunk where a size is given."""
    section: Any = OmegaConf.to_container(
        OmegaConf.load(CONFIGS / f"{model}.yaml").model.first_stage_config, resolve=True
    )
    for part in ("encoder_config", "decoder_config"):
        params = section["params"][part]["params"]
        params["ch"] = ch or params["ch"]
        params["num_res_blocks"] = num_res_blocks or params["num_res_blocks"]
    return section


def spatial_interpolation(section: dict[str, Any]) -> float:
    """Return the divisor of row and column numbers in a network section's sine-cosine table."""
    return (section["params"]["modules"]["pos_embed_config"].get("params") or {}).get("height_interpolation", 1.0)


def build_network(section: dict[str, Any], *, device: torch.device | None = None, dtype=torch.float32, seed: int = 0):
    """Build a `DiffusionTransformer` with random nonzero weights, so that every layer has an effect."""
    network: DiffusionTransformer = _build(section, device, dtype, seed)
    position = network.get_mixin("pos_embed")
    if isinstance(position, Basic3DPositionEmbeddingMixin):
        factor = spatial_interpolation(section)
        table = sincos_positions_3d(network.grid, network.hidden_size, (1.0, factor, factor))
        with torch.no_grad():
            position.pos_embedding[:, : position.text_length] = 0
            position.pos_embedding[:, position.text_length :] = table
    return network


def build_vae(section: dict[str, Any], *, device: torch.device | None = None, dtype=torch.float32, seed: int = 0):
    """Build a `VideoAutoencoderInferenceWrapper` with random weights."""
    vae: VideoAutoencoderInferenceWrapper = _build(section, device, dtype, seed)
    return vae


def _build(section: dict[str, Any], device: torch.device | None, dtype: torch.dtype, seed: int) -> Any:
    with without_allocating():
        module = instantiate_from_config(section)
    module = module.to(dtype).to_empty(device=device or torch.device("cpu"))
    randomize(module, seed)
    return module.eval()


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Fill all parameters: norm weights around 1, matrices and kernels so that outputs have the size of latents."""
    devices = {parameter.device for parameter in module.parameters()}
    generator = torch.Generator(device=devices.pop()).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5, generator=generator)
        else:
            is_norm_weight = "norm" in name and name.endswith(".weight")
            parameter.normal_(float(is_norm_weight), 0.1, generator=generator)
