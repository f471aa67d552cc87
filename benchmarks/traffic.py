"""Memory traffic of a transformer block at its released size, ours beside diffusers, without an accelerator.

    python -m benchmarks.traffic
    python -m benchmarks.traffic cogvideox1.5_5b --latents 22x96x170

Counted are the bytes that operators read and write on meta tensors in bfloat16, beside matrix products and attention,
and the bytes kept for the backward pass. One unit is one pass over the hidden states of the longest clip: S·D·2 bytes.
docs/benchmarks.md says what a block needs.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import network_section
from sgm.checks.cost import moved_bytes
from sgm.checks.meta_run import DEVICE, build, usage
from sgm.distributed import Mesh

MODELS = {"cogvideox_2b": (13, 60, 90), "cogvideox_5b": (13, 60, 90), "cogvideox1.5_5b": (22, 96, 170)}
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 128}}


class Passes(TorchDispatchMode):
    """Count the bytes that operators read and write, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operator asks torch's compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (moved := moved_bytes(func, args, kwargs or {}, out)) is not None:
            self.bytes[func.overloadpacket.__name__] += moved
        return out


@dataclass(frozen=True)
class Traffic:
    """Passes over the hidden states that a block makes.

    Attributes:
        passes: reads and writes of forward and backward pass, by operator.
        forward: those of the forward pass.
        saved: kept for the backward pass.
    """

    passes: dict[str, float]
    forward: float
    saved: float

    @property
    def total(self) -> float:
        """Return the reads and writes of forward and backward pass."""
        return sum(self.passes.values())


def block_traffic(
    model: str, side: str = "ours", task: str = "full", latents: tuple[int, int, int] | None = None
) -> Traffic:
    """Measure a block, as the difference between networks of three and of two.

    Args:
        model: name of the released configuration.
        side: ours or diffusers.
        task: full or LoRA: which weights are trained; guided: a step of a sampler, with both branches in one batch,
            without gradients.
        latents: (T, H, W); those of the longest clip unless given.
    """
    few, many = (_run(model, side, task, latents or MODELS[model], layers) for layers in (2, 3))
    passes = {name: number - few.passes[name] for name, number in many.passes.items()}
    return Traffic(passes, many.forward - few.forward, many.saved - few.saved)


def _run(model: str, side: str, task: str, latents: tuple[int, int, int], layers: int) -> Traffic:
    """Measure a network."""
    section = network_section(model)
    section["params"]["num_layers"] = layers
    if task == "LoRA":
        section["params"]["modules"]["lora_config"] = LORA
    network = module = build(section)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    length, width = network.get_mixin("pos_embed").text_length, network.get_mixin("patch_embed").text_proj.in_features
    tokens = math.prod(latents) // math.prod(network.patch_size) + length
    if side == "diffusers":
        from benchmarks.diffusers_peer import network_peer, run_network_peer  # lazy: imports diffusers

        module = network_peer(network)
        names = [name for name, _ in module.named_parameters()]
    counter, forward_bytes, saved = Passes(), 0, 0
    batch = 2 if task == "guided" else 1

    def work(module: Any) -> torch.Tensor:
        nonlocal forward_bytes, saved
        x = torch.empty(batch, latents[0], network.in_channels, *latents[1:], dtype=torch.bfloat16, device=DEVICE)
        context = torch.empty(batch, length, width, dtype=torch.bfloat16, device=DEVICE)
        step, ofs = (torch.tensor([value], device=DEVICE).expand(batch) for value in (500, 2.0))
        given: dict[str, Any] = {} if network.ofs_embed_dim is None else {"ofs": ofs}
        if side == "diffusers":
            if module.config.use_rotary_positional_embeddings:
                given |= {"rope": tuple(torch.empty(tokens - length, 64, device=DEVICE) for _ in range(2))}
            forward: Callable[[], torch.Tensor] = lambda: run_network_peer(  # noqa: E731
                module, x, step, context, **given
            )
        else:
            forward = lambda: module(x, step, context, **given)  # noqa: E731
        with counter:
            out, saved = _saved_bytes(module, forward)
            forward_bytes = counter.bytes.total()
            if task == "guided":
                return out
            out.square().mean().backward()
        return out.detach()

    trained = frozenset(name for name in names if task == "full" or "matrix_" in name)
    usage(module, work, torch.bfloat16, Mesh(), trained=None if task == "guided" else trained)
    unit = batch * tokens * network.hidden_size * 2
    return Traffic({name: size / unit for name, size in counter.bytes.items()}, forward_bytes / unit, saved / unit)


def _saved_bytes(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the result, and the bytes that are saved for the backward pass beside weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return out, sum(storage.nbytes() for storage in storages.values())


def rows(model: str, latents: tuple[int, int, int] | None = None) -> Iterator[str]:
    """Yield the rows of the table: passes of the forward pass and of a step, and what a step saves."""
    for name, side, task in (
        (model, "ours", "full"),
        (model, "diffusers", "full"),
        (f"{model} LoRA r128", "ours", "LoRA"),
        (f"{model} guided", "ours", "guided"),
        (f"{model} guided", "diffusers", "guided"),
    ):
        found = block_traffic(model, side, task, latents)
        step = " | " if task == "guided" else f"{found.total:.1f} | {found.saved:.1f}"
        yield f"| {name} | {side} | {found.forward:.1f} | {step} |"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["cogvideox_2b", "cogvideox_5b"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--latents", help="frames x height x width, such as 13x60x90")
    args = parser.parse_args(argv)
    if unknown := [model for model in args.models if model not in MODELS]:
        parser.error(f"{unknown[0]} is unknown; give some of {', '.join(MODELS)}")
    try:
        frames, height, width = map(int, args.latents.split("x")) if args.latents else (0, 0, 0)
    except ValueError:
        parser.error(f"--latents={args.latents}: give frames x height x width, such as 13x60x90")
    print("| model | side | forward | with backward | saved for backward |\n|---|---|---|---|---|", flush=True)
    for model in args.models:
        for row in rows(model, (frames, height, width) if args.latents else None):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
