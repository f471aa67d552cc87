"""Layers of the causal 3D video VAE.

Shapes: ``B C T H W`` everywhere. Temporal resampling skips the first frame of a clip (4(L-1)+1 frames for L latents).

A clip can be processed in chunks along T. The caller passes a `Stream` through all layers; it caches the last frames
of a chunk for the temporal convolutions of the next chunk.

Within a chunk, no kernel gets a tensor of 2³¹ elements or more: cuDNN indexes with 32 bits, and PyTorch's own kernels
for larger ones are slow or wrong. Convolutions, norms and upsampling take a chunk in pieces along T, usually one.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sgm.modules.in_place import silu

NORM_GROUPS = 32
NORM_EPS = 1e-6
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
MAX_ELEMENTS = 2**31 - 1  # of a tensor that a kernel indexes with 32 bits


class Stream:
    """State of one pass over a clip in chunks.

    Args:
        max_elements: of the tensors that a convolution, norm or upsampling gets; see `pieces`.

    Attributes:
        is_first: the current chunk starts the clip.
        is_last: no chunk follows; no frames are cached.
    """

    def __init__(self, max_elements: int = MAX_ELEMENTS) -> None:
        self.max_elements = max_elements
        self.is_first = True
        self.is_last = True
        self._tails: dict[nn.Module, torch.Tensor] = {}

    def begin_chunk(self, *, is_first: bool, is_last: bool) -> None:
        """Set the position of the next chunk."""
        self.is_first, self.is_last = is_first, is_last

    def frame_groups(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split (B, C, T, H, W) into the first frame of a clip, which is not resampled in time, and the others."""
        return (x[:, :, :1], x[:, :, 1:]) if self.is_first and x.shape[2] > 1 else (x,)

    def extend(self, layer: nn.Module, x: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Prepend the `num_frames` frames before `x`; before the clip, its first frame repeats."""
        head = x[:, :, :1].expand(-1, -1, num_frames, -1, -1) if self.is_first else self._tails.pop(layer)
        x = torch.cat((head, x), dim=2)
        if not self.is_last:
            # A view would keep the whole chunk's activation alive.
            self._tails[layer] = x[:, :, -num_frames:].clone()
        return x

    def pieces(self, num_frames: int, frame_elements: int, *, overlap: int = 0) -> list[tuple[int, int]]:
        """Return the bounds of the pieces in which a kernel takes `num_frames` frames, usually one piece.

        Args:
            num_frames: frames of the result.
            frame_elements: elements of a frame of the kernel's input or output, whichever is larger.
            overlap: further frames of the input that every piece needs.
        """
        longest = max(self.max_elements // frame_elements - overlap, 1)
        count = -(-num_frames // longest)
        bounds = [num_frames * i // count for i in range(count + 1)]
        return list(itertools.pairwise(bounds))

    def convolve(self, conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        """Apply a convolution without padding in time: (B, C, T, H, W) → (B, C', T − kernel + 1, H, W)."""
        overlap = conv.kernel_size[0] - 1
        num_frames = x.shape[2] - overlap
        frame = x.shape[0] * max(conv.in_channels, conv.out_channels) * x.shape[3] * x.shape[4]
        pieces = self.pieces(num_frames, frame, overlap=overlap)
        if len(pieces) == 1:
            return conv(x)
        return _joined((conv(x[:, :, start : end + overlap]) for start, end in pieces), num_frames)

    def group_norm(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Normalise the frames of a chunk (B, C, T, H, W)."""
        if len(self.pieces(x.shape[2], x[:, :, 0].numel())) == 1:
            return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return normalize(norm, x, moments_of(x, norm.num_groups))


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


def normalize(norm: nn.GroupNorm, x: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Group normalisation of (B, C, T, H, W) by given moments (3, B, groups), computed in float32 frame by frame."""
    _, mean, variance = moments.repeat_interleave(norm.num_channels // norm.num_groups, dim=2)
    scale = (variance + norm.eps).rsqrt() * norm.weight.float()
    shift = torch.addcmul(norm.bias.float(), mean, scale, value=-1)
    scale, shift = scale[..., None, None, None], shift[..., None, None, None]
    frames = (torch.addcmul(shift, frame.float(), scale).to(x.dtype) for frame in x.split(1, dim=2))
    return _joined(frames, x.shape[2])


def _joined(pieces: Iterator[torch.Tensor], num_frames: int) -> torch.Tensor:
    """Concatenate pieces (B, C, t, H, W) along time; without gradients, one of them exists at a time."""
    if torch.is_grad_enabled():
        return torch.cat(list(pieces), dim=2)
    start, whole = 0, None
    for piece in pieces:
        if whole is None:
            whole = piece.new_empty((*piece.shape[:2], num_frames, *piece.shape[3:]))
        whole[:, :, start : start + piece.shape[2]] = piece
        start += piece.shape[2]
        del piece  # before the next one is made
    assert whole is not None, "a chunk has frames"
    return whole


class Conv3d(nn.Conv3d):
    """A 3D convolution that takes oneDNN's kernel for float32 on x86 CPUs at all sizes.

    `F.conv3d` takes it for wide inputs only (B·C·T·H above 20480); its own kernel for narrow ones, as the toy's are, is
    up to eight times slower.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """(B, C, T, H, W) → (B, C', T', H', W')."""
        plain = type(input) is torch.Tensor and not torch.compiler.is_compiling()  # fake tensors know F.conv3d only
        if ONEDNN and plain and input.is_cpu and input.dtype == self.weight.dtype == torch.float32:
            sizes = self.padding, self.stride, self.dilation
            return torch.ops.aten.mkldnn_convolution(input, self.weight, self.bias, *sizes, self.groups)
        return super().forward(input)


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

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C', T, H, W)."""
        return stream.convolve(self.conv, stream.extend(self, x, self.history) if self.history else x)


class Normalize(nn.GroupNorm):
    """Group normalisation of the encoder; the statistics cover all frames of the chunk."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, input: torch.Tensor, latents: torch.Tensor | None, stream: Stream) -> torch.Tensor:  # noqa: A002
        """Normalise (B, C, T, H, W); `latents` is unused (the decoder's norm needs it)."""
        return stream.group_norm(self, input)


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

    def forward(self, x: torch.Tensor, latents: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) and the chunk's latents (B, z, t, h, w) → (B, C, T, H, W)."""
        normed = stream.group_norm(self.norm_layer, x)
        size = (*latents.shape[2:4], x.shape[4])
        scale = F.interpolate(self.conv_y(latents, stream), size=size)
        shift = F.interpolate(self.conv_b(latents, stream), size=size)
        pieces = zip(*(stream.frame_groups(tensor) for tensor in (normed, scale, shift)), strict=True)
        if torch.is_grad_enabled():
            return torch.cat([self._scale_and_shift(*piece) for piece in pieces], dim=2)
        for piece in pieces:
            self._scale_and_shift(*piece, in_place=True)
        return normed

    @staticmethod
    def _scale_and_shift(
        x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, in_place: bool = False
    ) -> torch.Tensor:
        """x·scale + shift for x (B, C, T, H, W), scale and shift (B, C, t, h, W); t divides T and h divides H."""
        t, h = scale.shape[2:4]
        blocks = x.unflatten(3, (h, -1)).unflatten(2, (t, -1))
        scale, shift = scale[:, :, :, None, :, None], shift[:, :, :, None, :, None]
        return torch.addcmul(shift, blocks, scale, out=blocks if in_place else None).flatten(4, 5).flatten(2, 3)


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

    def forward(self, x: torch.Tensor, latents: torch.Tensor | None, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C', T, H, W)."""
        h = self.conv1(silu(self.norm1(x, latents, stream)), stream)
        h = self.conv2(self.dropout(silu(self.norm2(h, latents, stream))), stream)
        # In place: the backward pass does not need h.
        h += stream.convolve(self.nin_shortcut, x) if isinstance(self.nin_shortcut, nn.Conv3d) else x
        return h


def _as_frames(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W): a 2D convolution is faster than a 3D one of depth 1."""
    return x.transpose(1, 2).flatten(0, 1)


def _as_clips(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """(B·T, C, H, W) → (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class Downsample3D(nn.Module):
    """Halve height and width with a strided convolution; average pairs of frames first if `compress_time`."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C, T', H/2, W/2), T' = (T−1)/2+1 at the start of a clip, T/2 later."""
        if self.compress_time and x.shape[2] > 1:
            *first, rest = stream.frame_groups(x)
            x = torch.cat((*first, (rest[:, :, ::2] + rest[:, :, 1::2]) / 2), dim=2)  # avg_pool3d is slower
        batch, channels, num_frames, height, width = x.shape
        pieces = stream.pieces(num_frames, batch * channels * (height + 1) * (width + 1))
        return _joined((self._shrunk(x[:, :, start:end]) for start, end in pieces), num_frames)

    def _shrunk(self, x: torch.Tensor) -> torch.Tensor:
        return _as_clips(self.conv(F.pad(_as_frames(x), (0, 1, 0, 1))), x.shape[0])


class Upsample3D(nn.Module):
    """Double height and width, smooth each frame, and double the frames after the first one if `compress_time`.

    Frames are smoothed before they are doubled: half the work, same result.
    """

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C, T', 2H, 2W), T' = 2(T−1)+1 at the start of a clip, 2T later."""
        batch, channels, num_frames, height, width = x.shape
        pieces = stream.pieces(num_frames, batch * channels * 4 * height * width)
        skipped = int(self.compress_time and stream.is_first)  # the first frame of a clip is not doubled
        num_made = 2 * num_frames - skipped if self.compress_time else num_frames
        return _joined(self._enlarged(x, pieces, skipped), num_made)

    def _enlarged(self, x: torch.Tensor, pieces: Sequence[tuple[int, int]], skipped: int) -> Iterator[torch.Tensor]:
        """Yield the frames of the result; doubled ones twice, less the first `skipped`."""
        for start, end in pieces:
            small = _as_frames(x[:, :, start:end])
            frames = _as_clips(self.conv(F.interpolate(small, scale_factor=2.0)), x.shape[0])
            for number, frame in enumerate(frames.split(1, dim=2), start):
                yield frame
                if self.compress_time and number >= skipped:
                    yield frame
