"""Data sets named in YAML.

Legend: F frames, H W pixels.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from sgm.config.values import AtLeast1, Share, Width
from sgm.data.buckets.config import parse_buckets
from sgm.data.cache import CachedTensors, ClipKeys
from sgm.data.clips.check import RowReport, check_rows, companion_problem, pair_problem, row_reports
from sgm.data.clips.decode import ClipError, Scan, read_frames, scan
from sgm.data.clips.frames import TIME_COMPRESSION, Selection, num_frames_4k1, select_frames
from sgm.data.clips.index import clip_infos, remember
from sgm.data.clips.masks import latent_mask, white
from sgm.data.clips.transform import cover_crop, stretch
from sgm.data.formats.manifest import Columns
from sgm.data.formats.registry import list_rows
from sgm.data.formats.webdataset import Member
from sgm.data.remote.objects import RemoteFile, root_of
from sgm.data.remote.store import Store
from sgm.data.rows import ClipFile, Row, VideoInfo
from sgm.urls import is_url, local_path
from sgm.util import InputError, RunError, default

Skipped = Annotated[float, Field(ge=0, le=10_000)]  # frames
RESHAPE_MODES = ("center", "random", "none")


class SFTDataset:
    """Clips with captions from a folder, manifest or archives, see docs/data.md.

    ``dataset[i]`` decodes clip i without random augmentation: ``mp4`` (F, 3, H, W) float32 in [-1, 1], ``txt`` the
    caption, ``num_frames`` the frames without padding, ``fps``, ``path``, and ``image`` (3, H, W) in [-1, 1], the first
    image of image-to-video, or None; with `control` also ``control``, like ``mp4``, and with `mask` also ``mask``, bool
    (T, 1, H/8, W/8) of its latents. Training calls `sample`.

    Args:
        data_dir: folder, manifest, archive, or URL of archives; training passes each of ``args.train_data`` and
            ``args.valid_data``.
        video_size: (H, W) in pixels.
        fps: frames selected per second of the clip.
        max_num_frames: F, one of 1, 5, 9, ...; shorter clips repeat the last frame.
        skip_frms_num: source frames skipped at both ends.
        skip_frames_start: source frames skipped at the start; None is `skip_frms_num`.
        skip_frames_end: source frames skipped at the end; None is `skip_frms_num`.
        reshape_mode: ``center`` scales clips to cover `video_size` and crops the centre, ``random`` a random part per
            sample, ``none`` scales height and width separately.
        random_flip: probability that a sample is mirrored horizontally.
        id_token: word put before every caption, with a space.
        caption_dropout: probability that the caption of a sample is empty.
        allow_missing_captions: train clips without a caption on an empty one.
        format: ``folder``, ``lines``, ``csv``, ``json``, ``jsonl``, ``parquet``, ``webdataset``, ``huggingface``, or
            ``auto``.
        caption_column: column, or file of lines, of captions; None selects it by its usual names.
        video_column: likewise for clips.
        image_column: likewise for first images.
        rejected_column: column of clips to which those of `video_column` are preferred, for a loss that takes pairs;
            samples then have ``rejected``, of the shape and with the augmentation of ``mp4``. None: there are none.
        control: each clip has a control, a clip that the network follows frame by frame, see docs/control.md; training
            sets it where the network takes one.
        control_column: column, or file of lines, of controls.
        mask: each clip has a mask, a clip or picture, white where the loss counts, see docs/training_well.md.
        mask_column: column, or file of lines, of masks.
        buckets: shapes of training clips, see docs/buckets.md; `video_size` and `max_num_frames` then apply to
            validation clips only.
        drop_partial: with buckets, leave out the clips of an epoch that do not fill a micro-batch of all ranks.
        store: that keeps what is read from a URL; None is that of the user's cache. Training passes that of
            ``args.remote_cache``.

    Raises:
        InputError: a parameter is invalid, or the data set is malformed.
    """

    TEXTS: ClassVar[tuple[str, ...]] = ("txt",)  # entries of a sample that a text encoder may read

    def __init__(
        self,
        *,
        data_dir: str | Path,
        video_size: tuple[Width, Width],
        fps: Annotated[float, Field(ge=0.01, le=1000)] = 8,
        max_num_frames: AtLeast1 = 49,
        skip_frms_num: Skipped = 3,
        skip_frames_start: Skipped | None = None,
        skip_frames_end: Skipped | None = None,
        reshape_mode: Literal["center", "random", "none"] = "center",
        random_flip: Share = 0.0,
        id_token: str | None = None,
        caption_dropout: Share = 0.0,
        allow_missing_captions: bool = False,
        format: str = "auto",
        caption_column: str | None = None,
        video_column: str | None = None,
        image_column: str | None = None,
        rejected_column: str | None = None,
        control: bool = False,
        control_column: str | None = None,
        mask: bool = False,
        mask_column: str | None = None,
        buckets: list[Any] | dict[Any, Any] | None = None,
        drop_partial: bool = False,
        store: Store | None = None,
    ) -> None:
        if len(video_size) != 2 or min(video_size) < 1:
            raise InputError(f"data.params.video_size is {list(video_size)}; give [height, width] in pixels")
        if fps <= 0:
            raise InputError(f"data.params.fps is {fps}; give a number above 0, 8 or 16 for the released models")
        if reshape_mode not in RESHAPE_MODES:
            raise InputError(f"data.params.reshape_mode is '{reshape_mode}'; give one of {', '.join(RESHAPE_MODES)}")
        self.video_size = (int(video_size[0]), int(video_size[1]))
        self.fps = float(fps)
        self.max_num_frames = num_frames_4k1(max_num_frames)
        both = _frame_count("skip_frms_num", skip_frms_num)
        self.skip = (
            _frame_count("skip_frames_start", default(skip_frames_start, both)),
            _frame_count("skip_frames_end", default(skip_frames_end, both)),
        )
        self.buckets = None if buckets is None else parse_buckets(buckets)
        if drop_partial and buckets is None:
            raise InputError("data.params.drop_partial has no effect without data.params.buckets; remove it")
        self.drop_partial = drop_partial
        self.reshape_mode = reshape_mode
        self.random_flip = _probability("random_flip", random_flip)
        self.caption_dropout = _probability("caption_dropout", caption_dropout)
        for name, column, has in (("control", control_column, control), ("mask", mask_column, mask)):
            if column is not None and not has:
                raise InputError(f"data.params.{name}_column has no effect without data.params.{name}=true; remove it")
        self.control, self.mask = control, mask
        # Of a part that the run has no use for, not even a missing file is a problem.
        of_parts = (control_column if control else "", mask_column if mask else "")
        columns = Columns(caption_column, video_column, image_column, rejected_column, *of_parts)
        store = store or Store()
        self.rows = list_rows(
            data_dir, format=format, columns=columns, allow_missing_captions=allow_missing_captions, store=store
        )
        for name, has in (("control", control), ("mask", mask)):
            self.rows = [_with_companion(row, name) if has else replace(row, **{name: None}) for row in self.rows]
        if id_token:
            self.rows = [replace(row, caption=f"{id_token} {row.caption}".strip()) for row in self.rows]
        self._cache: _Cache | None = None
        if is_url(data_dir):
            self._root: Path | str = root_of(str(data_dir))
            self.folder = store.folder / "clips"  # of the index of their metadata
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            path = local_path(data_dir)
            self.folder = self._root = path if path.is_dir() else path.parent

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode clip `index` without random augmentation; see `sample`."""
        return self.sample(index, None)

    def sample(
        self, index: int, generator: torch.Generator | None, shape: tuple[int, int, int] | None = None
    ) -> dict[str, Any]:
        """Decode clip `index` as a training sample.

        Args:
            index: of the clip.
            generator: on the CPU; four numbers are always drawn, for caption dropout, mirroring and the position of the
                crop. None keeps the caption and the centre.
            shape: (F, H, W) of a bucket; None uses the configured one.

        Raises:
            ClipError: the clip, its caption or its image cannot be used.
        """
        row = self.rows[index]
        if row.problem:
            raise ClipError(row.path, row.problem)
        num_frames, height, width = shape or (self.max_num_frames, *self.video_size)
        augmentation = self._augmentation(generator, (height, width))
        caption = "" if augmentation.drop_caption else row.caption
        sample = {"txt": caption, "fps": self.fps, "path": str(row.path)}
        if self._cache is None:
            scanned, selection = self._selected(row.path, num_frames)
            sample["mp4"] = _arranged(lambda indices: read_frames(row.path, indices, scanned), selection, augmentation)
            if row.rejected is not None:
                with _errors_of_part(row, "rejected clip"):
                    sample["rejected"] = self._rejected(row.rejected, selection, augmentation, num_frames)
            if self.control:
                with _errors_of_part(row, "control"):
                    sample["control"] = _arranged(_control_reader(row, scanned), selection, augmentation)
            if self.mask:
                sample["mask"] = _mask(row, scanned, selection, augmentation)
            return {**sample, "num_frames": selection.num_frames, "image": _image(row, augmentation)}
        if reason := self._cache.failure(row.path):
            raise ClipError(row.path, reason)
        sample |= self._cache.moments(row.path, (num_frames, height, width))
        if self._cache.images is not None:
            sample["image_moments"] = self._cache.images[self._cache.image_keys[str(row.path)]]
        elif self._cache.first_frames:
            image = _image(row, augmentation)
            sample["image"] = self._frames(row.path, augmentation, 1)[0] if image is None else image
        if self.mask:  # in no cache: it is read with the frames and the crop of the cached clip
            sample["mask"] = _mask(row, *self._selected(row.path, num_frames), augmentation)
        return sample

    def _rejected(
        self, clip: ClipFile, chosen: Selection, augmentation: "_Augmentation", num_frames: int
    ) -> torch.Tensor:
        scanned, selection = self._selected(clip, num_frames)
        if problem := pair_problem(chosen, selection):
            raise ClipError(clip, problem)
        return _arranged(lambda indices: read_frames(clip, indices, scanned), selection, augmentation)

    def _frames(self, clip: ClipFile, augmentation: "_Augmentation", num_frames: int) -> torch.Tensor:
        """Decode a clip: (F, 3, H, W)."""
        scanned, selection = self._selected(clip, num_frames)
        return _arranged(lambda indices: read_frames(clip, indices, scanned), selection, augmentation)

    def _selected(self, clip: ClipFile, num_frames: int) -> tuple[Scan, Selection]:
        """Return the scan of a clip, and the frames that a sample takes of it."""
        scanned = scan(clip)
        end = scanned.times[0] + scanned.info.duration
        try:
            return scanned, select_frames(
                scanned.times, fps=self.fps, max_num_frames=num_frames, skip=self.skip, end=end
            )
        except ValueError as error:
            raise ClipError(clip, str(error)) from error

    def _augmentation(self, generator: torch.Generator | None, size: tuple[int, int]) -> "_Augmentation":
        if generator is None:
            return _Augmentation(size, self.reshape_mode)
        dropped, flipped, down, across = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        place = (down, across) if self.reshape_mode == "random" else None
        flip, drop_caption = flipped < self.random_flip, dropped < self.caption_dropout
        return _Augmentation(size, self.reshape_mode, place, flip, drop_caption)

    def prefetch(self, index: int) -> None:
        """Read what sample `index` needs from afar, if anything, so that it is here when it is needed."""
        row = self.rows[index]
        if self._cache is not None:
            self._cache.prefetch(row.path)
        files = (row.path, row.image, row.rejected, row.control, row.mask)
        if self._cache is not None:
            files = (row.image if self._cache.first_frames else None, *((row.path, row.mask) if self.mask else ()))
        for file in files:
            if isinstance(file, Member) and isinstance(file.container, RemoteFile):
                file.container.prefetch(file.offset, file.size)

    @property
    def is_remote(self) -> bool:
        """Whether samples are read from afar."""
        if self._cache is not None and self._cache.is_remote:
            return True
        return not isinstance(self._root, Path)

    @property
    def paths(self) -> list[str]:
        """Paths of the clips, in order."""
        return [str(row.path) for row in self.rows]

    @property
    def captions(self) -> list[str]:
        """Captions of the clips, in order."""
        return [row.caption for row in self.rows]

    def cache_keys(self, *, images: bool = False, controls: bool = False) -> dict[str, str]:
        """Return path → key in a cache of each usable clip, of its first image, or of its control.

        Raises:
            InputError: a file is missing.
        """
        return {str(row.path): key for key, row, _ in self._cached_parts(images=images, controls=controls)}

    def cache_files(self, *, images: bool = False, controls: bool = False) -> dict[str, tuple[ClipFile, ...]]:
        """Return key in a cache → the files whose content decides its result, as `cache_keys` names them."""
        parts = self._cached_parts(images=images, controls=controls)
        return {key: (row.path,) if part is None else (row.path, part) for key, row, part in parts}

    def _cached_parts(self, *, images: bool, controls: bool) -> Iterator[tuple[str, Row, ClipFile | None]]:
        """Yield the key of each usable clip, its row, and the file of its first image or control."""
        key = ClipKeys(self._root)
        for row in self.rows:
            if not row.problem:
                part = row.image if images else row.control if controls else None
                yield key(row.path, part), row, part

    def cached(
        self,
        latents: CachedTensors,
        keys: Mapping[str, str],
        *,
        images: CachedTensors | None,
        image_keys: Mapping[str, str],
        first_frames: bool,
        controls: CachedTensors | None = None,
        control_keys: Mapping[str, str] | None = None,
    ) -> Self:
        """Return a copy whose samples have ``moments`` (2z, T, h, w) instead of ``mp4``.

        It has the same clips; a clip that failed to encode raises a ClipError, as without a cache.

        Args:
            latents: moments of the clips.
            keys: path → key in `latents`.
            images: moments of first images; samples then have ``image_moments`` (2z, 1, h, w).
            image_keys: path → key in `images`.
            first_frames: without `images`, decode the first image as ``image``.
            controls: moments of controls; samples then have ``control_moments``, like ``moments``.
            control_keys: path → key in `controls`.
        """
        chosen = copy.copy(self)
        chosen._cache = _Cache(latents, keys, images, image_keys, first_frames, controls, control_keys or {})
        return chosen

    def check(self, *, decode: bool = False, num_threads: int = 8) -> list[RowReport]:
        """Open and check all clips; with `decode`, decode every frame.

        Cached clips were decoded before, and are only opened if buckets depend on manifest columns, or with masks.
        """
        cache, reports = self._cache, self.row_reports()
        by_columns = self.buckets is not None  # buckets depend on columns, which can be wrong
        opened = [
            i
            for i, row in enumerate(self.rows)
            if cache is None or cache.lacks(row.path) or (by_columns and row.info) or self.mask
        ]
        if not opened:
            return reports
        checked = check_rows(
            [self.rows[index] for index in opened],
            video_size=self.video_size,
            fps=self.fps,
            max_num_frames=self.max_num_frames,
            skip=self.skip,
            buckets=self.buckets,
            decode=decode,
            num_threads=num_threads,
        )
        for index, report in zip(opened, checked, strict=True):
            reports[index] = report
        pairs = zip(self.rows, reports, strict=True)
        remember({row.path: report.info for row, report in pairs if report.info is not None}, self.folder)
        return reports

    def row_reports(self) -> list[RowReport]:
        """Report problems and metadata from the rows, without opening clips."""
        return row_reports(self.rows)

    def clip_infos(self, *, num_threads: int = 8) -> list[VideoInfo | str]:
        """Return the metadata of each clip, or why it cannot be used; see `sgm.data.clips.index`."""
        return clip_infos(self.rows, self.folder, num_threads=num_threads)

    def not_cached(self, shapes: Sequence[str | None]) -> list[str]:
        """Return a line for each clip not cached at its shape; none without a cache.

        Args:
            shapes: FxHxW of each clip's bucket, or None.
        """
        cache = self._cache
        if cache is None:
            return []
        shown = [(row.path, shape) for row, shape in zip(self.rows, shapes, strict=True) if shape and not row.problem]
        return [line for path, shape in shown for line in cache.wrong_shapes(path, shape)]

    def select(self, indices: Sequence[int]) -> Self:
        """Return a copy with these clips, in this order."""
        chosen = copy.copy(self)
        chosen.rows = [self.rows[index] for index in indices]
        return chosen

    def with_problems(self, problems: Mapping[str, str]) -> Self:
        """Return a copy in which clips with these captions cannot be used: caption → reason."""
        chosen = copy.copy(self)
        chosen.rows = [
            replace(row, problem=problems[row.caption]) if not row.problem and row.caption in problems else row
            for row in self.rows
        ]
        return chosen

    def without(self, paths: Collection[str]) -> Self:
        """Return a copy without these clips."""
        left_out = set(paths)
        return self.select([index for index, path in enumerate(self.paths) if path not in left_out])


