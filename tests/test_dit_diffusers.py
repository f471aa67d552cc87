"""The network against diffusers with the same weights: every released architecture at reduced size."""

import pytest
import torch

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import NetworkSize, build_network, network_section, spatial_interpolation
from sgm.conversion.diffusers.verify import peer_rope

MODELS = ["cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"]
SIZE = NetworkSize(
    hidden_size=64,
    num_attention_heads=4,
    num_layers=2,
    time_embed_dim=32,
    latents=(4, 8, 12),
    text_length=5,
    text_hidden_size=24,
)


def pair(model):
    section = network_section(model, SIZE)
    network = build_network(section)
    return network, network_peer(network, spatial_interpolation=spatial_interpolation(section))


def inputs(network, latents=SIZE.latents, batch=2):
    frames, height, width = latents
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, frames, network.in_channels, height, width, generator=generator)
    context = torch.randn(batch, SIZE.text_length, SIZE.text_hidden_size, generator=generator)
    timesteps = torch.tensor([999, 17][:batch])
    ofs = torch.full((batch,), 2.0) if network.ofs_embed_dim else None
    return x, timesteps, context, ofs


@torch.no_grad()
def outputs(network, peer, x, timesteps, context, ofs):
    ours = network(x, timesteps, context, ofs=ofs)
    return ours, run_network_peer(peer, x, timesteps, context, ofs=ofs, rope=peer_rope(peer, x))


@pytest.mark.parametrize("model", MODELS)
def test_output_is_that_of_diffusers(model):
    network, peer = pair(model)
    ours, theirs = outputs(network, peer, *inputs(network))
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("latents", [(2, 8, 12), (6, 12, 8), (2, 16, 4)])
def test_rotary_models_agree_at_sizes_they_were_not_built_for(latents):
    network, peer = pair("cogvideox1.5_5b")
    ours, theirs = outputs(network, peer, *inputs(network, latents))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_input_gradient_is_that_of_diffusers():
    network, peer = pair("cogvideox_5b")
    x, timesteps, context, _ = inputs(network)
    gradients = []
    for run in (network, lambda *args: run_network_peer(peer, *args, rope=peer_rope(peer, x))):
        leaf = x.clone().requires_grad_()
        run(leaf, timesteps, context).square().sum().backward()
        gradients.append(leaf.grad)
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() <= 1e-4
