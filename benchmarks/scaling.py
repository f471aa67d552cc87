"""Compare the model of step times with real trainings on one, two and four gloo ranks of this machine.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only 2-zero2 4-zero2 --card my_card.json
    python -m benchmarks.scaling --calibrate my_card.json

Trains networks with random weights of the toy's kind on the CPU, a thread a rank, and predicts their iterations with a
card whose figures are measured here, on other work: products, attention, elementwise operators, a tiny network, the
toy's VAE and clips, DeepSpeed with networks of few large and of many small layers, and gloo between two processes. As
many processes measure at once as there are ranks, since cores share caches and memory. All seconds are those of
processors, all threads of a rank together, since other work on a machine changes how long a step lasts, and hardly what
it takes. Of ranks that share cores, the prediction is ranks / cores times as long as that of ranks with cores of their
own, and so is the time of the measured ones. Cases of clips encode them in each step, the others read a cache.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

import sgm.distributed
from benchmarks.models import NetworkSize, build_network, build_vae, network_section, vae_section
from benchmarks.runs import launch
from data_video import SFTDataset
from sgm.checks.cost import Cost
from sgm.checks.meta_run import LiveBytes, build
from sgm.checks.scaling.cards import Card, card_named
from sgm.checks.scaling.step_time import Prediction, predict
from sgm.config.deepspeed_section import engine_config
from sgm.config.load import load_config
from sgm.distributed import planned
from sgm.training.optim.trainable import choose_trainable
from sgm.training.step import start_deepspeed
from sgm.util import RunError, prepare_import

ROOT = Path(__file__).parents[1]
RECORD, STEPS, WARMUP = "SCALING_RECORD", 8, 3  # variable with the folder for the seconds of each rank
BASES = ["configs/toy.yaml", "configs/toy_sft.yaml"]
_NETWORK, _ZERO = "model.network_config.params", "deepspeed.zero_optimization"
SETTINGS = (
    *("args.mode=pretrain", "args.load=null", "args.eval_interval=null", "args.valid_prompts=null"),
    *("args.num_workers=0", "args.save_interval=100000", f"args.train_iters={STEPS}", "args.resume=none"),
    *(f"{_NETWORK}.hidden_size=512", f"{_NETWORK}.num_layers=4", f"{_NETWORK}.num_attention_heads=16"),
    "deepspeed.train_micro_batch_size_per_gpu=4",
)
# Moved for a float32 parameter: 24 into buckets and back, 12 + 28 + 16 for norm, clipping and update, see step_time.
BYTES_OF_STAGE_2 = 80
SEQUENCE = ("args.sequence_parallel_size=2",)
# Name → ranks and settings.
CASES: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "1-clips": (1, (f"{_ZERO}.stage=2",)),
    "2-clips": (2, (f"{_ZERO}.stage=2",)),
    "1-zero0": (1, (f"{_ZERO}.stage=0",)),
    "1-zero2": (1, (f"{_ZERO}.stage=2",)),
    "2-zero1": (2, (f"{_ZERO}.stage=1",)),
    "2-zero2": (2, (f"{_ZERO}.stage=2",)),
    "2-zero3": (2, (f"{_ZERO}.stage=3",)),
    "2-tokens": (2, (f"{_ZERO}.stage=1", *SEQUENCE)),
    "2-layers": (2, (f"{_ZERO}.stage=1", "args.model_parallel_size=2")),
    "4-zero2": (4, (f"{_ZERO}.stage=2",)),
    "4-zero3": (4, (f"{_ZERO}.stage=3",)),
    "4-tokens": (4, (f"{_ZERO}.stage=2", *SEQUENCE)),
}


def busy_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the fewest processor seconds of some runs, after one that is not measured; other ranks begin with it."""
    work()
    found = []
    for _ in range(repeats):
        if dist.is_initialized():
            dist.barrier()
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def counted(work: Callable[[], object]) -> Cost:
    """Return what the kernels of a run cost."""
    with LiveBytes() as live:
        work()
    return live.cost


