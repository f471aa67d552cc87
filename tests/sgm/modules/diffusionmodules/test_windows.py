"""Clips denoised in windows along time: by a stand-in for the denoiser, and by tiny networks."""

import pytest
import torch

from sgm.modules.diffusionmodules.windows import TimeLoop, TimeWindows, led_in
from sgm.util import InputError
from tests.geometries import PATCHED, ROTARY, SINCOS
from tests.sgm.checks.test_sampling import refusal
from tests.sgm.models.test_video_diffusion import make_engine  # noqa: F401 - a fixture


def identity(x, levels, cond, **_):
    return x


@pytest.mark.parametrize(
    ("length", "overlap", "patch", "num", "starts"),
    [
        (5, 2, 1, 9, [0, 3, 4]),
        (5, 4, 1, 17, list(range(13))),
        (4, 2, 1, 8, [0, 2, 4]),
        (8, 2, 2, 22, [0, 6, 12, 14]),
        (5, 2, 1, 3, [0]),
    ],
)
def test_windows_cover_a_clip_and_blend_what_is_equal(length, overlap, patch, num, starts):
    windows = TimeWindows(length, overlap, patch)
    assert windows.starts(num) == starts
    x = torch.randn(2, num, 3, 2, 2)
    torch.testing.assert_close(windows.denoise(identity, x, torch.zeros(2), {}), x, rtol=0, atol=1e-6)


def test_neighbours_add_up_to_one_and_no_later_window_decides_its_first_patch():
    windows = TimeWindows(6, 4, 2)
    assert windows.weights(0, 10).tolist() == [1, 1, 1, 1, 0.5, 0.5]
    assert windows.weights(2, 10)[:2].tolist() == [0, 0] and windows.weights(4, 10)[-1] == 1
    seen = []

    def number(x, levels, cond, **_):
        assert torch.equal(cond["concat"], cond["control"]) and cond["crossattn"].shape == (1, 3)
        seen.append(cond["concat"][0, :, 0, 0, 0].tolist())
        return torch.full_like(x, len(seen))

    concat = torch.arange(8.0).view(1, 8, 1, 1, 1)
    cond = {"concat": concat, "control": concat, "crossattn": torch.zeros(1, 3)}
    found = TimeWindows(4, 2, 1).denoise(number, torch.zeros(1, 8, 1, 1, 1), torch.zeros(1), cond)
    assert seen == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert found.flatten().tolist() == [1, 1, 1, 1.5, 2, 2.5, 3, 3]


@pytest.mark.parametrize(("patch", "first"), [(1, [[3, 0, 1, 2, 3], [0, 1, 2, 3, 0]]), (2, [[2, 3, 0, 1, 2, 3]])])
def test_a_loop_begins_elsewhere_at_each_step_and_answers_stay_in_place(patch, first):
    loop, seen = TimeLoop(patch), []
    x = torch.arange(4.0).view(1, 4, 1, 1, 1)

    def answer(x, levels, cond, **_):
        seen.append(x.flatten().tolist())
        return torch.cat((torch.full_like(x[:, :patch], -1), 10 * x[:, patch:]), dim=1)

    for _ in range(5):
        assert torch.equal(loop.denoise(answer, x, torch.zeros(1), {}), 10 * x)
    assert seen[: len(first)] == first and seen[4] == seen[0] != seen[1]
    assert led_in(x, 6).flatten().tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5"])
def test_a_window_that_holds_the_clip_changes_nothing_and_shorter_ones_serve_every_family(make_engine, name):  # noqa: F811
    engine = make_engine(name)
    network = engine.network
    num = network.grid[0] * network.patch_size[0]
    height, width = (side * patch for side, patch in zip(network.grid[1:], network.patch_size[1:], strict=True))
    width_text = network.mixins["patch_embed"].text_proj.in_features
    text = torch.randn(1, network.mixins["pos_embed"].text_length, width_text)

    def sampled(num_latents, windows, **more):
        engine.windows = windows
        concat = torch.randn(1, num_latents, 16, height, width) if network.in_channels == 32 else None
        shape = (num_latents, 16, height, width)
        generators = [torch.Generator().manual_seed(1)]
        given = {"concat": concat, "num_steps": 2, "generators": generators, **more}
        try:
            return engine.sample({"crossattn": text}, {"crossattn": 0 * text}, shape=shape, **given)
        finally:
            engine.windows = None

    torch.manual_seed(0)
    whole = sampled(num, None)
    torch.manual_seed(0)
    assert torch.equal(sampled(num, TimeWindows(num, network.patch_size[0], network.patch_size[0])), whole)
    longer = sampled(2 * num - 1, TimeWindows(num, network.patch_size[0], network.patch_size[0]))
    assert longer.shape[1] == 2 * num - 1 and longer.isfinite().all()
    if network.in_channels == 16:
        patch = network.patch_size[0]
        looped = sampled(2 * num, TimeWindows(num, patch, patch), loop=True)
        assert looped.shape[1] == 2 * num and looped.isfinite().all()


@pytest.mark.parametrize(
    ("geometry", "given", "text"),
    [
        (
            ROTARY,
            {"time_window": 14},
            "is 14 latent frames, and the network was trained on 13 at once",
        ),
        (PATCHED, {"time_window": 21}, "args.time_window: is 21"),
        (SINCOS, {"time_window": 14, "time_scaling": "riflex"}, "give 13 or fewer"),
        (ROTARY, {"time_window": 13, "time_window_overlap": 13}, "args.time_window_overlap: is 13"),
        (PATCHED, {"time_window": 22, "time_window_overlap": 3}, "multiple of 2 latent frames, the temporal patch"),
        (SINCOS, {"time_scaling": "riflex"}, "set args.time_window"),
        (SINCOS, {"sampling_num_frames": 14}, "args.time_window=13 denoises longer clips in windows"),
        (ROTARY, {"sampling_num_frames": 14}, "args.time_scaling=riflex"),
    ],
)
def test_lengths_that_no_window_or_scaling_has(geometry, given, text):
    assert text in refusal(geometry, **given)


def test_a_network_scales_positions_of_longer_clips_alone(make_engine):  # noqa: F811
    network = make_engine("dit_t2v_1.5").network
    patch, (num, height, width) = network.patch_size, network.grid
    text = torch.randn(1, network.mixins["pos_embed"].text_length, network.mixins["patch_embed"].text_proj.in_features)

    def output(scaling, factor):
        torch.manual_seed(0)
        x = torch.randn(1, factor * num * patch[0], network.in_channels, height * patch[1], width * patch[2])
        network.use_time_scaling(scaling)
        try:
            with torch.no_grad():
                return network(x, torch.tensor([500]), text)
        finally:
            network.use_time_scaling("extrapolate")

    assert torch.equal(output("interpolate", 1), output("extrapolate", 1))
    assert not torch.allclose(output("interpolate", 2), output("extrapolate", 2), atol=1e-5)
    with pytest.raises(InputError, match=r"args\.time_scaling is riflex"):
        make_engine("dit_t2v_2b").network.use_time_scaling("riflex")
