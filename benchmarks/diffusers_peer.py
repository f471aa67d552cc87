"""diffusers twins of our networks and VAEs, with the same weights, for benchmarks and tests."""

from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import nn

from dit_video_concat import Basic3DPositionEmbeddingMixin, DiffusionTransformer
from sgm.conversion.diffusers.names import autoencoder_to_diffusers, network_to_diffusers
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

Peer = TypeVar("Peer", bound=nn.Module)


def network_peer(
    network: DiffusionTransformer, *, spatial_interpolation: float = 1.0, device: torch.device | None = None
) -> CogVideoXTransformer3DModel:
    """Build the twin of a network.

    Args:
        network: without LoRA, SwiGLU and RMSNorm, with square patches.
        spatial_interpolation: height_interpolation and width_interpolation of a sine-cosine table.
        device: of the twin; its dtype is the network's.
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
    translated = network_to_diffusers(
        network.state_dict(), patch_size=network.patch_size, learned_positions=has_table and not is_fixed
    )
    peer.load_state_dict({name: tensor.compute() for name, tensor in translated.items()})
    return _finish(peer, weight.dtype, network.training)


def run_network_peer(
    peer: CogVideoXTransformer3DModel,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    *,
    ofs: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Call the twin with the arguments of our network, and `rope` from `sgm.conversion.diffusers.verify.peer_rope`."""
    return peer(
        hidden_states=x,
        encoder_hidden_states=context,
        timestep=timesteps,
        ofs=ofs,
        image_rotary_emb=rope,
        return_dict=False,
    )[0]


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
    state = vae.state_dict()
    names = autoencoder_to_diffusers(state)
    peer.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    return _finish(peer, weight.dtype, vae.training)


def _finish(peer: Peer, dtype: torch.dtype, training: bool) -> Peer:
    # diffusers warns about any cast by to(), needed or not.
    return (peer if dtype == torch.float32 else peer.to(dtype)).train(training)
