import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import CONFIGS, build_vae, randomize, vae_section
from sgm.checks.measure import with_equal_parts_once
from sgm.checks.meta_run import LiveBytes
from sgm.parallel.sequence import shard_sizes
from sgm.util import InputError, instantiate_from_config, without_allocating
from tests.marks import only
from vae_modules import autoencoder, convolutions
from vae_modules.autoencoder import Tiling, VideoAutoencoderInferenceWrapper
from vae_modules.convolutions import Conv2d, Conv3d, UpsamplingConv2d
from vae_modules.layers import (
    CausalConv3d,
    Downsample3D,
    ResnetBlock3D,
    SpatialNorm3D,
    Stream,
    Upsample3D,
    each,
)
from vae_modules.regularizers import DiagonalGaussian, DiagonalGaussianRegularizer

# Not resources that tests of other modules left to the garbage collection.
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape):
    """Return a clip in −1..1 without much detail."""
    batch, channels, frames, height, width = shape
    small = random(batch, channels, frames // 2 + 1, height // 8, width // 8)
    return F.interpolate(small, size=shape[2:], mode="trilinear").clamp(-1, 1)


def section(ch_mult=(1, 1, 1, 1), **changes):
    result = vae_section("cogvideox_5b", ch=32, num_res_blocks=1)
    for part in ("encoder_config", "decoder_config"):
        result["params"][part]["params"]["ch_mult"] = list(ch_mult)
    result["params"] |= changes
    return result


@pytest.fixture(scope="module")
def shared() -> VideoAutoencoderInferenceWrapper:
    return build_vae(section())


@pytest.fixture
def vae(shared):
    """The shared autoencoder with other options."""
    return copy.copy(shared)


def streamed(layer, x, lengths):
    stream = Stream()
    pieces = list(x.split(lengths, dim=2))
    outputs = []
    for index, piece in enumerate(pieces):
        stream.begin_chunk(is_first=index == 0, is_last=index == len(pieces) - 1)
        outputs += layer([piece], stream)
    return torch.cat(outputs, dim=2)


def whole(layer, x, stream=None):
    """Apply a layer to one chunk of a clip."""
    return torch.cat(layer([x], stream or Stream()), dim=2)


def test_convolution_in_chunks_equals_the_whole():
    conv = CausalConv3d(4, 6, 3)
    x = random(2, 4, 9, 5, 6)
    expected = whole(conv, x)
    for lengths in ([9], [1] * 9, [3, 2, 4], [1, 8]):
        torch.testing.assert_close(streamed(conv, x, lengths), expected, rtol=0, atol=1e-6)


def test_convolution_never_sees_the_future_and_repeats_the_first_frame():
    conv = CausalConv3d(4, 6, 3)
    x = random(1, 4, 6, 5, 6)
    later = x.clone()
    later[:, :, 4:] += 1
    before, after = whole(conv, x), whole(conv, later)
    torch.testing.assert_close(before[:, :, :4], after[:, :, :4], rtol=0, atol=1e-6)
    assert (before[:, :, 4] - after[:, :, 4]).abs().max() > 0.01
    padded = F.pad(x, (1, 1, 1, 1))
    expected = F.conv3d(
        torch.cat((padded[:, :, :1], padded[:, :, :1], padded), dim=2), conv.conv.weight, conv.conv.bias
    )
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [[3, 2, 2, 2], [1, 2, 2, 2, 2], [1, 8]])
@pytest.mark.parametrize("compress_time", [False, True])
def test_resampling_in_chunks_equals_the_whole(compress_time, lengths):
    x = random(1, 4, 9, 4, 6)
    for layer in (Downsample3D(4, compress_time=compress_time), Upsample3D(4, compress_time=compress_time)):
        torch.testing.assert_close(streamed(layer, x, lengths), whole(layer, x), rtol=0, atol=1e-6)


def test_upsampling_equals_enlarging_and_then_smoothing():
    up = Upsample3D(4, compress_time=True)
    x = random(2, 4, 3, 4, 6)
    large = F.interpolate(x, scale_factor=(2, 2, 2))[:, :, 1:]
    expected = F.conv3d(large, up.conv.weight[:, :, None], up.conv.bias, padding=(0, 1, 1))
    torch.testing.assert_close(whole(up, x), expected, rtol=0, atol=1e-6)


