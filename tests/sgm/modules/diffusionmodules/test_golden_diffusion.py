"""Loss and samples of the reference implementation, through YAML and checkpoint, as users run it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.modules.diffusionmodules.sampling import VideoSampler
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config
from sgm.weights.checkpoint import load_network

GOLDEN = Path(__file__).parents[3] / "data/golden"


@dataclass
class Case:
    network: OpenAIWrapper
    denoiser: DiscreteDenoiser
    sampler: VideoSampler
    loss: VideoDiffusionLoss
    tensors: dict[str, torch.Tensor]

    def cond(self) -> dict[str, torch.Tensor]:
        cond = {"crossattn": self.tensors["context"]}
        return cond | {"concat": self.tensors["concat"]} if "concat" in self.tensors else cond

    def sample(self, x: torch.Tensor, generators: list[torch.Generator] | None = None) -> torch.Tensor:
        cond = {name: tensor[: len(x)] for name, tensor in self.cond().items()}
        uc = cond | {"crossattn": torch.zeros_like(cond["crossattn"])}

        def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
            return self.denoiser(self.network, x, a, cond, idx=idx)

        with torch.no_grad():
            return self.sampler(denoise, x, cond, uc, num_steps=8, generators=generators)


@pytest.fixture(scope="module", params=["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5"])
def case(request: pytest.FixtureRequest) -> Case:
    folder = GOLDEN / request.param
    model = OmegaConf.to_container(OmegaConf.load(folder / "model.yaml"))["model"]
    network = instantiate_from_config(model["network_config"])
    load_network(network, folder / "transformer")
    return Case(
        network=OpenAIWrapper(network.eval()),
        denoiser=instantiate_from_config(model["denoiser_config"]),
        sampler=instantiate_from_config(model["sampler_config"]),
        loss=instantiate_from_config(model["loss_fn_config"]),
        tensors=load_file(folder / "io.safetensors"),
    )


def test_loss_equals_the_reference(case: Case) -> None:
    torch.manual_seed(4321)
    with torch.no_grad():
        loss = case.loss(case.network, case.denoiser, case.tensors["latents"], case.cond())
    assert (loss - case.tensors["loss.seed4321"]).abs().max() <= 1e-5


def test_loss_with_given_timesteps_and_noise_equals_the_reference(case: Case) -> None:
    with torch.no_grad():
        loss = case.loss(
            case.network,
            case.denoiser,
            case.tensors["latents"],
            case.cond(),
            idx=case.tensors["loss.idx"],
            noise=case.tensors["loss.noise"],
        )
    assert (loss - case.tensors["loss.seed4321"]).abs().max() <= 1e-5


def test_sample_equals_the_reference(case: Case) -> None:
    expected = case.tensors["sample.steps8.seed1234"]
    torch.manual_seed(1234)
    assert (case.sample(torch.randn(expected.shape)) - expected).abs().max() <= 1e-4


def test_sample_from_a_generator_equals_the_reference_in_any_batch(case: Case) -> None:
    expected = case.tensors["sample.steps8.seed1234"]
    generators = [torch.Generator().manual_seed(seed) for seed in (1234, 99)]
    x = torch.stack([torch.randn(expected.shape[1:], generator=generator) for generator in generators])
    assert (case.sample(x, generators)[:1] - expected).abs().max() <= 1e-4