@dataclass(frozen=True)
class _Cache:
    """The arguments of `SFTDataset.cached`."""

    latents: CachedTensors
    keys: Mapping[str, str]
    images: CachedTensors | None
    image_keys: Mapping[str, str]
    first_frames: bool
    controls: CachedTensors | None
    control_keys: Mapping[str, str]

    def _entries(self, clip: ClipFile) -> list[tuple[CachedTensors, str]]:
        """Return cache and key of the results of a clip."""
        kinds = (
            (self.latents, self.keys),
            (self.images, self.image_keys),
            (self.controls, self.control_keys),
        )
        return [(cache, keys[str(clip)]) for cache, keys in kinds if cache is not None]

    def failure(self, clip: ClipFile) -> str | None:
        """Return why a clip could not be encoded, or None."""
        reasons = (cache.failures.get(key) for cache, key in self._entries(clip))
        return next((reason for reason in reasons if reason is not None), None)

    def lacks(self, clip: ClipFile) -> bool:
        """Return whether a clip was not encoded: it failed, or fits no bucket."""
        return str(clip) in self.keys and any(key not in cache for cache, key in self._entries(clip))

    @property
    def is_remote(self) -> bool:
        """Whether results are read from afar."""
        return self.latents.is_remote

    def prefetch(self, clip: ClipFile) -> None:
        """Read the results of a clip from afar, so that they are here when they are needed."""
        if str(clip) in self.keys:
            for cache, key in self._entries(clip):
                cache.prefetch(key)

    def wrong_shapes(self, clip: ClipFile, shape: str) -> list[str]:
        """Return a line for each cache that lacks a clip at shape FxHxW."""
        lines = []
        for cache, key in self._entries(clip):
            there = cache.shapes.get(key, "left out, as it fitted no bucket")
            if key not in cache.failures and there != shape:
                lines.append(f"{clip}: {there} in '{cache.folder}', {shape} now")
        return lines

    def moments(self, clip: ClipFile, shape: tuple[int, int, int]) -> dict[str, torch.Tensor]:
        """Return the moments of a clip at a shape (F, H, W), and those of its control, by their names in a sample.

        Raises:
            RunError: the cache has another shape of the clip, or left it out.
        """
        moments = {"moments": self._moments(clip, self.latents, self.keys, shape)}
        if self.controls is not None:
            moments["control_moments"] = self._moments(clip, self.controls, self.control_keys, shape)
        return moments

    def _moments(
        self, clip: ClipFile, cache: CachedTensors, keys: Mapping[str, str], shape: tuple[int, int, int]
    ) -> torch.Tensor:
        moments, found = cache.get(keys[str(clip)]), "is left out of"
        if moments is not None:
            frames = (moments.shape[1] - 1) * TIME_COMPRESSION + 1
            cached = (frames, *(8 * side for side in moments.shape[2:]))
            if cached == tuple(shape):
                return moments
            found = f"is {'x'.join(map(str, cached))} in"
        found = f"{clip} {found} {cache.folder}, and {'x'.join(map(str, shape))} is asked for"
        raise RunError(f"{found}; train without args.latent_cache")


