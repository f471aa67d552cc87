import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser
from sgm.util import InputError, without_allocating

PREFIX = "sgm.modules.diffusionmodules"


def section(name: str, **params: float) -> dict:
    return {"target": f"{PREFIX}.{name}", "params": params}


def discrete(scaling: str, discretization: str, **params: bool) -> DiscreteDenoiser:
    return DiscreteDenoiser(
        num_idx=1000,
        scaling_config=section(f"denoiser_scaling.{scaling}"),
        weighting_config=section("denoiser_weighting.EpsWeighting"),
        discretization_config=section(f"discretizer.{discretization}"),
        **params,
    )


class Recorder:
    """A network that notes what it is given and answers a constant."""

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, cond: dict, **kwargs: object) -> torch.Tensor:
        self.x, self.timesteps, self.cond, self.kwargs = x, timesteps, cond, kwargs
        return torch.full_like(x, 2.0)


def test_levels_are_snapped_to_the_table_and_the_timestep_is_passed_on() -> None:
    denoiser, network = discrete("VideoScaling", "ZeroSNRDDPMDiscretization"), Recorder()
    x = torch.randn(2, 1, 1, 2, 2)
    level = denoiser.table.at(torch.tensor([300, 700]))
    denoised = denoiser(network, x, level + 1e-4, {"crossattn": x}, idx=torch.tensor([3, 7]), ofs="ofs")
    expected = level.view(2, 1, 1, 1, 1) * x - (1 - level.view(2, 1, 1, 1, 1) ** 2) ** 0.5 * 2.0
    torch.testing.assert_close(denoised, expected, atol=1e-6, rtol=0)
    assert network.timesteps.tolist() == [3, 7]
    assert network.kwargs == {"ofs": "ofs"}


@pytest.mark.parametrize(("quantize", "expected"), [(True, 500), (False, None)])
def test_sigma_is_told_as_its_position_when_quantized(quantize: bool, expected: int | None) -> None:
    denoiser, network = discrete("EpsScaling", "LegacyDDPMDiscretization", quantize_c_noise=quantize), Recorder()
    sigma = denoiser.table.at(torch.tensor([500]))
    denoiser(network, torch.randn(1, 1, 1, 2, 2), sigma, {})
    assert network.timesteps.item() == pytest.approx(expected if expected is not None else sigma.item())


def test_half_precision_latents_are_denoised_in_float32() -> None:
    denoiser = discrete("VideoScaling", "ZeroSNRDDPMDiscretization")
    x = torch.randn(1, 1, 1, 2, 2, dtype=torch.bfloat16)
    assert denoiser(Recorder(), x, torch.tensor([0.5]), {}, idx=torch.tensor([1])).dtype == torch.float32


def test_continuous_denoiser_takes_any_sigma() -> None:
    denoiser = Denoiser(
        scaling_config=section("denoiser_scaling.EDMScaling", sigma_data=1.0),
        weighting_config=section("denoiser_weighting.EDMWeighting", sigma_data=1.0),
    )
    x, sigma = torch.randn(1, 1, 1, 2, 2), torch.tensor([3.0])
    network = Recorder()
    torch.testing.assert_close(denoiser(network, x, sigma, {}), x / 10 + 3 / 10**0.5 * 2.0)
    torch.testing.assert_close(network.x, x / 10**0.5)
    assert denoiser.w(sigma).item() == pytest.approx(10 / 9)


def test_weights_are_those_of_the_snapped_level() -> None:
    denoiser = discrete("EpsScaling", "LegacyDDPMDiscretization")
    sigma = denoiser.table.at(torch.tensor([900]))
    torch.testing.assert_close(denoiser.w(sigma + 1e-4), sigma**-2)


def test_sigma_levels_under_video_scaling_are_refused() -> None:
    with pytest.raises(InputError, match="ZeroSNRDDPMDiscretization"):
        discrete("VideoScaling", "LegacyDDPMDiscretization")


def test_the_table_has_its_values_even_when_networks_are_built_without_memory() -> None:
    with without_allocating():
        denoiser = discrete("VideoScaling", "ZeroSNRDDPMDiscretization")
    assert denoiser.table.at(torch.tensor([999])).tolist() == [0.0]
