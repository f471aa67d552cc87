"""Measure with the toy how much the gradients of training vary, by how its timesteps are drawn.

    python tools/toy/timesteps.py --write assets/toy/timesteps.json

The LoRA of ``make demo`` is taken as its training leaves it, and the gradients of many steps of 8 clips are computed,
each way with the same clips and noise. `variance` is that of the gradient about its mean, summed over all numbers, and
`loss_variance` that of the loss of a step, both relative to uniform timesteps. `apart` is the distance of the mean
gradient from that of uniform timesteps, and `by_chance` what it is between means of as many independent steps with
these variances, both relative to the length of the uniform one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import concept
import numpy as np
import quality
import scene
import teach
import torch

from sgm.cli import run_command, tool_parser
from sgm.io import write_json
from sgm.models.video_diffusion import TrainingInputs

SAMPLER = "model.loss_fn_config.params.sigma_sampler_config.params"
# Name → words after those of the toy's LoRA.
WAYS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "strata": (f"{SAMPLER}.strata=8",),
    "loss": (f"{SAMPLER}.distribution=loss",),
    "loss, strata": (f"{SAMPLER}.distribution=loss", f"{SAMPLER}.strata=8"),
}
BATCH, SEEN = 8, 40  # clips a step; steps whose losses the sampler sees first


def latents_and_texts(engine: Any, num_clips: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return latents (N, T, C, H, W) and text embeddings of clips with land."""
    rng = np.random.default_rng(0)
    names = [concept.CLIPS[number % len(concept.CLIPS)] for number in range(num_clips)]
    videos = torch.stack([quality.to_engine(concept.render(each, rng)) for each in names])
    texts = [scene.caption(*each) + concept.WORDS for each in names]
    with torch.no_grad():
        return engine.encode_first_stage(videos, sample=False), dict(engine.conditioner({"txt": texts}))


class Steps:
    """Steps of training, whose clips and noise depend on the number of the step alone.

    Args:
        way: key of `WAYS`.
        num_clips: that steps draw from.
    """

    def __init__(self, way: str, num_clips: int) -> None:
        self.engine = quality.load_engine(
            "configs/toy_lora.yaml", [teach.TARGETS, f"args.load={concept.LORA}", *WAYS[way]]
        )
        self.sampler = self.engine.require_loss().sigma_sampler
        self.latents, self.cond = latents_and_texts(self.engine, num_clips)
        network = self.engine.network.requires_grad_(False)
        self.trained = [value for name, value in network.named_parameters() if ".matrix_" in name]
        for value in self.trained:
            value.requires_grad_()

    def losses(self, step: int) -> torch.Tensor:
        """Return the losses of a step (`BATCH`,), which the sampler sees, with the weights of their timesteps."""
        first = BATCH * step
        generators = [torch.Generator().manual_seed(number) for number in range(first, first + BATCH)]
        chosen = torch.tensor([int(torch.randint(len(self.latents), (), generator=each)) for each in generators])
        noise = torch.stack([torch.randn(self.latents.shape[1:], generator=each) for each in generators])
        drawn = [self.sampler.draw_idx(1, generator=g, number=first + n) for n, g in enumerate(generators)]
        idx, cond = torch.cat(drawn), {name: value[chosen] for name, value in self.cond.items()}
        weights = self.sampler.weights(idx)
        losses = self.engine.training_losses(TrainingInputs(self.latents[chosen], cond, idx, noise))
        if self.sampler.moments is not None:
            self.sampler.moments.update(self.sampler.moments.sums(idx, losses))
        return losses if weights is None else losses * weights

    def gradient(self, step: int) -> tuple[float, torch.Tensor]:
        """Return the loss of a step, and the gradient of all that is trained as one vector."""
        loss = self.losses(step).mean()
        found = torch.autograd.grad(loss, self.trained)
        return float(loss.detach()), torch.cat([each.flatten() for each in found])


def gradients(num_steps: int) -> dict[str, Any]:
    """Measure mean and variance of the gradients of each way."""
    means, result = {}, {}
    for way in WAYS:
        steps = Steps(way, 48)
        with torch.no_grad():
            for step in range(SEEN):
                steps.losses(step)
        losses, total, squares = [], torch.zeros(()), 0.0
        for step in range(SEEN, SEEN + num_steps):
            loss, gradient = steps.gradient(step)
            losses.append(loss)
            total, squares = total + gradient.double(), squares + float(gradient.double().square().sum())
        means[way] = total / num_steps
        variance = (squares / num_steps - float(means[way].square().sum())) * num_steps / (num_steps - 1)
        result[way] = {"variance": variance, "loss_variance": float(np.var(losses, ddof=1))}
        length = means["uniform"].norm()
        result[way]["apart"] = float((means[way] - means["uniform"]).norm() / length)
        scatter = ((variance + result["uniform"]["variance"]) / num_steps) ** 0.5
        result[way]["by_chance"] = scatter / float(length)
    base = dict(result["uniform"])
    for own in result.values():
        own |= {name: round(own[name] / base[name], 3) for name in ("variance", "loss_variance")}
        own |= {name: round(own[name], 3) for name in ("apart", "by_chance")}
    return {"steps": num_steps, **result}


def measure(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    found = gradients(options.num_steps)
    sys.stdout.write(f"{json.dumps(found)}\n")
    if options.write is not None:
        write_json(options.write, found)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--num_steps", type=int, default=100, help="whose gradients are computed, each way (100)")
    parser.add_argument("--write", type=Path, help="a JSON file for the figures")
    return run_command(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
