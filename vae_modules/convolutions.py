"""Convolutions of the VAE: on a CPU in float32, and without gradients with fewer multiplications.

Shapes: ``B C T H W``; ``B·T C H W`` for frames. Results are those of torch's own convolutions but for rounding: the
weights are combined before they are multiplied, which is exact for numbers without rounding. Other devices use torch's
kernels, and gradients do.

Half precision on a CPU is computed in float32 and rounded once, as torch's kernels do, which need instructions for it:
on CPUs without them they take up to several hundred times as long as those of float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

FEWEST_PIXELS = 256  # of all frames that share combined weights; combining pays for more
BUFFER_ELEMENTS = 2**20  # of a sum of frames; larger ones leave the processor's cache


def _is_combined(x: torch.Tensor, weight: torch.Tensor) -> bool:
    in_float32 = x.is_cpu and x.dtype == weight.dtype == torch.float32
    return in_float32 and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _is_half(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)


def _in_float32(layer: nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return layer._conv_forward(x.float(), layer.weight.float(), bias).to(x.dtype)


class Conv2d(nn.Conv2d):
    """A 2D convolution."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """(N, C, H, W) → (N, C', H', W')."""
        return _in_float32(self, input) if _is_half(input) else super().forward(input)


class Conv3d(nn.Conv3d):
    """A 3D convolution; on a CPU in float32 made of 2D ones, where that is faster.

    Large inputs of kernels of three frames take four 2D convolutions for two frames (`_in_pairs`). With gradients and
    of small inputs, the sum of 2D ones over the frames of the kernel is taken where `F.conv3d` is slow: it leaves small
    inputs, as the toy's and the deepest levels' are, to a kernel that is up to eight times slower. Of others with many
    channels it is faster than the sum, since the frames are not copied for each part.
    """

    SMALL = 20480  # torch's bound: batch·channels·frames·height
    FEW = 96  # channels

    def reset_parameters(self) -> None:
        """Draw weights, if they have memory: on the meta device this would take half of the time of building a VAE."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: torch.Tensor, *, repeats: bool = False) -> torch.Tensor:  # noqa: A002
        """(B, C, T, H, W) → (B, C', T', H', W').

        Args:
            input: the frames.
            repeats: the frames that the first result is made of are equal.
        """
        if _is_half(input):
            return _in_float32(self, input)  # by one kernel, so that pieces round as the whole does
        depth, num = self.kernel_size[0], input.shape[2] - self.kernel_size[0] + 1
        plain = {*self.stride, *self.dilation, self.groups} == {1} and self.padding[0] == 0 and depth > 1
        if not plain or not input.is_cpu or not input.dtype == self.weight.dtype == torch.float32:
            return super().forward(input)
        frames, combined = input.transpose(1, 2), depth == 3 and _is_combined(input, self.weight)
        if combined and repeats and num == 1:
            return as_clips(self._of_repeated(frames), len(input))
        if combined and (num - repeats) // 2 * len(input) * math.prod(input.shape[3:]) >= FEWEST_PIXELS:
            return self._in_pairs(frames, num, repeats=repeats).transpose(1, 2)
        if math.prod(input.shape[:-1]) > self.SMALL and min(self.weight.shape[:2]) >= self.FEW:
            return super().forward(input)
        return as_clips(self._summed(frames, num), len(input))

    def _summed(self, frames: torch.Tensor, num: int) -> torch.Tensor:
        """(B, T, C, H, W) → (B·num, C', H', W')."""
        padding = self.padding[1:]
        out = F.conv2d(frames[:, :num].flatten(0, 1), self.weight[:, :, 0], self.bias, padding=padding)
        for t in range(1, self.kernel_size[0]):
            out += F.conv2d(frames[:, t : t + num].flatten(0, 1), self.weight[:, :, t], padding=padding)
        return out

    def _of_repeated(self, frames: torch.Tensor) -> torch.Tensor:
        """Equal frames (B, T, C, H, W) → (B, C', H', W')."""
        return F.conv2d(frames[:, 0], self.weight.sum(2), self.bias, padding=self.padding[1:])

    def _in_pairs(self, frames: torch.Tensor, num: int, *, repeats: bool) -> torch.Tensor:
        """(B, T, C, H, W) → (B, num, C', H', W'), two frames at a time.

        Minimal filtering F(2, 3) along time (Winograd 1980; Lavin & Gray 2016, eq. 5), with 2D convolutions as the
        products. Of four frames d and the frames g of the kernel,
        m₁ = (d₀−d₂)∗g₀, m₂ = (d₁+d₂)∗(g₀+g₁+g₂)/2, m₃ = (d₂−d₁)∗(g₀−g₁+g₂)/2, m₄ = (d₁−d₃)∗g₂ give
        y₀ = m₁+m₂+m₃ and y₁ = m₂−m₃−m₄.
        """
        g0, g1, g2 = self.weight.unbind(2)
        outer, inner = (g0 + g2) / 2, g1 / 2
        plus, minus = outer + inner, outer - inner
        batch, _, channels, *size = frames.shape
        out: torch.Tensor | None = None
        step = max(BUFFER_ELEMENTS // (batch * channels * math.prod(size)), 1)
        last = repeats + (num - repeats) // 2 * 2
        for start in range(int(repeats), last, 2 * step):
            count = min(step, (last - start) // 2)
            d0, d1, d2, d3 = (frames[:, start + i : start + i + 2 * count : 2] for i in range(4))
            buffer = frames.new_empty(batch, count, channels, *size)  # in the order of frames

            def convolved(kernel: torch.Tensor, bias: torch.Tensor | None = None, *, made: torch.Tensor = buffer):
                return F.conv2d(made.flatten(0, 1), kernel, bias, padding=self.padding[1:]).unflatten(0, (batch, -1))

            torch.add(d1, d2, out=buffer)
            m2 = convolved(plus, self.bias)
            torch.sub(d2, d1, out=buffer)
            m3 = convolved(minus)
            if out is None:
                out = frames.new_empty(batch, num, *m2.shape[2:])
            y0, y1 = (out[:, start + i : start + 2 * count : 2] for i in (0, 1))
            torch.add(m2, m3, out=y0)
            torch.sub(m2, m3, out=y1)
            del m2, m3
            torch.sub(d0, d2, out=buffer)
            y0 += convolved(g0)
            torch.sub(d1, d3, out=buffer)
            y1 -= convolved(g2)
        assert out is not None, "there is at least one pair"
        if repeats:
            out[:, 0] = self._of_repeated(frames)
        if last < num:
            out[:, last] = self._summed(frames[:, last:], 1)
        return out


class UpsamplingConv2d(Conv2d):
    """A 3×3 convolution of frames that were enlarged twice by repeating their pixels.

    On a CPU in float32 without gradients four 2×2 convolutions of the small frames, one for each pixel that a pixel
    becomes: a kernel of 3×3 covers 2×2 small pixels, some of them twice. That is 4/9 of the multiplications.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """(N, C, H, W) → (N, C, 2H, 2W)."""
        number, _, height, width = input.shape
        if not _is_combined(input, self.weight) or number * height * width < FEWEST_PIXELS:
            return super().forward(F.interpolate(input, scale_factor=2.0))
        # Which taps of a side of three meet each of the two small pixels, for the early and the late one of two pixels.
        met = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        kernels = torch.einsum("phy, qwx, oiyx -> pqoihw", met, met, self.weight)
        bias = None if self.bias is None else self.bias.repeat(4)
        made = F.conv2d(input, kernels.flatten(0, 2), bias, padding=1).unflatten(1, kernels.shape[:3])
        out = input.new_empty(number, made.shape[3], height, 2, width, 2)
        for i in (0, 1):
            for j in (0, 1):
                out[:, :, :, i, :, j] = made[:, i, j, :, i : i + height, j : j + width]
        return out.flatten(4, 5).flatten(2, 3)


def as_frames(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → (B·T, C, H, W): a 2D convolution is faster than a 3D one of depth 1."""
    return x.transpose(1, 2).flatten(0, 1)


def as_clips(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """(B·T, C, H, W) → (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
