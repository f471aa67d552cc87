"""Time our network and VAE against diffusers, on the same weights and inputs in the same process.

    python -m benchmarks.bench                         CPU sizes, or released sizes where there is an accelerator
    python -m benchmarks.bench --sizes cpu --json bench.json
    python -m benchmarks.bench --only dit --compile    both compiled block by block

Calls alternate, so that other load affects both equally. Reported are the medians, the median of the ratios
of neighbouring calls (below 1: ours is faster) and the largest difference of the outputs; see docs/benchmarks.md.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch._dynamo

import sgm.distributed
from benchmarks.diffusers_peer import network_peer, run_network_peer, vae_peer
from benchmarks.models import NetworkSize, build_network, build_vae, network_section, spatial_interpolation, vae_section
from sgm.conversion.diffusers.verify import peer_rope


@dataclass(frozen=True)
class NetworkCase:
    """A network to time.

    Attributes:
        model: name of the released configuration.
        size: reduced size; None keeps the released size.
        latents: (T, H, W) of the input of the forward pass.
        train_latents: (T, H, W) of the input of forward and backward pass.
    """

    model: str
    size: NetworkSize | None
    latents: tuple[int, int, int]
    train_latents: tuple[int, int, int]


@dataclass(frozen=True)
class VaeCase:
    """A VAE to time on clips of (F, height, width); `ch` and `num_res_blocks` are its own unless given."""

    model: str
    clip: tuple[int, int, int]
    ch: int | None = None
    num_res_blocks: int | None = None


_SMALL = NetworkSize(512, 8, 4, 512, latents=(5, 16, 24), text_length=226, text_hidden_size=1024)
NETWORKS = {
    "cpu": [NetworkCase(model, _SMALL, (5, 16, 24), (5, 16, 24)) for model in ("cogvideox_2b", "cogvideox_5b")],
    # The backward pass of 5B keeps all activations of 42 layers; fewer frames let two networks fit on one device.
    "released": [
        NetworkCase("cogvideox_2b", None, (13, 60, 90), (13, 60, 90)),
        NetworkCase("cogvideox_5b", None, (13, 60, 90), (3, 60, 90)),
    ],
}
VAES = {
    "cpu": [VaeCase("cogvideox_5b", (9, 48, 48), num_res_blocks=2)],  # as wide as the released one
    "released": [VaeCase("cogvideox_5b", (49, 480, 720))],
}


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        what: model, size and pass.
        ours: median of our times, in seconds.
        diffusers: median of theirs.
        ratio: median of ours/theirs over neighbouring calls.
        max_difference: largest absolute difference of the outputs.
        max_output: largest absolute value of the outputs, for scale.
        repeats: timed calls of each side.
        first_calls: seconds of our first call and of theirs, in which a compiled network is compiled.
    """

    what: str
    ours: float
    diffusers: float
    ratio: float
    max_difference: float
    max_output: float
    repeats: int
    first_calls: tuple[float, float]


