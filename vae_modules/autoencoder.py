"""The video autoencoder: encoder and decoder over the chunks and tiles of a clip.

Shapes: ``B C T H W``; F video frames, L latent frames, F = 4(L−1)+1.

Chunks (along time) bound the memory. Decoding takes 2 latents at a time, and 3 at the start if L is odd
(13 = 3+2+2+2+2+2). Group-norm statistics are taken per chunk, as the released weights expect. Tiles (in space) bound
the memory further and change the result slightly, since each tile has its own norm statistics.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import sgm.distributed
from sgm.config.values import AtLeast0, AtLeast1
from sgm.parallel.sequence import shard_sizes, sum_gradients
from sgm.util import InputError, instantiate_from_config
from vae_modules.compiled_norms import CompiledNorms
from vae_modules.cp_ops import SharedStream, gather_pieces
from vae_modules.layers import MAX_ELEMENTS, Stream
from vae_modules.regularizers import DiagonalGaussianRegularizer

DECODE_CHUNK = 2  # latent frames
PIECE_FRAMES = 4  # of the video, as many elements as the largest input of a convolution has: 2 frames and the 2 before
PIECE_ELEMENTS = 2**24  # or as many, of small frames: each piece reads all weights


@dataclass(frozen=True)
class Tiling:
    """Spatial tiles, in pixels of the video.

    Attributes:
        size: (height, width) of a tile; multiples of 8.
        overlap: pixels that neighbours share, blended linearly; a multiple of 8.
        above: pixels of a frame up to which it stays whole.
    """

    size: tuple[int, int] = (256, 384)
    overlap: int = 64
    above: int = 0

    def __post_init__(self) -> None:
        if any(side % 8 or side <= self.overlap for side in self.size) or self.overlap % 8 or self.overlap <= 0:
            raise InputError(
                f"VAE tiles of {self.size} with an overlap of {self.overlap} pixels do not work: sizes and overlap "
                "must be positive multiples of 8, and each side larger than the overlap"
            )


class VideoAutoencoderInferenceWrapper(nn.Module):
    """Encoder, regularizer and decoder.

    Args:
        encoder_config: section for `vae_modules.cp_enc_dec.ContextParallelEncoder3D`.
        decoder_config: section for `vae_modules.cp_enc_dec.ContextParallelDecoder3D`.
        regularizer_config: section for `vae_modules.regularizers.DiagonalGaussianRegularizer`.
        cp_size: context parallel ranks, along time; 0 and 1 disable it.
        ckpt_path: the weights file. `sgm.weights.checkpoint.load_autoencoder` reads it.
        ignore_keys: prefixes of tensors in that file to skip.
        encode_chunk: video frames encoded at a time (a multiple of 8; diffusers takes 8), or None for the whole clip,
            as the models were trained.
        compile: generate code for norms and what follows them, where no gradients are recorded.

    Attributes:
        tiling: a `Tiling` to encode and decode in spatial tiles, see `enable_tiling`; None for whole frames.
        slicing: encode and decode one sample of the batch at a time, see `enable_slicing`.
        max_elements: of the tensors that a convolution, norm or upsampling gets, see `vae_modules.layers`.
        decodes_everywhere: all ranks of the context parallel group get the decoded video; otherwise only the first
            one, and the others get 0 frames. Latents always go to all ranks.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("loss_config", "monitor", "input_key"), "the autoencoder is not trained here"
    )

    def __init__(
        self,
        *,
        encoder_config: Mapping[str, Any],
        decoder_config: Mapping[str, Any],
        regularizer_config: Mapping[str, Any],
        cp_size: AtLeast0 = 1,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        encode_chunk: AtLeast1 | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__()
        if cp_size < 0:
            raise InputError(f"first_stage_config: cp_size={cp_size} is not a number of ranks; set cp_size: 1")
        if encode_chunk is not None and (encode_chunk < 8 or encode_chunk % 8):
            raise InputError(f"first_stage_config: encode_chunk={encode_chunk} must be a multiple of 8 frames, or null")
        self.ckpt_path = ckpt_path
        self.ignore_keys = tuple(ignore_keys)
        self.encode_chunk = encode_chunk
        self.tiling: Tiling | None = None
        self.slicing = False
        self.max_elements = MAX_ELEMENTS
        self.cp_size = max(cp_size, 1)
        self.decodes_everywhere = True
        self._compiled_norms = CompiledNorms() if compile else None
        self.encoder = instantiate_from_config(encoder_config)
        self.decoder = instantiate_from_config(decoder_config)
        self.regularization: DiagonalGaussianRegularizer = instantiate_from_config(regularizer_config)

    def enable_tiling(self, tiling: Tiling | None = None, *, above: int = 0) -> None:
        """Encode and decode in spatial tiles from now on, by default those of `Tiling`; `above`: of larger frames."""
        self.tiling = tiling or Tiling(above=above)

    def enable_slicing(self) -> None:
        """Encode and decode one sample of the batch at a time from now on."""
        self.slicing = True

    def encode_moments(self, video: torch.Tensor) -> torch.Tensor:
        """Encode a clip.

        Args:
            video: (B, 3, F, H, W) in −1..1, F = 4k+1, H and W multiples of 8.

        Returns:
            Mean and log-variance (B, 2z, (F−1)/4+1, H/8, W/8).

        Raises:
            InputError: another shape.
        """
        frames, height, width = video.shape[2:]
        if (frames - 1) % 4:
            low = max((frames - 1) // 4 * 4 + 1, 1)
            raise InputError(f"the VAE encodes 4k+1 frames, not {frames}; take {low} or {low + 4}")
        if height % 8 or width % 8:
            raise InputError(
                f"the VAE encodes sides that are multiples of 8, not {height}×{width}; crop or resize the clip"
            )
        return self._sliced(video, self.encode_tile, in_scale=8, out_scale=1)

    def encode(
        self, video: torch.Tensor, *, generator: torch.Generator | None = None, sample: bool = True
    ) -> torch.Tensor:
        """(B, 3, F, H, W) → unscaled latents (B, z, L, H/8, W/8): a draw from their distribution, or its mean."""
        distribution = self.regularization.distribution(self.encode_moments(video))
        return distribution.sample(generator=generator) if sample else distribution.mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents (B, z, L, h, w) → video (B, 3, 4(L−1)+1, 8h, 8w), nominally in −1..1."""
        return self._sliced(latents, self.decode_tile, in_scale=1, out_scale=8)

    def decode_on_this_rank(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode as `decode` does, without the other ranks of the context parallel group."""

        def alone(tile: torch.Tensor) -> torch.Tensor:
            return torch.cat(list(self._chunks(tile, self.decoder, DECODE_CHUNK, scale=8)), dim=2)

        return self._tiled(latents, alone, 1, 8)

    def decode_in_chunks(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode as `decode` does; yield consecutive frames as soon as they are made, so that none need to be kept.

        Tiles, slices of a batch and clips shared over ranks come as one piece.
        """
        if self._is_tiled(latents, in_scale=1) or (self.slicing and len(latents) > 1) or self._num_ranks() > 1:
            yield self.decode(latents)
        else:
            yield from self._chunks(latents, self.decoder, DECODE_CHUNK, scale=8)

    def forward(self, video: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Reconstruct a clip: (B, 3, F, H, W) → (B, 3, F, H, W)."""
        return self.decode(self.regularization(self.encode_moments(video), generator=generator))

    def _sliced(
        self, x: torch.Tensor, run: Callable[..., torch.Tensor], *, in_scale: int, out_scale: int
    ) -> torch.Tensor:
        """Apply `run` per sample with `slicing`, and per tile with `tiling`."""
        if self.slicing and x.shape[0] > 1:
            return torch.cat([self._tiled(one, run, in_scale, out_scale) for one in x.split(1)])
        return self._tiled(x, run, in_scale, out_scale)

    def _tiled(self, x: torch.Tensor, run: Callable[..., torch.Tensor], in_scale: int, out_scale: int) -> torch.Tensor:
        """Apply `run` to overlapping tiles and blend them; `*_scale`: pixels of x and of the result per latent."""
        if self.tiling is None or not self._is_tiled(x, in_scale=in_scale):
            return run(x)
        size = [side // 8 for side in self.tiling.size]
        overlap = self.tiling.overlap // 8
        height, width = x.shape[3] // in_scale, x.shape[4] // in_scale
        total = weight = dtype = None
        for top in _tile_starts(height, size[0], overlap):
            for left in _tile_starts(width, size[1], overlap):
                bottom, right = min(top + size[0], height), min(left + size[1], width)
                tile = run(x[..., top * in_scale : bottom * in_scale, left * in_scale : right * in_scale])
                if total is None or weight is None:
                    # float32: rounding every sum would show in the overlaps.
                    whole = (*tile.shape[:3], height * out_scale, width * out_scale)
                    total = tile.new_zeros(whole, dtype=torch.float32)
                    weight = tile.new_zeros(whole[3:], dtype=torch.float32)
                ramp = overlap * out_scale
                mask = torch.outer(
                    _blend_weights(tile.shape[3], ramp, top > 0, bottom < height, tile.device),
                    _blend_weights(tile.shape[4], ramp, left > 0, right < width, tile.device),
                )
                rows = slice(top * out_scale, bottom * out_scale)
                columns = slice(left * out_scale, right * out_scale)
                total[..., rows, columns] += tile * mask
                weight[rows, columns] += mask
                dtype = tile.dtype
        assert total is not None and weight is not None and dtype is not None, "there is at least one tile"
        return total.div_(weight).to(dtype)

    def _is_tiled(self, x: torch.Tensor, *, in_scale: int) -> bool:
        """Whether `x`, with `in_scale` pixels per latent, is tiled: larger than a tile, and than what stays whole."""
        if self.tiling is None:
            return False
        sides = [side * 8 // in_scale for side in x.shape[3:]]
        larger = any(side > tile for side, tile in zip(sides, self.tiling.size, strict=True))
        return larger and sides[0] * sides[1] > self.tiling.above

    def encode_tile(self, video: torch.Tensor) -> torch.Tensor:
        """`encode_moments` of all samples at once, without tiles."""
        if self.encode_chunk is None and self._num_ranks() > 1:
            # The first latent of a clip has one frame, every other one has four.
            latents = shard_sizes((video.shape[2] - 1) // 4 + 1, self._num_ranks())
            pieces = [4 * num - 3 * (rank == 0) for rank, num in enumerate(latents) if num]
            return self._shared(video, self.encoder, pieces, scales=(0.25, 0.125), shares_norms=True)
        return self._stream(video, self.encoder, self.encode_chunk or video.shape[2], scales=(0.25, 0.125))

    def decode_tile(self, latents: torch.Tensor) -> torch.Tensor:
        """`decode` of all samples at once, without tiles."""
        return self._stream(latents, self.decoder, DECODE_CHUNK, scales=(4, 8))

    def _stream(self, x: torch.Tensor, network: nn.Module, chunk: int, *, scales: tuple[float, float]) -> torch.Tensor:
        """Run `network` over chunks of `chunk` frames; the first one also takes the remainder."""
        if self._num_ranks() > 1:
            lengths = [end - start for start, end in itertools.pairwise(_chunk_bounds(x.shape[2], chunk))]
            return self._shared(x, network, lengths, scales=scales, shares_norms=False)
        pieces = list(self._chunks(x, network, chunk, scale=scales[1]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def _chunks(self, x: torch.Tensor, network: Any, chunk: int, *, scale: float) -> Iterator[torch.Tensor]:
        """Yield the output of `network` for every chunk, on this rank; `scale`: output size / input size, in space."""
        stream = Stream(self._max_elements(x, network, scale), self._compiled_norms)
        for start, end in itertools.pairwise(_chunk_bounds(x.shape[2], chunk)):
            stream.begin_chunk(is_first=start == 0, is_last=end == x.shape[2])
            yield network(x[:, :, start:end], stream)

    def _max_elements(self, x: torch.Tensor, network: Any, scale: float) -> int:
        """Return the most elements that kernels get: without gradients, those of a few frames of the video."""
        if torch.is_grad_enabled():
            return self.max_elements  # the backward pass keeps all activations
        batch, _, _, height, width = x.shape
        frame = batch * network.width * round(height * width * max(1.0, scale) ** 2)
        return min(self.max_elements, max(PIECE_FRAMES * frame, PIECE_ELEMENTS))

    def _num_ranks(self) -> int:
        """Return the context parallel size."""
        size = sgm.distributed.context_parallel_size()
        if self.cp_size > 1 and size != self.cp_size:
            raise InputError(
                f"first_stage_config: cp_size={self.cp_size}, but this process shares clips with {size} ranks; start "
                f"torchrun with a multiple of {self.cp_size} processes, or set cp_size: 1"
            )
        return size if self.cp_size > 1 else 1

    def _shared(
        self,
        x: torch.Tensor,
        network: Any,
        lengths: Sequence[int],
        *,
        scales: tuple[float, float],
        shares_norms: bool,
    ) -> torch.Tensor:
        """Run `network` over pieces of a clip, assigned to the ranks round-robin; see `vae_modules.cp_ops`.

        Args:
            x: the whole clip, the same on all ranks.
            network: encoder or decoder.
            lengths: frames of the pieces.
            scales: output size / input size, in time and in space.
            shares_norms: norm statistics cover all pieces; requires one piece per rank.
        """
        everyone = sgm.distributed.context_group()
        active = sgm.distributed.context_group(min(self.cp_size, len(lengths)))
        x = sum_gradients(x, everyone)  # each rank reads only its own pieces of x
        starts = [0, *itertools.accumulate(lengths)]
        everywhere = network is self.encoder or self.decodes_everywhere
        settings = {"max_elements": self._max_elements(x, network, scales[1]), "compiled": self._compiled_norms}
        own = []
        if active is not None:
            rank, size = active.rank(), active.size()
            stream = SharedStream(active, shares_norms=shares_norms and size > 1, **settings)
            for index in range(rank, len(lengths), size):
                stream.begin_piece(index, len(lengths))
                own.append(network(x[:, :, starts[index] : starts[index + 1]], stream))
        time, space = scales
        made = [round((length - 1) * time) + 1 if i == 0 else round(length * time) for i, length in enumerate(lengths)]
        height, width = (round(side * space) for side in x.shape[3:])
        dtype = network.conv_out.conv.weight.dtype
        like = x.new_empty((x.shape[0], network.conv_out.conv.out_channels, 0, height, width), dtype=dtype)
        return gather_pieces(own, made, everyone, like=like, anchor=x[:, :, :0], everywhere=everywhere)


def _chunk_bounds(frames: int, chunk: int) -> list[int]:
    return [0, *range(min(frames, chunk + frames % chunk), frames + 1, chunk)]


def _tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Starts of tiles of `size` that cover `length`, overlap by at least `overlap`, and end at `length`."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def _blend_weights(length: int, ramp: int, fade_in: bool, fade_out: bool, device: torch.device) -> torch.Tensor:
    """Weights (length,): 1, with a linear ramp of `ramp` pixels at sides with a neighbour."""
    weights = torch.ones(length, device=device)
    slope = (torch.arange(ramp, device=device) + 0.5) / ramp
    if fade_in:
        weights[:ramp] = slope
    if fade_out:
        weights[-ramp:] *= slope.flip(0)
    return weights
