"""Released sizes on an accelerator; each test also runs at a tiny size on the CPU, which shows that it is right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sgm.distributed
from benchmarks.models import build_network, build_vae
from benchmarks.runs import (
    GuidedStep,
    Peak,
    TrainingRun,
    build_engine,
    free_memory,
    random,
    sampling_config,
    shape_of,
    step_estimate,
    text_of,
    training_config,
    training_inputs,
)
from sgm.training.optim.optimizer import make_optimizer
from sgm.training.optim.trainable import choose_trainable
from vae_modules.compiled_norms import CompiledNorms

CPU = torch.device("cpu")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator: released sizes in bfloat16"),
)
MODEL = "cogvideox_5b"


@dataclass(frozen=True)
class Place:
    """Where a test runs: a size of `benchmarks.runs.SIZES`, on a device."""

    size: str
    device: torch.device

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"


@pytest.fixture(params=[pytest.param("tiny", id="tiny"), pytest.param("released", id="released", marks=GPU)])
def place(request) -> Iterator[Place]:
    yield Place(request.param, CPU if request.param == "tiny" else sgm.distributed.device())
    if request.param != "tiny":
        free_memory()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference, relative to what is expected."""
    expected = expected.float()
    return float((found.to(expected.device).float() - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_vae_makes_the_same_whole_and_chunk_by_chunk(place):
    config = sampling_config(MODEL, place.size)
    dtype, bound = (torch.float32, 1e-5) if place.is_tiny else (torch.bfloat16, 2e-2)
    vae = build_vae(config.model["first_stage_config"], device=place.device, dtype=dtype)
    num, first = (4, 2) if place.is_tiny else (13, 5)
    height, width = (side // 8 for side in config.args.sampling_image_size)
    latents = random(1, 16, num, height, width, device=place.device, dtype=dtype)
    video = random(1, 3, 4 * num - 3, 8 * height, 8 * width, device=place.device, dtype=dtype)
    whole, moments = vae.decode(latents), vae.encode_moments(video)
    assert whole.shape == video.shape and whole.isfinite().all() and moments.isfinite().all()
    start = 0
    for chunk in vae.decode_in_chunks(latents):
        assert torch.equal(chunk, whole[:, :, start : start + chunk.shape[2]])
        start += chunk.shape[2]
    assert start == whole.shape[2]
    # Later latents change nothing, nor do smaller pieces in the kernels.
    assert error(vae.decode(latents[:, :, :first]), whole[:, :, : 4 * first - 3]) <= bound
    vae.max_elements = vae.decoder.width * video[0, 0, 0].numel()
    assert error(vae.decode(latents), whole) <= bound
    assert error(vae.encode_moments(video), moments) <= bound


def test_a_step_in_bfloat16_is_near_one_in_float32(place):
    config = sampling_config(MODEL, place.size)
    low = GuidedStep(config, place.device, torch.bfloat16)
    high = build_network(config.model["network_config"], device=place.device, dtype=torch.float32)
    high.load_state_dict(low.network.state_dict())
    x, timesteps, text = low.inputs
    with torch.no_grad():
        assert 1e-4 < error(low(), high(x.float(), timesteps, text.float())) <= 5e-2


@pytest.fixture
def counters():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.thorough
def test_three_shapes_are_compiled_once(place, counters):
    step = GuidedStep(sampling_config(MODEL, place.size), place.device, torch.bfloat16)
    step.network.compile(**({"backend": "eager"} if place.is_tiny else {}))
    x, timesteps, text = step.inputs
    shapes = [x, x[:, :1], x[:, :2, :, :, : x.shape[4] // 4 * 2]]
    with torch.no_grad():
        first = [step.network(shape, timesteps, text) for shape in shapes]
        graphs = counters["stats"]["unique_graphs"]
        again = [step.network(shape, (timesteps[:1] // 2 + 1).expand(2), 2 * text) for shape in shapes]
    assert 1 <= graphs <= 2 and counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert all(torch.isfinite(out).all() for out in (*first, *again))


@pytest.mark.thorough
@torch.no_grad()
def test_compiled_norms_of_the_vae_change_nothing_but_rounding(place, counters):
    config = sampling_config(MODEL, place.size)
    dtype, bound = (torch.float32, 1e-5) if place.is_tiny else (torch.bfloat16, 2e-2)
    vae = build_vae(config.model["first_stage_config"], device=place.device, dtype=dtype)
    height, width = (side // 8 for side in config.args.sampling_image_size)
    latents = random(1, 16, 4, height, width, device=place.device, dtype=dtype)
    video = random(1, 3, 13, 8 * height, 8 * width, device=place.device, dtype=dtype)
    expected = vae.decode(latents), vae.encode_moments(video)
    vae._compiled_norms = CompiledNorms(**({"backend": "eager"} if place.is_tiny else {}))
    assert error(vae.decode(latents), expected[0]) <= bound
    assert error(vae.encode_moments(video), expected[1]) <= bound
    graphs = counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 5 and not counters["graph_break"]
    vae.decode(latents[..., : width // 2])
    assert counters["stats"]["unique_graphs"] == graphs


class _NoValues(TorchDispatchMode):
    """Refuses what makes the host wait for an accelerator: operators whose values or shapes the host must know."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # SAT gives a layer its number as a tensor, which is on the host everywhere.
        is_number = name == "_local_scalar_dense" and args[0].dtype == torch.int64
        if name in self.REFUSED and not is_number:
            raise RuntimeError(f"called a synchronizing operator: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with _NoValues():
            yield


def test_the_host_does_not_wait_in_a_training_step(place):
    config = training_config(MODEL, place.size, lora=True)
    engine = build_engine(config, place.device, torch.bfloat16)
    choose_trainable(engine.network, config.model)
    engine.network.train()
    optimizer = make_optimizer(config.deepspeed["optimizer"], engine.network.named_parameters())
    inputs = training_inputs(config, engine)

    def step() -> torch.Tensor:
        loss = engine.training_losses(inputs).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    before = step()  # makes the state of the optimizer
    with no_synchronization(place.device):
        after = step()
        with pytest.raises(RuntimeError, match="called a synchronizing"):
            after.item()
    assert after.isfinite() and after != before


@pytest.mark.parametrize("device", [pytest.param("cpu", id="cpu"), pytest.param(None, id="accelerator", marks=GPU)])
def test_a_seed_gives_the_latents_of_the_cpu(device):
    """On the CPU in float64, which is as another device."""
    config = sampling_config(MODEL, "tiny")
    expected = build_engine(config, CPU, torch.float32)
    place, dtype = (CPU, torch.float64) if device else (sgm.distributed.device(), torch.float32)
    engine = build_engine(config, place, dtype)
    engine.network.load_state_dict(expected.network.state_dict())

    def latents(engine, seed: int) -> torch.Tensor:
        text = text_of(engine, 1)
        generators = [torch.Generator().manual_seed(seed)]
        conds = {"crossattn": text}, {"crossattn": -text}
        return engine.sample(*conds, shape=shape_of(config, engine), generators=generators, num_steps=3)

    ours = latents(engine, 7)
    assert ours.dtype == torch.float32 and ours.device == engine.device
    assert error(ours, latents(expected, 7)) <= 1e-3 < 0.1 < error(ours, latents(expected, 8))


LAYERS = "model.network_config.params.num_layers=4"
INT8, FP8, BLOCKS = "args.weights=int8", "args.weights=fp8", "args.network_offload=blocks"


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("tiny", (INT8,)),
        ("tiny", (BLOCKS,)),
        *(pytest.param("released", each, marks=GPU) for each in ((), (INT8,), (FP8,), (BLOCKS,), (INT8, BLOCKS))),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_the_peak_of_a_guided_step_is_the_planners(size, settings):
    if any("weights" in setting for setting in settings):
        pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")
    device = CPU if size == "tiny" else sgm.distributed.device()
    more = [LAYERS] if size == "tiny" else []  # so that two blocks are not all
    step = GuidedStep(sampling_config(MODEL, size, *settings, *more), device, torch.bfloat16)
    assert step.peak() == pytest.approx(step.estimate(), rel=0.05)


@pytest.mark.parametrize("lora", [True, False])
def test_the_peak_of_a_training_step_is_the_planners(place, lora):
    config = training_config(MODEL, place.size, lora=lora)
    estimate = step_estimate(config, torch.bfloat16)
    if not place.is_tiny and estimate > (room := torch.accelerator.get_memory_info()[0]):
        pytest.skip(f"an estimated {estimate / 2**30:.0f} GiB, and the card has {room / 2**30:.0f} free")
    with Peak(place.device) as peak:
        run = TrainingRun(config, place.device, torch.bfloat16)
        run.start()
        try:
            run.step()  # makes the state of the optimizer
            peak.restart()
            run.step()
            found = peak.bytes
        finally:
            run.close()
    assert found == pytest.approx(estimate, rel=0.05)
