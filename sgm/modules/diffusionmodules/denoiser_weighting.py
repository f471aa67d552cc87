"""Weightings: how much the squared error at noise level σ counts in the sgm loss. Tensors are (B,), float32."""

import torch


class UnitWeighting:
    """Every noise level counts the same."""

    def __call__(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return ones of the shape of `sigmas` (B,)."""
        return torch.ones_like(sigmas)


class EDMWeighting:
    """(σ² + σ_data²) / (σ·σ_data)², which makes the loss of the raw network output even; Karras et al. 2022, table 1.

    Args:
        sigma_data: standard deviation of the clean data.
    """

    def __init__(self, *, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the weights (B,) of `sigmas` (B,)."""
        return (sigmas**2 + self.sigma_data**2) / (sigmas * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """The EDM weighting for data of unit variance, (σ² + 1)/σ²: an even loss for v-prediction."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """1/σ², an even loss for ε-prediction; Ho et al. 2020, equation 14 in terms of x0."""

    def __call__(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Return the weights (B,) of `sigmas` (B,)."""
        return sigmas**-2.0