def calibrate(ranks: int) -> Card:
    """Measure the figures of a core of this machine's CPU in float32, while `ranks` processes do the same work."""
    cores = figures_of_cores(ranks)
    core = {name: statistics.fmean(each[name] for each in cores) for name in cores[0]}
    gloo = gloo_figures()
    return Card(
        name="core of this CPU",
        memory=4,
        products=1.0,
        **core,
        per_node=1024,
        intra_bandwidth=gloo["bandwidth"],
        intra_latency=gloo["latency"],
        inter_bandwidth=gloo["bandwidth"],
        inter_latency=gloo["latency"],
        host_bandwidth=core["memory_bandwidth"],
        disk_bandwidth=1e9,
        shared_bandwidth=1e9,
        cores=1,
        overlaps=False,  # DeepSpeed has no streams on a CPU
        slots=len(os.sched_getaffinity(0)),
    )


def core_figures() -> dict[str, float]:
    """Measure a core: the figures of a card that other cores' work changes."""
    products = _rate(_products(), "products")
    attention = _rate(_attention(), "attention")
    bandwidth = _rate(_elementwise(), "moved")
    tiny = _tiny_network()
    kernel = busy_seconds(tiny) / counted(tiny).kernels
    encode = _encode()
    cost = counted(encode)
    rest = busy_seconds(encode) - cost.products / products - cost.moved / bandwidth - cost.kernels * kernel
    if rest <= 0:
        raise RunError("the VAE took less than its operators beside convolutions: the machine is too busy to measure")
    clips = SFTDataset(data_dir=ROOT / "assets/toy", video_size=(64, 64), fps=8, max_num_frames=17)
    return {
        "peak": products,
        "attention": min(attention / products, 1.0),
        "convolutions": min(cost.convolutions / rest / products, 1.0),
        "memory_bandwidth": bandwidth,
        "kernel_seconds": kernel,
        "clip_pixels": 17 * 64 * 64 / busy_seconds(lambda: clips[0]),
    }


def deepspeed_figures() -> dict[str, float]:
    """Measure what DeepSpeed takes on one rank beside the passes of a network, for its bytes and for its tensors.

    Stages 2 and 3 of many small layers tell what a tensor takes; stage 2 of a few large ones, what is left for bytes.
    """
    many, large = _Layers(96, 16), _Layers(12, 1024)
    of_many, of_large = map(_plain_seconds, (many, large))
    tensors = len(list(many.parameters()))
    second, third = (busy_seconds(_deepspeed_step(many, stage)) - of_many for stage in (2, 3))
    tensor = second / tensors
    state = busy_seconds(_deepspeed_step(large, 2)) - of_large - len(list(large.parameters())) * tensor
    if min(second, third - second, state) <= 0:
        raise RunError("DeepSpeed took less than the network alone: the machine is too busy to measure")
    moved = sum(parameter.numel() for parameter in large.parameters()) * BYTES_OF_STAGE_2
    return {
        "state_bandwidth": moved / state,
        "tensor_seconds": tensor,
        "gather_seconds": (third - second) / (2 * tensors),
    }


