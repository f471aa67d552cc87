"""The autoencoder against outputs of the reference implementation, through YAML and checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sgm.util import instantiate_from_config, without_allocating
from sgm.weights.checkpoint import load_autoencoder
from tests.marks import only, thorough
from vae_modules import convolutions

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "vae"


@pytest.fixture(scope="module")
def vae():
    with without_allocating():
        vae = instantiate_from_config(OmegaConf.load(GOLDEN / "first_stage.yaml").first_stage_config)
    load_autoencoder(vae, GOLDEN / "3d-vae.pt", dtype=torch.float32, device="cpu", ignore_keys=vae.ignore_keys)
    return vae.eval()


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(params=[None, 1, 50_000], ids=["whole", "frames", "pieces"])
def split(vae, request, monkeypatch):
    """Let kernels take whole chunks, single frames, or a few frames at a time; the last with combined weights."""
    if request.param is not None:
        monkeypatch.setattr(vae, "max_elements", request.param)
    if request.param == 50_000:
        monkeypatch.setattr(convolutions, "FEWEST_PIXELS", 1)


@pytest.mark.parametrize("frames", only([1, 9], [1, 9, 17]))
@pytest.mark.usefixtures("split")
@torch.no_grad()
def test_moments_are_those_of_the_reference(vae, io, frames):
    moments = vae.encode_moments(io[f"video.{frames}"])
    torch.testing.assert_close(moments, io[f"moments.{frames}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("latents", only([1, 3, 5], [1, 3, 5, 9]))
@pytest.mark.usefixtures("split")
@torch.no_grad()
def test_video_is_that_of_the_reference(vae, io, latents):
    video = vae.decode(io[f"latents.{latents}"])
    torch.testing.assert_close(video, io[f"decoded.{latents}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ("video.9", "moments.9"),
        ("latents.3", "decoded.3"),
        thorough("video.17", "moments.17"),
        thorough("latents.9", "decoded.9"),
    ],
)
@pytest.mark.usefixtures("split")
@torch.no_grad()
def test_rounding_is_that_of_the_reference(vae, io, inputs, outputs):
    """Both are in float32, and differ from each other by both roundings; float64 is computed by torch's own kernel."""
    exact = copy.deepcopy(vae).double()
    run = "encode_moments" if outputs.startswith("moments") else "decode"
    expected = getattr(exact, run)(io[inputs].double())
    errors = [float((made - expected).abs().max()) for made in (getattr(vae, run)(io[inputs]), io[outputs])]
    assert errors[0] <= 4e-6 and errors[1] <= 4e-6 and errors[0] <= 1.5 * errors[1], errors
