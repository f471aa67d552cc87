"""The model of step times, with cards that are infinitely fast in all but one."""

import dataclasses

import pytest
import torch

import sgm.distributed
from sgm.checks.estimate import training_estimate
from sgm.checks.measure import network_usage
from sgm.checks.meta_run import build
from sgm.checks.scaling.cards import CARDS
from sgm.checks.scaling.step_time import CURES, LIMITS, predict
from sgm.config.load import load_config
from sgm.training.optim.trainable import choose_trainable

FAST, GIB = 1e20, 2**30
BANDWIDTHS = ("memory", "intra", "inter", "host", "disk", "shared")
ALL = dataclasses.replace(
    CARDS["h100"],
    **{f"{name}_bandwidth": FAST for name in BANDWIDTHS},
    peak=FAST,
    products=1.0,
    attention=1.0,
    convolutions=1.0,
    intra_latency=0.0,
    inter_latency=0.0,
    clip_pixels=FAST,
)
ZERO = "deepspeed.zero_optimization"


def config_of(*settings: str):
    words = ["args.eval_interval=null", "deepspeed.train_micro_batch_size_per_gpu=1", *settings]
    return load_config(["configs/toy.yaml", "configs/toy_sft.yaml"], words, mode="train")


@pytest.fixture(scope="module")
def trained():
    config = config_of()
    return frozenset(choose_trainable(build(config.model["network_config"]), config.model).names)


@pytest.fixture
def seconds(trained):
    """Return the parts of an iteration that take time on a card which is fast but for what is given."""

    def parts(*settings: str, ranks: int = 1, vae: bool = False, text_encoder: bool = False, **slow):
        with sgm.distributed.planned(ranks):
            card = dataclasses.replace(ALL, **slow)
            found = predict(config_of(*settings), torch.float32, trained, card, vae=vae, text_encoder=text_encoder)
        return {name: value for name, value in found.seconds.items() if value > 1e-7}

    return parts


def test_what_the_network_computes_and_moves(seconds, trained):
    usage = network_usage(config_of(), (5, 64, 64), 1, torch.float32, trained=trained)
    found = seconds(peak=2e9, products=0.5)
    assert set(found) == {"products", "attention"}
    assert found["products"] == pytest.approx(usage.cost.products / 1e9)
    assert found["attention"] == pytest.approx(usage.cost.attention / 2e9)
    found = seconds(memory_bandwidth=1e9)
    assert set(found) == {"traffic", "optimizer"}
    assert found["traffic"] == pytest.approx(usage.cost.moved / 1e9)
    assert found["optimizer"] == pytest.approx(usage.trained * (6 * 4 + 12 + 28 + 16) / 1e9)
    state = [f"{ZERO}.stage={stage}" for stage in (0, 1, 2, 3)]
    steps = "deepspeed.gradient_accumulation_steps=2"
    moved = [seconds(stage, steps, state_bandwidth=1e9)["optimizer"] for stage in state]
    update, numbers = 12 + 28 + 16, usage.trained / 1e9
    assert moved[0] == pytest.approx(numbers * (12 + update - 16))
    assert moved[1] == pytest.approx(numbers * (12 + 24 + update))
    assert moved[2] == pytest.approx(numbers * (12 + 48 + update))
    assert moved[3] == pytest.approx(numbers * (12 + 48 + update) + 48 * usage.weights / 1e9)
    assert seconds(kernel_seconds=1e-5) == {"kernels": pytest.approx(usage.cost.kernels * 1e-5)}
    handled = [seconds(stage, steps, tensor_seconds=1e-3, gather_seconds=1e-2).get("kernels", 0) for stage in state]
    tensors = len(list(build(config_of().model["network_config"]).parameters()))
    assert len(trained) < tensors, "some are frozen"
    of_trained = len(trained) * 1e-3  # in one pass; stages 2 and 3 reduce in each, and stage 3 gathers twice in each
    assert handled == pytest.approx([0, of_trained, 2 * of_trained, 2 * of_trained + 2 * 2 * tensors * 1e-2])
    twice = seconds("deepspeed.gradient_accumulation_steps=2", peak=2e9, products=0.5)
    assert twice["products"] == pytest.approx(2 * usage.cost.products / 1e9)


def test_ranks_share_the_optimizer_and_cores(seconds, trained):
    one, four = (seconds(ranks=ranks, memory_bandwidth=1e9)["optimizer"] for ranks in (1, 4))
    usage = network_usage(config_of(), (5, 64, 64), 1, torch.float32, trained=trained)
    assert one - four == pytest.approx(3 / 4 * usage.trained * (12 + 28 + 16) / 1e9)
    alone, shared = (seconds(ranks=4, peak=1e9, slots=slots)["products"] for slots in (None, 2))
    assert shared == pytest.approx(2 * alone)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_zero_sends_is_that_of_the_estimate(seconds, trained, stage):
    config, settings = config_of(f"{ZERO}.stage={stage}"), (f"{ZERO}.stage={stage}", f"{ZERO}.overlap_comm=false")
    with sgm.distributed.planned(4):
        sent = training_estimate(config, torch.float32, trained, vae=False, text_encoder=False).traffic["ZeRO"]
    assert seconds(*settings, ranks=4, intra_bandwidth=1e6) == {"ZeRO": pytest.approx(sent / 1e6)}
    assert seconds(*settings, intra_bandwidth=1e6) == {}, "of one rank"