@dataclass(frozen=True)
class Setup:
    """Measurement settings.

    Attributes:
        device: device of both sides.
        dtype: of weights and inputs.
        repeats: timed calls of each side.
        cpu_time: measure processor time instead of wall time, on a busy CPU.
        compiled: compile the blocks of both networks.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int
    cpu_time: bool = False
    compiled: bool = False

    def compare(self, what: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> Result:
        """Time two functions alternately; their first calls are not timed, and their outputs are compared."""
        outputs, marks = [], [time.perf_counter()]
        for function in (ours, theirs):
            outputs.append(function().detach())
            self.wait()
            marks.append(time.perf_counter())
        first, second = outputs
        difference, largest = (first - second).abs().max().item(), second.abs().max().item()
        del first, second, outputs
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        gc.disable()
        try:
            for index in range(self.repeats):
                pair = [("ours", ours), ("theirs", theirs)]
                for name, function in pair if index % 2 else reversed(pair):
                    seconds[name].append(self.seconds(function))
        finally:
            gc.enable()
        medians = [statistics.median(values) for values in seconds.values()]
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        first_calls = (marks[1] - marks[0], marks[2] - marks[1])
        return Result(what, *medians, ratio, difference, largest, self.repeats, first_calls)

    def alone(self, work: Callable[[], object]) -> float:
        """Return the median time of a function, whose first call is not timed."""
        work()
        return statistics.median(self.seconds(work) for _ in range(self.repeats))

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call."""
        clock = time.process_time if self.cpu_time else time.perf_counter
        self.wait()
        start = clock()
        function()
        self.wait()
        return clock() - start

    def wait(self) -> None:
        """Wait until the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def network_results(case: NetworkCase, setup: Setup) -> Iterator[Result]:
    """Time the forward pass, and forward and backward pass together."""
    device, dtype = setup.device, setup.dtype
    section = network_section(case.model, case.size)
    network = build_network(section, device=device, dtype=dtype)
    peer = network_peer(network, spatial_interpolation=spatial_interpolation(section), device=device)
    peer.train()  # no dropout on either side
    network.train()
    if setup.compiled:
        network.compile()
        for block in peer.transformer_blocks:
            block.compile(fullgraph=True)
    name = f"{case.model} compiled" if setup.compiled else case.model
    text_length = network.get_mixin("pos_embed").text_length
    text_size = network.get_mixin("patch_embed").text_proj.in_features

    def inputs(latents: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        frames, height, width = latents
        x = torch.randn(1, frames, network.in_channels, height, width, generator=generator)
        context = torch.randn(1, text_length, text_size, generator=generator)
        return x.to(device, dtype), torch.tensor([500], device=device), context.to(device, dtype)

    args = inputs(case.latents)
    rope = peer_rope(peer, args[0])
    with torch.no_grad():
        yield setup.compare(
            f"{name} {_shape(case.latents)} forward",
            lambda: network(*args),
            lambda: run_network_peer(peer, *args, rope=rope),
        )

    train_args = inputs(case.train_latents)
    train_rope = peer_rope(peer, train_args[0])

    def train(module: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        output = forward()
        output.square().mean().backward()
        return output

    yield setup.compare(
        f"{name} {_shape(case.train_latents)} forward + backward",
        lambda: train(network, lambda: network(*train_args)),
        lambda: train(peer, lambda: run_network_peer(peer, *train_args, rope=train_rope)),
    )


@torch.no_grad()
def vae_results(case: VaeCase, setup: Setup) -> Iterator[Result]:
    """Time encoding (8 frames at a time, as diffusers does) and decoding."""
    device, dtype = setup.device, setup.dtype
    vae = build_vae(vae_section(case.model, ch=case.ch, num_res_blocks=case.num_res_blocks), device=device, dtype=dtype)
    vae.encode_chunk = 8
    peer = vae_peer(vae, device=device)
    generator = torch.Generator().manual_seed(0)
    frames, height, width = case.clip
    video = (2 * torch.rand(1, 3, *case.clip, generator=generator) - 1).to(device, dtype)
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator).to(device, dtype)
    size = f"vae ch {vae.encoder.conv_in.conv.out_channels} {_shape(case.clip)}"
    yield setup.compare(
        f"{size} encode",
        lambda: vae.encode_moments(video),
        lambda: peer.encode(video).latent_dist.parameters,
    )
    yield setup.compare(
        f"{size} decode",
        lambda: vae.decode(latents),
        lambda: peer.decode(latents).sample,
    )


@contextmanager
def cold_compiler(device: torch.device) -> Iterator[None]:
    """Context in which first calls include neither the compiler's start nor code of earlier runs that is on disk."""
    from torch._inductor.utils import fresh_cache  # lazy: imports the code generator

    with fresh_cache():
        x = torch.ones(8, 8, device=device, requires_grad=True)
        torch.compile(lambda x: (x @ x).sin())(x).sum().backward()
        yield


