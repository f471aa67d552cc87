"""Write mp4 videos, latents and contact sheets, each atomically.

Legend: ``T C H W`` frames of one video from the model, ``T H W C`` pictures.
"""

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from sgm.io import atomic_file
from sgm.util import InputError, RunError
from sgm.weights.checksums import save_torch

Frames = np.ndarray | torch.Tensor

# On a contact sheet, small frames are enlarged to a shorter side of MIN_SIDE pixels, wide ones reduced to MAX_WIDTH.
MIN_SIDE, MAX_WIDTH = 192, 384
MARGIN, FONT_SIZE = 6, 15
MOST_PIXELS = {".webp": 16383, ".gif": 65535, ".jpg": 65500, ".jpeg": 65500, ".pdf": 65500}  # of a side, by format


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Round decoded video (T, 3, H, W) in [-1, 1] to pictures (T, H, W, 3), uint8 on the CPU.

    Raises:
        RunError: the video holds NaN or infinity.
    """
    video = video.detach().float()
    if not torch.isfinite(video).all():
        raise RunError(
            "the decoded video is not finite (NaN or infinity): the precision is too narrow. The 2B model runs in "
            "fp16, bf16 or fp32, the 5B models in bf16 or fp32; correct args.fp16 and args.bf16"
        )
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def write_video(path: str | Path, frames: Frames, fps: float, *, crf: int = 17) -> None:
    """Write an mp4 (H.264, yuv420p, in the size of the frames).

    Args:
        path: the file, ending with ``.mp4``.
        frames: (T, H, W, 3) uint8, H and W even, as yuv420p stores one colour for 2×2 pixels.
        fps: frames per second.
        crf: constant rate factor of x264, 0 (lossless) to 51; 17 looks like the original.

    Raises:
        ValueError: `frames` have another shape or type.
        RunError: ffmpeg failed or the disk is full.
    """
    pictures = _as_array(frames)
    num_frames, height, width, _ = pictures.shape
    if num_frames == 0 or height % 2 or width % 2:
        raise ValueError(f"expected at least one frame of even height and width, got {num_frames} of {height}x{width}")
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    encoder = ["-an", "-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    # ffmpeg converts RGB with the BT.601 matrix; tag the file with it, since some players assume another one.
    colours = ["-colorspace", "smpte170m", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    with atomic_file(path) as temporary:
        output = os.path.abspath(temporary)  # ffmpeg would take a relative name with a colon for a URL
        words = ["-v", "error", "-y", *source, *encoder, *colours, output]
        # In a thread: signals raise in the main thread alone, and one that raised while ffmpeg starts would leave it
        # running. So it is waited for.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()  # a thread that is interrupted while it starts would not be waited for
            done = pool.submit(_run_ffmpeg, words, pictures.data.cast("B")).result()
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()[:6]
            raise RunError(
                f"could not write {path}: ffmpeg ended with {done.returncode}: {' / '.join(said) or 'no message'}; "
                "check that the disk has room and that the ffmpeg of imageio-ffmpeg has libx264"
            )


def _run_ffmpeg(words: Sequence[str], content: memoryview) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *words]  # asks it for its version at first
    return subprocess.run(command, input=content, capture_output=True, check=False)


def read_video(path: str | Path) -> np.ndarray:
    """Return the frames (T, H, W, 3) uint8 of a video of `write_video`.

    Raises:
        RunError: it cannot be read, or holds no frames.
    """
    from sgm.data.clips.decode import open_video  # lazy: slow to import, and needed for contact sheets only

    with open_video(path) as (container, stream, _):
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    if not frames:
        raise RunError(f"{path} holds no frames; remove it to sample it again")
    return np.stack(frames)


def write_latents(path: str | Path, latents: torch.Tensor) -> None:
    """Write latents (T, C, H, W) under the name ``latents``: safetensors, or ``torch.save`` if `path` ends with .pt.

    Raises:
        RunError: the file could not be written.
    """
    tensors = {"latents": latents.detach().cpu().contiguous().clone()}
    with atomic_file(path, need_bytes=tensors["latents"].nbytes) as temporary:
        if temporary.suffix == ".safetensors":
            save_file(tensors, temporary)
        else:
            save_torch(tensors, temporary)


def contact_sheet(entries: Iterable[tuple[str, Frames]], path: str | Path, *, columns: int = 5) -> None:
    """Draw videos as one PNG: a row each, a caption above evenly spaced frames.

    Args:
        entries: caption and frames (T, H, W, 3) uint8 of each video; sizes may differ. Of a generator, one video is in
            memory at a time.
        path: the file, ending with ``.png``.
        columns: maximum number of frames per video.

    Raises:
        ValueError: `entries` is empty, or frames have another shape or type.
        InputError: the picture is too large for the format.
        RunError: the file could not be written.
    """
    rows = [_row(caption, _as_array(frames), columns) for caption, frames in entries] if columns > 0 else []
    if not rows:
        raise ValueError(f"expected videos and columns, got {len(rows)} videos and {columns} columns")
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    _require_room(path, size, "draw fewer videos, or name a .png")
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_file(path) as temporary:
        sheet.save(temporary)


def animation(entries: Sequence[tuple[str, Frames]], path: str | Path, *, columns: int, fps: float) -> None:
    """Play videos beside and below each other in one animated WebP or GIF, a caption above each.

    Args:
        entries: caption and frames (T, H, W, 3) uint8 of each video; shorter ones hold their last frame.
        path: the file, ending with ``.webp`` or ``.gif``.
        columns: videos in a row.
        fps: frames per second.

    Raises:
        ValueError: `entries` is empty, or frames have another shape or type.
        InputError: the picture is too large for the format.
        RunError: the file could not be written.
    """
    if not entries or columns < 1:
        raise ValueError(f"expected videos and columns, got {len(entries)} videos and {columns} columns")
    videos = [(caption, _as_array(frames)) for caption, frames in entries]
    num_frames = max(len(frames) for _, frames in videos)
    pictures = []
    for index in range(num_frames):
        cells = [_row(caption, frames[min(index, len(frames) - 1)][None], 1) for caption, frames in videos]
        width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
        rows = -(-len(cells) // columns)
        size = (min(columns, len(cells)) * width, rows * height)
        _require_room(path, size, "give other --columns, or draw fewer videos")
        picture = Image.new("RGB", size, "white")
        for number, cell in enumerate(cells):
            # Videos of a row stand on one line, whatever the length of their captions.
            left, top = number % columns * width, number // columns * height + height - cell.height
            picture.paste(cell, (left, top))
        pictures.append(picture)
    with atomic_file(path) as temporary:
        settings = {"duration": round(1000 / fps), "loop": 0, "quality": 80, "method": 4}
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], **settings)


def _require_room(path: str | Path, size: tuple[int, int], cure: str) -> None:
    """Raise an InputError if the format of a picture cannot hold its size (W, H)."""
    most = MOST_PIXELS.get(Path(path).suffix.lower(), max(size))
    if max(size) > most:
        said = f"the picture would be {size[0]}x{size[1]}, and this format holds {most} pixels a side"
        raise InputError(f"{path}: {said}; {cure}")


def _row(caption: str, pictures: np.ndarray, columns: int) -> Image.Image:
    """Draw one video of a contact sheet."""
    indices = np.linspace(0, len(pictures) - 1, min(columns, len(pictures))).round().astype(int)
    height, width = pictures.shape[1:3]
    enlarge = -(-MIN_SIDE // min(height, width))
    scale = min(MAX_WIDTH / width, 1.0) if enlarge == 1 else enlarge
    size = (round(width * scale), round(height * scale))
    # Nearest neighbour when enlarging, to show the model's pixels without interpolation.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    row_width = MARGIN + len(indices) * (size[0] + MARGIN)
    font = ImageFont.load_default(FONT_SIZE)
    lines = _wrap(caption, font, row_width - 2 * MARGIN)
    top = MARGIN + len(lines) * (FONT_SIZE + 4)
    row = Image.new("RGB", (row_width, top + size[1] + MARGIN), "white")
    ImageDraw.Draw(row).multiline_text((MARGIN, MARGIN // 2), "\n".join(lines), fill="black", font=font)
    for column, index in enumerate(indices):
        picture = Image.fromarray(pictures[index]).resize(size, method)
        row.paste(picture, (MARGIN + column * (size[0] + MARGIN), top))
    return row


def _wrap(text: str, font: Any, width: int, *, max_lines: int = 3) -> list[str]:
    """Wrap a caption into at most `max_lines` lines of `width` pixels; a longer one ends with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        words = lines[max_lines - 1].split()
        while len(words) > 1 and font.getlength(" ".join([*words, "..."])) > width:
            words.pop()
        lines[max_lines - 1 :] = [" ".join([*words, "..."])]
    return lines


def _as_array(frames: Frames) -> np.ndarray:
    """Return frames as a contiguous array (T, H, W, 3) uint8."""
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(f"expected frames (T, H, W, 3) in uint8, got {array.shape} in {array.dtype}")
    return np.ascontiguousarray(array)
