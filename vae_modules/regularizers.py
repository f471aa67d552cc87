"""The regularizer: the diagonal Gaussian of a KL autoencoder."""

from dataclasses import dataclass

import torch
from torch import nn

from sgm.util import to_device


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian with independent components, over latents (B, z, T, H, W).

    Attributes:
        mean: expectation.
        logvar: logarithm of the variance, clamped to −30..20 so that its exponential stays finite.
    """

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, *, generator: torch.Generator | None = None, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Draw latents, with the given `noise` or with that of `generator`, drawn on the generator's device."""
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * to_device(noise, self.mean.device)

    def kl(self) -> torch.Tensor:
        """KL divergence to the standard normal distribution, summed over the components: (B,), in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)


class DiagonalGaussianRegularizer(nn.Module):
    """Moments → latents.

    Args:
        sample: draw from the distribution; otherwise take its mean.
    """

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.sample = sample

    def distribution(self, moments: torch.Tensor) -> DiagonalGaussian:
        """(B, 2z, T, H, W), mean and log-variance on the channel axis → their distribution."""
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def forward(self, moments: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B, 2z, T, H, W) → latents (B, z, T, H, W)."""
        distribution = self.distribution(moments)
        return distribution.sample(generator=generator) if self.sample else distribution.mean
