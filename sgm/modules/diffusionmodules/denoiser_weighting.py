"""Loss weights by noise level, for losses that call `DiscreteDenoiser.w`."""

import torch


class EpsWeighting:
    """1/σ²: uniform weight for ε-prediction; Ho et al. 2020, equation 14 in terms of x0.

    Every released YAML names it; `loss.VideoDiffusionLoss` uses its own weight instead.
    """

    def __call__(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the weights (B,) of `sigmas` (B,)."""
        return sigmas**-2.0
