"""Layers of the causal 3D video VAE.

Shapes: ``B C T H W`` everywhere. Temporal resampling skips the first frame of a clip (4(L-1)+1 frames for L latents).

A clip can be processed in chunks along T. The caller passes a `Stream` through all layers; it caches the last frames
of a chunk for the temporal convolutions of the next chunk.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sgm.modules.in_place import silu

NORM_GROUPS = 32
NORM_EPS = 1e-6


class Stream:
    """State of one pass over a clip in chunks.

    Attributes:
        is_first: the current chunk starts the clip.
        is_last: no chunk follows; no frames are cached.
    """

    def __init__(self) -> None:
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

    def group_norm(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Normalise the frames of a chunk (B, C, T, H, W)."""
        return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


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
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2))

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C', T, H, W)."""
        return self.conv(stream.extend(self, x, self.history) if self.history else x)


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
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, latents: torch.Tensor | None, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C', T, H, W)."""
        h = self.conv1(silu(self.norm1(x, latents, stream)), stream)
        h = self.conv2(self.dropout(silu(self.norm2(h, latents, stream))), stream)
        h += self.nin_shortcut(x)  # in place: the backward pass does not need h
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
        batch, _, num_frames = x.shape[:3]
        x = _as_clips(self.conv(F.interpolate(_as_frames(x), scale_factor=2.0)), batch)
        if not self.compress_time:
            return x
        source = torch.arange(int(stream.is_first), 2 * num_frames, device=x.device) // 2
        return x.index_select(2, source)
