"""The data sets that YAML names.

Legend: F frames, H W pixels.
"""

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from sgm.data.check import RowReport, check_rows
from sgm.data.folder import Row, list_rows
from sgm.data.frames import num_frames_4k1, select_frames
from sgm.data.transform import cover_crop
from sgm.data.video import ClipError, read_frames, scan
from sgm.util import InputError

_CHUNK = 8  # frames brought to size at a time: those of a large clip as floats would fill gigabytes


class SFTDataset:
    """Clips with captions from a folder: ``videos/**/x.mp4`` with ``labels/**/x.txt``, or the caption beside the clip.

    ``dataset[i]`` decodes clip i: ``mp4`` (F, 3, H, W) float32 in [-1, 1], ``txt`` its caption, ``num_frames`` how many
    of the frames it gave before the last one was repeated, ``fps``, and ``path``.

    Args:
        data_dir: the folder; training gives each of ``args.train_data`` and ``args.valid_data``.
        video_size: (H, W) that clips are scaled to cover and cropped to, in pixels.
        fps: frames taken per second of the clip, whatever its own rate.
        max_num_frames: F, one of 1, 5, 9, ...; shorter clips repeat their last frame.
        skip_frms_num: source frames left out at both ends.
        allow_missing_captions: train clips without a caption on an empty one.

    Raises:
        InputError: a parameter is not usable, or the folder holds no clips.
    """

    def __init__(
        self,
        *,
        data_dir: str | Path,
        video_size: tuple[int, int],
        fps: float = 8,
        max_num_frames: int = 49,
        skip_frms_num: float = 3,
        allow_missing_captions: bool = False,
    ) -> None:
        if len(video_size) != 2 or min(video_size) < 1:
            raise InputError(f"data.params.video_size is {list(video_size)}; give [height, width] in pixels")
        if fps <= 0:
            raise InputError(f"data.params.fps is {fps}; give a number above 0, 8 or 16 for the released models")
        if skip_frms_num < 0 or int(skip_frms_num) != skip_frms_num:
            raise InputError(f"data.params.skip_frms_num is {skip_frms_num}; give a whole number of frames, 0 or more")
        self.video_size = (int(video_size[0]), int(video_size[1]))
        self.fps = float(fps)
        self.max_num_frames = num_frames_4k1(max_num_frames)
        self.skip_frms_num = int(skip_frms_num)
        self.rows: list[Row] = list_rows(data_dir, allow_missing_captions=allow_missing_captions)

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode clip `index`.

        Raises:
            ClipError: it, or its caption, cannot be used.
        """
        row = self.rows[index]
        if row.problem:
            raise ClipError(row.path, row.problem)
        info, times = scan(row.path)
        try:
            selection = select_frames(
                times, fps=self.fps, max_num_frames=self.max_num_frames, skip_frms_num=self.skip_frms_num
            )
        except ValueError as error:
            raise ClipError(row.path, str(error)) from error
        different = sorted(set(selection.indices))
        pictures = torch.from_numpy(read_frames(row.path, different, info.num_frames))
        sized = [
            cover_crop(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1, self.video_size)
            for chunk in pictures.split(_CHUNK)
        ]
        places = [different.index(frame) for frame in selection.indices]
        return {
            "mp4": torch.cat(sized)[places],
            "txt": row.caption,
            "num_frames": selection.num_frames,
            "fps": self.fps,
            "path": str(row.path),
        }

    @property
    def paths(self) -> list[str]:
        """The clips, in order."""
        return [str(row.path) for row in self.rows]

    @property
    def captions(self) -> list[str]:
        """Their captions."""
        return [row.caption for row in self.rows]

    def check(self, *, decode: bool = False, num_threads: int = 8) -> list[RowReport]:
        """Check all clips without training on them; with `decode`, every frame of them."""
        return check_rows(
            self.rows,
            video_size=self.video_size,
            fps=self.fps,
            max_num_frames=self.max_num_frames,
            skip_frms_num=self.skip_frms_num,
            decode=decode,
            num_threads=num_threads,
        )

    def select(self, indices: Sequence[int]) -> Self:
        """Return the data set of these clips alone, in this order."""
        chosen = copy.copy(self)
        chosen.rows = [self.rows[index] for index in indices]
        return chosen

    def without(self, paths: Collection[str]) -> Self:
        """Return the data set of all clips but these."""
        left_out = set(paths)
        return self.select([index for index, path in enumerate(self.paths) if path not in left_out])
