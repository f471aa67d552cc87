"""Norms of the VAE as generated code, beside those of torch's kernels."""

import copy

import pytest
import torch

from benchmarks.models import build_vae, randomize, vae_section
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper
from vae_modules.compiled_norms import CompiledNorms
from vae_modules.layers import ResnetBlock3D, Stream


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vae() -> VideoAutoencoderInferenceWrapper:
    section = vae_section("cogvideox_5b", ch=32, num_res_blocks=1)
    for part in ("encoder_config", "decoder_config"):
        section["params"][part]["params"]["ch_mult"] = [1, 1, 1, 1]
    return build_vae(section)


@pytest.fixture
def graphs():
    """Return the function that counts compiled graphs; too many of a function, or broken ones, fail."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield lambda: counters["stats"]["unique_graphs"]
        assert not counters["graph_break"]
    torch._dynamo.reset()


def test_compiled_norms_equal_those_of_the_kernels_whatever_the_size_and_compile_nothing_for_another(vae, graphs):
    compiled = copy.copy(vae)
    compiled._compiled_norms = CompiledNorms(backend="eager")

    def compare(batch, frames, height, width):
        latents, video = random(batch, 16, (frames + 3) // 4, height, width), random(batch, 3, frames, 64, 8 * width)
        for chunk in (None, 8):
            vae.encode_chunk = compiled.encode_chunk = chunk
            found = compiled.encode_moments(video)
            torch.testing.assert_close(found, vae.encode_moments(video), rtol=0, atol=1e-5)
        vae.max_elements = compiled.max_elements = vae.decoder.width * 4 * 64 * height * width  # several pieces
        torch.testing.assert_close(compiled.decode(latents), vae.decode(latents), rtol=0, atol=1e-5)

    with torch.no_grad():
        for batch, frames in ((1, 17), (2, 13)):
            compare(batch, frames, 4, 6)
        found = graphs()
        compare(1, 9, 5, 4)
    assert 3 <= found == graphs() <= 5


def test_with_gradients_norms_are_not_compiled(vae, graphs):
    compiled, latents = copy.copy(vae), random(1, 16, 2, 2, 2).requires_grad_()
    compiled._compiled_norms = CompiledNorms(backend="eager")
    found, expected = (torch.autograd.grad(each.decode(latents).sin().sum(), latents)[0] for each in (compiled, vae))
    assert torch.equal(found, expected) and graphs() == 0


def test_generated_code_of_a_residual_block_rounds_once():
    block = ResnetBlock3D(32, 32, 0.0, z_channels=4)
    randomize(block, 0)
    x, latents = random(1, 32, 3, 8, 6), random(1, 4, 2, 2, 3)
    with torch.no_grad():
        (expected,) = block([x], latents, Stream())
        low, given = block.to(torch.bfloat16), (x.bfloat16(), latents.bfloat16())
        (plain,), (found,) = (low([given[0]], given[1], Stream(compiled=made)) for made in (None, CompiledNorms()))
    assert (found.float() - expected).norm() <= 3e-2 * expected.norm()
    assert (found.float() - expected).norm() < (plain.float() - expected).norm()
