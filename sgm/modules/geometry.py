"""Legal frame counts and sizes of a model, from its network parameters.

A video has F frames of H×W pixels; the VAE encodes it to L = (F−1)/4 + 1 latent frames of H/8 × W/8; the network splits
them into patches of (time, height, width). With a temporal patch of 2 the network needs an even number of latent
frames: an odd count is padded at the front by one, which is dropped after sampling; an even count is not padded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sgm.util import InputError

SPATIAL_COMPRESSION = 8
FREE_SIZE = (768, 1360)  # default of CogVideoX1.5; its maximum is much larger

PatchSize = tuple[int, int, int]  # (time, height, width)
Grid = tuple[int, int, int]  # patches in (time, height, width)


@dataclass(frozen=True)
class Geometry:
    """The legal shapes of one network.

    Attributes:
        patch_size: of a patch, in latent frames and latent pixels.
        time_compression: video frames per latent frame after the first.
        max_latents: latent frames of the longest video, without padding.
        max_latent_size: largest (height, width) of the latents; with `fixed_size` the only one.
        fixed_size: positions are tables (sincos or learned) for one size only.
        in_channels: channels of the network's input.
        out_channels: channels of its output and of the latents.
        positions: ``sincos``, ``learned`` or ``rotary``.
        longer: clips may be longer than those of training, as ``args.time_scaling`` says how.
        control_channels: further channels of its input, for a control video; 0 without.
    """

    patch_size: PatchSize
    time_compression: int
    max_latents: int
    max_latent_size: tuple[int, int]
    fixed_size: bool
    in_channels: int
    out_channels: int
    positions: str
    longer: bool = False
    control_channels: int = 0

    @classmethod
    def from_network(cls, params: Mapping[str, Any]) -> Self:
        """Read the geometry from ``model.network_config.params``.

        Raises:
            InputError: a parameter is missing or not a positive integer, or a patch is larger than the latents.
        """
        patch_size = normalize_patch_size(params.get("patch_size", 2))
        latent_size = _count(params, "latent_height"), _count(params, "latent_width")
        if patch_size[1] > latent_size[0] or patch_size[2] > latent_size[1]:
            raise InputError(
                f"model.network_config.params.patch_size is {list(patch_size)}, and latents have {latent_size[0]} x "
                f"{latent_size[1]} pixels (latent_height, latent_width); give a smaller one, e.g. [1, 2, 2]"
            )
        rate = _count(params, "time_compressed_rate", 4)
        modules = params.get("modules") or {}
        position_config = modules.get("pos_embed_config") or {}
        sincos = str(position_config.get("target", "")).endswith("Basic3DPositionEmbeddingMixin")
        learned = bool((position_config.get("params") or {}).get("learnable_pos_embed", False))
        return cls(
            patch_size=patch_size,
            time_compression=rate,
            max_latents=(_count(params, "num_frames") - 1) // rate + 1,
            max_latent_size=latent_size,
            fixed_size=sincos or learned,
            in_channels=_count(params, "in_channels"),
            out_channels=_count(params, "out_channels"),
            positions="sincos" if sincos else "learned" if learned else "rotary",
            control_channels=params.get("control_channels") or 0,
        )

    @property
    def image_conditioned(self) -> bool:
        """Whether the network takes image latents besides the noisy ones (image-to-video)."""
        return self.in_channels == 2 * self.out_channels

    @property
    def max_size(self) -> tuple[int, int]:
        """Largest (height, width) in pixels."""
        height, width = self.max_latent_size
        return height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION

    @property
    def size_steps(self) -> tuple[int, int]:
        """Required divisors of height and width, in pixels."""
        return self.patch_size[1] * SPATIAL_COMPRESSION, self.patch_size[2] * SPATIAL_COMPRESSION

    def video_frames(self, latents: int) -> int:
        """Video frames that `latents` latent frames decode to."""
        return self.time_compression * (latents - 1) + 1

    def padded_latents(self, latents: int) -> int:
        """Round `latents` kept latent frames up to a multiple of the temporal patch."""
        return -(-latents // self.patch_size[0]) * self.patch_size[0]

    def num_patches(self, latents: int, size: tuple[int, int]) -> int:
        """Patches of a video of `latents` kept latent frames and `size` (height, width) in pixels."""
        height, width = (side // step for side, step in zip(size, self.size_steps, strict=True))
        return self.padded_latents(latents) // self.patch_size[0] * height * width

    def kept_latents(self, sampling_num_frames: int) -> int:
        """Latent frames kept for a value of ``args.sampling_num_frames``: as many.

        Files of the reference release count the padding of the longest video as well: 22 means 21 latents, 81 frames.
        """
        is_longest = sampling_num_frames == self.padded_latents(self.max_latents)
        return self.max_latents if is_longest else sampling_num_frames

    def legal_latents(self) -> list[int]:
        """Legal numbers of kept latent frames, ascending."""
        return list(range(1, self.max_latents + 1))

    def legal_frames(self) -> list[int]:
        """Legal numbers of video frames of clips that are not `longer`, ascending."""
        return [self.video_frames(latents) for latents in self.legal_latents()]

    def frames_are_legal(self, frames: int) -> bool:
        """Whether a clip may have `frames` video frames."""
        longest = math.inf if self.longer and not self.fixed_size else self.video_frames(self.max_latents)
        return 1 <= frames <= longest and (frames - 1) % self.time_compression == 0

    def size_is_legal(self, height: int, width: int) -> bool:
        """Whether `height` × `width` pixels is a legal size."""
        if self.fixed_size:
            return (height, width) == self.max_size
        return all(
            0 < side <= largest and side % step == 0
            for side, largest, step in zip((height, width), self.max_size, self.size_steps, strict=True)
        )

    def nearest_size(self, height: float, width: float) -> tuple[int, int]:
        """Return the legal (height, width) in pixels closest to the given one."""
        if self.fixed_size:
            return self.max_size
        sides = []
        for side, largest, step in zip((height, width), self.max_size, self.size_steps, strict=True):
            sides.append(min(max(round(side / step), 1), largest // step) * step)
        return sides[0], sides[1]

    def size_for_image(self, height: int, width: int) -> tuple[int, int]:
        """Return the default size of a video that starts with an image of `height` × `width` pixels.

        Models with temporal patches (CogVideoX1.5) keep the image's aspect ratio, with a short side of 768 pixels if
        the maximum allows; the others use their training size.
        """
        if self.patch_size[0] == 1 or self.fixed_size:
            return self.max_size
        scale = FREE_SIZE[0] / min(height, width)
        for side, largest in zip((height, width), self.max_size, strict=True):
            scale = min(scale, largest / side)
        return self.nearest_size(height * scale, width * scale)

    def default_size(self) -> tuple[int, int]:
        """Return the default (height, width) of a text-to-video sample."""
        return self.max_size if self.patch_size[0] == 1 or self.fixed_size else self.nearest_size(*FREE_SIZE)


def normalize_patch_size(patch_size: Any) -> PatchSize:
    """Return (time, height, width); ``2`` means 2×2 patches within a frame: (1, 2, 2).

    Raises:
        InputError: neither one nor three positive integers.
    """
    sides = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if not isinstance(sides, Sequence) or len(sides) != 3 or not all(map(_is_count, sides)):
        raise InputError(
            f"model.network_config.params.patch_size is {patch_size!r}; give one number for height and width, or "
            "[time, height, width], e.g. [2, 2, 2]"
        )
    return sides[0], sides[1], sides[2]


def require_rotary_heads(channels: int) -> None:
    """Raise InputError for heads whose `channels` cannot be divided among the axes of 3D rotary positions."""
    if channels % 16:
        raise InputError(
            f"3D rotary positions need a head size that is a multiple of 16, got {channels}; set num_attention_heads "
            "to another divisor of hidden_size"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(params: Mapping[str, Any], name: str, fallback: int | None = None) -> int:
    value = params.get(name, fallback)
    if not _is_count(value):
        raise InputError(f"model.network_config.params.{name} is {value!r}; give a whole number above 0")
    return value
