"""The autoencoder against diffusers, on the same weights."""

import pytest
import torch

from benchmarks.diffusers_peer import vae_peer
from benchmarks.models import build_vae, vae_section
from tests.marks import only


@pytest.fixture(scope="module")
def pair():
    vae = build_vae(vae_section("cogvideox_5b", ch=32, num_res_blocks=1))
    return vae, vae_peer(vae)


@pytest.mark.parametrize("num_latents", only([1, 3, 9], [1, 3, 5, 9, 13]))
@torch.no_grad()
def test_decoded_video_is_that_of_diffusers(pair, num_latents):
    vae, peer = pair
    size = (2, 3) if num_latents < 9 else (1, 2)
    latents = torch.randn(1, 16, num_latents, *size, generator=torch.Generator().manual_seed(num_latents))
    torch.testing.assert_close(vae.decode(latents), peer.decode(latents).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", only([1, 17], [1, 9, 17]))
@torch.no_grad()
def test_chunked_moments_are_those_of_diffusers(pair, frames, monkeypatch):
    vae, peer = pair
    monkeypatch.setattr(vae, "encode_chunk", 8)
    video = 2 * torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(frames)) - 1
    expected = peer.encode(video).latent_dist.parameters
    torch.testing.assert_close(vae.encode_moments(video), expected, rtol=0, atol=2e-5)
