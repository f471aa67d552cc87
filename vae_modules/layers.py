"""Layers of the causal 3D video VAE.

Shapes: ``B C T H W`` everywhere. Temporal resampling skips the first frame of a clip (4(L-1)+1 frames for L latents).

A clip can be processed in chunks along T. Within a chunk an activation is a list of `Pieces` along T, and a layer takes
them one at a time and drops each as soon as it is used: norm statistics first, over all pieces, then norm, activation
and convolution piece by piece. So a chunk's memory is that of the activations that a residual block must keep, and no
more than a few frames of anything else. The caller passes a `Stream` through all layers; it holds the last frames
of a piece for the temporal convolutions of the next one, which may belong to the next chunk.

No kernel gets a tensor of 2³¹ elements or more: cuDNN indexes with 32 bits, and PyTorch's own kernels for larger ones
are slow or wrong.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sgm.modules.in_place import silu
from vae_modules.compiled_norms import CompiledNorms
from vae_modules.convolutions import Conv2d, Conv3d, UpsamplingConv2d, as_clips, as_frames

NORM_GROUPS = 32
NORM_EPS = 1e-6
MAX_ELEMENTS = 2**31 - 1  # of a tensor that a kernel indexes with 32 bits

Pieces = list[torch.Tensor]  # the frames of a chunk, (B, C, t, H, W) each; whoever is given a list may empty it

# Makes the normalised frames of a piece and applies SiLU, given the piece and the number of its first frame.
Normalizer = Callable[[torch.Tensor, int], torch.Tensor]


class Stream:
    """State of one pass over a clip in chunks.

    Args:
        max_elements: of the tensors that a convolution, norm or upsampling gets; see `lengths`.
        compiled: the norms of generated code, taken where no gradients are recorded.

    Attributes:
        is_first: the current chunk starts the clip.
        is_last: no chunk follows; no frames are cached.
    """

    def __init__(self, max_elements: int = MAX_ELEMENTS, compiled: CompiledNorms | None = None) -> None:
        self.max_elements = max_elements
        self._compiled = compiled
        self.is_first = True
        self.is_last = True
        self._tails: dict[nn.Module, torch.Tensor] = {}

    def begin_chunk(self, *, is_first: bool, is_last: bool) -> None:
        """Set the position of the next chunk."""
        self.is_first, self.is_last = is_first, is_last

    def lengths(self, num_frames: int, frame_elements: int, *, overlap: int = 0) -> list[int]:
        """Return the numbers of frames of the pieces in which kernels take `num_frames` frames.

        Args:
            num_frames: frames of the result.
            frame_elements: elements of a frame of the kernel's input or output, whichever is larger.
            overlap: further frames of the input that every piece needs.
        """
        longest = max(self.max_elements // frame_elements - overlap, 1)
        count = -(-num_frames // longest)
        bounds = [num_frames * i // count for i in range(count + 1)]
        return [end - start for start, end in itertools.pairwise(bounds)]

    def arranged(self, x: Pieces, channels: int) -> Pieces:
        """Divide frames anew, for 3×3×3 convolutions of at most `channels` channels; their memory is contiguous.

        Pieces end between the pairs of frames that a convolution of the whole chunk takes together, so that they round
        alike (`vae_modules.convolutions`): the first frame of a clip is alone there, and the last one of an odd number.
        """
        batch, _, _, height, width = x[0].shape
        frames, elements = num_frames(x), batch * channels * height * width
        lengths = self.lengths(frames, elements, overlap=2)
        if max(lengths) > 1:
            single = int(self.is_first)
            units = [1] * single + [2] * ((frames - single) // 2) + [1] * ((frames - single) % 2)
            shares = self.lengths(len(units), 2 * elements, overlap=1)
            lengths = [sum(itertools.islice(left, share)) for left in [iter(units)] for share in shares]
        return [piece.contiguous() for piece in regrouped(drained(x), lengths)]

    def convolve(self, layer: "CausalConv3d", x: Iterable[torch.Tensor]) -> Pieces:
        """Apply a causal convolution piece by piece; before the clip, its first frame repeats."""
        made = []
        for piece in x:
            repeats = False
            if layer.history:
                head = self._tails.pop(layer, None)
                repeats = head is None
                if head is None:
                    head = piece[:, :, :1].expand(-1, -1, layer.history, -1, -1)
                piece = torch.cat((head, piece), dim=2)  # noqa: PLW2901 (the shorter one is freed)
                del head
                # For the next piece; a view would keep the whole window alive.
                self._tails[layer] = piece[:, :, -layer.history :].clone()
            made.append(layer.conv(piece, repeats=repeats))
            del piece  # before the next one is made
        if self.is_last:
            self._tails.pop(layer, None)
        return made

    def compiled_norms(self, x: Pieces) -> CompiledNorms | None:
        """Return the norms of generated code if these pieces take them: not in a dry run, which compiles nothing."""
        return None if torch.is_grad_enabled() or x[0].is_meta else self._compiled

    def moments(self, norm: nn.GroupNorm, x: Pieces) -> torch.Tensor:
        """Return the moments of all pieces of a chunk, as `moments_of` does."""
        compiled = self.compiled_norms(x)
        if compiled is None:
            return pooled_moments(torch.stack([moments_of(piece, norm.num_groups) for piece in x]))
        return pooled_moments(torch.cat([compiled.moments(piece, norm.num_groups) for piece in x]))

    def factors(self, norm: nn.GroupNorm, x: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and shift of every channel by which all pieces of a chunk are normalised, (B, C) each."""
        _, mean, variance = self.moments(norm, x)
        return _factors(norm, mean, (variance + norm.eps).rsqrt())

    def group_norm(self, norm: nn.GroupNorm, x: Pieces) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that normalises a piece with the statistics of all pieces of a chunk."""
        if len(x) == 1:
            return lambda piece: F.group_norm(piece, norm.num_groups, norm.weight, norm.bias, norm.eps)
        if torch.is_grad_enabled():
            return normalizer(*_factors(norm, *_Statistics.apply(norm, *x)))
        return normalizer(*_factors(norm, *_statistics(norm, x)))


def num_frames(x: Pieces) -> int:
    """Return the number of frames of all pieces."""
    return sum(piece.shape[2] for piece in x)


def drained(x: Pieces) -> Iterator[torch.Tensor]:
    """Yield the pieces; the list holds none that has been yielded."""
    while x:
        yield x.pop(0)


def each(x: Pieces, run: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield `run` of every piece and the number of its first frame; drops a piece when its result is yielded."""
    start = 0
    while x:
        length = x[0].shape[2]
        yield run(x.pop(0), start)
        start += length