def kernels_of_a_block() -> int:
    """Return how many kernels a compiled block of the 5B has in its forward pass, beside products and attention."""
    from torch._inductor.utils import run_and_get_code  # lazy: imports the code generator

    size = NetworkSize(32, 2, 2, 16, latents=(4, 4, 6), text_length=3, text_hidden_size=8)
    network = build_network(network_section("cogvideox_5b", size))
    x, context = torch.randn(1, 4, network.in_channels, 4, 6), torch.randn(1, size.text_length, size.text_hidden_size)
    torch._dynamo.reset()  # code is generated once
    network.compile()
    with torch.no_grad():
        _, (code,) = run_and_get_code(lambda: network(x, torch.tensor([500]), context))
    torch._dynamo.reset()
    return len(re.findall(r"^\w+ = async_compile", code, re.MULTILINE))


def _shape(lengths: tuple[int, ...]) -> str:
    return "×".join(map(str, lengths))


def environment(setup: Setup) -> dict[str, str | int]:
    """Return hardware, versions and settings."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    accelerator = "none"
    if setup.device.type != "cpu":
        found = torch.get_device_module(setup.device).get_device_properties(setup.device)
        accelerator = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"  # not its number, which another card lacks
    return {
        "cpu": name,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "clock": "processor time" if setup.cpu_time else "wall time",
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


HEADER = "| what | ours | diffusers | ratio | max difference |\n|---|---|---|---|---|"


def row(result: Result) -> str:
    """Return a result as a row of the Markdown table."""
    return (
        f"| {result.what} | {_duration(result.ours)} | {_duration(result.diffusers)} | {result.ratio:.2f} | "
        f"{result.max_difference:.1e} of {result.max_output:.1f} |"
    )


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def run(sizes: str, only: str | None, setup: Setup) -> Iterator[Result]:
    """Run the cases of `sizes`, one after the other; `only` is "dit", "vae" or None for both."""
    for network in NETWORKS[sizes] if only in (None, "dit") else []:
        yield from network_results(network, setup)
    for vae in VAES[sizes] if only in (None, "vae") else []:
        yield from vae_results(vae, setup)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=sorted(NETWORKS), help="default: released with an accelerator, cpu without")
    parser.add_argument("--only", choices=["dit", "vae"], help="time one of the two")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each side")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, on a busy CPU")
    parser.add_argument("--compile", action="store_true", help="compile both networks; needs --only dit")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    device = sgm.distributed.device()
    if args.sizes == "released" and device.type == "cpu":
        parser.error("--sizes released needs an accelerator, and torch finds none here")
    sizes = args.sizes or ("cpu" if device.type == "cpu" else "released")
    if sizes == "cpu":
        device = torch.device("cpu")
    if args.cpu_time and device.type != "cpu":
        parser.error("--cpu-time is for the CPU; add --sizes cpu")
    if args.compile and args.only != "dit":
        parser.error("--compile is for networks; add --only dit")
    setup = Setup(
        device, torch.float32 if device.type == "cpu" else torch.bfloat16, args.repeats, args.cpu_time, args.compile
    )

    facts = environment(setup)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if device.type == "cpu":
        print("the released sizes are skipped: they need an accelerator")
    print(HEADER, flush=True)
    results = []
    with cold_compiler(device) if setup.compiled else nullcontext():
        for result in run(sizes, args.only, setup):
            print(row(result), flush=True)
            results.append(result)
    if setup.compiled:
        print(
            "\n".join(f"{r.what}: first calls {r.first_calls[0]:.0f} s and {r.first_calls[1]:.0f} s" for r in results)
        )
        print(f"{kernels_of_a_block()} kernels in a compiled block, forward, beside products and attention", flush=True)
    if args.json:
        content = {"environment": facts, "sizes": sizes, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
