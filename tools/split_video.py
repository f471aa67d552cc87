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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from sgm.cli import run_command
from sgm.data.clips.decode import ClipError, VideoInfo, open_video, scan
from sgm.data.clips.frames import select_frames
from sgm.data.formats.folder import LABELS, VIDEOS
from sgm.inference.video import write_video
from sgm.io import atomic_file, json_bytes, parse_json, remove_leftovers, require_writable, write_json
from sgm.log import get_logger, printable
from sgm.util import InputError

logger = get_logger("split_video")

PLANS, MANIFEST = "cuts", "clips.jsonl"
DETECTION_WIDTH = 256  # width of compared frames in pixels; small frames show cuts without grain
FLASH_SECONDS = 0.5  # two changes within this time are a flash or a dissolve
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
        if self.fps is not None and not self.fps > 0:
            raise InputError(f"--fps is {self.fps:g}; give a number above 0")
        if not 0 < self.min_seconds <= self.max_seconds < math.inf:
            cure = "give numbers above 0, the first no larger than the second"
            said = f"--min_seconds is {self.min_seconds:g} and --max_seconds {self.max_seconds:g}"
            raise InputError(f"{said}; {cure}")
        if self.size is not None and any(side < 2 or side % 2 for side in self.size):
            raise InputError(f"--size is {self.size[0]} {self.size[1]}; give even numbers, as mp4 needs them")
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


def find_scenes(path: Path, info: VideoInfo, times: np.ndarray, threshold: float) -> list[tuple[float, float]]:
    """Return start and end of each scene in seconds of the source's timestamps.

    Metadata and `times` are those of `scan`; for `threshold` see `Settings`.

    Raises:
        ClipError: the video cannot be decoded to its end.
    """
    from scenedetect import ContentDetector, FrameTimecode

    detector = ContentDetector(threshold=threshold, min_scene_len=FLASH_SECONDS)
    cuts, count = [], 0
    opened, progress = open_video(path, thread_type="AUTO"), _progress(path, "scenes", info.num_frames)
    with opened as (container, stream), progress as bar:
        for frame in container.decode(stream):
            height = max(round(frame.height * DETECTION_WIDTH / frame.width), 1)
            picture = frame.reformat(DETECTION_WIDTH, height, "bgr24", interpolation="AREA").to_ndarray()
            cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(count, info.fps), picture)]
            count += 1
            bar.update()
    if count < info.num_frames:
        raise ClipError(path, f"only {count} of its {info.num_frames} frames can be decoded; encode it again")
    bounds = [*(float(times[index]) for index in (0, *cuts)), float(times[0]) + info.duration]
    return list(pairwise(bounds))


def make_plan(path: Path, settings: Settings) -> Plan:
    """Detect the scenes of a video and split them into clips.

    Raises:
        ClipError: the video cannot be read.
    """
    info, times = scan(path)
    if info.num_frames < 2:
        raise ClipError(path, "holds a single frame, which is not a video")
    scenes = find_scenes(path, info, times, settings.threshold)
    clips, dropped = divide(scenes, settings)
    fps = info.fps if settings.fps is None else min(settings.fps, info.fps)
    return Plan(str(path), path.stat().st_size, asdict(settings), round(fps, 6), clips, dropped)


def write_clips(plan: Plan, settings: Settings, out: Path) -> int:
    """Write the missing clips of a source; return their number.

    Raises:
        ClipError: the source cannot be read.
        RunError: a clip could not be written.
    """
    missing = [(clip, path) for clip, path in zip(plan.clips, plan.paths(out), strict=True) if not path.is_file()]
    if not missing:
        return 0
    source = Path(plan.source)
    selected = _select_frames([clip for clip, _ in missing], scan(source)[1], plan)
    pictures = _pictures(source, [index for indices in selected for index in indices], settings.size)
    with _progress(source, "clips", len(missing)) as bar:
        for indices, (_, path) in zip(selected, missing, strict=True):
            first = next(pictures)
            clip = np.empty((len(indices), *first.shape), dtype=np.uint8)  # filled in place: memory of one clip
            clip[0] = first
            for k in range(1, len(indices)):
                clip[k] = next(pictures)
            write_video(path, clip, plan.fps)
            bar.update()
    return len(missing)


