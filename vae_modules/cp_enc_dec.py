"""Encoder and decoder of the causal 3D video VAE.

Shapes: ``B C T H W``. Parameter names are those of the released ``3d-vae.pt`` (SAT checkpoint format). Both run on one
chunk of a clip; `vae_modules.autoencoder` makes the chunks and owns the `Stream`.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from sgm.config.values import AtLeast1, Depth, Share, Width
from sgm.util import InputError
from vae_modules.layers import CausalConv3d, Downsample3D, Pieces, ResnetBlock3D, Stream, Upsample3D, each, make_norm

_UNUSED = {
    "resolution": "the network is fully convolutional",
    "resamp_with_conv": "resampling always ends in a convolution",
    "gather_norm": "norms cover a whole clip or chunk, however many ranks share it",
}

Multipliers = Annotated[Sequence[Annotated[int, Field(ge=1, le=1000)]], Field(min_length=1, max_length=16)]


def _num_time_levels(name: str, temporal_compress_times: int, num_levels: int) -> int:
    """Return the number of levels that resample time, of `num_levels`, the last of which resamples nothing."""
    levels = int(math.log2(temporal_compress_times))
    if 2**levels != temporal_compress_times:
        raise InputError(f"{name}: temporal_compress_times={temporal_compress_times} is not a power of 2; use 4")
    if levels >= num_levels:
        raise InputError(
            f"{name}: temporal_compress_times={temporal_compress_times} takes {levels} levels that resample, and "
            f"ch_mult has {num_levels - 1}; use 4 with a ch_mult of 4 numbers"
        )
    return levels


class Level(nn.Module):
    """One resolution: residual blocks, then a resampling layer except at the last level."""

    def __init__(
        self,
        blocks: list[ResnetBlock3D],
        *,
        downsample: Downsample3D | None = None,
        upsample: Upsample3D | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.width = max(block.width for block in blocks)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Pieces, latents: torch.Tensor | None, stream: Stream) -> Pieces:
        """Frames of (B, C, T, H, W) → frames of (B, C', T', H', W')."""
        x = stream.arranged(x, self.width)
        for block in self.block:
            x = block(x, latents, stream)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x, stream)
        return x


def _middle(channels: int, dropout: float, z_channels: int | None = None) -> nn.ModuleDict:
    """The two residual blocks at the lowest resolution."""
    blocks = {name: ResnetBlock3D(channels, channels, dropout, z_channels) for name in ("block_1", "block_2")}
    return nn.ModuleDict(blocks)


def _finished(network: Any, h: Pieces, latents: torch.Tensor | None, stream: Stream) -> torch.Tensor:
    """The last norm, activation and convolution; the frames are joined."""
    normalize = network.norm_out(h, latents, stream)
    made = network.conv_out(each(h, normalize), stream)
    return made[0] if len(made) == 1 else torch.cat(made, dim=2)


class ContextParallelEncoder3D(nn.Module):
    """Video → mean and log-variance of the latents.

    Args:
        ch: channels at full resolution.
        ch_mult: channel multiplier of every resolution level; each level but the last halves height and width.
        num_res_blocks: residual blocks per level.
        in_channels: channels of the video.
        z_channels: channels of the latents.
        double_z: output mean and log-variance (2·z channels) instead of only the mean.
        dropout: dropout probability inside the residual blocks.
        temporal_compress_times: the first log2(n) levels halve the frame count; 4 in released models.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = {**_UNUSED, "out_ch": "the encoder's output has z_channels"}

    def __init__(
        self,
        *,
        ch: Width,
        ch_mult: Multipliers = (1, 2, 2, 4),
        num_res_blocks: Depth = 3,
        in_channels: Width = 3,
        z_channels: Width = 16,
        double_z: bool = True,
        dropout: Share = 0.0,
        temporal_compress_times: AtLeast1 = 4,
    ) -> None:
        super().__init__()
        time_levels = _num_time_levels(type(self).__name__, temporal_compress_times, len(ch_mult))
        self.width = ch
        self.conv_in = CausalConv3d(in_channels, ch, 3)
        self.down = nn.ModuleList()
        channels = ch
        for level, multiplier in enumerate(ch_mult):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock3D(channels, ch * multiplier, dropout))
                channels = ch * multiplier
            is_last = level == len(ch_mult) - 1
            down = None if is_last else Downsample3D(channels, compress_time=level < time_levels)
            self.down.append(Level(blocks, downsample=down))
        self.mid = _middle(channels, dropout)
        self.norm_out = make_norm(channels, None)
        self.conv_out = CausalConv3d(channels, 2 * z_channels if double_z else z_channels, 3)

    def forward(self, x: torch.Tensor, stream: Stream | None = None) -> torch.Tensor:
        """One chunk of video (B, 3, F, H, W) in −1..1 → (B, 2z, F', H/8, W/8)."""
        stream = stream or Stream()
        h = self.conv_in(stream.arranged([x], self.width), stream)
        for block in (*self.down, *self.mid.values()):
            h = block(h, None, stream)
        return _finished(self, h, None, stream)


class ContextParallelDecoder3D(nn.Module):
    """Latents → video.

    Args:
        ch: channels at full resolution.
        ch_mult: channel multiplier of every resolution level, from full resolution to that of the latents.
        num_res_blocks: residual blocks per level, minus one.
        out_ch: channels of the video.
        z_channels: channels of the latents.
        dropout: dropout probability inside the residual blocks.
        temporal_compress_times: the last log2(n) levels double the frame count; 4 in released models.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        **_UNUSED,
        "in_channels": "the decoder's output has out_ch channels",
        "double_z": "the decoder takes latents, not their mean and variance",
    }

    def __init__(
        self,
        *,
        ch: Width,
        ch_mult: Multipliers = (1, 2, 2, 4),
        num_res_blocks: Depth = 3,
        out_ch: Width = 3,
        z_channels: Width = 16,
        dropout: Share = 0.0,
        temporal_compress_times: AtLeast1 = 4,
    ) -> None:
        super().__init__()
        time_levels = _num_time_levels(type(self).__name__, temporal_compress_times, len(ch_mult))
        self.width = ch
        channels = ch * ch_mult[-1]
        self.conv_in = CausalConv3d(z_channels, channels, 3)
        self.mid = _middle(channels, dropout, z_channels)
        levels: list[nn.Module] = []
        for level in reversed(range(len(ch_mult))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResnetBlock3D(channels, ch * ch_mult[level], dropout, z_channels))
                channels = ch * ch_mult[level]
            compress_time = level >= len(ch_mult) - time_levels
            up = None if level == 0 else Upsample3D(channels, compress_time=compress_time)
            levels.insert(0, Level(blocks, upsample=up))
        self.up = nn.ModuleList(levels)
        self.norm_out = make_norm(channels, z_channels)
        self.conv_out = CausalConv3d(channels, out_ch, 3)

    def forward(self, latents: torch.Tensor, stream: Stream | None = None) -> torch.Tensor:
        """One chunk of latents (B, z, t, h, w) → video (B, 3, T, 8h, 8w), T = 4(t−1)+1 at the start, 4t later."""
        stream = stream or Stream()
        h = self.conv_in([latents], stream)
        for block in (*self.mid.values(), *reversed(self.up)):
            h = block(h, latents, stream)
        return _finished(self, h, latents, stream)