def test_downsampling_averages_pairs_after_the_first_frame():
    down = Downsample3D(4, compress_time=True)
    x = random(1, 4, 5, 4, 6)
    frames = torch.stack((x[:, :, 0], x[:, :, 1:3].mean(2), x[:, :, 3:].mean(2)), dim=2)
    expected = F.conv3d(F.pad(frames, (0, 1, 0, 1)), down.conv.weight[:, :, None], down.conv.bias, stride=(1, 2, 2))
    torch.testing.assert_close(whole(down, x), expected, rtol=0, atol=1e-6)
    still = x[:, :, :1]
    assert whole(down, still).shape == (1, 4, 1, 2, 3)


@pytest.mark.parametrize(("is_first", "frames"), [(True, 9), (False, 12), (True, 1)])
@pytest.mark.parametrize("record", [False, True])
def test_spatial_norm_equals_its_formula(is_first, frames, record):
    norm = SpatialNorm3D(32, 4)
    randomize(norm, 0)
    t = (frames - 1) // 4 + 1
    x, latents = random(2, 32, frames, 8, 12), random(2, 4, t, 2, 3, seed=1)
    stream = Stream()
    stream.begin_chunk(is_first=is_first, is_last=True)
    index = [(i + 3) // 4 if is_first else i // 4 for i in range(frames)]
    large = F.interpolate(latents[:, :, index], size=x.shape[2:])
    expected = F.group_norm(x, 32, norm.norm_layer.weight, norm.norm_layer.bias, 1e-6)
    expected = F.silu(expected * norm.conv_y.conv(large) + norm.conv_b.conv(large))
    kept = x.clone()
    for length in (frames, 2, 1):
        pieces = list(x.split(length, dim=2))
        with torch.set_grad_enabled(record):
            normalize = norm(pieces, latents, stream)
            found = torch.cat(list(each(pieces, normalize)), dim=2)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(x, kept) and not pieces


@pytest.mark.parametrize("max_elements", [1, 3000, 20_000])
def test_layers_in_pieces_equal_the_whole(max_elements):
    x = random(2, 32, 9, 6, 4)
    norm = torch.nn.GroupNorm(8, 32)
    randomize(norm, 0)
    layers = [
        CausalConv3d(32, 16, 3),
        CausalConv3d(32, 64, 1),
        Downsample3D(32, compress_time=True),
        Downsample3D(32, compress_time=False),
        Upsample3D(32, compress_time=True),
        Upsample3D(32, compress_time=False),
        ResnetBlock3D(32, 64, 0.0),
        lambda x, stream: list(map(stream.group_norm(norm, x), x)),
    ]
    for layer in layers:
        more = (None,) if isinstance(layer, ResnetBlock3D) else ()
        for record in (False, True):
            found, expected = [], []
            for results, stream in ((found, Stream(max_elements)), (expected, Stream())):
                leaf = x.clone().requires_grad_(record)
                with torch.set_grad_enabled(record):
                    results.append(torch.cat(layer(stream.arranged([leaf], 64), *more, stream), dim=2))
                    if record:
                        results[0].sin().sum().backward()
                        results.append(leaf.grad)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("frames", "elements", "overlap", "expected"),
    [
        (9, 10, 0, [9]),
        (10, 10, 2, [5, 5]),
        (10, 10, 0, [10]),
        (11, 10, 0, [5, 6]),
        (2, 500, 0, [1, 1]),
    ],
)
def test_pieces_are_as_long_as_allowed_overlap_included(frames, elements, overlap, expected):
    assert Stream(100).lengths(frames, elements, overlap=overlap) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_norms_in_pieces_have_the_bits_of_the_kernel_and_copy_no_more_than_a_piece(mean, dtype):
    norm = torch.nn.GroupNorm(32, 64).to(dtype)
    randomize(norm, 0)
    x = (random(2, 64, 9, 4, 6) + mean).to(dtype)
    with torch.no_grad():
        expected = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
        pieces = [piece.contiguous() for piece in x.split(1, dim=2)]
        with Operators() as operators:
            normalize = Stream().group_norm(norm, pieces)
            found = [normalize(piece) for piece in pieces]
    assert torch.equal(torch.cat(found, dim=2), expected)
    assert max(made.numel() for _, _, made in operators.calls) <= 4 / 32 * x.numel()


class Operators(TorchDispatchMode):
    """Record (name, tensors taken, tensor made) of every operator, or of those with the given names."""

    def __init__(self, *names):
        super().__init__()
        self.calls = []
        self.names = names

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # else each operator asks torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if self.names and func.overloadpacket.__name__ not in self.names:
            return made
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.calls += [
            (func.overloadpacket.__name__, taken, x) for x in tree_leaves(made) if isinstance(x, torch.Tensor)
        ]
        return made