class _Layers(torch.nn.Module):
    """Linear layers with little to compute."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def _plain_seconds(layers: _Layers) -> float:
    return busy_seconds(lambda: layers(_input(layers)).backward())


def _input(layers: Any) -> torch.Tensor:
    return torch.ones(1, layers.layers[0].in_features)


def _deepspeed_step(layers: _Layers, stage: int) -> Callable[[], object]:
    config = load_config(BASES, [*SETTINGS, f"{_ZERO}.stage={stage}"], mode="train")
    section = engine_config(config.deepspeed, world_size=1, dtype=torch.float32)
    layers = copy.deepcopy(layers)
    engine = start_deepspeed(layers, torch.optim.AdamW(layers.parameters(), fused=True), None, section)

    def work() -> None:
        engine.backward(engine(_input(layers)))
        engine.step()

    return work


def figures_of_cores(ranks: int) -> list[dict[str, float]]:
    """Return the figures of processes that measure at the same time: they share caches and memory as ranks do."""
    return _of_ranks(ranks, "--core")


def _rate(work: Callable[[], object], kind: str) -> float:
    return getattr(counted(work), kind) / busy_seconds(work)


def _products() -> Callable[[], object]:
    """Return the products of an MLP of the trained networks, forward and backward."""
    x, w = torch.randn(384, 512, requires_grad=True), torch.randn(512, 2048, requires_grad=True)
    return lambda: torch.autograd.backward(x @ w, torch.ones(384, 2048))


def _attention() -> Callable[[], object]:
    q, k, v = (torch.randn(4, 16, 96, 32, requires_grad=True) for _ in range(3))
    ones = torch.ones_like(q)
    return lambda: torch.autograd.backward(functional.scaled_dot_product_attention(q, k, v), ones)


def _elementwise() -> Callable[[], object]:
    """Return operators like those of a block between its products, forward and backward."""
    x, scale = torch.randn(4, 96, 512, requires_grad=True), torch.randn(4, 1, 512, requires_grad=True)
    wide, ones = torch.randn(4, 96, 2048, requires_grad=True), torch.ones(4, 96, 512)

    def work() -> None:
        normed = functional.layer_norm(x, (512,)) * (1 + scale) + scale
        parts = torch.cat([normed[:, :16], normed[:, 16:]], 1)
        torch.autograd.backward([torch.addcmul(x, parts, scale)], [ones])
        torch.autograd.backward(functional.gelu(wide, approximate="tanh"), torch.ones_like(wide))

    return work


def _tiny_network() -> Callable[[], object]:
    """Return a step of a network so small that starting its kernels takes all the time."""
    size = NetworkSize(32, 2, 4, 32, latents=(1, 2, 2), text_length=2, text_hidden_size=8)
    network = build_network(network_section("toy", size)).train()
    x, text = torch.randn(1, 1, network.in_channels, 2, 2), torch.randn(1, 2, 8)
    return lambda: network(x, torch.tensor([500]), text).square().mean().backward()


def _encode() -> Callable[[], object]:
    vae, clip = build_vae(vae_section("toy")), torch.randn(1, 3, 9, 32, 32)

    @torch.no_grad()
    def work() -> None:
        vae.encode_moments(clip)

    return work


def gloo_figures() -> dict[str, float]:
    """Return bandwidth and latency of collectives of two processes, in processor seconds of one."""
    return _of_ranks(2, "--gloo")[0]


def _of_ranks(ranks: int, option: str) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        launch(ranks, ["-m", "benchmarks.scaling", option, folder], OMP_NUM_THREADS="1")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def _measure_rank(folder: Path, *, core: bool) -> None:
    torch.set_num_threads(1)
    prepare_import()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = core_figures() if core else _collectives()
    dist.barrier()
    dist.destroy_process_group()
    if core:  # of DeepSpeed by itself, while the others measure it, too
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        sgm.distributed.initialize()
        found |= deepspeed_figures()
        sgm.distributed.shutdown()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def _collectives() -> dict[str, float]:
    """Measure what ZeRO does with gradients and weights, which are more than caches hold."""
    whole, small = torch.ones(16_000_000), torch.ones(4)
    part = whole.chunk(2)[dist.get_rank()].clone()
    few = busy_seconds(lambda: [dist.all_reduce(small) for _ in range(200)]) / 200
    reduced = busy_seconds(lambda: dist.all_reduce(whole)) - few
    gathered = busy_seconds(lambda: dist.all_gather_into_tensor(whole, part)) - few
    # Each of two ranks sends as much as there is to reduce it, and half of that to gather it; a message passes their
    # ring twice.
    return {"bandwidth": 1.5 * whole.nbytes / (reduced + gathered), "latency": few / 4}


def measure(case: str, cache: Path) -> tuple[float, float]:
    """Train a case; return the seconds of an iteration: of processors, as ranks share them, and by the clock.

    Args:
        case: of `CASES`.
        cache: folder of encoded clips and captions, which the first case that needs it fills.
    """
    ranks, settings = CASES[case]
    if "clips" not in case:
        settings += ("args.precompute=true", f"args.latent_cache={cache}", f"args.text_cache={cache}")
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "benchmarks.scaling", "--train", folder, "--base", *BASES, *SETTINGS, *settings]
        launch(ranks, [*words, f"args.save={folder}/runs"], OMP_NUM_THREADS="1")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    assert len(found) == ranks
    cores = len(os.sched_getaffinity(0))
    busy = sum(min(rank["busy"][WARMUP:]) for rank in found)
    return busy / min(ranks, cores), min(found[0]["clock"][WARMUP:])


def _train_rank(folder: Path, words: Sequence[str]) -> int:
    """Train as ``train_video.py`` does, and record the seconds of each iteration of this rank."""
    from sgm.training.main import main as train
    from sgm.training.run import TrainingRun

    seconds: dict[str, list[float]] = {"busy": [], "clock": []}
    step = TrainingRun._guarded_step

    def timed(self: TrainingRun, batches: Any) -> bool:
        begun = time.process_time(), time.perf_counter()
        stop = step(self, batches)
        seconds["busy"].append(time.process_time() - begun[0])
        seconds["clock"].append(time.perf_counter() - begun[1])
        return stop

    TrainingRun._guarded_step = timed
    code = train(words)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seconds))
    return code


def predicted(case: str, card: Card) -> Prediction:
    """Predict a case."""
    ranks, settings = CASES[case]
    with planned(ranks):
        config = load_config(BASES, [*SETTINGS, *settings], mode="train")
        trained = choose_trainable(build(config.model["network_config"]), config.model).names
        encodes = "clips" in case
        return predict(config, torch.float32, trained, card, vae=encodes, text_encoder=encodes)


def rows(cases: Sequence[str], given: Card | None = None) -> list[str]:
    """Measure cases and predict them; return the lines of a table.

    Args:
        cases: of `CASES`.
        given: the card. None measures one for the ranks of a case before and after it, since the speed of a shared
            machine drifts by more than the model errs.
    """
    lines = ["| ranks and setup | predicted, s | measured, s | error | by the clock, s | largest parts |"]
    lines.append("|" + "---|" * 6)
    cards: dict[int, Card] = {}  # those measured last
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            ranks = CASES[case][0]
            before = given or cards.get(ranks) or calibrate(ranks)
            busy, clock = measure(case, Path(cache))
            cards = {ranks: given or calibrate(ranks)}
            found = predicted(case, _mean(before, cards[ranks]))
            parts = sorted(found.seconds.items(), key=lambda item: -item[1])[:4]
            shown = ", ".join(f"{name} {seconds / found.step:.0%}" for name, seconds in parts)
            figures = f"{found.step:.3f} | {busy:.3f} | {found.step / busy - 1:+.0%} | {clock:.3f}"
            lines.append(f"| {case} | {figures} | {shown} |")
            sys.stderr.write(f"{lines[-1]}\n")
    return lines


def _mean(first: Card, second: Card) -> Card:
    values, others = asdict(first), asdict(second)
    measured = {name: (value + others[name]) / 2 for name, value in values.items() if isinstance(value, float)}
    return replace(first, **measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate, predict and measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--calibrate", type=Path, metavar="JSON", help="only measure the card, and write it")
    parser.add_argument("--card", metavar="JSON", help="a card that was measured before")
    parser.add_argument("--gloo", type=Path, help=argparse.SUPPRESS)  # of the ranks that this starts
    parser.add_argument("--core", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options, words = parser.parse_known_args(argv)
    if folder := options.gloo or options.core:
        _measure_rank(folder, core=options.gloo is None)
        return 0
    if options.train:
        return _train_rank(options.train, words)
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    try:
        if options.calibrate:
            card = calibrate(len(os.sched_getaffinity(0)))
            options.calibrate.write_text(json.dumps(asdict(card), indent=1) + "\n", encoding="utf-8")
            return 0
        prepare_import()
        given = card_named(options.card) if options.card else None
        sys.stdout.write("\n".join([*rows(options.only, given), ""]))
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
