"""Which videos a model can make: frame counts and sizes that follow from the network's parameters.

Three units meet here. A video has F frames of H×W pixels; the VAE turns it into L = (F−1)/4 + 1 latent frames of
H/8 × W/8; the network cuts those into patches of (time, height, width). With a temporal patch of 2 the network needs
an even number of latent frames: they are padded at the front by one, and the padding is dropped after sampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sgm.util import InputError

SPATIAL_COMPRESSION = 8
FREE_SIZE = (768, 1360)  # what CogVideoX1.5, whose maximum is much larger, was released for

_FIXED_SIZE_POSITIONS = "Basic3DPositionEmbeddingMixin"


@dataclass(frozen=True)
class Geometry:
    """The legal shapes of one network.

    Attributes:
        patch_size: (time, height, width) of a patch, in latent frames and latent pixels.
        time_compression: video frames per latent frame after the first.
        max_latents: latent frames of the longest video, without padding.
        max_latent_size: largest (height, width) of the latents; with `fixed_size` the only one.
        fixed_size: whether positions are tables (sincos or learned) that fit one size only.
        in_channels: channels of the network's input.
        out_channels: channels of its output, which are those of the latents.
        positions: ``sincos``, ``learned`` or ``rotary``: how the network knows where a patch is.
    """

    patch_size: tuple[int, int, int]
    time_compression: int
    max_latents: int
    max_latent_size: tuple[int, int]
    fixed_size: bool
    in_channels: int
    out_channels: int
    positions: str

    @classmethod
    def from_network(cls, params: Mapping[str, Any]) -> Self:
        """Read the geometry from ``model.network_config.params``.

        Raises:
            InputError: a parameter is missing, or is no whole number above 0.
        """
        patch = params.get("patch_size", 2)
        if isinstance(patch, int):
            patch = (1, patch, patch)
        patch_ok = isinstance(patch, Sequence) and len(patch) == 3 and all(_is_count(side) for side in patch)
        if not patch_ok:
            raise InputError(
                f"model.network_config.params.patch_size is {patch!r}; give one number for height and width, or "
                "[time, height, width], e.g. [2, 2, 2]"
            )
        rate = _count(params, "time_compressed_rate", 4)
        modules = params.get("modules") or {}
        position_config = modules.get("pos_embed_config") or {}
        sincos = str(position_config.get("target", "")).endswith(_FIXED_SIZE_POSITIONS)
        learned = bool((position_config.get("params") or {}).get("learnable_pos_embed", False))
        return cls(
            patch_size=(patch[0], patch[1], patch[2]),
            time_compression=rate,
            max_latents=(_count(params, "num_frames") - 1) // rate + 1,
            max_latent_size=(_count(params, "latent_height"), _count(params, "latent_width")),
            fixed_size=sincos or learned,
            in_channels=_count(params, "in_channels"),
            out_channels=_count(params, "out_channels"),
            positions="sincos" if sincos else "learned" if learned else "rotary",
        )

    @property
    def image_conditioned(self) -> bool:
        """Whether the network takes image latents beside the noisy ones (image-to-video)."""
        return self.in_channels == 2 * self.out_channels

    @property
    def max_size(self) -> tuple[int, int]:
        """Largest (height, width) in pixels."""
        height, width = self.max_latent_size
        return height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION

    @property
    def size_steps(self) -> tuple[int, int]:
        """What height and width must be multiples of, in pixels."""
        return self.patch_size[1] * SPATIAL_COMPRESSION, self.patch_size[2] * SPATIAL_COMPRESSION

    def video_frames(self, latents: int) -> int:
        """Video frames that `latents` latent frames decode to."""
        return self.time_compression * (latents - 1) + 1

    def padded_latents(self, latents: int) -> int:
        """Latent frames that the network sees for `latents` kept ones: padded to a multiple of the temporal patch."""
        return -(-latents // self.patch_size[0]) * self.patch_size[0]

    def num_patches(self, latents: int, size: tuple[int, int]) -> int:
        """Patches that the network sees of a video of `latents` kept latent frames and (height, width) in pixels."""
        height, width = (side // step for side, step in zip(size, self.size_steps, strict=True))
        return self.padded_latents(latents) // self.patch_size[0] * height * width

    def kept_latents(self, sampling_num_frames: int) -> int:
        """Latent frames kept for what a user writes as ``args.sampling_num_frames``.

        With a temporal patch of 2, a count that fills whole patches includes the padding frame, as in the reference
        release (22 stands for 21 kept latents, 81 frames).
        """
        temporal = self.patch_size[0]
        if temporal > 1 and sampling_num_frames % temporal == 0:
            return sampling_num_frames - temporal + 1
        return sampling_num_frames

    def legal_latents(self) -> list[int]:
        """Every number of latent frames that can be kept, ascending."""
        return list(range(1, self.max_latents + 1, self.patch_size[0]))

    def legal_frames(self) -> list[int]:
        """Every number of video frames that can be made, ascending."""
        return [self.video_frames(latents) for latents in self.legal_latents()]

    def size_is_legal(self, height: int, width: int) -> bool:
        """Whether videos of `height` × `width` pixels can be made."""
        if self.fixed_size:
            return (height, width) == self.max_size
        return all(
            0 < side <= most and side % step == 0
            for side, most, step in zip((height, width), self.max_size, self.size_steps, strict=True)
        )

    def nearest_size(self, height: float, width: float) -> tuple[int, int]:
        """Return the legal (height, width) in pixels closest to the given one."""
        if self.fixed_size:
            return self.max_size
        sides = []
        for side, most, step in zip((height, width), self.max_size, self.size_steps, strict=True):
            sides.append(min(max(round(side / step), 1), most // step) * step)
        return sides[0], sides[1]

    def size_for_image(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the video that starts with an image of `height` × `width`, where the user names none.

        Models with temporal patches (CogVideoX1.5) keep the image's shape, its short side at 768 pixels where the
        maximum allows; the others make videos of the size that they were trained on.
        """
        if self.patch_size[0] == 1 or self.fixed_size:
            return self.max_size
        scale = FREE_SIZE[0] / min(height, width)
        for side, most in zip((height, width), self.max_size, strict=True):
            scale = min(scale, most / side)
        return self.nearest_size(height * scale, width * scale)

    def default_size(self) -> tuple[int, int]:
        """Return (height, width) of a text-to-video sample where the user names none."""
        return self.max_size if self.patch_size[0] == 1 or self.fixed_size else self.nearest_size(*FREE_SIZE)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count(params: Mapping[str, Any], name: str, fallback: int | None = None) -> int:
    value = params.get(name, fallback)
    if not _is_count(value):
        raise InputError(f"model.network_config.params.{name} is {value!r}; give a whole number above 0")
    return value
