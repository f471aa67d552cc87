"""What work costs, counted on meta tensors."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sgm.checks.cost import Cost, sample_flops
from sgm.checks.measure import encode_usage, network_usage
from sgm.checks.meta_run import LiveBytes, build
from sgm.config.load import load_config
from sgm.util import instantiate_from_config
from vae_modules import convolutions


def counted(work) -> Cost:
    with LiveBytes() as live:
        work()
    return live.cost


@pytest.fixture(scope="module")
def config():
    return load_config(
        ["configs/toy.yaml", "configs/toy_sft.yaml"], ["args.checkpoint_activations=false"], mode="train"
    )


def test_products_attention_and_what_is_moved_are_told_apart():
    x, w = torch.randn(6, 8), torch.randn(8, 4)
    assert counted(lambda: x @ w) == Cost(products=2 * 6 * 8 * 4, kernels=1)
    assert counted(lambda: torch.add(x, x[:1])) == Cost(moved=4 * (48 + 8 + 48), kernels=1), "an expanded row once"
    assert counted(lambda: x.view(8, 6).t()) == Cost(), "views are no kernels"
    q, k = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 7, 4)
    forward = 4 * 2 * 3 * 5 * 7 * 4
    assert counted(lambda: functional.scaled_dot_product_attention(q, k, k)).attention == forward
    both = counted(lambda: functional.scaled_dot_product_attention(q, k, k).sum().backward())
    assert both.attention == 3.5 * forward


def test_costs_add_up():
    one, other = Cost(products=1, moved=2, kernels=1), Cost(attention=3, moved=4)
    assert one.plus(other, 2) == Cost(products=1, attention=6, moved=10, kernels=1)


def test_a_step_of_the_network_has_the_products_of_the_formula(config):
    """Three layers of embeddings are beside the blocks, and the scores are computed again in the backward pass."""
    network = build(config.model["network_config"])
    trained = frozenset(dict(network.named_parameters()))
    clip = (2, 64, 64)
    cost = network_usage(config, clip, 2, torch.float32, trained=trained).cost
    tokens = 2 * 4 * 4 + 16
    attention = 4 * len(network.blocks) * tokens**2 * network.hidden_size
    assert cost.attention == 2 * 3.5 * attention
    formula = sample_flops(network, tokens, trains_all=True) - 3 * attention
    assert cost.products == pytest.approx(2 * formula, rel=0.05)
    again = load_config(config.bases, ["args.checkpoint_activations=true"], mode="train")
    recomputed = network_usage(again, clip, 2, torch.float32, trained=trained).cost
    assert recomputed.attention == 2 * 4.5 * attention
    assert recomputed.products == pytest.approx(2 * 4 / 3 * formula, rel=0.05)


def test_convolutions_of_an_encoded_clip_are_those_that_torch_counts(config, monkeypatch):
    monkeypatch.setattr(convolutions, "FEWEST_PIXELS", 2**31)  # with combined weights, a CPU multiplies less
    cost = encode_usage(config, (9, 32, 32), torch.float32).cost
    vae = instantiate_from_config({**config.model["first_stage_config"]})
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode_moments(torch.zeros(1, 3, 9, 32, 32))
    assert cost.convolutions + cost.products == counter.get_total_flops() > 0
    config = load_config(config.bases, ["model.first_stage_config.params.encode_chunk=8"], mode="train")
    pieces = [encode_usage(config, (frames, 32, 32), torch.float32).cost.convolutions for frames in (9, 17, 25)]
    assert pieces[2] - pieces[1] == pieces[1] - pieces[0] > 0, "a chunk that is like one before costs as much"
