import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.denoiser_scaling import Preconditioning
from sgm.util import InputError, instantiate_from_config, without_allocating

PREFIX = "sgm.modules.diffusionmodules"


def section(name: str, **params: object) -> dict:
    return {"target": f"{PREFIX}.{name}", "params": params}


ZERO_SNR = section("discretizer.ZeroSNRDDPMDiscretization")


def discrete(scaling: str = f"{PREFIX}.denoiser_scaling.VideoScaling", **params: bool) -> DiscreteDenoiser:
    defaults = {"num_idx": 1000, "discretization_config": ZERO_SNR, "scaling_config": {"target": scaling}}
    weighting = section("denoiser_weighting.EpsWeighting")
    return DiscreteDenoiser(**{**defaults, "weighting_config": weighting, **params})


class OwnScaling:
    """A scaling that passes the noise level, a real number, to the network."""

    def __call__(self, levels: torch.Tensor, *, idx: torch.Tensor | None = None) -> Preconditioning:
        return Preconditioning(c_skip=levels, c_out=levels, c_in=2 * levels, c_noise=levels)


class Sigmas:
    """A discretization in σ, as in image models."""

    def __call__(self, n: int, *, flip: bool = False) -> torch.Tensor:
        return torch.linspace(14.6, 0.03, n)


class Recorder:
    """A network that records its inputs and returns a constant."""

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, cond: dict, **kwargs: object) -> torch.Tensor:
        self.x, self.timesteps, self.cond, self.kwargs = x, timesteps, cond, kwargs
        return torch.full_like(x, 2.0)


def test_levels_are_snapped_to_the_table_and_the_timestep_is_passed_on() -> None:
    denoiser, network = discrete(), Recorder()
    x = torch.randn(2, 1, 1, 2, 2)
    level = denoiser.table.at(torch.tensor([300, 700]))
    denoised = denoiser(network, x, level + 1e-4, {"crossattn": x}, idx=torch.tensor([3, 7]), ofs="ofs")
    expected = level.view(2, 1, 1, 1, 1) * x - (1 - level.view(2, 1, 1, 1, 1) ** 2) ** 0.5 * 2.0
    torch.testing.assert_close(denoised, expected, atol=1e-6, rtol=0)
    assert network.timesteps.tolist() == [3, 7]
    assert network.kwargs == {"ofs": "ofs"}


@pytest.mark.parametrize("quantize", [True, False])
def test_a_real_c_noise_becomes_its_position_in_the_table_when_quantized(quantize: bool) -> None:
    denoiser, network = discrete(f"{__name__}.OwnScaling", quantize_c_noise=quantize), Recorder()
    x, level = torch.randn(1, 1, 1, 2, 2), denoiser.table.at(torch.tensor([500]))
    denoised = denoiser(network, x, level, {})
    torch.testing.assert_close(network.x, 2 * level * x)
    torch.testing.assert_close(denoised, level * (x + 2.0))
    assert network.timesteps.item() == (500 if quantize else level.item())


def test_half_precision_latents_are_denoised_in_float32() -> None:
    denoiser = discrete()
    x = torch.randn(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    assert denoiser(Recorder(), x, torch.tensor([0.5]), {}, idx=torch.tensor([1])).dtype == torch.float32


def test_weights_are_those_of_the_nearest_level() -> None:
    denoiser = discrete()
    level = denoiser.table.at(torch.tensor([500]))
    torch.testing.assert_close(denoiser.w(level + 1e-4), level**-2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"discretization_config": {"target": f"{__name__}.Sigmas"}}, r"Sigmas gives .* from 0.03 to 14.6, but √ᾱ"),
        ({"do_append_zero": True}, "do_append_zero is true, but the noise levels are √ᾱ"),
    ],
)
def test_levels_that_are_no_alphas_are_refused(params: dict, message: str) -> None:
    config = section("denoiser.DiscreteDenoiser", num_idx=1000, discretization_config=ZERO_SNR)
    config["params"] |= {"scaling_config": section("denoiser_scaling.VideoScaling")}
    config["params"] |= {"weighting_config": section("denoiser_weighting.EpsWeighting"), **params}
    with pytest.raises(InputError, match=message):
        instantiate_from_config(config)


def test_the_table_has_its_values_even_when_networks_are_built_without_memory() -> None:
    with without_allocating():
        denoiser = discrete()
    assert denoiser.table.at(torch.tensor([999])).tolist() == [0.0]
