"""The loss on pairs of clips, alone and around a network with adapters."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.modules.diffusionmodules.preference import DiffusionDPOLoss
from sgm.modules.lora import adapters_of, without_adapters
from tests.sgm.modules.diffusionmodules.test_loss import DISCRETE, SHAPE, video_denoiser
from tests.test_dit_golden import GOLDEN, load


def test_the_loss_is_that_of_the_paper_with_errors_of_v():
    """Also at pure noise, timestep 999, where errors of noise say nothing."""
    loss, denoiser, beta = DiffusionDPOLoss(sigma_sampler_config=DISCRETE, beta=3.0), video_denoiser(), 3.0
    x, other, noise, idx = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([300, 999])
    outputs, is_reference = {True: torch.randn(SHAPE), False: torch.randn(SHAPE)}, [False]
    seen = []

    @contextmanager
    def reference():
        is_reference[0] = True
        yield
        is_reference[0] = False

    def network(noised, timesteps, cond):
        seen.append((is_reference[0], torch.is_grad_enabled(), timesteps.tolist(), cond["crossattn"].tolist()))
        return outputs[is_reference[0]].repeat(2, 1, 1, 1, 1)

    cond = {"crossattn": torch.tensor([[1.0], [2.0]])}
    found = loss(network, denoiser, x, cond, idx=idx, noise=noise, rejected=other, reference=reference)
    four = [300, 999, 300, 999], [[1.0], [2.0], [1.0], [2.0]]
    assert seen == [(True, False, *four), (False, True, *four)]
    a = denoiser.table.at(idx).view(-1, 1, 1, 1, 1)
    errors = {
        (kind, name): ((outputs[kind] - (a * noise - (1 - a**2) ** 0.5 * clip)) ** 2).flatten(1).mean(dim=1)
        for kind in outputs
        for name, clip in (("chosen", x), ("rejected", other))
    }
    changes = [errors[False, name] - errors[True, name] for name in ("chosen", "rejected")]
    expected = -F.logsigmoid(-beta / 2 * (changes[0] - changes[1]))
    torch.testing.assert_close(found, expected)
    values = loss.validation_values(found)
    torch.testing.assert_close(values["margin"], -beta / 2 * (changes[0] - changes[1]), rtol=1e-4, atol=1e-4)
    assert values["accuracy"].tolist() == (values["margin"] > 0).float().tolist()
    with pytest.raises(ValueError, match="rejected"):
        loss(network, denoiser, x, cond, idx=idx, noise=noise)


def test_values_of_validation_at_both_ends():
    values = DiffusionDPOLoss.validation_values(torch.tensor([math.log(2), 0.0, 100.0]))
    assert values["accuracy"].tolist() == [0.5, 1, 0]
    assert values["margin"][0].abs() < 1e-6 and values["margin"].isfinite().all()


def test_the_reference_is_the_network_without_its_adapters():
    network, inputs, _ = load(GOLDEN / "dit_t2v_5b_lora")
    plain, _, _ = load(GOLDEN / "dit_t2v_5b_lora")
    for _, adapter in adapters_of(plain):
        for matrix in adapter.matrix_B:
            matrix.data.zero_()
    with torch.no_grad():
        adapted = network(*inputs)
        with without_adapters(network):
            assert torch.equal(network(*inputs), plain(*inputs))
        assert torch.equal(network(*inputs), adapted) and not torch.equal(plain(*inputs), adapted)


def test_a_pair_without_adapters_effect_has_the_loss_log_2_and_a_gradient_that_prefers_the_chosen_clip():
    network, (x, timesteps, context), _ = load(GOLDEN / "dit_t2v_5b_lora")
    for _, adapter in adapters_of(network):
        for matrix in adapter.matrix_B:
            matrix.data.zero_()
    loss = DiffusionDPOLoss(sigma_sampler_config=DISCRETE, beta=100.0)
    plain = VideoDiffusionLoss(sigma_sampler_config=DISCRETE)
    trained = [matrix for _, adapter in adapters_of(network) for matrix in adapter.matrix_B]
    other, noise, idx = torch.randn_like(x), torch.randn_like(x), torch.randint(0, 1000, (len(x),))

    def call(noised, steps, cond):
        return network(noised, steps, cond["crossattn"])

    given = {"idx": idx, "noise": noise}
    pair = {"rejected": other, "reference": lambda: without_adapters(network)}
    found = loss(call, video_denoiser(), x, {"crossattn": context}, **given, **pair)
    torch.testing.assert_close(found, torch.full_like(found, math.log(2)))
    gradient = torch.autograd.grad(found.sum(), trained)
    sides = [plain(call, video_denoiser(), clip, {"crossattn": context}, **given).sum() for clip in (x, other)]
    expected = torch.autograd.grad(100.0 / 4 * (sides[0] - sides[1]), trained)
    for one, two in zip(gradient, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
