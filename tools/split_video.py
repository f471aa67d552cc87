"""Cut long videos into training clips without scene changes.

    python tools/split_video.py raw/*.mp4 --out my_clips --fps 16 --size 480 720 --min_seconds 3 --max_seconds 10

Writes my_clips/videos/<name>_<number>.mp4, and a line per clip into my_clips/clips.jsonl. Scenes longer than
--max_seconds are divided evenly. Frames are selected by their timestamps, so clips keep their speed; a source with a
lower frame rate than --fps keeps its own, with a warning. After an interruption, the same command continues: finished
clips are kept. Memory holds the frames of one clip.

Exit codes: 0 done, 1 some sources could not be read, 2 wrong input.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sgm.cli import run_command, tool_parser
from sgm.data.clips.decode import MAX_PIXELS, ClipError, Scan, each_frame, scan
from sgm.data.clips.frames import MAX_FPS, shown_frames, usual_gap
from sgm.data.formats.folder import LABELS, VIDEOS
from sgm.data.rows import VideoInfo, listed
from sgm.inference.video import write_video
from sgm.io import atomic_file, json_bytes, parse_json, remove_leftovers, require_writable, write_json
from sgm.log import bar, get_logger, printable
from sgm.util import InputError

logger = get_logger("split_video")

PLANS, MANIFEST = "cuts", "clips.jsonl"
DETECTION_WIDTH = 256  # width of compared frames in pixels; small frames show cuts without grain
FLASH_SECONDS = 0.5  # two changes within this time are a flash or a dissolve
MIN_FPS = 8.0  # of clips; a slide show repeats its frames, as a clip of one frame is not a video
_TOLERANCE = 1e-6  # of times, in seconds: they are rounded to the time base of the file


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the cut, common to all clips of a folder."""

    fps: float | None  # frame rate of clips; None keeps the source's
    size: Sequence[int] | None  # [height, width] of clips; None keeps the source's
    min_seconds: float  # shorter scenes and pieces are dropped
    max_seconds: float  # longer scenes are split
    threshold: float  # frame difference that counts as a cut, on the scale of PySceneDetect's ContentDetector

    def check(self) -> None:
        """Raise an InputError for an illegal value."""
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise InputError(f"--fps is {self.fps:g}; give a number above 0 and at most {MAX_FPS:g}")
        if not 0 < self.min_seconds <= self.max_seconds < math.inf:
            cure = "give numbers above 0, the first no larger than the second"
            said = f"--min_seconds is {self.min_seconds:g} and --max_seconds {self.max_seconds:g}"
            raise InputError(f"{said}; {cure}")
        if self.size is not None and any(side < 2 or side % 2 for side in self.size):
            raise InputError(f"--size is {self.size[0]} {self.size[1]}; give even numbers, as mp4 needs them")
        if self.size is not None and self.size[0] * self.size[1] > MAX_PIXELS:
            raise InputError(f"--size is {self.size[0]} {self.size[1]}; give {MAX_PIXELS:,} pixels at most")
        if not self.threshold > 0:
            raise InputError(f"--threshold is {self.threshold:g}; give a number above 0, such as 27")


@dataclass(frozen=True)
class Plan:
    """The clips of one source."""

    source: str
    num_bytes: int  # file size, to detect another video of the same name
    settings: dict  # `Settings` as JSON
    fps: float  # frame rate of the clips
    clips: list[tuple[float, float]]  # start and end of each in seconds of the source's timestamps
    dropped_seconds: float  # in scenes and pieces that are too short

    def paths(self, out: Path) -> list[Path]:
        """Return the paths of the clips."""
        stem = Path(self.source).stem
        return [out / VIDEOS / f"{stem}_{number:04d}.mp4" for number in range(len(self.clips))]


