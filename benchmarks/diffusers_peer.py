"""The diffusers twin of a network or a VAE of ours: the same architecture with the same weights.

Used by the benchmark and by the tests that hold our outputs against diffusers.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from dit_video_concat import Basic3DPositionEmbeddingMixin, DiffusionTransformer
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

Peer = TypeVar("Peer", bound=nn.Module)

_NETWORK_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
    "transformer.final_layernorm": "norm_final",
}
_LAYER_NAMES = {
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
}
_MIXIN_LISTS = {"query_layernorm_list": "attn1.norm_q", "key_layernorm_list": "attn1.norm_k"}
# Of the twelve parts of a block's modulation: those of its first and of its second norm.
_FIRST_NORM, _SECOND_NORM = (0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)


def diffusers_network_state(state: Mapping[str, torch.Tensor], patch_size: tuple[int, int, int]) -> dict:
    """Translate the tensors of a `DiffusionTransformer` without LoRA into those of a CogVideoXTransformer3DModel.

    Args:
        state: ``network.state_dict()``.
        patch_size: (pt, ph, pw). With pt = 1 diffusers projects patches by a convolution, otherwise by a matrix; the
            numbers have the same order in both.
    """
    result = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name in ("transformer.position_embeddings.weight", "mixins.pos_embed.pos_embedding"):
            continue
        if module in _NETWORK_NAMES:
            if name == "mixins.patch_embed.proj.weight" and patch_size[0] == 1:
                tensor = tensor.flatten(1).unflatten(1, (-1, *patch_size[1:]))
            result[f"{_NETWORK_NAMES[module]}.{kind}"] = tensor
        elif match := re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", module):
            block = f"transformer_blocks.{match[1]}"
            if match[2] == "attention.query_key_value":
                for part, value in zip("qkv", tensor.chunk(3), strict=True):
                    result[f"{block}.attn1.to_{part}.{kind}"] = value
            else:
                result[f"{block}.{_LAYER_NAMES[match[2]]}.{kind}"] = tensor
        elif match := re.fullmatch(r"mixins\.adaln_layer\.(\w+)\.(\d+)(?:\.1)?", module):
            block = f"transformer_blocks.{match[2]}"
            if match[1] == "adaLN_modulations":
                parts = tensor.chunk(12)
                result[f"{block}.norm1.linear.{kind}"] = torch.cat([parts[i] for i in _FIRST_NORM])
                result[f"{block}.norm2.linear.{kind}"] = torch.cat([parts[i] for i in _SECOND_NORM])
            else:
                result[f"{block}.{_MIXIN_LISTS[match[1]]}.{kind}"] = tensor
        else:
            raise KeyError(f"{name} has no counterpart in diffusers")
    return result


def network_peer(
    network: DiffusionTransformer, *, spatial_interpolation: float = 1.0, device: torch.device | None = None
) -> CogVideoXTransformer3DModel:
    """Build the twin of a network.

    Args:
        network: one without LoRA, SwiGLU and RMSNorm, with square patches.
        spatial_interpolation: what height_interpolation and width_interpolation of a sine-cosine table are.
        device: where the twin goes; it takes the network's dtype.
    """
    pt, patch, _ = network.patch_size
    position: Any = network.get_mixin("pos_embed")
    has_table = hasattr(position, "pos_embedding")
    is_fixed = isinstance(position, Basic3DPositionEmbeddingMixin)
    layers: Any = network.transformer.layers
    weight: Any = network.time_embed[0].weight
    with torch.device(device or weight.device):
        peer = CogVideoXTransformer3DModel(
            num_attention_heads=layers[0].attention.num_attention_heads,
            attention_head_dim=layers[0].attention.hidden_size_per_attention_head,
            num_layers=len(layers),
            in_channels=network.in_channels,
            out_channels=network.out_channels,
            time_embed_dim=weight.shape[0],
            ofs_embed_dim=network.ofs_embed_dim,
            text_embed_dim=network.get_mixin("patch_embed").text_proj.in_features,
            max_text_seq_length=position.text_length,
            patch_size=patch,
            patch_size_t=None if pt == 1 else pt,
            sample_height=network.grid[1] * patch,
            sample_width=network.grid[2] * patch,
            sample_frames=4 * (network.grid[0] * pt - 1) + 1,
            spatial_interpolation_scale=spatial_interpolation,
            use_rotary_positional_embeddings=not is_fixed,
            use_learned_positional_embeddings=has_table and not is_fixed,
        )
    state = diffusers_network_state(network.state_dict(), network.patch_size)
    if has_table and not is_fixed:
        state["patch_embed.pos_embedding"] = position.pos_embedding
    peer.load_state_dict(state)
    return _finish(peer, weight.dtype, network.training)


def peer_rope(peer: CogVideoXTransformer3DModel, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines that diffusers' pipelines hand to the twin for latents (B, T, C, H, W); None for 2B."""
    config: Any = peer.config
    if not config.use_rotary_positional_embeddings:
        return None
    frames = latents.shape[1] // (config.patch_size_t or 1)
    height, width = latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size
    return get_3d_rotary_pos_embed(
        config.attention_head_dim, ((0, 0), (height, width)), (height, width), frames, device=latents.device
    )


def run_network_peer(
    peer: CogVideoXTransformer3DModel,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    *,
    ofs: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Call the twin as our network is called; `rope` is what `peer_rope` gives."""
    return peer(
        hidden_states=x,
        encoder_hidden_states=context,
        timestep=timesteps,
        ofs=ofs,
        image_rotary_emb=rope,
        return_dict=False,
    )[0]


_VAE_NAMES = (
    (r"\.mid\.block_([12])\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}."),
    (r"encoder\.down\.(\d+)\.", lambda match: f"encoder.down_blocks.{match[1]}."),
    (r"\.block\.(\d+)\.", lambda match: f".resnets.{match[1]}."),
    (r"\.(down|up)sample\.conv\.", lambda match: f".{match[1]}samplers.0.conv."),
    (r"\.nin_shortcut\.", lambda match: ".conv_shortcut."),
)


def diffusers_vae_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the tensors of our autoencoder into those of an AutoencoderKLCogVideoX."""
    last_level = max(int(match[1]) for name in state if (match := re.match(r"decoder\.up\.(\d+)\.", name)))
    result = {}
    for name, tensor in state.items():
        # Levels of the decoder are counted from full resolution here and from the latents there.
        name = re.sub(r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{last_level - int(match[1])}.", name)
        for pattern, replacement in _VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def vae_peer(vae: VideoAutoencoderInferenceWrapper, *, device: torch.device | None = None) -> AutoencoderKLCogVideoX:
    """Build the twin of an autoencoder; it encodes 8 frames at a time, as ours does with ``encode_chunk=8``."""
    weight: Any = vae.encoder.conv_in.conv.weight
    levels: Any = list(vae.encoder.down)
    with torch.device(device or weight.device):
        peer = AutoencoderKLCogVideoX(
            block_out_channels=tuple(level.block[-1].conv2.conv.out_channels for level in levels),
            layers_per_block=len(levels[0].block),
            latent_channels=vae.decoder.conv_in.conv.in_channels,
        )
    peer.load_state_dict(diffusers_vae_state(vae.state_dict()))
    return _finish(peer, weight.dtype, vae.training)


def _finish(peer: Peer, dtype: torch.dtype, training: bool) -> Peer:
    # diffusers warns about any cast by to(), needed or not.
    return (peer if dtype == torch.float32 else peer.to(dtype)).train(training)