@dataclass(frozen=True)
class _Augmentation:
    """Size, crop and mirroring of all frames of one sample, and of its first image."""

    size: tuple[int, int]
    mode: str
    place: tuple[float, float] | None = None
    flip: bool = False
    drop_caption: bool = False

    def apply(self, pictures: np.ndarray) -> torch.Tensor:
        """Frames (T, h, w, 3) uint8 → (T, 3, H, W) float32 in [-1, 1]."""
        source = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        stretches = self.mode == "none"
        frames = stretch(source, self.size) if stretches else cover_crop(source, self.size, self.place)
        return frames.flip(-1) if self.flip else frames


def as_samples(pictures: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Frames (T, h, w, 3) uint8 → (T, 3, H, W) float32 in [-1, 1], scaled to cover `size` and cropped at the centre."""
    return _Augmentation(size, "center").apply(pictures)


def _with_companion(row: Row, part: str) -> Row:
    """Return a row whose problem is a missing control or mask, if it has no other and none of these."""
    if getattr(row, part) is not None or row.problem:
        return row
    cure = f"put it into the folder {part}/ beside videos/, under the name of the clip, or name it in a column {part}"
    return replace(row, problem=f"its {part} is missing; {cure}")


def _arranged(
    read: Callable[[Sequence[int]], np.ndarray], selection: Selection, augmentation: _Augmentation
) -> torch.Tensor:
    """Return the selected frames (F, 3, H, W), each of them read and augmented once."""
    distinct = sorted(set(selection.indices))
    frames = augmentation.apply(read(distinct))
    if len(distinct) < len(selection.indices):
        frames = frames[[distinct.index(frame) for frame in selection.indices]]
    return frames


def _control_reader(row: Row, clip: Scan) -> Callable[[Sequence[int]], np.ndarray]:
    """Return what reads frames of the control of a clip: indices → (T, h, w, 3) uint8."""
    control = row.control
    assert control is not None, "a row without one has a problem"
    scanned = scan(control)
    if problem := companion_problem(clip.info, scanned.info):
        raise ClipError(control, problem)
    return lambda indices: read_frames(control, indices, scanned)


def _mask(row: Row, clip: Scan, selection: Selection, augmentation: _Augmentation) -> torch.Tensor:
    """Return which latents of a sample the loss counts, bool (T, 1, H/8, W/8).

    Raises:
        ClipError: the mask cannot be read beside its clip, or is black where every sample of the clip is.
    """
    file = row.mask
    assert file is not None, "a row without one has a problem"
    with _errors_of_part(row, "mask"):
        scanned = scan(file)
        if problem := companion_problem(clip.info, scanned.info, may_be_still=True):
            raise ClipError(file, problem)
        if scanned.info.num_frames == 1:
            still = augmentation.apply(read_frames(file, [0], scanned))
            pixels = white(still).expand(len(selection.indices), -1, -1)
        else:
            pixels = white(_arranged(lambda indices: read_frames(file, indices, scanned), selection, augmentation))
        mask = latent_mask(pixels)[0]
        # A random crop may show black alone: then the sample has no loss.
        if augmentation.mode != "random" and not mask.any():
            raise ClipError(file, "is black in the frames and crop that are trained; paint white what is to be learned")
    return mask


@contextmanager
def _errors_of_part(row: Row, part: str) -> Iterator[None]:
    """Context: errors name the clip, whose `part` is at fault."""
    try:
        yield
    except ClipError as error:
        raise ClipError(row.path, f"its {part} {error.path} {error.reason}") from error


def _image(row: Row, augmentation: _Augmentation) -> torch.Tensor | None:
    """Return the first image of image-to-video (3, H, W), or None."""
    if row.image is None:
        return None
    with _errors_of_part(row, "image"):
        return augmentation.apply(read_frames(row.image, [0], scan(row.image)))[0]


def _frame_count(name: str, value: float) -> int:
    if value < 0 or int(value) != value:
        raise InputError(f"data.params.{name} is {value}; give a whole number of frames, 0 or more")
    return int(value)


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"data.params.{name} is {value}; give a probability from 0 to 1")
    return float(value)
