from collections.abc import Iterable, Sequence

import pytest
import torch

from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler, VideoSampler, VPSDEDPMPP2MSampler
from sgm.util import InputError, instantiate_from_config

PREFIX = "sgm.modules.diffusionmodules"
DISCRETIZATION = {"target": f"{PREFIX}.discretizer.ZeroSNRDDPMDiscretization"}
VANILLA = {"target": f"{PREFIX}.guiders.VanillaCFG", "params": {"scale": 3.0}}
SHAPE = (2, 3, 2, 2, 2)
SAMPLERS = [VPSDEDPMPP2MSampler, VideoDDIMSampler]


class Sigmas:
    """A discretization in σ."""

    def __call__(self, n: int, *, flip: bool = False) -> torch.Tensor:
        return torch.linspace(1, 0, n)


class Thirds:
    """A custom discretization: levels √ᾱ and timesteps."""

    def timesteps(self, n: int) -> torch.Tensor:
        return torch.tensor([0, 500, 999])

    def __call__(self, n: int, *, flip: bool = False) -> torch.Tensor:
        return torch.tensor([0.0, 0.5, 0.9])


def test_a_foreign_discretization_works() -> None:
    schedule = build(VideoDDIMSampler, discretization_config={"target": f"{__name__}.Thirds"}).schedule()
    assert schedule.timesteps == [999, 500, 0]
    assert schedule.alphas_cumprod_sqrt == pytest.approx([0.0, 0.5, 0.9, 1.0])


def build(cls: type[VideoSampler], **params: object) -> VideoSampler:
    return cls(**{"discretization_config": DISCRETIZATION, "num_steps": 8, **params})


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gaussian_denoiser(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
    """The exact posterior mean for normal data with mean 3 and standard deviation 0.5."""
    a = a.view(-1, 1, 1, 1, 1)
    gain = a * 0.25 / (a**2 * 0.25 + 1 - a**2)
    return 3 + gain * (x - 3 * a)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_known_target_is_reached_exactly(cls: type[VideoSampler]) -> None:
    target = torch.randn(SHAPE)
    result = build(cls)(lambda x, a, cond, *, idx: target, torch.randn(SHAPE), {})
    assert torch.equal(result, target)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_exact_denoiser_gives_samples_of_its_distribution(cls: type[VideoSampler]) -> None:
    noise = torch.randn((1, 1, 1, 100, 200), generator=torch.Generator().manual_seed(0))
    result = build(cls, num_steps=100)(gaussian_denoiser, noise, {}, generators=generators(1))
    assert result.mean().item() == pytest.approx(3, abs=0.02)
    assert result.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 999, 1000])
def test_every_number_of_steps_stays_finite(cls: type[VideoSampler], num_steps: int) -> None:
    result = build(cls)(gaussian_denoiser, torch.randn(1, 1, 1, 2, 2), {}, num_steps=num_steps)
    assert torch.isfinite(result).all()


def test_schedule_starts_at_noise_and_ends_clean() -> None:
    schedule = build(VPSDEDPMPP2MSampler).schedule()
    assert schedule.timesteps == [999, 874, 749, 624, 499, 374, 249, 124]
    assert schedule.timesteps[::-1] == build(VPSDEDPMPP2MSampler).timesteps().tolist()
    assert schedule.alphas_cumprod_sqrt[0] == 0.0
    assert schedule.alphas_cumprod_sqrt[-1] == 1.0
    assert sorted(schedule.alphas_cumprod_sqrt) == schedule.alphas_cumprod_sqrt


def test_denoiser_sees_each_level_with_its_timestep() -> None:
    seen = []

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
        seen.append((a[0].item(), idx[0].item(), idx.dtype))
        return x

    sampler = build(VideoDDIMSampler)
    sampler(denoise, torch.randn(SHAPE), {}, num_steps=5)
    schedule = sampler.schedule(5)
    assert [idx for _, idx, _ in seen] == schedule.timesteps == [999, 799, 599, 399, 199]
    assert [a for a, _, _ in seen] == schedule.alphas_cumprod_sqrt[:-1]
    assert {dtype for _, _, dtype in seen} == {torch.int64}


