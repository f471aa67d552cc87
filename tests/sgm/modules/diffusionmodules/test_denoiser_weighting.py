import torch

from sgm.modules.diffusionmodules.denoiser_weighting import EpsWeighting


def test_eps() -> None:
    sigmas = torch.tensor([0.02, 0.7, 30.0])
    torch.testing.assert_close(EpsWeighting()(sigmas), 1 / sigmas**2)
