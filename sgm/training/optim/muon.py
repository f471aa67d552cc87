"""Muon for matrices, AdamW for all other parameters, in one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Orthogonal updates of matrices (Jordan et al. 2024; Liu et al., arXiv:2502.16982), and AdamW for the rest.

    Args:
        params: parameter groups, each of matrices only or without any.
        lr: learning rate of both.
        momentum: of the matrices, in [0, 1).
        nesterov: whether the momentum looks ahead.
        ns_steps: steps of the Newton-Schulz iteration that makes an update orthogonal.
        adjust_lr_fn: ``match_rms_adamw`` scales the updates of matrices to the size of AdamW's, so that they share its
            learning rate; ``original`` scales by the shape alone.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: times lr, the fraction of a weight that each update subtracts.

    Raises:
        ValueError: a value is out of its range, or a group mixes matrices with others.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        of_muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        of_adamw = {"betas": tuple(betas), "eps": eps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **of_muon, **of_adamw})
        parts = []
        for cls, settings in ((torch.optim.Muon, of_muon), (torch.optim.AdamW, of_adamw)):
            example = torch.nn.Parameter(torch.zeros(1, 1))
            parts.append(cls([example], lr=lr, weight_decay=weight_decay, **settings))
        self._muon, self._adamw = parts
        for group in self.param_groups:
            axes = {p.ndim == 2 for p in group["params"]}
            if len(axes) > 1:
                raise ValueError("a group of Muon holds matrices only, or none")
            group["matrices"] = axes == {True}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, matrices in ((self._muon, True), (self._adamw, False)):
            # Loading replaces the groups and the state; the parts have none of their own.
            defaults = part.defaults
            groups = [group for group in self.param_groups if group["matrices"] is matrices]
            part.param_groups = [
                {"params": group["params"], **{name: group.get(name, value) for name, value in defaults.items()}}
                for group in groups
            ]
            if matrices:
                for group in part.param_groups:
                    group["eps"] = defaults["eps"]  # of the iteration, not of AdamW
            part.state = self.state
            part.step()
        return loss