def test_dpmpp_sample_with_generators_does_not_depend_on_its_batch() -> None:
    sampler = build(VPSDEDPMPP2MSampler)
    noise = torch.randn(SHAPE)
    batch = sampler(gaussian_denoiser, noise, {}, generators=generators(1, 2))
    alone = sampler(gaussian_denoiser, noise[1:], {}, generators=generators(2))
    assert torch.equal(batch[1:], alone)
    assert not torch.equal(alone, sampler(gaussian_denoiser, noise[1:], {}, generators=generators(3)))


@pytest.mark.parametrize(("cls", "draws"), [(VPSDEDPMPP2MSampler, 2 * 8 - 1), (VideoDDIMSampler, 0)])
def test_number_of_random_draws(cls: type[VideoSampler], draws: int) -> None:
    used, counted = generators(5, 5)
    build(cls)(gaussian_denoiser, torch.randn(1, 1, 1, 4, 4), {}, generators=[used])
    for _ in range(draws):
        torch.randn((1, 1, 4, 4), generator=counted)
    assert torch.equal(used.get_state(), counted.get_state())


def test_guidance_doubles_the_batch_and_what_belongs_to_it() -> None:
    shapes = {}

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor, **kwargs: object) -> torch.Tensor:
        shapes.update(x=len(x), a=len(a), idx=len(idx), crossattn=len(cond["crossattn"]))
        shapes.update({name: getattr(value, "shape", value) for name, value in kwargs.items()})
        return cond["crossattn"].view(-1, 1, 1, 1, 1).expand_as(x)

    cond, uc = {"crossattn": torch.tensor([2.0, 4.0])}, {"crossattn": torch.tensor([1.0, 1.0])}
    sampler = build(VideoDDIMSampler, guider_config=VANILLA)
    result = sampler(denoise, torch.randn(SHAPE), cond, uc, ofs=torch.full((2,), 2.0), flag=True)
    assert shapes == {"x": 4, "a": 4, "idx": 4, "crossattn": 4, "ofs": (4,), "flag": True}
    assert result.flatten(1).mean(dim=1).tolist() == pytest.approx([1 + 3 * 1, 1 + 3 * 3])
    result = sampler(denoise, torch.randn(SHAPE), cond, uc, scale=2.0)
    assert result.flatten(1).mean(dim=1).tolist() == pytest.approx([1 + 2 * 1, 1 + 2 * 3])


def test_guidance_outside_of_its_interval_costs_nothing() -> None:
    rows = []

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return cond["crossattn"].view(-1, 1, 1, 1, 1).expand_as(x)

    cond, uc = {"crossattn": torch.tensor([2.0, 4.0])}, {"crossattn": torch.tensor([1.0, 1.0])}
    sampler = build(VideoDDIMSampler, guider_config=VANILLA)
    result = sampler(denoise, torch.randn(SHAPE), cond, uc, guidance_interval=(0.25, 0.75), scale=2.0)
    assert rows == [2, 2, 4, 4, 4, 4, 2, 2]
    assert result.flatten(1).mean(dim=1).tolist() == pytest.approx([2, 4])
    rows.clear()
    result = sampler(denoise, torch.randn(SHAPE), cond, uc, scale=1.0)
    assert rows == [2] * 8, "nor does a scale that is no guidance"
    assert result.flatten(1).mean(dim=1).tolist() == pytest.approx([2, 4])


def test_dynamic_guidance_follows_the_number_of_steps_of_the_run() -> None:
    sampler = build(
        VideoDDIMSampler,
        num_steps=50,
        guider_config={
            "target": f"{PREFIX}.guiders.DynamicCFG",
            "params": {"scale": 6, "exp": 5, "num_steps": 50},
        },
    )

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
        return cond["crossattn"].view(-1, 1, 1, 1, 1).expand_as(x)

    cond, uc = {"crossattn": torch.ones(1)}, {"crossattn": torch.zeros(1)}
    result = sampler(denoise, torch.randn(1, 1, 1, 2, 2), cond, uc, num_steps=8)
    # The last of 8 steps is at timestep 124.
    assert result.mean().item() == pytest.approx(sampler.guider.scale_at(124, num_steps=8))
    assert result.mean().item() != pytest.approx(sampler.guider.scale_at(124, num_steps=50))