KERNELS = ("convolution", "native_group_norm", "upsample_nearest2d", "upsample_nearest3d")


@torch.no_grad()
def test_the_decoder_does_not_copy_its_largest_tensors(vae, monkeypatch):
    """Neither by itself nor inside of kernels, which copy an input that is not contiguous. Pieces as of large clips."""
    monkeypatch.setattr(autoencoder, "PIECE_ELEMENTS", 0)
    with Operators() as operators:
        vae.decode(random(1, 16, 4, 2, 3))
    largest = max(made.numel() for _, _, made in operators.calls)
    copied = [
        made.shape
        for name, _, made in operators.calls
        if name in ("clone", "index_select") and made.numel() > largest / 2  # the two frames for the next piece
    ]
    read = [x for name, taken, _ in operators.calls if name in KERNELS for x in taken]
    assert copied == [] and not [x.shape for x in read if x.numel() > largest / 2 and not x.is_contiguous()]


@functools.cache
def largest_in_kernels(first_stage: str, frames: int, height: int, width: int) -> dict[str, int]:
    """Return the most elements that a kernel meets in encoding and in decoding, by a run on the meta device.

    Of equal chunks of a clip one is run.
    """
    with without_allocating():
        vae = instantiate_from_config(yaml.safe_load(first_stage))
    latents = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="meta")
    video = torch.empty(1, 3, frames, height, width, device="meta")
    found = {}
    with_equal_parts_once(vae, live := LiveBytes())
    for run, x in ((vae.encode_moments, video), (vae.decode, latents)):
        with live, Operators(*KERNELS) as operators, torch.no_grad():
            run(x)
        found[run.__name__] = max(x.numel() for _, taken, made in operators.calls for x in (*taken, made))
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_kernel_of_a_released_size_meets_2_31_elements(path):
    config = yaml.safe_load(path.read_text())
    if "first_stage_config" not in config.get("model", {}):
        pytest.skip("no model")
    height, width = config["args"].get("sampling_image_size") or (768, 1360)
    frames = config["model"]["network_config"]["params"]["num_frames"]
    section = config["model"]["first_stage_config"]
    section["params"].pop("ckpt_path")
    first_stage = yaml.safe_dump(section)
    for how, largest in largest_in_kernels(first_stage, frames, height, width).items():
        assert largest < 2**31, how


@pytest.mark.parametrize(
    ("num", "size", "expected"), [(13, 4, [4, 3, 3, 3]), (1, 3, [1, 0, 0]), (0, 2, [0, 0]), (6, 2, [3, 3])]
)
def test_ranks_share_evenly_and_the_first_ones_more(num, size, expected):
    assert shard_sizes(num, size) == expected


@pytest.mark.parametrize("num_latents", [1, 2, 3, 4, 5, 6, 9])
@torch.no_grad()
def test_every_number_of_latents_decodes(vae, num_latents):
    video = vae.decode(random(1, 16, num_latents, 1, 2))
    assert video.shape == (1, 3, 4 * (num_latents - 1) + 1, 8, 16)
    assert video.isfinite().all()


@torch.no_grad()
def test_four_latents_decode_in_pairs(vae, monkeypatch):
    seen = []
    decoder = vae.decoder
    run = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda x, stream: seen.append(x.shape[2]) or run(x, stream))
    for count in (4, 5, 1, 13):
        vae.decode(random(1, 16, count, 1, 2))
    assert seen == [2, 2] + [3, 2] + [1] + [3, 2, 2, 2, 2, 2]