def regrouped(x: Iterator[torch.Tensor], lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Divide frames anew, into pieces of `lengths`; copies only where frames of several pieces are joined."""
    rest = None
    for length in lengths:
        parts = []
        while length:
            part = next(x) if rest is None else rest
            rest = part[:, :, length:] if part.shape[2] > length else None
            parts.append(part[:, :, :length])
            length -= parts[-1].shape[2]
            del part
        yield _joined(parts)


def _joined(parts: Pieces) -> torch.Tensor:
    """Concatenate parts along time, and empty the list."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    parts.clear()
    return whole


def moments_of(x: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return count, mean and variance of every group of channels of (B, C, T, H, W): float32 (3, B, groups).

    Frame by frame, so that float32 copies are those of a frame.
    """
    found = []
    for frame in x.unbind(2):
        variance, mean = torch.var_mean(frame.unflatten(1, (num_groups, -1)).float(), dim=(2, 3, 4), correction=0)
        found.append(torch.stack((torch.full_like(mean, frame[0].numel() // num_groups), mean, variance)))
    return pooled_moments(torch.stack(found))


def pooled_moments(moments: torch.Tensor) -> torch.Tensor:
    """Join the moments of n parts, (n, 3, B, groups) → (3, B, groups); see `moments_of`."""
    counts, means, variances = moments.unbind(1)
    total = counts.sum(0)
    weights = counts / total
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return torch.stack((total, mean, variance))


def _statistics(norm: nn.GroupNorm, x: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 1/std of every group over all pieces, (B, groups) each, bit for bit those of `F.group_norm`.

    Its kernel computes them, for as many groups at a time as there are pieces, so that its inputs are no larger.
    """
    channels = norm.num_channels // norm.num_groups
    # A CPU returns float32 statistics with float32 weights; accelerators normalise with statistics in the dtype.
    dtype = torch.promote_types(x[0].dtype, torch.float32) if x[0].is_cpu else x[0].dtype
    count = min(len(x), norm.num_groups)
    bounds = [norm.num_groups * i // count * channels for i in range(count + 1)]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    weights, biases = (value.to(dtype).split(sizes) for value in (norm.weight, norm.bias))
    parts = zip(zip(*(piece.split(sizes, dim=1) for piece in x), strict=True), weights, biases, strict=True)
    found = []
    for frames, weight, bias in parts:
        whole = torch.cat(frames, dim=2)
        batch, width, *size = whole.shape
        groups = width // channels
        _, *made = torch.native_group_norm(whole, weight, bias, batch, width, math.prod(size), groups, norm.eps)
        found.append(made)
    mean, rstd = (torch.cat(values, dim=1).to(dtype) for values in zip(*found, strict=True))
    return mean, rstd


class _Statistics(torch.autograd.Function):
    """`_statistics` with gradients; of (mean, 1/std) = (m, r) over n elements, dx = (dm − dr·r³·(x − m)) / n."""

    @staticmethod
    def forward(ctx: Any, norm: nn.GroupNorm, *pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mean, rstd = _statistics(norm, list(pieces))
        ctx.save_for_backward(mean, rstd, *pieces)
        return mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mean_grad: torch.Tensor, rstd_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mean, rstd, *pieces = ctx.saved_tensors
        mean, rstd, mean_grad, rstd_grad = (x.float()[..., None] for x in (mean, rstd, mean_grad, rstd_grad))
        count = sum(piece[0].numel() for piece in pieces) // mean.shape[1]
        slope, offset = rstd_grad * rstd.pow(3) / count, mean_grad / count
        grads = []
        for piece in pieces:
            rows = piece.reshape(*mean.shape[:2], -1).float()
            grads.append(torch.addcmul(offset, rows - mean, slope, value=-1).to(piece.dtype).view(piece.shape))
        return None, *grads


def _factors(norm: nn.GroupNorm, mean: torch.Tensor, rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift of every channel, float32 (B, C), from statistics of every group, (B, groups) each."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, rstd = (
        value.to(dtype).repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for value in (mean, rstd)
    )
    scale = rstd * norm.weight.to(rstd.dtype)
    return scale, torch.addcmul(norm.bias.to(rstd.dtype), scale, mean, value=-1)


def normalizer(scale: torch.Tensor, shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that normalises (B, C, t, H, W) by the scale and shift of every channel, (B, C) each."""
    zero, one = torch.zeros_like(shift[0]), torch.ones_like(shift[0])

    def run(x: torch.Tensor) -> torch.Tensor:
        # x·scale + shift, rounded once: batch normalisation whose statistics are 0 and 1. Memory in the order of frames
        # is taken as 2D, since the kernel rounds otherwise where it steps over memory.
        in_frames = x.shape[2] > 1 and x.stride(2) > x.stride(1)
        made = []
        for sample, weight, bias in zip(x.split(1), scale, shift, strict=True):
            rows = as_frames(sample) if in_frames else sample
            normed = torch.batch_norm(rows, weight, bias, zero, one, False, 0.0, 0.0, False)
            made.append(as_clips(normed, 1) if in_frames else normed)
        return made[0] if len(made) == 1 else torch.cat(made)

    return run


class CausalConv3d(nn.Module):
    """3D convolution, causal in time.

    Space is padded with zeros, time by repeating the first frame before the clip.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the same odd length in T, H and W.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.history = kernel_size - 1
        # Pad space inside the convolution: a separate pad would copy the activation.
        self.conv = Conv3d(in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2))

    def forward(self, x: Iterable[torch.Tensor], stream: Stream) -> Pieces:
        """Pieces of (B, C, T, H, W) → pieces of (B, C', T, H, W), as long."""
        return stream.convolve(self, x)


class Normalize(nn.GroupNorm):
    """Group normalisation of the encoder; the statistics cover all frames of the chunk."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, input: Pieces, latents: torch.Tensor | None, stream: Stream) -> Normalizer:  # noqa: A002
        """Return what normalises the pieces of a chunk and applies SiLU; `latents` are for the decoder's alone."""
        if (compiled := stream.compiled_norms(input)) is not None:
            factors = stream.factors(self, input)
            return lambda piece, start: compiled.activated(piece, *factors)
        normalize = stream.group_norm(self, input)
        return lambda piece, start: silu(normalize(piece))


class SpatialNorm3D(nn.Module):
    """Group normalisation of the decoder, scaled and shifted per position by the latents.

    ``norm(x) · conv_y(z) + conv_b(z)``, z upsampled to the size of x (MoVQ, Zheng et al. 2022, eq. 4). The 1×1
    convolutions run before the nearest-neighbour upsampling, with the same result. Only the width is upsampled in
    memory; scale and shift are broadcast over height and time.

    Args:
        channels: channels of the activation.
        z_channels: channels of the latents.
    """

    def __init__(self, channels: int, z_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)
        self.conv_y = CausalConv3d(z_channels, channels, 1)
        self.conv_b = CausalConv3d(z_channels, channels, 1)

    def forward(self, x: Pieces, latents: torch.Tensor, stream: Stream) -> Normalizer:
        """Return what normalises the pieces of a chunk, whose latents are (B, z, t, h, w), and applies SiLU."""
        frames = num_frames(x)
        single, each = _frames_of_latents(frames, latents.shape[2], is_first=stream.is_first)
        size = (*latents.shape[2:4], x[0].shape[4])
        scale, shift = (F.interpolate(conv([latents], stream)[0], size=size) for conv in (self.conv_y, self.conv_b))
        if (compiled := stream.compiled_norms(x)) is not None:
            factors = stream.factors(self.norm_layer, x)
            of_frames = torch.arange(-single, frames - single, device=latents.device) // each + single
            return lambda piece, start: compiled.modulated(
                piece, *factors, (scale, shift), of_frames[start : start + piece.shape[2]]
            )
        bounds = [0] * single + list(range(single, frames + 1, each))
        normalize = stream.group_norm(self.norm_layer, x)
        scale, shift = (value[:, :, :, :, None].split(1, dim=2) for value in (scale, shift))

        def run(piece: torch.Tensor, start: int) -> torch.Tensor:
            normed, end = normalize(piece), start + piece.shape[2]
            parts = []
            for number, (first, last) in enumerate(itertools.pairwise(bounds)):
                if first < end and last > start:
                    all_of_it = first <= start and last >= end
                    frames = normed if all_of_it else normed[:, :, max(first - start, 0) : last - start]
                    parts.append(_scale_and_shift(frames, scale[number], shift[number]))
            return silu(torch.cat(parts, dim=2) if torch.is_grad_enabled() else normed)

        return run


def _frames_of_latents(frames: int, latents: int, *, is_first: bool) -> tuple[int, int]:
    """Return how many frames the first latent has alone (one at the start of a clip, else none), and each other one."""
    single = int(is_first and frames > 1)
    return single, (frames - single) // (latents - single)


def _scale_and_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x·scale + shift for x (B, C, t, H, W), scale and shift (B, C, 1, h, 1, W), h | H; in place under `no_grad`."""
    blocks = x.unflatten(3, (scale.shape[3], -1))
    if torch.is_grad_enabled():
        return torch.addcmul(shift, blocks, scale).flatten(3, 4)
    torch.addcmul(shift, blocks, scale, out=blocks)
    return x


def make_norm(channels: int, z_channels: int | None) -> nn.Module:
    """Return the encoder's norm, or with `z_channels` the decoder's."""
    return Normalize(channels) if z_channels is None else SpatialNorm3D(channels, z_channels)


class ResnetBlock3D(nn.Module):
    """Two causal 3×3×3 convolutions with norm and SiLU before each, and a residual connection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; if they differ, the shortcut is a 1×1×1 convolution.
        dropout: dropout probability before the second convolution.
        z_channels: channels of the latents for the decoder's norms; None for the encoder.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, z_channels: int | None = None) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, z_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = make_norm(out_channels, z_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.nin_shortcut = Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.width = max(in_channels, out_channels)

    def forward(self, x: Pieces, latents: torch.Tensor | None, stream: Stream) -> Pieces:
        """Pieces of (B, C, T, H, W) → pieces of (B, C', T, H, W), as long."""
        residual: Pieces = []
        normalize = self.norm1(x, latents, stream)

        def enter(piece: torch.Tensor, start: int) -> torch.Tensor:
            made = normalize(piece, start)
            shortcut = self.nin_shortcut
            residual.append(shortcut(piece))
            return made

        h = self.conv1(each(x, enter), stream)
        normalize_again = self.norm2(h, latents, stream)
        made = each(h, lambda piece, start: self.dropout(normalize_again(piece, start)))
        h = self.conv2(made, stream)
        for piece, skipped in zip(h, drained(residual), strict=True):
            piece += skipped  # in place: the backward pass does not need it
        return h


class Downsample3D(nn.Module):
    """Halve height and width with a strided convolution; average pairs of frames first if `compress_time`."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Pieces, stream: Stream) -> Pieces:
        """(B, C, T, H, W) → the frames of (B, C, T', H/2, W/2), T' = (T−1)/2+1 at the start of a clip, T/2 later."""
        batch, channels, _, height, width = x[0].shape
        frames, parts = num_frames(x), drained(x)
        if self.compress_time and frames > 1:
            single = int(stream.is_first)  # the first frame of a clip has no partner
            parts = map(self._averaged, regrouped(parts, [1] * single + [2] * (frames // 2)))
            frames = single + frames // 2
        lengths = stream.lengths(frames, batch * channels * (height + 1) * (width + 1))
        made: Pieces = []
        for part in regrouped(parts, lengths):
            shrunk = self.conv(F.pad(as_frames(part), (0, 1, 0, 1)))
            made += as_clips(shrunk, batch).split(1, dim=2)
        return made

    @staticmethod
    def _averaged(x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[2] == 1 else (x[:, :, ::2] + x[:, :, 1::2]) / 2  # avg_pool3d is slower


class Upsample3D(nn.Module):
    """Double height and width, smooth each frame, and double the frames after the first one if `compress_time`.

    Frames are smoothed before they are doubled: half the work, same result.
    """

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = UpsamplingConv2d(channels)

    def forward(self, x: Pieces, stream: Stream) -> Pieces:
        """(B, C, T, H, W) → the frames of (B, C, T', 2H, 2W), T' = 2(T−1)+1 at the start of a clip, 2T later."""
        batch, channels, _, height, width = x[0].shape
        lengths = stream.lengths(num_frames(x), batch * channels * 4 * height * width)
        made: Pieces = []
        for part in regrouped(drained(x), lengths):
            large = self.conv(as_frames(part))
            made += as_clips(large, batch).split(1, dim=2)
        if not self.compress_time:
            return made
        single = int(stream.is_first)  # the first frame of a clip is not doubled
        return made[:single] + [frame for frame in made[single:] for _ in range(2)]
