from types import SimpleNamespace

import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.util import InputError, instantiate_from_config

PREFIX = "sgm.modules.diffusionmodules"
ZERO_SNR = {"target": f"{PREFIX}.discretizer.ZeroSNRDDPMDiscretization"}
DISCRETE = {
    "target": f"{PREFIX}.sigma_sampling.DiscreteSampling",
    "params": {"num_idx": 1000, "discretization_config": ZERO_SNR},
}
SHAPE = (2, 3, 2, 4, 4)


class Sigmas:
    """A sigma sampler without timesteps."""


def video_denoiser() -> DiscreteDenoiser:
    return DiscreteDenoiser(
        num_idx=1000,
        discretization_config=ZERO_SNR,
        scaling_config={"target": f"{PREFIX}.denoiser_scaling.VideoScaling"},
        weighting_config={"target": f"{PREFIX}.denoiser_weighting.EpsWeighting"},
    )


def zero_network(x: torch.Tensor, timesteps: torch.Tensor, cond: dict) -> torch.Tensor:
    return torch.zeros_like(x)


def test_video_loss_is_the_squared_error_of_v() -> None:
    loss, denoiser = VideoDiffusionLoss(sigma_sampler_config=DISCRETE), video_denoiser()
    x, noise, output = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    idx = torch.tensor([100, 900])
    a = denoiser.table.at(idx).view(-1, 1, 1, 1, 1)
    v = a * noise - (1 - a**2) ** 0.5 * x
    result = loss(lambda *_: output, denoiser, x, {}, idx=idx, noise=noise)
    torch.testing.assert_close(result, ((output - v) ** 2).flatten(1).mean(dim=1))


def test_perfect_network_has_no_loss() -> None:
    loss, denoiser = VideoDiffusionLoss(sigma_sampler_config=DISCRETE), video_denoiser()
    x, noise, idx = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 999])
    a = denoiser.table.at(idx).view(-1, 1, 1, 1, 1)
    v = a * noise - (1 - a**2) ** 0.5 * x
    assert loss(lambda *_: v, denoiser, x, {}, idx=idx, noise=noise).max() < 1e-9


def test_timesteps_are_drawn_before_the_noise() -> None:
    loss, denoiser, x = VideoDiffusionLoss(sigma_sampler_config=DISCRETE), video_denoiser(), torch.randn(SHAPE)
    by_hand = torch.Generator().manual_seed(3)
    idx = torch.randint(0, 1000, (2,), generator=by_hand)
    noise = torch.randn(SHAPE, generator=by_hand)
    drawn = loss(zero_network, denoiser, x, {}, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, loss(zero_network, denoiser, x, {}, idx=idx, noise=noise))
    assert not torch.equal(drawn, loss(zero_network, denoiser, x, {}, generator=torch.Generator().manual_seed(4)))


def test_min_snr_value_bounds_the_weight() -> None:
    x, noise, idx = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 999])
    denoiser = video_denoiser()
    given = {"idx": idx, "noise": noise}
    plain = VideoDiffusionLoss(sigma_sampler_config=DISCRETE)(zero_network, denoiser, x, {}, **given)
    bounded = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, min_snr_value=5.0)(
        zero_network, denoiser, x, {}, **given
    )
    weight = 1 / (1 - denoiser.table.at(idx) ** 2)
    assert bounded[0].item() == pytest.approx(plain[0].item() * 5 / weight[0].item(), rel=1e-5)
    assert bounded[1] == plain[1]


def test_offset_noise_is_shared_by_a_sample() -> None:
    x = torch.zeros(2, 3, 2, 4, 4)
    loss = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, offset_noise_level=10.0)
    plain = VideoDiffusionLoss(sigma_sampler_config=DISCRETE)
    offset = loss.draw_noise(x, torch.Generator().manual_seed(1)) - plain.draw_noise(
        x, torch.Generator().manual_seed(1)
    )
    assert offset.flatten(1).std(dim=1).max() < 1e-5
    assert abs(offset[0].mean() - offset[1].mean()) > 0.1