def test_a_backward_pass_hides_what_is_reduced_beside_it(seconds):
    settings = [f"{ZERO}.stage=2", f"{ZERO}.overlap_comm=true"]
    slow = {"ranks": 4, "intra_bandwidth": 1e9}
    plain = seconds(settings[0], f"{ZERO}.overlap_comm=false", **slow)["ZeRO"]
    hidden = seconds(*settings, **slow, peak=1e8)["ZeRO"]
    assert hidden == pytest.approx(plain / 3), "weights are gathered after it: a third"
    assert seconds(*settings, **slow, peak=1e8, overlaps=False)["ZeRO"] == pytest.approx(plain)
    assert seconds(*settings, **slow)["ZeRO"] == pytest.approx(plain), "there is nothing to hide it"


@pytest.mark.parametrize("axis", ["sequence_parallel_size", "model_parallel_size"])
def test_what_ranks_of_a_group_exchange(seconds, trained, axis):
    settings = [f"args.{axis}=2", f"{ZERO}.stage=1"]
    with sgm.distributed.planned(2):
        usage = network_usage(config_of(*settings), (5, 64, 64), 1, torch.float32, trained=trained)
    (sent,), (messages,) = usage.sent.values(), usage.messages.values()
    found = seconds(*settings, ranks=2, intra_bandwidth=1e8)
    assert found["groups"] == pytest.approx(sent / 1e8) and messages > 2
    hops = 4 if axis == "model_parallel_size" else 1  # an all-reduce passes a ring of two twice
    assert seconds(*settings, ranks=2, intra_latency=1e-4)["groups"] == pytest.approx(messages * hops * 1e-4)


def test_clips_are_encoded_and_read_beside_the_step(seconds):
    found = seconds(vae=True, peak=1e9)
    assert found["VAE"] > 0 and "VAE" not in seconds(peak=1e9)
    pixels = 17 * 64 * 64
    slow = {"clip_pixels": 1e5, "vae": True}
    assert seconds("args.num_workers=0", **slow) == {"data": pytest.approx(pixels / 1e5)}
    assert seconds("args.num_workers=2", **slow) == {"data": pytest.approx(pixels / 2e5)}
    assert seconds("args.num_workers=16", **slow, cores=4) == {"data": pytest.approx(pixels / 4e5)}
    assert "data" not in seconds("args.num_workers=2", **slow, peak=1e8)


CONTROL = "model.network_config.params.control_channels=16"
PAIRS = "model.loss_fn_config={target: sgm.modules.diffusionmodules.preference.DiffusionDPOLoss}"


@pytest.mark.parametrize("second", [CONTROL, PAIRS])
def test_a_second_video_is_encoded_and_read_too_and_a_caption_once(seconds, second):
    slow = {"vae": True, "text_encoder": True, "peak": 1e9}
    one, two = seconds(**slow), seconds(second, **slow)
    assert two["VAE"] == pytest.approx(2 * one["VAE"]) and two["text encoder"] == pytest.approx(one["text encoder"])
    read = [seconds(*more, "args.num_workers=0", vae=True, clip_pixels=1e5)["data"] for more in ((), (second,))]
    assert read[1] == pytest.approx(2 * read[0])


def test_saves_cost_their_share(seconds, trained):
    config = config_of()
    usage = network_usage(config, (5, 64, 64), 1, torch.float32, trained=trained)
    saved = 4 * usage.weights + (4 + 4 + 8) * usage.trained
    slow = {"disk_bandwidth": 1e8}
    assert seconds("args.save_interval=10", **slow) == {"saves": pytest.approx(saved / 1e8 / 10)}
    assert seconds("args.save_interval=5 epochs", **slow) == {}
    behind = seconds("args.save_interval=10", "args.async_save=true", **slow, host_bandwidth=1e9)
    assert behind == {"saves": pytest.approx((saved / 1e9 + saved / 1e8) / 10)}, "the next save waits for it"
    beside = seconds("args.save_interval=10", "args.async_save=true", **slow, host_bandwidth=1e9, peak=1e6)
    assert beside["saves"] == pytest.approx(saved / 1e9 / 10)


def test_the_largest_share_limits(trained):
    with sgm.distributed.planned(2):
        card = dataclasses.replace(ALL, peak=1e9, products=0.5)
        found = predict(config_of(), torch.float32, trained, card, vae=False, text_encoder=False)
    assert list(found.limits) == ["compute"] or found.limits["compute"] > 0.99
    assert found.samples == 2 and found.samples_per_second == 2 / found.step
    assert 0.3 < found.utilization < 1
    assert set(LIMITS.values()) == set(CURES)
