"""Layers of the causal 3D video VAE.

Shapes: ``B C T H W`` everywhere; a video is seen as one first frame and groups of following frames, because the
temporal resampling leaves the first frame alone (4(L-1)+1 frames for L latents).

A clip can be processed in chunks along T. What one chunk must know of the one before it, the last frames in front
of every temporal convolution, lives in a `Stream` that the caller passes through all layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

NORM_GROUPS = 32
NORM_EPS = 1e-6


class Stream:
    """State of one pass over a clip in chunks.

    Attributes:
        is_first: the chunk being processed starts the clip.
        is_last: no chunk follows, so nothing has to be remembered.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = True
        self._tails: dict[nn.Module, torch.Tensor] = {}

    def begin_chunk(self, *, is_first: bool, is_last: bool) -> None:
        """Announce the position of the chunk that is processed next."""
        self.is_first, self.is_last = is_first, is_last

    def extend(self, layer: nn.Module, x: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Return `x` with the `num_frames` frames before it in front; the first frame repeats before the clip."""
        head = x[:, :, :1].expand(-1, -1, num_frames, -1, -1) if self.is_first else self._tails.pop(layer)
        x = torch.cat((head, x), dim=2)
        if not self.is_last:
            # A copy: a view would keep the whole chunk's activation alive until the next chunk.
            self._tails[layer] = x[:, :, -num_frames:].clone()
        return x


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of a tensor that nobody else reads: in place where no gradient is recorded."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def resize_nearest(x: torch.Tensor, size: tuple[int, int, int], stream: Stream) -> torch.Tensor:
    """Enlarge `x` to the frames, height and width `size`; the first frame of a clip stays one frame.

    Args:
        x: (B, C, t, h, w).
        size: target (T, H, W); each a multiple of its counterpart (T − 1 of t − 1 at the start of a clip).
        stream: tells whether `x` starts a clip.
    """
    if tuple(x.shape[2:]) == size:
        return x
    if not stream.is_first or x.shape[2] == 1 == size[0]:
        return F.interpolate(x, size=size, mode="nearest")
    first = F.interpolate(x[:, :, :1], size=(1, *size[1:]), mode="nearest")
    if x.shape[2] == 1:
        return first
    rest = F.interpolate(x[:, :, 1:], size=(size[0] - 1, *size[1:]), mode="nearest")
    return torch.cat((first, rest), dim=2)


class CausalConv3d(nn.Module):
    """3D convolution that sees the present and the past, never the future.

    Space is padded with zeros; before the clip, time is padded by repeating the first frame.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: the same odd length in T, H and W.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.history = kernel_size - 1
        # Space is padded inside the convolution: a separate pad would copy the whole activation.
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=(0, kernel_size // 2, kernel_size // 2))

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C', T, H, W)."""
        if self.history:
            x = stream.extend(self, x, self.history)
        return self.conv(x)


class Normalize(nn.GroupNorm):
    """Group normalisation of the encoder; the statistics cover all frames of the chunk."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, input: torch.Tensor, latents: torch.Tensor | None = None, stream: Stream | None = None):  # noqa: A002
        """Normalise (B, C, T, H, W); the latents that the decoder's norm takes do not matter here."""
        return super().forward(input)


class SpatialNorm3D(nn.Module):
    """Group normalisation of the decoder, scaled and shifted per position by the latents.

    ``norm(x) · conv_y(z) + conv_b(z)`` (MoVQ, Zheng et al. 2022, eq. 4). The 1×1 convolutions run at the resolution
    of the latents and their results are enlarged: for nearest-neighbour enlargement both orders are equal.

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
        size = (x.shape[2], x.shape[3], x.shape[4])
        scale = resize_nearest(self.conv_y(latents, stream), size, stream)
        shift = resize_nearest(self.conv_b(latents, stream), size, stream)
        return torch.addcmul(shift, self.norm_layer(x), scale)


def make_norm(channels: int, z_channels: int | None) -> nn.Module:
    """Return the encoder's norm, or the decoder's where `z_channels` is given."""
    return Normalize(channels) if z_channels is None else SpatialNorm3D(channels, z_channels)


class ResnetBlock3D(nn.Module):
    """Two causal 3×3×3 convolutions with norm and SiLU before each, and a residual connection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, the shortcut is a 1×1×1 convolution.
        dropout: dropout probability before the second convolution.
        z_channels: channels of the latents that steer the norms (decoder), or None (encoder).
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
        return self.nin_shortcut(x) + h


class FrameConv(nn.Conv2d):
    """A 2D convolution applied to every frame of a clip, without moving the frames into the batch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """(B, C, T, H, W) → (B, C', T, H', W')."""
        stride, padding = (1, *self.stride), (0, *(int(p) for p in self.padding))
        return F.conv3d(input, self.weight.unsqueeze(2), self.bias, stride, padding)


class Downsample3D(nn.Module):
    """Halve height and width with a strided convolution; average pairs of frames first if `compress_time`."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = FrameConv(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C, T', H/2, W/2), T' = (T−1)/2+1 at the start of a clip, T/2 later."""
        if self.compress_time and x.shape[2] > 1:
            if stream.is_first:
                x = torch.cat((x[:, :, :1], F.avg_pool3d(x[:, :, 1:], (2, 1, 1))), dim=2)
            else:
                x = F.avg_pool3d(x, (2, 1, 1))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample3D(nn.Module):
    """Double height and width (and, if `compress_time`, the frames after the first), then smooth each frame."""

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = FrameConv(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, stream: Stream) -> torch.Tensor:
        """(B, C, T, H, W) → (B, C, T', 2H, 2W), T' = 2(T−1)+1 at the start of a clip, 2T later."""
        frames, height, width = x.shape[2:]
        if self.compress_time:
            frames = 2 * frames - 1 if stream.is_first else 2 * frames
        return self.conv(resize_nearest(x, (frames, 2 * height, 2 * width), stream))