def divide(scenes: Sequence[tuple[float, float]], settings: Settings) -> tuple[list[tuple[float, float]], float]:
    """Split scenes, (start, end) in seconds, into clips; return them, and the dropped seconds.

    A long scene is split into the smallest number of equal clips of at most the maximum length. If these are shorter
    than the minimum, clips of the maximum length are taken from its start, and the rest is dropped.
    """
    clips = []
    for begin, end in scenes:
        length = end - begin
        num = max(math.ceil((length - _TOLERANCE) / settings.max_seconds), 1)
        piece = length / num
        if piece < settings.min_seconds - _TOLERANCE:
            num, piece = num - 1, settings.max_seconds
        clips += [(begin + k * piece, begin + (k + 1) * piece) for k in range(num)]
    dropped = sum(end - begin for begin, end in scenes) - sum(end - begin for begin, end in clips)
    return clips, max(dropped, 0.0)


def find_scenes(path: Path, scanned: Scan, threshold: float) -> list[tuple[float, float]]:
    """Return start and end of each scene in seconds of the source's timestamps.

    `scanned` is the result of `scan`; for `threshold` see `Settings`. Frames that cannot be decoded are passed over: a
    clip that needs one is refused when it is written.

    Raises:
        ClipError: no frame can be decoded.
    """
    from scenedetect import ContentDetector, FrameTimecode

    info, times = scanned.info, scanned.times
    size = max(round(info.height * DETECTION_WIDTH / info.width), 1), DETECTION_WIDTH
    detector = ContentDetector(threshold=threshold, min_scene_len=FLASH_SECONDS)
    cuts, errors = [], []
    with _progress(path, "scenes", info.num_frames) as bar:
        every = range(info.num_frames)
        pictures = each_frame(path, every, scanned, size=size, interpolation="AREA", thread_type="AUTO")
        for index, picture in enumerate(pictures):
            bar.update()
            if isinstance(picture, ClipError):
                errors.append(picture)
                continue
            bgr = np.ascontiguousarray(picture[..., ::-1])
            cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(index, info.fps), bgr)]
    if len(errors) == info.num_frames:
        raise errors[0]
    return list(pairwise([*(float(times[index]) for index in (0, *cuts)), float(times[0]) + info.duration]))


def make_plan(path: Path, settings: Settings) -> Plan:
    """Detect the scenes of a video and split them into clips.

    Raises:
        ClipError: the video cannot be read.
    """
    scanned = scan(path)
    if scanned.info.num_frames < 2:
        raise ClipError(path, "holds a single frame, which is not a video")
    fps = clip_rate(scanned.times)
    if fps > MAX_FPS:
        raise ClipError(path, f"says that it runs at {fps:.4g} frames per second, which no video does; encode it again")
    scenes = find_scenes(path, scanned, settings.threshold)
    clips, dropped = divide(scenes, settings)
    fps = fps if settings.fps is None else min(settings.fps, fps)
    return Plan(str(path), path.stat().st_size, asdict(settings), round(fps, 6), clips, dropped)


def clip_rate(times: np.ndarray) -> float:
    """Return the frame rate of clips: that of the moving parts, or a multiple of it for a slide show."""
    rate = 1 / max(usual_gap(times, default=1.0), 1e-9)
    return rate * max(math.ceil(MIN_FPS / rate - _TOLERANCE), 1)


def write_clips(plan: Plan, settings: Settings, out: Path) -> int:
    """Write the missing clips of a source; return their number.

    Raises:
        ClipError: the source, or a part of it, cannot be read; the other clips are written.
        RunError: a clip could not be written.
    """
    missing = [(clip, path) for clip, path in zip(plan.clips, plan.paths(out), strict=True) if not path.is_file()]
    if not missing:
        return 0
    source = Path(plan.source)
    scanned = scan(source)
    selected = [_select_frames(clip, scanned.times, plan.fps) for clip, _ in missing]
    covering, size = _sizes(scanned.info, settings.size)
    _warn_of_losses(source, scanned, covering)
    indices = [index for chosen in selected for index in chosen]
    pictures = each_frame(source, indices, scanned, size=covering, thread_type="AUTO")
    failed = []
    with _progress(source, "clips", len(missing)) as bar:
        for chosen, ((begin, end), path) in zip(selected, missing, strict=True):
            clip = np.empty((len(chosen), *size, 3), dtype=np.uint8)  # filled in place: memory of one clip
            errors = [error for k in range(len(chosen)) if (error := _fill(clip[k], next(pictures)))]
            if errors:
                failed.append(f"{path.name}, from {begin:.2f} to {end:.2f} s: {errors[0].reason}")
            else:
                write_video(path, clip, plan.fps)
            bar.update()
    if failed:
        written = len(missing) - len(failed)
        raise ClipError(source, f"{written} clips are written, {len(failed)} cannot be cut:\n{listed(failed)}")
    return len(missing)


