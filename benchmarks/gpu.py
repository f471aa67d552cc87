"""Time and peak memory of released models on one accelerator or several, beside diffusers and the planner's estimates.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --size tiny --only "5b, LoRA"      on any machine, in seconds

Weights are random, in bfloat16. A row is written to a file as soon as it is known, and a second start does the others,
at the end those that failed or ended the first. Printed is the Markdown table for docs/benchmarks.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import sgm.distributed
from benchmarks.bench import Setup, environment
from benchmarks.diffusers_peer import network_peer, run_network_peer, vae_peer
from benchmarks.models import build_vae, spatial_interpolation
from benchmarks.runs import (
    SIZES,
    GuidedStep,
    Peak,
    TrainingRun,
    build_engine,
    extra_bytes,
    free_memory,
    random,
    sampling_config,
    seconds_of_ranks,
    shape_of,
    step_estimate,
    text_of,
    training_config,
    vae_estimate,
    video_of,
    write_shared_seconds,
)
from sgm.config.load import load_config
from sgm.conversion.diffusers.verify import peer_rope
from sgm.io import parse_json, write_json
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.quantize import num_bytes

logger = get_logger(__name__)

GIB = 2**30
CONFIGS = Path(__file__).parents[1] / "configs"
DTYPE = torch.bfloat16
REPEATS = {"released": 5, "tiny": 1}  # timed calls, after one that is not
SAMPLER_STEPS = {"released": 12, "tiny": 4}
RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Figures:
    """What a row says; None for what it does not.

    Attributes:
        seconds: median of our times.
        diffusers: median of theirs, called in turns with ours.
        ratio: median of ours/theirs.
        peak: most bytes on the device, weights included.
        diffusers_peak: theirs.
        estimate: the planner's figure of `peak`.
        note: what else is to be known, or why nothing was measured.
    """

    seconds: float | None = None
    diffusers: float | None = None
    ratio: float | None = None
    peak: float | None = None
    diffusers_peak: float | None = None
    estimate: float | None = None
    note: str = ""


HEADER = (
    "| what | ours | diffusers | ratio | peak, GiB | diffusers | estimated | peak/estimate | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(name: str, found: Figures) -> str:
    """Return a row of the Markdown table."""

    def text(value: float | None, form: Callable[[float], str]) -> str:
        return "" if value is None else form(value)

    off = found.peak / found.estimate if found.peak and found.estimate else None
    cells = [
        *(text(seconds, _duration) for seconds in (found.seconds, found.diffusers)),
        text(found.ratio, "{:.2f}".format),
        *(text(size, lambda x: f"{x / GIB:.2f}") for size in (found.peak, found.diffusers_peak, found.estimate)),
        text(off, "{:.3f}".format),
        found.note,
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


@dataclass(frozen=True)
class Bench:
    """What all rows share.

    Attributes:
        size: one of `benchmarks.runs.SIZES`.
        device: of all models.
    """

    size: str
    device: torch.device

    @property
    def setup(self) -> Setup:
        """How calls are timed."""
        return Setup(self.device, DTYPE, REPEATS[self.size])

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the median of the times of `work`."""
        return self.setup.alone(work)

    # Sampling

    def step(self, model: str, *, compiled: bool = False) -> Figures:
        """A guided step of the network, in turns with diffusers."""
        step = GuidedStep(sampling_config(model, self.size), self.device, DTYPE)
        section = step.config.model["network_config"]
        peer = network_peer(
            step.network, spatial_interpolation=spatial_interpolation(section), device=self.device
        ).requires_grad_(False)
        rope = peer_rope(peer, step.inputs[0])
        if compiled:
            step.network.compile()
            for block in peer.transformer_blocks:
                block.compile(fullgraph=True)

        @torch.no_grad()
        def theirs() -> torch.Tensor:
            return run_network_peer(peer, *step.inputs, rope=rope)

        found = self.setup.compare(model, step, theirs)
        figures = Figures(found.ours, found.diffusers, found.ratio)
        if compiled:
            first, second = found.first_calls
            return replace(figures, note=f"first calls {first:.0f} s and {second:.0f} s")
        inputs = sum(x.nbytes for x in step.inputs)
        peer_peak = num_bytes([peer]) + inputs + extra_bytes(theirs, self.device)
        return replace(figures, peak=step.peak(), diffusers_peak=peer_peak, estimate=step.estimate())

    def changed_step(self, model: str, *settings: str, compiled: bool = False) -> Figures:
        """A guided step with other weights, or weights that wait in host memory."""
        step = GuidedStep(sampling_config(model, self.size, *settings), self.device, DTYPE)
        if compiled:
            step.network.compile()
            return Figures(self.seconds(step))
        return Figures(self.seconds(step), peak=step.peak(), estimate=step.estimate())

    def cached(self, model: str, speed: str) -> Figures:
        """Steps of a sampler with a file of configs/speed; with random weights, what is skipped is not typical."""
        config = sampling_config(model, self.size)
        engine = build_engine(config, self.device, DTYPE)
        shape, text, steps = shape_of(config, engine), text_of(engine, 1), SAMPLER_STEPS[self.size]

        def run() -> float:
            start = time.perf_counter()
            generators = [torch.Generator().manual_seed(0)]
            engine.sample(
                {"crossattn": text}, {"crossattn": -text}, shape=shape, generators=generators, num_steps=steps
            )
            self.setup.wait()
            return (time.perf_counter() - start) / steps

        run()
        exact = run()
        base = CONFIGS / f"{model}.yaml"
        args = load_config([base, CONFIGS / "inference.yaml", CONFIGS / f"speed/{speed}.yaml"], mode="inference").args
        engine.use_step_cache(args.step_cache, args.step_cache_threshold)
        seconds = run()
        share = 1.0 if engine.step_cache is None else engine.step_cache.share_run
        note = f"{share:.0%} of the calls of blocks, {_duration(exact)} with all"
        return Figures(seconds, note=f"a step of {steps}, with its share of the sampler: {note}")

    # VAE

    @torch.no_grad()
    def vae(self, model: str, phase: str, *, compiled: bool = False) -> Figures:
        """Encoding (8 frames at a time, as diffusers does) or decoding, in turns with diffusers, never compiled."""
        chunk = ["model.first_stage_config.params.encode_chunk=8"] if phase == "encode" else []
        compiling = ["model.first_stage_config.params.compile=true"] if compiled else []
        config = sampling_config(model, self.size, *chunk, *compiling)
        vae = build_vae(config.model["first_stage_config"], device=self.device, dtype=DTYPE).requires_grad_(False)
        peer = vae_peer(vae, device=self.device).requires_grad_(False)
        frames, height, width = video_of(config)
        of_clip, of_latents = (1, 3, 4 * frames - 3, height, width), (1, 16, frames, height // 8, width // 8)
        x = random(*(of_clip if phase == "encode" else of_latents), device=self.device, dtype=DTYPE)

        def ours() -> torch.Tensor:
            return vae.encode_moments(x) if phase == "encode" else vae.decode(x)

        def theirs() -> torch.Tensor:
            return peer.encode(x).latent_dist.parameters if phase == "encode" else peer.decode(x).sample

        def as_sampled() -> None:
            if phase == "encode":
                ours()
            for part in vae.decode_in_chunks(x) if phase == "decode" else ():
                part.float()  # as it leaves the device

        found = self.setup.compare(phase, ours, theirs)
        figures = Figures(found.ours, found.diffusers, found.ratio)
        if compiled:
            return replace(figures, note=f"first call {found.first_calls[0]:.0f} s")
        weights = num_bytes([vae]) + x.nbytes
        return replace(
            figures,
            peak=weights + extra_bytes(as_sampled, self.device),
            diffusers_peak=weights + extra_bytes(theirs, self.device),
            estimate=vae_estimate(config, phase, DTYPE),
        )

    # Training

    def training(self, model: str, *, lora: bool) -> Figures:
        """A step of the optimizer, from a cache of latents and text."""
        config = training_config(model, self.size, lora=lora)
        estimate, room = step_estimate(config, DTYPE), self._room()
        if estimate > room:
            needed = f"{estimate / GIB:.0f} GiB, and the card has {room / GIB:.0f}"
            return Figures(estimate=estimate, note=f"not run: an estimated {needed}")
        with Peak(self.device) as peak:
            run = TrainingRun(config, self.device, DTYPE)
            run.start()
            try:
                run.step()  # makes the optimizer's state
                peak.restart()
                run.step()
                most = peak.bytes
                return Figures(self.seconds(run.step), peak=most, estimate=estimate)
            finally:
                run.close()

    def _room(self) -> float:
        return float("inf") if self.device.type == "cpu" else torch.accelerator.get_memory_info()[1]

    # Ranks

    def ranks(self, model: str, num: int) -> Figures:
        """A guided step of which each rank has a share of the tokens."""
        found = 0 if self.device.type == "cpu" else torch.accelerator.device_count()
        if found < num:
            return Figures(note=f"not run: {num} accelerators are needed, and there are {found}")
        alone = self.seconds(GuidedStep(sampling_config(model, self.size), self.device, DTYPE))
        free_memory()  # for the first of the ranks
        shared = shared_step(model, self.size, num)
        return Figures(shared, note=f"{alone / shared:.2f} times faster than one ({_duration(alone)})")


def shared_step(model: str, size: str, num: int) -> float:
    """Return the seconds of a guided step on `num` ranks, started by torchrun."""
    return seconds_of_ranks(num, [str(Path(__file__)), "--rank-of", model, "--size", size])


def rank_seconds(model: str, size: str) -> float:
    """Return the seconds of a guided step on this rank and the others."""
    bench = Bench(size, sgm.distributed.device())
    return bench.seconds(GuidedStep(sampling_config(model, size), bench.device, DTYPE))


def rows(bench: Bench) -> dict[str, Callable[[], Figures]]:
    """Return all rows by their names."""
    models = {"2B": "cogvideox_2b", "5B": "cogvideox_5b"}
    found: dict[str, Callable[[], Figures]] = {}
    for name, model in models.items():
        found[f"{name}, CFG step"] = lambda model=model: bench.step(model)
        found[f"{name}, CFG step, compiled"] = lambda model=model: bench.step(model, compiled=True)
    large = models["5B"]
    changes = {
        "int8": ("args.weights=int8",),
        "fp8": ("args.weights=fp8",),
        "in blocks": ("args.network_offload=blocks",),
        "int8 in blocks": ("args.weights=int8", "args.network_offload=blocks"),
    }
    for name, settings in changes.items():
        found[f"5B, CFG step, {name}"] = lambda settings=settings: bench.changed_step(large, *settings)
    for name in ("int8", "fp8"):
        found[f"5B, CFG step, {name}, compiled"] = lambda name=name: bench.changed_step(
            large, *changes[name], compiled=True
        )
    for speed in ("balanced", "fast"):
        found[f"5B, sampler, speed/{speed}"] = lambda speed=speed: bench.cached(large, speed)
    for phase in ("encode", "decode"):
        found[f"VAE, {phase}"] = lambda phase=phase: bench.vae(large, phase)
        found[f"VAE, {phase}, compiled"] = lambda phase=phase: bench.vae(large, phase, compiled=True)
    for name, model in models.items():
        found[f"{name}, LoRA step"] = lambda model=model: bench.training(model, lora=True)
        found[f"{name}, full step"] = lambda model=model: bench.training(model, lora=False)
    for num in RANKS:
        found[f"5B, CFG step on {num} accelerators"] = lambda num=num: bench.ranks(large, num)
    return found


def facts(bench: Bench) -> dict[str, Any]:
    """Return hardware, versions and settings of all rows."""
    packages = {name: version(name) for name in ("deepspeed", "torchao", "SwissArmyTransformer")}
    count = 0 if bench.device.type == "cpu" else torch.accelerator.device_count()
    return {"size": bench.size, **environment(bench.setup), "accelerators": count, **packages}


def known_rows(path: Path, here: Mapping[str, Any]) -> tuple[dict[str, Figures], dict[str, str]]:
    """Return the rows of an earlier start on this machine, and those that failed or were cut off, with the reason.

    Raises:
        InputError: the file is of another machine, other versions or another size, or is no such file.
    """
    if not path.exists():
        return {}, {}
    cure = "remove it, or give another file with --json"
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        found = {name: Figures(**figures) for name, figures in content["rows"].items()}
        then, failed = dict(content["environment"]), dict(content.get("failed", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{path}' holds no rows of this benchmark ({error}); {cure}") from error
    changed = [f"{name} {then.get(name)!r}, now {value!r}" for name, value in here.items() if then.get(name) != value]
    if changed:
        raise InputError(f"'{path}' was measured elsewhere or otherwise ({'; '.join(changed)}); {cure}")
    return found, failed


def measured(bench: Bench, path: Path, only: str) -> Iterator[tuple[str, Figures | str]]:
    """Yield all rows whose name contains `only`, written to `path` one by one; the reason for one that failed.

    Rows that an earlier start failed at, or that ended it, come last.
    """
    here = facts(bench)
    known, failed = known_rows(path, here)

    def write() -> None:
        content = {key: asdict(row) for key, row in known.items()}
        write_json(path, {"environment": here, "rows": content, "failed": failed})

    works = {name: work for name, work in rows(bench).items() if only.lower() in name.lower()}
    for name in sorted(works, key=failed.__contains__):
        if name not in known:
            failed[name] = "cut off"  # should this process not survive it
            write()
            try:
                known[name] = works[name]()
                del failed[name]
            except Exception as error:  # out of memory, or what a device, torch or a package cannot do
                failed[name] = f"{type(error).__name__}: {error}"
                logger.error("%s: %s", name, failed[name])
            free_memory()
            write()
        yield name, known[name] if name in known else failed[name]


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if a row failed, which the next start tries again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="released", help="tiny runs anywhere, in seconds")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench_gpu.json"), help="file of the rows")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)  # a model: this process is one rank of `shared_step`
    args = parser.parse_args(argv)
    if args.rank_of:
        write_shared_seconds(args.json, partial(rank_seconds, args.rank_of, args.size))
        return 0
    bench = Bench(args.size, sgm.distributed.device())
    if args.size == "released" and bench.device.type == "cpu":
        parser.error("the released sizes need an accelerator, and torch finds none here; --size tiny runs anywhere")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    try:
        print(HEADER, flush=True)
        for name, found in measured(bench, args.json, args.only):
            failed += isinstance(found, str)
            reason = " ".join(str(found).replace("|", "/").split())[:200]
            print(line(name, Figures(note=f"failed: {reason}") if isinstance(found, str) else found), flush=True)
    except InputError as error:
        parser.error(str(error))
    print(json.dumps(facts(bench), ensure_ascii=False))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
