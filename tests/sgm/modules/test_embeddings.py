import math

import pytest
import torch

from sgm.modules.embeddings import (
    TIME_SCALINGS,
    _rotate_real,
    patchify,
    rope_table_3d,
    rotate,
    sincos_positions_3d,
    timestep_embedding,
    unpatchify,
)

GRID = (3, 4, 5)
HEAD_DIM = 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 2, 2), (1, 1, 1), (2, 1, 4)])
def test_unpatchify_inverts_patchify(patch_size):
    x = random(2, 4, 3, 8, 12)
    grid = tuple(length // patch for length, patch in zip((4, 8, 12), patch_size, strict=True))
    patches = patchify(x, patch_size)
    assert patches.shape == (2, math.prod(grid), 3 * math.prod(patch_size))
    assert torch.equal(unpatchify(patches, grid, patch_size), x)


def test_a_patch_is_ordered_by_channel_frame_row_column():
    x = random(1, 4, 3, 4, 6)
    patch = patchify(x, (2, 2, 2))[0, -1].reshape(3, 2, 2, 2)
    assert torch.equal(patch, x[0, 2:4, :, 2:4, 4:6].transpose(0, 1))


def test_patch_projection_equals_a_strided_convolution():
    x, weight = random(2, 3, 4, 6, 8), random(10, 4, 2, 2, seed=1)
    convolved = torch.nn.functional.conv2d(x.flatten(0, 1), weight, stride=2).unflatten(0, (2, 3))
    expected = convolved.permute(0, 1, 3, 4, 2).flatten(1, 3)
    torch.testing.assert_close(patchify(x, (1, 2, 2)) @ weight.flatten(1).T, expected, rtol=0, atol=1e-5)


def test_timestep_embedding_is_cosines_then_sines_of_geometric_frequencies():
    embedding = timestep_embedding(torch.tensor([0, 7]), 6)
    angles = [7 * 10000 ** (-k / 3) for k in range(3)]
    expected = [[1.0] * 3 + [0.0] * 3, [math.cos(a) for a in angles] + [math.sin(a) for a in angles]]
    torch.testing.assert_close(embedding, torch.tensor(expected), rtol=0, atol=1e-6)
    assert timestep_embedding(torch.tensor([7], dtype=torch.float16), 6).dtype == torch.float32


def test_sincos_table_splits_channels_into_frame_column_row():
    table = sincos_positions_3d(GRID, 32, (1.0, 2.0, 1.0)).reshape(*GRID, 32)
    frame, column, row = table.split((8, 12, 12), dim=-1)
    assert torch.equal(frame, frame[:, :1, :1].expand_as(frame))
    assert torch.equal(column, column[:1, :1].expand_as(column))
    assert torch.equal(row, row[:1, :, :1].expand_as(row))
    frequencies = torch.tensor([10000 ** (-k / 6) for k in range(6)])
    expected = torch.cat(((3 / 2 * frequencies).sin(), (3 / 2 * frequencies).cos()))
    torch.testing.assert_close(row[0, 3, 0], expected, rtol=0, atol=1e-6)


def test_rotation_keeps_the_norm_of_every_pair_and_leaves_text_alone():
    cos, sin = rope_table_3d(GRID, HEAD_DIM, num_text=7)
    x = random(2, 7 + 60, 3, HEAD_DIM)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[:, :7], x[:, :7])
    assert (turned[:, 8:] - x[:, 8:]).abs().max() > 0.5
    pairs = [tensor.unflatten(-1, (-1, 2)).norm(dim=-1) for tensor in (x, turned)]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-5, atol=1e-5)


def test_scores_depend_on_relative_positions_only():
    cos, sin = rope_table_3d(GRID, HEAD_DIM)
    q, k = random(HEAD_DIM), random(HEAD_DIM, seed=1)
    queries, keys = (rotate(v.expand(1, 60, 1, -1), cos, sin).reshape(*GRID, -1) for v in (q, k))
    scores = torch.einsum("abcd,xyzd->abcxyz", queries, keys)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores[1, 2, 3, 0, 1, 1], scores[2, 3, 4, 1, 2, 2], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores[0, 0, 0, 0, 3, 1], scores[2, 0, 2, 2, 3, 3], rtol=0, atol=1e-5)


