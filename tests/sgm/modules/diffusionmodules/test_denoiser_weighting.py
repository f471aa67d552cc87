import torch

from sgm.modules.diffusionmodules.denoiser_weighting import EDMWeighting, EpsWeighting, UnitWeighting, VWeighting

SIGMAS = torch.tensor([0.02, 0.7, 30.0])


def test_unit() -> None:
    assert UnitWeighting()(SIGMAS).tolist() == [1, 1, 1]


def test_edm() -> None:
    expected = (SIGMAS**2 + 0.09) / (SIGMAS**2 * 0.09)
    torch.testing.assert_close(EDMWeighting(sigma_data=0.3)(SIGMAS), expected)
    torch.testing.assert_close(EDMWeighting()(SIGMAS), EDMWeighting(sigma_data=0.5)(SIGMAS))


def test_v() -> None:
    torch.testing.assert_close(VWeighting()(SIGMAS), (SIGMAS**2 + 1) / SIGMAS**2)


def test_eps() -> None:
    torch.testing.assert_close(EpsWeighting()(SIGMAS), 1 / SIGMAS**2)
