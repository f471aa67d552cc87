"""Weighting: the weight of a noise level in a loss that asks the denoiser for it, see `DiscreteDenoiser.w`."""

import torch


class EpsWeighting:
    """1/σ², an even loss for ε-prediction; Ho et al. 2020, equation 14 in terms of x0.

    Every released YAML names it. `loss.VideoDiffusionLoss` has a weight of its own and does not ask.
    """

    def __call__(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the weights (B,) of `sigmas` (B,)."""
        return sigmas**-2.0