def test_channels_of_a_head_are_divided_two_to_three_to_three():
    cos, _ = rope_table_3d(GRID, HEAD_DIM)
    cos = cos.reshape(*GRID, HEAD_DIM)
    moved = [(cos.diff(dim=axis) != 0).any(dim=(0, 1, 2)).nonzero().flatten().tolist() for axis in range(3)]
    assert moved == [list(range(8)), list(range(8, 20)), list(range(20, 32))]


def test_table_of_a_smaller_grid_is_a_part_of_a_larger_one():
    large = rope_table_3d(GRID, HEAD_DIM)[1].reshape(*GRID, -1)
    small = rope_table_3d((2, 3, 4), HEAD_DIM)[1].reshape(2, 3, 4, -1)
    assert torch.equal(large[:2, :3, :4], small)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-22), (torch.float64, 2**-22), (torch.bfloat16, 2**-7)])
def test_the_rotation_and_its_gradient_are_those_of_the_plain_form(dtype, unit):
    cos, sin = rope_table_3d((200, 1, 1), HEAD_DIM, num_text=2)
    weights, results = random(2, 202, 3, HEAD_DIM, seed=1).to(dtype), []
    for form, kind in ((rotate, dtype), (_rotate_real, torch.float64)):
        x = random(2, 202, 3, HEAD_DIM).to(dtype).to(kind).requires_grad_()
        out = form(x, cos, sin)
        (gradient,) = torch.autograd.grad(out, x, weights.to(kind))
        assert out.dtype == gradient.dtype == kind
        results.append((out.detach().double(), gradient.double()))
    for given, own, exact in zip((random(2, 202, 3, HEAD_DIM), weights), *results, strict=True):
        # Two roundings, the first of one product of two.
        size = given.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
        assert ((own - exact).abs() <= unit * size).all()


def test_gradients_are_rotated_in_any_layout():
    """The math kernel of attention gives those of keys transposed."""
    cos, sin = rope_table_3d((4, 1, 1), HEAD_DIM)
    x = random(1, 4, 3, HEAD_DIM).requires_grad_()
    out = rotate(x, cos, sin)
    weights = random(1, 4, 3, HEAD_DIM, seed=1)
    transposed = weights.transpose(2, 3).contiguous().transpose(2, 3)
    found, expected = (torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in (transposed, weights))
    assert transposed.stride(-1) == 3 and torch.equal(found, expected)


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        rope_table_3d(GRID, 24)
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        sincos_positions_3d(GRID, 40)


@pytest.mark.parametrize("scaling", list(TIME_SCALINGS))
def test_positions_of_trained_lengths_are_not_scaled(scaling):
    plain = rope_table_3d((13, 2, 3), 64)
    for found in (
        rope_table_3d((13, 2, 3), 64, time_scaling=scaling, trained=13),
        tuple(table[: 13 * 6] for table in rope_table_3d((25, 2, 3), 64, time_scaling="extrapolate", trained=13)),
    ):
        assert all(map(torch.equal, found, plain))


def test_longer_clips_scale_the_frequencies_of_time_as_published():
    """CogVideoX: 13 latent frames, 8 components of time, of which RIFLEx changes the second (k = 2)."""

    def frequencies(scaling, length=25, trained=13):
        cos, sin = rope_table_3d((length, 1, 1), 64, time_scaling=scaling, trained=trained)
        plain = rope_table_3d((length, 1, 1), 64)
        assert torch.equal(cos[:, 16:], plain[0][:, 16:]), "rows and columns stay"
        return torch.atan2(sin[1, 1:16:2], cos[1, 1:16:2])

    plain = 10000.0 ** (-torch.arange(8) / 8)
    torch.testing.assert_close(frequencies("extrapolate"), plain)
    torch.testing.assert_close(frequencies("interpolate"), plain * 13 / 25)
    riflex = plain.clone()
    riflex[1] = 0.9 * 2 * math.pi / 25
    torch.testing.assert_close(frequencies("riflex"), riflex)
    torch.testing.assert_close(frequencies("riflex", length=17), plain), "within 0.9 of a period nothing repeats"
    # Of 33 trained frames, the third: 62.8 frames is the first period that holds them.
    riflex = plain.clone()
    riflex[2] = 0.9 * 2 * math.pi / 65
    torch.testing.assert_close(frequencies("riflex", length=65, trained=33), riflex)
    base = 10000.0 * (25 / 13) ** (16 / 14)  # the base that NTK-aware scaling changes
    torch.testing.assert_close(frequencies("ntk"), base ** (-torch.arange(8) / 8))