def _select_frames(clips: Sequence[tuple[float, float]], times: np.ndarray, plan: Plan) -> list[list[int]]:
    """Return the source frames of each clip in display order; sparse frames are repeated."""
    selected = []
    for begin, end in clips:
        low = max(int(np.searchsorted(times, begin + _TOLERANCE)) - 1, 0)  # the frame displayed at that time
        high = max(int(np.searchsorted(times, end - _TOLERANCE)), low + 1)
        num = max(round((end - begin) * plan.fps), 1)
        try:
            taken = select_frames(times[low:high], fps=plan.fps, max_num_frames=num)
        except ValueError as error:
            raise ClipError(plan.source, f"from {begin:.2f} to {end:.2f} s: {error}") from error
        selected.append([low + index for index in taken.indices[: taken.num_frames]])
    return selected


def _pictures(path: Path, indices: Sequence[int], size: Sequence[int] | None) -> Iterator[np.ndarray]:
    """Yield source frames (H, W, 3) uint8, RGB, upright, by ascending index; decode from the start of the file."""
    position = 0
    with open_video(path, thread_type="AUTO") as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            if index == indices[position]:
                picture = _picture(frame, size)
                while position < len(indices) and indices[position] == index:
                    yield picture
                    position += 1
                if position == len(indices):
                    return
    raise ClipError(path, f"ends before frame {indices[position]}, though its packets go further; encode it again")


def _picture(frame: av.VideoFrame, size: Sequence[int] | None) -> np.ndarray:
    """Return a frame upright, scaled to cover `size` and cropped to it; without one, cropped to even sides."""
    turned = frame.rotation % 180 != 0
    height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
    target_h, target_w = size or (height - height % 2, width - width % 2)
    scale = max(target_h / height, target_w / width) if size else 1.0
    covering = max(target_h, round(height * scale)), max(target_w, round(width * scale))
    stored_h, stored_w = covering[::-1] if turned else covering
    scaled = frame.to_ndarray(format="rgb24", width=stored_w, height=stored_h, interpolation="BICUBIC")
    upright = np.rot90(scaled, frame.rotation // 90)  # counterclockwise in degrees
    top, left = (covering[0] - target_h) // 2, (covering[1] - target_w) // 2
    return upright[top : top + target_h, left : left + target_w]


def _plan_file(path: Path, out: Path) -> Path:
    return out / PLANS / f"{path.stem}.json"


def _read_plan(file: Path) -> Plan:
    try:
        content = parse_json(file.read_bytes())
        return Plan(**content | {"clips": [(begin, end) for begin, end in content["clips"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        cure = "remove it, and the clips and captions of its source, to cut that again"
        raise InputError(f"{file} is not a plan of this command ({error}); {cure}") from error


def check_sources(sources: Sequence[Path], settings: Settings, out: Path) -> None:
    """Check that the clips of each source can be written to the folder; decode nothing.

    Raises:
        InputError: a source does not exist, shares its name with another, or has clips with other settings or no plan.
    """
    by_stem: dict[str, Path] = {}
    for path in sources:
        if not path.is_file():
            found = "is a folder; give the videos in it" if path.is_dir() else "does not exist"
            raise InputError(f"'{path}' {found}")
        other = by_stem.setdefault(path.stem, path)
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
    if settings.fps is not None and plan.fps < settings.fps:
        said = "%s has %.4g frames per second, below --fps %g; its clips keep them"
        logger.warning(said, path, plan.fps, settings.fps)
    try:
        num_new = write_clips(plan, settings, out)
    finally:
        write_manifest(out)
    return f"{path}: {len(plan.clips)} clips, {num_new} of them new; {plan.dropped_seconds:.1f} s too short to use"


def _progress(path: Path, what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"{printable(path.name)}: {what}", leave=False, disable=None, mininterval=0.5)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="videos to cut")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="data folder of the clips")
    parser.add_argument("--fps", type=float, help="frame rate of clips (that of the source)")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of clips: scaled to cover it, centre cropped"
    )
    parser.add_argument("--min_seconds", type=float, default=2.0, help="drop what is shorter (2)")
    parser.add_argument("--max_seconds", type=float, default=10.0, help="divide what is longer (10)")
    parser.add_argument("--threshold", type=float, default=27.0, help="change that is a cut; less finds more cuts (27)")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
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
