"""A picture of what a run is making, written again and again while it samples: ``args.preview``.

The VAE decodes three latent frames of the denoised latents, the first, the middle and the last, each alone, as if a
clip began with it. Of the causal VAE that is the first frame of the video, and nearly a frame of the four that another
latent frame stands for: 30 to 37 dB on clips of the toy. It needs no table of colours for each VAE, and as much memory
as a step of the 2B model, less than one of the others. No random number is drawn: samples are bit-equal.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgm.inference.record import clock
from sgm.inference.video import to_uint8
from sgm.log import get_logger

logger = get_logger(__name__)

MAX_SIDE = 320  # pixels of the longer side of each frame
MAX_SHARE = 0.1  # of the time of the steps that previews take


class Preview:
    """Called after each step, it writes a picture unless those before took too much of the time.

    The first step has a picture; another one follows once all before, itself counted as the last, take `MAX_SHARE` of
    the time of the steps at most. So the cost is bounded on every device, whatever a step costs.

    Args:
        path: of the picture, replaced each time; Pillow knows its suffix.
        decode: latent frames (n, C, H, W) to pictures (n, 3, 8H, 8W) in −1..1, see
            `sgm.models.video_diffusion.SATVideoDiffusionEngine.decode_alone`.
        clock: the time in seconds at which the device has done its work.
    """

    def __init__(
        self, path: Path, decode: Callable[[torch.Tensor], torch.Tensor], clock: Callable[[], float] = clock
    ) -> None:
        self.path, self.decode, self.clock = path, decode, clock
        self._begun, self._last, self._spent = clock(), 0.0, 0.0
        self._is_over = False

    def begin(self) -> None:
        """Begin with a new sample, whose first step has a picture again."""
        self._begun, self._last, self._spent = self.clock(), 0.0, 0.0

    def __call__(self, denoised: torch.Tensor) -> None:
        """Look at denoised latents (B, T, C, H, W), of which the first sample is shown."""
        start = self.clock()
        steps = start - self._begun - self._spent
        if self._is_over or self._spent + self._last > MAX_SHARE * steps:
            return
        try:
            self._write(denoised[0])
        except torch.OutOfMemoryError:
            self._is_over = True  # the run itself needs less than what is left: it goes on
            logger.warning("args.preview: no memory is left to decode a frame; there are no further previews")
        self._last = self.clock() - start
        self._spent += self._last

    def _write(self, latents: torch.Tensor) -> None:
        """Write the picture of one sample, latents (T, C, H, W); no failure of the run if it cannot be written."""
        last = len(latents) - 1
        shown = latents[sorted({0, last // 2, last})]
        pictures = to_uint8(self.decode(shown).nan_to_num()).numpy()  # of noise at worst; the run says what is wrong
        sheet = _beside([Image.fromarray(picture) for picture in pictures])
        with contextlib.suppress(OSError):
            beside = self.path.with_name(f".{os.getpid()}-{self.path.name}")
            sheet.save(beside)
            beside.replace(self.path)


def _beside(pictures: list[Any]) -> Any:
    """Return pictures of one size beside each other, with a line between them; large ones get smaller."""
    for picture in pictures:
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (len(pictures) * (width + 2) - 2, height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index * (width + 2), 0))
    return sheet