def test_l1_takes_the_absolute_error() -> None:
    x, idx = torch.randn(SHAPE), torch.tensor([999, 999])
    noise = torch.randn(SHAPE)
    loss = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, type="l1")
    # At the last timestep √ᾱ is 0, so the weight is 1 and the zero network's result is 0.
    result = loss(zero_network, video_denoiser(), x, {}, idx=idx, noise=noise)
    torch.testing.assert_close(result, x.abs().flatten(1).mean(dim=1))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"type": "lpips"}, "loss type 'lpips'.*l2, l1"),
        ({"offset_noise_level": -1.0}, "offset_noise_level is -1"),
        ({"sigma_sampler_config": {"target": f"{__name__}.Sigmas"}}, "Sigmas, which draws no timesteps"),
    ],
)
def test_impossible_configuration_is_refused(params: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        instantiate_from_config(
            {"target": f"{PREFIX}.loss.VideoDiffusionLoss", "params": {"sigma_sampler_config": DISCRETE, **params}}
        )


@pytest.mark.parametrize("bound", [None, 5.0])
def test_the_huber_loss_is_that_of_the_error_of_v(bound) -> None:
    denoiser, idx = video_denoiser(), torch.tensor([100, 900])
    x, noise, output = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    a = denoiser.table.at(idx).view(-1, 1, 1, 1, 1)
    error = (output - a * noise + (1 - a**2) ** 0.5 * x).flatten(1)

    def loss(**params):
        whole = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, min_snr_value=bound, **params)
        return whole(lambda *_: output, denoiser, x, {}, idx=idx, noise=noise)

    square = loss()
    torch.testing.assert_close(loss(type="huber", huber_delta=1e3), square)
    expected = torch.where(error.abs() <= 0.5, error**2, error.abs() - 0.25).mean(dim=1)
    torch.testing.assert_close(loss(type="huber", huber_delta=0.5), expected * square / (error**2).mean(dim=1))
    torch.testing.assert_close(loss(type="huber"), loss(type="huber", huber_delta=1.0), rtol=0, atol=0)


def test_a_delta_without_the_huber_loss_is_refused() -> None:
    with pytest.raises(InputError, match="huber_delta is 1, and the loss type l2 has none; set type to huber"):
        VideoDiffusionLoss(sigma_sampler_config=DISCRETE, huber_delta=1.0)


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_variants_of_min_snr_have_the_weights_of_their_papers(kind) -> None:
    """``min_snr`` as diffusers' trainers weight the error of v; γ between the SNRs of the timesteps."""
    from diffusers.training_utils import compute_snr

    denoiser, idx, bound = video_denoiser(), torch.tensor([20, 300, 700, 999]), 5.0
    x, noise, output = (torch.randn(4, *SHAPE[1:]) for _ in range(3))

    def loss(**params):
        whole = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, type=kind, **params)
        return whole(lambda *_: output, denoiser, x, {}, idx=idx, noise=noise)

    of_v = loss()
    snr = compute_snr(SimpleNamespace(alphas_cumprod=denoiser.table.at(torch.arange(1000)).double() ** 2), idx)
    assert snr[0] > bound > snr[1] and snr[-1] == 0
    expected = {
        "bound": (snr + 1).clamp(max=bound) / (snr + 1),
        "min_snr": torch.stack([snr, torch.full_like(snr, bound)]).amin(dim=0) / (snr + 1),
        "soft": snr * bound / (snr + bound) / (snr + 1),
    }
    for variant, weight in expected.items():
        torch.testing.assert_close(
            loss(min_snr_value=bound, min_snr_variant=variant), of_v * weight.float(), rtol=1e-4, atol=1e-7
        )
    with pytest.raises(InputError, match="min_snr_variant is soft without min_snr_value"):
        loss(min_snr_variant="soft")


@pytest.mark.parametrize("params", [{}, {"type": "l1"}, {"type": "huber", "huber_delta": 0.5}, {"min_snr_value": 5.0}])
def test_a_mask_leaves_the_mean_over_its_part_and_no_gradient_elsewhere(params) -> None:
    """Of two samples: one half of the cells of the first, and nothing of the second."""
    denoiser, idx = video_denoiser(), torch.tensor([100, 900])
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    output = torch.randn(SHAPE, requires_grad=True)
    mask = torch.zeros(2, 3, 1, 4, 4)
    mask[0, :, :, :2] = 1
    loss = VideoDiffusionLoss(sigma_sampler_config=DISCRETE, **params)

    def losses(part, **more):
        own = {"idx": idx, "noise": noise[..., part, :], **more}
        return loss(lambda *_: output[..., part, :], denoiser, x[..., part, :], {}, **own)

    found = losses(slice(None), mask=mask)
    torch.testing.assert_close(found[0], losses(slice(2))[0])
    assert found[1] == 0
    found.sum().backward()
    assert output.grad is not None and output.grad[0, ..., :2, :].abs().min() > 0
    assert not output.grad[0, ..., 2:, :].any() and not output.grad[1].any()
    torch.testing.assert_close(losses(slice(None), mask=torch.ones_like(mask)), losses(slice(None)))