@pytest.mark.parametrize("configured", [8, 50])
def test_dynamic_guidance_keeps_its_own_number_of_steps_otherwise(configured: int) -> None:
    guider = {
        "target": f"{PREFIX}.guiders.DynamicCFG",
        "params": {"scale": 6, "exp": 5, "num_steps": configured},
    }
    sampler = build(VideoDDIMSampler, num_steps=8, guider_config=guider)

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
        return cond["crossattn"].view(-1, 1, 1, 1, 1).expand_as(x)

    cond, uc = {"crossattn": torch.ones(1)}, {"crossattn": torch.zeros(1)}
    result = sampler(denoise, torch.randn(1, 1, 1, 2, 2), cond, uc)
    assert result.mean().item() == pytest.approx(sampler.guider.scale_at(124, num_steps=configured))
    assert result.mean().item() != pytest.approx(sampler.guider.scale_at(124, num_steps=58 - configured))


def test_progress_wraps_the_steps_only_when_verbose() -> None:
    wrapped = []

    def progress(steps: Sequence[int]) -> Iterable[int]:
        wrapped.append(len(steps))
        return steps

    for verbose in (True, False):
        build(VideoDDIMSampler, verbose=verbose)(gaussian_denoiser, torch.randn(SHAPE), {}, progress=progress)
    assert wrapped == [8]


@pytest.mark.parametrize("cls", SAMPLERS)
def test_the_denoised_latents_of_every_step_can_be_looked_at(cls: type[VideoSampler]) -> None:
    sampler, noise, seen = build(cls, num_steps=3, guider_config=VANILLA), torch.randn(SHAPE), []
    result = sampler(gaussian_denoiser, noise, {}, {}, generators=generators(1, 2), after_step=seen.append)
    assert torch.equal(result, sampler(gaussian_denoiser, noise, {}, {}, generators=generators(1, 2)))
    assert [x.shape for x in seen] == [SHAPE] * 3 and torch.equal(seen[-1], result), "the last step ends at them"


def test_result_has_the_dtype_of_the_noise_while_the_steps_are_float32() -> None:
    dtypes = set()

    def denoise(x: torch.Tensor, a: torch.Tensor, cond: dict, *, idx: torch.Tensor) -> torch.Tensor:
        dtypes.add(x.dtype)
        return x.bfloat16()

    assert build(VideoDDIMSampler)(denoise, torch.randn(SHAPE).bfloat16(), {}).dtype == torch.bfloat16
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"num_steps": 2000}, "num_steps is 2000"),
        ({"discretization_config": {"target": f"{__name__}.Sigmas"}}, "from 0 to 1, but √ᾱ is at least 0 and below 1"),
    ],
)
def test_impossible_configuration_is_refused(params: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        instantiate_from_config(
            {
                "target": f"{PREFIX}.sampling.VPSDEDPMPP2MSampler",
                "params": {"discretization_config": DISCRETIZATION, "num_steps": 8, **params},
            }
        )


def test_inversion_undoes_the_steps_of_ddim():
    def denoise(x, levels, cond, *, idx):
        seen.append((levels.tolist(), idx.tolist()))
        return 0.8 * torch.tanh(x)

    sampler, x, seen = build(VideoDDIMSampler), torch.randn(SHAPE), []
    noise = sampler.invert(denoise, x, {}, num_iterations=40)
    schedule = sampler.schedule()
    assert seen[::40] == [
        ([schedule.alphas_cumprod_sqrt[i]] * 2, [schedule.timesteps[i]] * 2) for i in range(6, -1, -1)
    ]
    torch.testing.assert_close(sampler(denoise, noise, {}), 0.8 * torch.tanh(x), rtol=0, atol=1e-5)
    half = sampler.invert(denoise, x, {}, num_iterations=40, first_step=4)
    torch.testing.assert_close(sampler(denoise, half, {}, first_step=4), 0.8 * torch.tanh(x), rtol=0, atol=1e-5)