def _warn_of_losses(source: Path, scanned: Scan, covering: tuple[int, int]) -> None:
    """Warn of what the clips no longer tell, so that the check of them cannot note it."""
    info = scanned.info
    if scanned.hdr:
        said = "%s is HDR (PQ or HLG) and read without tone mapping, so its clips are pale; convert it to BT.709 first"
        logger.warning(said, source)
    if covering[0] > info.height:
        said = "%s has %dx%d pixels, and is enlarged to %dx%d"
        logger.warning(said, source, info.height, info.width, *covering)


def _select_frames(clip: tuple[float, float], times: np.ndarray, fps: float) -> list[int]:
    """Return the source frames of a clip in display order; a still stretch repeats the frame that it shows."""
    begin, end = clip
    low = max(int(np.searchsorted(times, begin + _TOLERANCE)) - 1, 0)  # the frame displayed at that time
    high = max(int(np.searchsorted(times, end - _TOLERANCE)), low + 1)
    targets = begin + np.arange(max(round((end - begin) * fps), 1)) / fps
    return (low + shown_frames(times[low:high], targets, fps=fps)).tolist()


def _sizes(info: VideoInfo, size: Sequence[int] | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (H, W) to which frames are scaled, and of clips: `size`, or that of the source with even sides."""
    height, width = info.height, info.width
    if size is None:
        return (height, width), (max(height - height % 2, 2), max(width - width % 2, 2))
    scale = max(size[0] / height, size[1] / width)
    return (max(size[0], round(height * scale)), max(size[1], round(width * scale))), (size[0], size[1])


def _fill(target: np.ndarray, picture: np.ndarray | ClipError) -> ClipError | None:
    """Copy the centre of a frame into a clip; return the error of a frame that cannot be decoded."""
    if isinstance(picture, ClipError):
        return picture
    height, width = target.shape[:2]
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    target[:] = picture[top : top + height, left : left + width]
    return None


def _plan_file(path: Path, out: Path) -> Path:
    return out / PLANS / f"{path.stem}.json"


def _read_plan(file: Path) -> Plan:
    try:
        content = parse_json(file.read_bytes())
        plan = Plan(**content | {"clips": [(begin, end) for begin, end in content["clips"]]})
        if not plan.settings.keys() <= Settings.__dataclass_fields__.keys():
            raise ValueError
        return plan
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cure = "remove it, and the clips and captions of its source, to cut that again"
        raise InputError(f"{file} is not a plan of this command; {cure}") from error


def check_sources(sources: Sequence[Path], settings: Settings, out: Path) -> None:
    """Check that the clips of each source can be written to the folder; decode nothing.

    Raises:
        InputError: a source does not exist, shares its name with another, or has clips with other settings or no plan.
    """
    by_stem: dict[str, Path] = {}
    for path in sources:
        if not path.is_file():
            found = "does not exist" if not path.exists() else "is not a file"
            found = "is a folder; give the videos in it" if path.is_dir() else found
            raise InputError(f"'{path}' {found}")
        other = by_stem.setdefault(path.stem, path)
        if other is not path and path.samefile(other):
            raise InputError(f"'{path}' is given twice; name each video once")
        if other is not path:
            raise InputError(f"'{other}' and '{path}' would give clips of the same names; rename one of them")
        require_writable(out, f"{path.stem}_0000.mp4")
        file = _plan_file(path, out)
        clips = f"{out / VIDEOS / path.stem}_*.mp4"
        if not file.is_file():
            if there := _named_as_results(path, out):
                said = f"{len(there)} files have names of its clips and captions, such as '{there[0]}', but no {file}"
                raise InputError(f"'{path}': {said} says what they show; remove them, or give another --out")
            continue
        plan = _read_plan(file)
        if plan.num_bytes != path.stat().st_size:
            raise InputError(f"{clips} come from another video of this name, '{plan.source}'; give another --out")
        changed = [f"--{key} {value}" for key, value in plan.settings.items() if asdict(settings)[key] != value]
        if changed:
            cure = f"give the same again or another --out, or remove them, their captions and {file} to cut it again"
            raise InputError(f"{clips} were cut with {', '.join(changed)}; {cure}")


def _named_as_results(path: Path, out: Path) -> list[Path]:
    """Return existing files with names of the clips and captions of a source."""
    name = re.compile(re.escape(path.stem) + r"_\d{4,}\.(mp4|txt)")
    return [file for part in (VIDEOS, LABELS) for file in sorted((out / part).glob("*")) if name.fullmatch(file.name)]


def write_manifest(out: Path) -> int:
    """Write a line for each finished clip of all sources in the folder; return their number."""
    lines = []
    for file in sorted((out / PLANS).glob("*.json")):
        plan = _read_plan(file)
        for (begin, end), path in zip(plan.clips, plan.paths(out), strict=True):
            if path.is_file():
                where = {"video": path.relative_to(out).as_posix(), "source": plan.source}
                lines.append(where | {"start": round(begin, 6), "end": round(end, 6), "fps": plan.fps})
    with atomic_file(out / MANIFEST) as temporary:
        temporary.write_bytes(b"".join(json_bytes(line) + b"\n" for line in lines))
    return len(lines)


def split(path: Path, settings: Settings, out: Path) -> str:
    """Cut one video, or continue; return a line about it.

    Raises:
        ClipError: the video cannot be read.
        RunError: a clip could not be written.
    """
    file = _plan_file(path, out)
    if not file.is_file():
        write_json(file, asdict(make_plan(path, settings)))
    plan = _read_plan(file)
    if plan.source != str(path):  # it has moved, or the working directory is another one
        plan = replace(plan, source=str(path))
        write_json(file, asdict(plan))
    if settings.fps is not None and plan.fps < settings.fps:
        said = "the clips of %s have %.4g frames per second, below --fps %g, as it is slower"
        logger.warning(said, path, plan.fps, settings.fps)
    try:
        num_new = write_clips(plan, settings, out)
    finally:
        write_manifest(out)
    return f"{path}: {len(plan.clips)} clips, {num_new} of them new; {plan.dropped_seconds:.1f} s too short to use"


def _progress(path: Path, what: str, total: int) -> Any:
    return bar(what=f"{printable(path.name)}: {what}", total=total)


def _require_detector() -> None:
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        cure = "run: pip install -e '.[scenes]'"
        raise InputError(f"cutting needs PySceneDetect, which cannot be imported ({error}); {cure}") from error


def work(options: argparse.Namespace) -> None:
    """Cut all videos; the number of unreadable ones is written to ``options.num_failed``."""
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    settings.check()
    _require_detector()
    require_writable(options.out)
    if (manifest := options.out / MANIFEST).exists() and not (options.out / PLANS).is_dir():
        raise InputError(f"{manifest} exists and was not written by this command; move it, or give another --out")
    check_sources(options.videos, settings, options.out)
    remove_leftovers(options.out / VIDEOS)
    for path in options.videos:
        try:
            sys.stdout.write(split(path, settings, options.out) + "\n")
        except ClipError as error:
            options.num_failed += 1
            sys.stderr.write(f"error: {error}\n")
    sys.stdout.write(f"{write_manifest(options.out)} clips: {options.out / MANIFEST}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="videos to cut")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="data folder of the clips")
    parser.add_argument("--fps", type=float, help="frame rate of clips (that of the source)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of clips: scaled to cover it, centre cropped"
    )
    parser.add_argument("--min_seconds", type=float, default=2.0, help="drop what is shorter (2)")
    parser.add_argument("--max_seconds", type=float, default=10.0, help="divide what is longer (10)")
    parser.add_argument("--threshold", type=float, default=27.0, help="change that is a cut; less finds more cuts (27)")
    options = parser.parse_args(argv)
    options.num_failed = 0
    code = run_command(
        work,
        options,
        interrupted="interrupted; the same command goes on where this one stopped",
        memory_hint="give a smaller --size or --max_seconds",
    )
    return code or int(options.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
