"""Wrapper between denoiser and network."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import sgm.distributed
from sgm.parallel.sequence import gather_sequence, split_sequence


class OpenAIWrapper(nn.Module):
    """Pass the conditions to the network by its own argument names, in the dtype of its parameters.

    The name, and `diffusion_model`, are part of the SAT checkpoint format (``model.diffusion_model.*``).

    Args:
        network: called as ``network(x, timesteps, context, ofs=...)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = network

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        cond: Mapping[str, torch.Tensor],
        *,
        ofs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the network.

        Args:
            x: scaled noised latents (B, T, C, H, W).
            timesteps: (B,).
            cond: ``crossattn``, the text (B, L, D_text), and optionally ``concat``, image latents (B, T, C', H, W),
                and ``control``, those of a control video, both concatenated after the channels of `x`.
            ofs: (B,), for networks with this embedding.

        Returns:
            The network's output (B, T, C_out, H, W).
        """
        dtype = next((p.dtype for p in self.diffusion_model.parameters() if p.is_floating_point()), x.dtype)
        parts = [x, *(cond[name] for name in ("concat", "control") if name in cond)]
        latents = torch.cat([part.to(dtype) for part in parts], dim=2)
        # With guidance parallelism, each of two ranks computes one branch: half of the batch.
        group = sgm.distributed.cfg_group()
        own = partial(split_sequence, group=group, dim=0)
        latents = own(latents)

        def own_value(values: torch.Tensor) -> torch.Tensor:
            """One value expanded to all samples stays expanded, since blocks take fewer passes then."""
            return own(values) if values.stride(0) else values[: len(latents)]

        optional: dict[str, Any] = {} if ofs is None else {"ofs": own_value(ofs)}
        out = self.diffusion_model(latents, own_value(timesteps), own(cond["crossattn"].to(dtype)), **optional)
        return gather_sequence(out, group, 0, len(x))
