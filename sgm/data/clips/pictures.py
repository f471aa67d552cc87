"""The one reader of picture files, for training, sampling and precomputing.

Pictures are upright by their EXIF orientation, in RGB of 8 bits, transparent parts over white. Grey values of 16 bits
are scaled, those of floats taken from 0 to 1. A picture with more pixels than Pillow's limit against decompression
bombs is refused from its header.

Legend: H, W pixels.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from sgm.data.rows import require_file
from sgm.io import NotAFileError

# Pixel formats that hold one picture. Pillow runs Ghostscript for EPS, and others hold instructions or thumbnails.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA")
ANIMATED = ("PNG", "WEBP", "GIF")  # formats whose further pictures come later in time; those of TIFF are other sizes
BACKGROUND = 255  # white, behind transparent parts of pictures and videos
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 on swap height and width

# Above the limit, `_opened` refuses; Pillow itself only warns up to twice the limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """A file is no usable picture; the message is the reason.

    Attributes:
        damaged: whether it is no picture, or a damaged one; otherwise it is an intact picture that is refused.
    """

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


def read_picture(source: str | io.BytesIO) -> np.ndarray:
    """Decode a picture: (H, W, 3) uint8, RGB.

    Args:
        source: path, or the bytes of a file.

    Raises:
        PictureError: it is missing, damaged, too large, or of a format or range of values that is not read.
    """
    with _opened(source) as image:
        upright = _to_8_bits(ImageOps.exif_transpose(image))
        if not upright.has_transparency_data:
            return np.array(upright.convert("RGB"))
        return over_background(np.array(upright.convert("RGBA")))


def over_background(pixels: np.ndarray) -> np.ndarray:
    """Lay pictures with transparency, (..., H, W, 4) uint8, over the background: (..., H, W, 3) uint8."""
    alpha = pixels[..., 3:].astype(np.uint16)
    return ((pixels[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255).astype(np.uint8)


def picture_size(source: str | io.BytesIO) -> tuple[int, int]:
    """Return the displayed (H, W) of a picture, from its header (Pillow may decode PNG for its EXIF, and TIFF).

    Raises:
        PictureError: it is missing, too large, or its header cannot be read.
    """
    with _opened(source) as image:
        if image.format == "TIFF":  # Pillow's versions differ in whether they turn it themselves
            upright = ImageOps.exif_transpose(image)
            return upright.height, upright.width
        turned = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(source: str | io.BytesIO) -> Iterator[Image.Image]:
    """Open a picture, without decoding it; errors, also those in the block, become a PictureError."""
    try:
        if isinstance(source, str):
            require_file(source)
        with Image.open(source, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                found = f"it is too large: {image.height}x{image.width} pixels, of at most {limit:,}"
                raise PictureError(f"{found}; make it smaller")
            if image.format in ANIMATED and getattr(image, "is_animated", False):
                found = f"it is an animation of {getattr(image, 'n_frames', 0)} pictures"
                raise PictureError(f"{found}; save it as a video, or one of them as a picture")
            yield image
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError("it does not exist") from error
    except Image.DecompressionBombError as error:  # raised on opening, above twice the limit
        raise PictureError(f"it is too large: {error}; make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError("no known image format", damaged=True) from error
    except NotAFileError as error:
        raise PictureError(str(error)) from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(reason, damaged=True) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits or floats to 8 bits (Pillow's conversion clips it); leave other modes unchanged.

    Raises:
        PictureError: the value of white is unknown.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    grey = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535.0  # some formats store 16 bits in mode I, of 32 bits
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0 and high <= white):  # also for NaN
        raise PictureError(
            f"its pixels are grey values of 32 bits (mode {image.mode}) from {low:g} to {high:g}; save it with 8 or 16 "
            "bits, or as floats from 0 to 1"
        )
    scaled = Image.fromarray(np.round(grey * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")  # of PNG: the grey value that is transparent
    if isinstance(clear, int):
        scaled.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    return scaled