@torch.no_grad()
def test_earlier_chunks_do_not_depend_on_later_latents(vae):
    latents = random(1, 16, 7, 2, 2)
    later = latents.clone()
    later[:, :, 5:] += 1
    before, after = vae.decode(latents), vae.decode(later)
    assert torch.equal(before[:, :, : 4 * 4 + 1], after[:, :, : 4 * 4 + 1])
    assert (before - after)[:, :, 17:].abs().max() > 1e-3


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@torch.no_grad()
def test_moments_have_their_shape_whole_and_chunked(vae, frames):
    video = random(2, 3, frames, 16, 8)
    shapes = []
    for vae.encode_chunk in (None, 8):
        shapes.append(tuple(vae.encode_moments(video).shape))
    assert shapes == [(2, 32, (frames - 1) // 4 + 1, 2, 1)] * 2


@torch.no_grad()
def test_one_chunk_is_the_whole(vae):
    video = random(1, 3, 9, 16, 16)
    whole = vae.encode_moments(video)
    vae.encode_chunk = 8
    assert torch.equal(vae.encode_moments(video), whole)
    video = random(1, 3, 17, 16, 16)
    assert not torch.allclose(vae.encode_moments(video), shared_whole(vae, video)), "norms see one chunk only"


def shared_whole(vae, video):
    whole = copy.copy(vae)
    whole.encode_chunk = None
    return whole.encode_moments(video)


@torch.no_grad()
def test_slicing_changes_nothing(vae):
    latents, video = random(3, 16, 2, 2, 2), random(3, 3, 5, 16, 16)
    expected = vae.decode(latents), vae.encode_moments(video)
    vae.slicing = True
    torch.testing.assert_close(vae.decode(latents), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(vae.encode_moments(video), expected[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiles_cover_everything_and_small_clips_are_not_cut(vae):
    latents = random(1, 16, 1, 6, 6)
    plain = vae.decode(latents)
    vae.tiling = Tiling(size=(48, 48), overlap=16)
    assert torch.equal(vae.decode(latents), plain)
    vae.tiling = Tiling(size=(32, 32), overlap=16)
    tiled = vae.decode(latents)
    assert tiled.shape == plain.shape and tiled.isfinite().all()
    assert not torch.equal(tiled, plain)
    for above in (48 * 48 - 1, 48 * 48):
        vae.enable_tiling(Tiling((32, 32), 16, above=above))
        assert torch.equal(vae.decode(latents), tiled if above < 48 * 48 else plain)
    vae.tiling = Tiling(size=(32, 32), overlap=16)
    assert vae.encode_moments(random(1, 3, 5, 48, 40)).shape == (1, 32, 2, 6, 5)


def test_blending_tiles_of_a_local_function_gives_it_back(vae):
    vae.tiling = Tiling(size=(32, 48), overlap=16)
    latents = random(1, 3, 2, 7, 11)

    def enlarge(x):
        return F.interpolate(x, scale_factor=(1, 8, 8))

    whole = vae._tiled(latents, enlarge, 1, 8)
    torch.testing.assert_close(whole, enlarge(latents), rtol=0, atol=1e-6)
    half = latents.bfloat16()
    assert torch.equal(vae._tiled(half, enlarge, 1, 8), enlarge(half)), "blended in float32"
    shrunk = vae._tiled(whole, lambda x: x[..., ::8, ::8], 8, 1)
    torch.testing.assert_close(shrunk, latents, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("encode_chunk", [None, 8])
def test_half_precision_stays_near_single_precision(encode_chunk):
    vae = build_vae(section(encode_chunk=encode_chunk))
    video, latents = random(1, 3, 17, 16, 24).clamp(-1, 1), random(1, 16, 5, 2, 3)
    single = vae.encode_moments(video), vae.decode(latents)
    vae = vae.to(torch.bfloat16)
    half = vae.encode_moments(video.bfloat16()), vae.decode(latents.bfloat16())
    for expected, found in zip(single, half, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_encoding_draws_from_the_generator_given(vae):
    video = random(1, 3, 1, 16, 16)
    draws = [vae.encode(video, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    mean = vae.encode(video, sample=False)
    assert torch.equal(mean, vae.encode_moments(video)[:, :16])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    std = (0.5 * vae.encode_moments(video)[:, 16:]).exp()
    torch.testing.assert_close(draws[0], mean + std * noise, rtol=0, atol=1e-6)


def test_gradients_reach_the_latents(vae):
    latents = random(1, 16, 3, 1, 1).requires_grad_()
    plain = vae.decode(latents.detach())
    video = vae.decode(latents)
    torch.testing.assert_close(video.detach(), plain, rtol=0, atol=1e-5)
    video.square().sum().backward()
    assert (latents.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


def test_regularizer_clamps_and_measures():
    moments = torch.cat((torch.full((1, 2, 1, 1, 1), 0.5), torch.tensor([-100.0, 100.0]).reshape(1, 2, 1, 1, 1)), dim=1)
    distribution = DiagonalGaussianRegularizer().distribution(moments)
    assert distribution.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.equal(DiagonalGaussianRegularizer(sample=False)(moments), moments[:, :2])
    unit = DiagonalGaussian(torch.zeros(1, 4), torch.zeros(1, 4))
    moved = DiagonalGaussian(torch.full((1, 4), 3.0), torch.zeros(1, 4))
    assert unit.kl().item() == 0 and moved.kl().item() == pytest.approx(4 * 9 / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cp_size": -1}, "cp_size=-1 is not a number of ranks"),
        ({"encode_chunk": 4}, "encode_chunk=4 must be a multiple of 8"),
        ({"encode_chunk": 12}, "encode_chunk=12 must be a multiple of 8"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        instantiate_from_config(section(**changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attn_resolutions", [16], "attn_resolutions is .16., but this VAE has no attention"),
        ("pad_mode", "replicate", "pad_mode is 'replicate', but the causal padding repeats the first frame"),
        ("temporal_compress_times", 3, "temporal_compress_times=3 is not a power of 2"),
        ("temporal_compress_times", 16, "temporal_compress_times=16 takes 4 levels that resample, and ch_mult has 3"),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_the_released_vae_does_not_have_is_refused(part, name, value, message):
    config = section()
    config["params"][f"{part}_config"]["params"][name] = value
    with pytest.raises(InputError, match=message):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16, 16), "4k[+]1 frames, not 8; take 5 or 9"),
        ((1, 3, 2, 16, 16), "not 2; take 1 or 5"),
        ((1, 3, 1, 16, 20), "multiples of 8, not 16×20"),
    ],
)
def test_clips_that_cannot_be_encoded_are_refused(vae, shape, message):
    with pytest.raises(InputError, match=message):
        vae.encode_moments(torch.zeros(shape))


@pytest.mark.parametrize(("size", "overlap"), [((60, 64), 16), ((64, 64), 12), ((64, 64), 64), ((64, 64), 0)])
def test_tiles_that_do_not_work_are_refused(size, overlap):
    with pytest.raises(InputError, match="multiples of 8"):
        Tiling(size=size, overlap=overlap)


@torch.no_grad()
def test_small_frames_are_one_piece_and_those_of_released_sizes_are_a_few(vae):
    small, large = torch.empty(1, 3, 9, 48, 48, device="meta"), torch.empty(1, 3, 9, 480, 720, device="meta")
    width = vae.encoder.width
    assert vae._max_elements(small, vae.encoder, 1 / 8) == 2**24 > 9 * width * 48 * 48
    assert vae._max_elements(large, vae.encoder, 1 / 8) == max(2**24, 4 * width * 480 * 720)


@pytest.mark.parametrize(("channels", "height", "summed"), [(96, 16, True), (96, 44, False), (64, 100, True)])
def test_large_inputs_of_many_channels_are_left_to_torch(channels, height, summed):
    conv, shapes = Conv3d(channels, channels, 3, padding=(0, 1, 1)), []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shapes.extend([args[1].ndim] if func is torch.ops.aten.convolution.default else [])
            return func(*args, **(kwargs or {}))

    with Operators(), torch.no_grad():
        conv(torch.zeros(1, channels, 5, height, 2))
    assert shapes == ([4, 4, 4] if summed else [5])


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, (0, 1, 1)), (3, 1)])
def test_convolutions_by_frames_are_those_of_torch(kernel, padding):
    ours, torchs = (kind(4, 6, kernel, padding=padding) for kind in (Conv3d, torch.nn.Conv3d))
    ours.load_state_dict(torchs.state_dict())
    x = random(2, 4, 5, 6, 5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for conv, given in zip((ours, torchs), inputs, strict=True):
        conv(given).square().sum().backward()
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-6)
    for one, other in [(inputs[0], inputs[1]), (ours.weight, torchs.weight), (ours.bias, torchs.bias)]:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    weights = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            weights.extend([args[1]] if func is torch.ops.aten.convolution.default else [])
            return func(*args, **(kwargs or {}))

    with Operators(), torch.no_grad():
        ours(x)
    assert [weight.ndim for weight in weights] == ([4, 4, 4] if padding == (0, 1, 1) else [5])


@pytest.mark.parametrize(("frames", "repeats"), [(4, False), (7, False), (5, True), (4, True), (1, True)])
@torch.no_grad()
def test_frames_in_pairs_take_four_convolutions_and_lose_no_precision(frames, repeats, monkeypatch):
    monkeypatch.setattr(convolutions, "BUFFER_ELEMENTS", 2 * 3 * 256)  # a pair at a time
    conv, calls = Conv3d(3, 4, 3, padding=(0, 1, 1)), []
    x = random(2, 3, frames + 2, 8, 32)
    if repeats:
        x[:, :, :2] = x[:, :, 2:3]
    real = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **options: calls.append(args) or real(*args, **options))
    found = conv(x, repeats=repeats)
    exact = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))
    allowed = 2 * (F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1)) - exact).abs().max()
    assert (found - exact).abs().max() < allowed
    pairs, single = divmod(frames - repeats, 2)
    assert len(calls) == 4 * pairs + 3 * single + repeats


@torch.no_grad()
def test_enlarging_frames_takes_kernels_of_2x2():
    conv = UpsamplingConv2d(3)
    x, small = random(2, 3, 16, 12), random(1, 3, 6, 4)
    shapes = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            shapes.extend([args[1].shape] if func is torch.ops.aten.convolution.default else [])
            return func(*args, **(kwargs or {}))

    for frames, kernels in ((x, (12, 3, 2, 2)), (small, (3, 3, 3, 3))):
        expected = F.conv2d(F.interpolate(frames, scale_factor=2.0), conv.weight, conv.bias, padding=1)
        with Operators():
            torch.testing.assert_close(conv(frames), expected, rtol=0, atol=1e-6)
        assert shapes.pop() == kernels


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_is_computed_in_float32_and_rounded_once(dtype):
    frames, clip = random(2, 4, 6, 8), random(2, 4, 5, 6, 8)
    cases = [
        (Conv2d(4, 3, 3, stride=2), frames, F.conv2d, {"stride": 2}),
        (UpsamplingConv2d(4), frames, lambda x, *w: F.conv2d(F.interpolate(x, scale_factor=2.0), *w, padding=1), {}),
        (Conv3d(4, 3, 3, padding=(0, 1, 1)), clip, F.conv3d, {"padding": (0, 1, 1)}),
        (Conv3d(4, 3, 1), clip, F.conv3d, {}),
    ]
    for layer, x, plain, options in cases:
        layer, x = layer.to(dtype), x.to(dtype)  # noqa: PLW2901
        expected = plain(x.double(), layer.weight.double(), layer.bias.double(), **options)
        with Operators("convolution") as operators:
            found = layer(x)
        assert {made.dtype for _, _, made in operators.calls} == {torch.float32}
        torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@torch.no_grad()
def test_a_whole_vae_in_pieces_has_the_bits_of_itself_in_one(shared, monkeypatch):
    vae = copy.deepcopy(shared).bfloat16()
    video, latents = random(1, 3, 9, 40, 48).clamp(-1, 1).bfloat16(), random(1, 16, 4, 3, 5).bfloat16()
    longest, results = [], []
    for elements in (autoencoder.PIECE_ELEMENTS, 0):
        monkeypatch.setattr(autoencoder, "PIECE_ELEMENTS", elements)
        with Operators("convolution") as operators:
            results.append((vae.encode_moments(video), vae.decode(latents)))
        longest.append(max(made.numel() for _, _, made in operators.calls))
    assert longest[1] <= longest[0] / 2
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("train", only([False], [False, True]))
def test_a_whole_vae_in_pieces_has_the_bits_of_itself_in_one_in_float32(train):
    """Of frames that are large enough for pieces: a CPU has other kernels for smaller ones, and those round otherwise.

    Gradients are sums in another order.
    """
    side = 104
    vae = build_vae(section(ch_mult=[1, 1, 1]))
    results = []
    for elements in (autoencoder.MAX_ELEMENTS, 4 * 32 * side**2):
        vae.max_elements = elements
        video = smooth(1, 3, 5, side, side).requires_grad_(train)
        vae.requires_grad_(train).zero_grad()
        with torch.set_grad_enabled(train):
            moments = vae.encode_moments(video)
            decoded = vae.decode(moments[:, :16])
        found = [moments.detach(), decoded.detach()]
        if train:
            (decoded.square().mean() + moments.square().mean()).backward()
            weights = [parameter for parameter in vae.parameters() if parameter.ndim > 1]
            found += [video.grad, torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])]
        results.append(found)
    whole, in_pieces = results
    assert torch.equal(in_pieces[0], whole[0]) and torch.equal(in_pieces[1], whole[1])
    for one, other in zip(in_pieces[2:], whole[2:], strict=True):
        assert (one - other).abs().max() <= min(1e-6, 2e-5 * other.abs().max())
