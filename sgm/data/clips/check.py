"""Check clips before training, and report the results."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgm.data.buckets.assign import NOWHERE, Buckets, clip_sizes
from sgm.data.clips.decode import ClipError, Scan, decode_all, each_frame, probe, read_frames, scan
from sgm.data.clips.frames import Selection, select_frames
from sgm.data.rows import ClipFile, Row, VideoInfo
from sgm.io import atomic_file, json_bytes
from sgm.log import bar

_BARS, _WIDTH = 10, 40  # number of bars of a histogram, and characters of the longest
_SAME_FPS = 0.01  # relative tolerance of stated frame rates: 30 for 29.97


@dataclass(frozen=True)
class RowReport:
    """The result of checking one clip."""

    path: str
    caption: str
    info: VideoInfo | None = None  # None if unreadable
    num_frames: int = 0  # frames that training selects, without padding; 0 if none
    effective_fps: float = 0.0  # distinct frames per second among those
    problems: tuple[str, ...] = ()  # why it cannot be used; empty for a good clip
    notes: tuple[str, ...] = ()  # about a usable clip

    @property
    def uncaptioned(self) -> bool:
        """Whether a missing caption is the only problem."""
        return len(self.problems) == 1 and self.problems[0].startswith(("its caption", "caption "))


def row_reports(rows: Sequence[Row]) -> list[RowReport]:
    """Report problems and metadata from the rows of a data set, without opening clips."""
    return [
        RowReport(str(row.path), row.caption, row.info, problems=(row.problem,) if row.problem else ()) for row in rows
    ]


def check_rows(
    rows: Sequence[Row],
    *,
    video_size: tuple[int, int],
    fps: float,
    max_num_frames: int,
    skip: tuple[int, int] = (0, 0),
    buckets: Buckets | None = None,
    decode: bool = False,
    num_threads: int = 8,
) -> list[RowReport]:
    """Check clips in parallel, with a progress bar.

    Args:
        rows: clips and captions.
        video_size: (H, W) of training.
        fps: frame rate of training.
        max_num_frames: F of training.
        skip: source frames skipped at the start and at the end.
        buckets: check each clip against its (most likely) bucket instead of one size and length.
        decode: decode every frame, not only the first one; slow, but finds damage inside.
        num_threads: clips checked at a time.

    Returns:
        A report for each row, in order.
    """

    def check(row: Row) -> RowReport:
        problems = [row.problem] if row.problem else []
        scanned, info, selection, shape = None, None, None, (max_num_frames, *video_size)
        wrong_columns: list[str] = []
        try:
            scanned = scan(row.path)
            info, end = scanned.info, scanned.times[0] + scanned.info.duration
            wrong_columns = _wrong_columns(row, info)
            if buckets is not None:
                shape = _bucket_shape(info, buckets, fps, skip)
            num_frames = shape[0] if shape else 1
            selection = select_frames(scanned.times, fps=fps, max_num_frames=num_frames, skip=skip, end=end)
            if decode:
                scanned = decode_all(row.path, scanned)
            if row.image is not None:
                probe(row.image)
            if row.rejected is not None:
                other = scan(row.rejected)
                end = other.times[0] + other.info.duration
                of_other = select_frames(other.times, fps=fps, max_num_frames=num_frames, skip=skip, end=end)
                if problem := pair_problem(selection, of_other):
                    problems.append(f"its rejected clip {row.rejected} {problem}")
            for part, file in (("control", row.control), ("mask", row.mask)):
                if file is not None:
                    problems += _companion_problems(part, file, info, decode=decode)
        except ClipError as error:
            problems.append(error.reason if error.path == str(row.path) else part_problem(row, error))
        except ValueError as error:
            problems.append(str(error))
        if buckets is not None:  # buckets are assigned from the columns
            problems += wrong_columns
            wrong_columns = []
        if scanned is None or info is None or selection is None:
            return RowReport(str(row.path), row.caption, info, problems=tuple(problems))
        if shape is None:
            return RowReport(str(row.path), row.caption, info, 0, 0.0, tuple(problems), ("fits no bucket: left out",))
        notes = (*wrong_columns, *_notes(scanned, selection, fps, shape[1:]))
        taken = selection.num_frames, selection.effective_fps
        return RowReport(str(row.path), row.caption, info, *taken, tuple(problems), notes)

    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(check, rows)
        return list(bar(found, "check clips", total=len(rows)))


def _companion_problems(part: str, file: ClipFile, info: VideoInfo, *, decode: bool) -> list[str]:
    """Return the problem of a control or mask beside its clip, if any; raise a ClipError if it is unreadable."""
    scanned = scan(file)
    if decode:
        decode_all(file, scanned)
    problem = companion_problem(info, scanned.info, may_be_still=part == "mask")
    if part == "mask" and (decode or scanned.info.num_frames == 1) and _is_black(file, scanned):
        problem = "is black; paint white what is to be learned"
    return [f"its {part} {file} {problem}"] if problem else []


def _is_black(file: ClipFile, scanned: Scan) -> bool:
    """Return whether a mask has no white pixel; decodes it once, and holds a frame at a time."""
    num = scanned.info.num_frames
    for frame in read_frames(file, [0], scanned) if num == 1 else each_frame(file, range(num), scanned):
        if isinstance(frame, ClipError):
            raise frame
        if frame.mean(axis=-1).max() >= 128:
            return False
    return True


def companion_problem(clip: VideoInfo, other: VideoInfo, *, may_be_still: bool = False) -> str | None:
    """Return why a control or mask cannot be read with the frames and crop of its clip; None if it can.

    Args:
        clip: metadata of the clip.
        other: of its control or mask.
        may_be_still: a picture is for all frames, as of a mask.
    """
    is_still = may_be_still and other.num_frames == 1
    if other.num_frames != clip.num_frames and not is_still:
        return f"has {other.num_frames} frames, and the clip {clip.num_frames}; make it from the frames of the clip"
    if clip.num_frames > 1 and not is_still and not math.isclose(other.fps, clip.fps, rel_tol=_SAME_FPS):
        return f"runs at {other.fps:.4g} fps, and the clip at {clip.fps:.4g}; write it at that rate"
    return shape_problem(clip, other)


def shape_problem(clip: VideoInfo, other: VideoInfo) -> str | None:
    """Return why a control or mask cannot be cropped as its clip is; None if it can."""
    if abs(other.height * clip.width / clip.height - other.width) <= 1:
        return None
    shapes = f"{other.height}x{other.width}, and the clip {clip.height}x{clip.width}"
    return f"is {shapes}: another shape, so that crops differ; give the ratio of the clip, at any size"


def pair_problem(chosen: Selection, rejected: Selection) -> str | None:
    """Return why a rejected clip is no counterpart of its chosen one: one would end with a still; None if it is one."""
    if rejected.num_frames == chosen.num_frames:
        return None
    return f"gives {rejected.num_frames} frames, and the chosen one {chosen.num_frames}; give both the same length"


def part_problem(row: Row, error: ClipError) -> str:
    """Return what is wrong with the image, the control, the mask or the rejected clip of a clip."""
    parts = {str(row.control): "control", str(row.mask): "mask", str(row.rejected): "rejected clip"}
    return f"its {parts.get(error.path, 'image')} {error.path} {error.reason}"


def _bucket_shape(info: VideoInfo, buckets: Buckets, fps: float, skip: tuple[int, int]) -> tuple[int, int, int] | None:
    index = buckets.choose(clip_sizes([info], fps=fps, skip=skip), np.zeros((1, buckets.num_draws)))[0]
    return None if index == NOWHERE else buckets.buckets[index].shape


def _wrong_columns(row: Row, info: VideoInfo) -> list[str]:
    """Return a problem if length, rate or size in the columns differ from the clip."""
    if row.info is None:
        return []
    wrong = [name for name in ("num_frames", "height", "width") if getattr(row.info, name) != getattr(info, name)]
    if info.num_frames > 1 and not math.isclose(row.info.fps, info.fps, rel_tol=_SAME_FPS):
        wrong.append("fps")
    pairs = [(name, round(getattr(row.info, name), 3), round(getattr(info, name), 3)) for name in wrong]
    said = ", ".join(f"{name}={stated} where it has {true}" for name, stated, true in pairs)
    return [f"its columns say {said}; correct or remove them"] if wrong else []


def _notes(scanned: Scan, selection: Selection, fps: float, video_size: tuple[int, int]) -> tuple[str, ...]:
    info, notes = scanned.info, []
    if selection.effective_fps < fps:
        notes.append(f"slower than {fps:g} fps: frames come twice, {selection.effective_fps:.3g} a second differ")
    if selection.num_frames < len(selection.indices):
        notes.append(f"short: the last of {selection.num_frames} frames is repeated")
    if info.height < video_size[0] or info.width < video_size[1]:
        notes.append("enlarged")
    if scanned.interlaced:
        notes.append("interlaced: it is deinterlaced")
    if scanned.hdr:
        notes.append("HDR (PQ or HLG): it is read without tone mapping, so colours are pale; convert it to BT.709")
    return tuple(notes)


def bad_share(reports: Sequence[RowReport]) -> float:
    """Return the fraction of unusable clips."""
    return sum(bool(report.problems) for report in reports) / max(len(reports), 1)


def summarize(reports: Sequence[RowReport]) -> dict[str, Any]:
    """Count clips, bad and noted ones, and return the ranges of durations, frame rates and sizes."""
    good = [report for report in reports if not report.problems]
    infos = [report.info for report in good if report.info is not None]
    taken = [report for report in good if report.num_frames]
    return {
        "clips": len(reports),
        "bad": len(reports) - len(good),
        "noted": sum(bool(report.notes) for report in good),
        "seconds": _range([info.duration for info in infos]),
        "fps": _range([info.fps for info in infos]),
        "effective_fps": _range([report.effective_fps for report in taken]),
        "frames_taken": _range([report.num_frames for report in taken]),
        "sizes": _sizes(infos),
    }


def _range(values: Sequence[float]) -> list[float]:
    return [round(min(values), 3), round(max(values), 3)] if values else []


def _sizes(infos: Sequence[VideoInfo]) -> dict[str, int]:
    return dict(Counter(f"{info.height}x{info.width}" for info in infos).most_common())


def summary_text(reports: Sequence[RowReport]) -> str:
    """Return the summary as a few lines of text."""
    found = summarize(reports)
    sizes = [f"{size} ({count})" for size, count in found["sizes"].items()]
    lines = [f"{found['clips']} clips: {found['clips'] - found['bad']} good, {found['bad']} bad"]
    if found["seconds"]:
        lines.append(f"duration {_span(found['seconds'])} s, {_span(found['fps'])} fps")
        lines.append(f"sizes (height x width): {', '.join(sizes[:6])}{', ...' if len(sizes) > 6 else ''}")
    if found["frames_taken"]:
        taken, fps = _span(found["frames_taken"]), _span(found["effective_fps"])
        lines[1] += f", of which training takes {taken} frames at an effective {fps} fps"
    elif found["clips"] > found["bad"]:
        lines[0] += "; no clip was opened"
    return "\n".join(lines)


def _span(pair: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in pair)
    return low if low == high else f"{low} to {high}"


def table(reports: Sequence[RowReport]) -> str:
    """Return the reports as a table, a line per clip: metadata, selected frames, path, problems and notes."""
    lines = [("frames", "fps", "seconds", "size", "taken", "clip", ""), *map(_cells, reports)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(widths) - 2  # the first column that is aligned to the left
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column < left else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(report: RowReport) -> tuple[str, ...]:
    remarks = "; ".join([*(f"BAD: {problem}" for problem in report.problems), *report.notes])
    path, remarks = (text.replace("\n", "\\n").replace("\t", "\\t") for text in (report.path, remarks))
    info = report.info
    if info is None:
        return ("-", "-", "-", "-", "0", path, remarks)
    measured = (str(info.num_frames), f"{info.fps:.4g}", f"{info.duration:.2f}", f"{info.height}x{info.width}")
    return (*measured, str(report.num_frames), path, remarks)


def histograms(reports: Sequence[RowReport]) -> str:
    """Return the distributions of sizes, durations and frame rates of good clips, as bars of text."""
    infos = [report.info for report in reports if report.info is not None and not report.problems]
    sizes, rates = [*_sizes(infos).items()], Counter(f"{info.fps:.4g}" for info in infos)
    shown = dict(sizes[:_BARS])
    if len(sizes) > _BARS:
        shown["others"] = sum(count for _, count in sizes[_BARS:])
    few_rates = {rate: rates[rate] for rate in sorted(rates, key=float)}
    parts = {
        "size (height x width)": shown,
        "seconds": _binned([info.duration for info in infos]),
        "fps": few_rates if len(rates) <= _BARS else _binned([info.fps for info in infos]),
    }
    return "\n\n".join(_bars(title, counts) for title, counts in parts.items() if counts)


def _binned(values: Sequence[float]) -> dict[str, int]:
    """Count values in at most `_BARS` equal bins of a round width."""
    if not values:
        return {}
    least = max((max(values) - min(values)) / (_BARS - 1), 1e-3)
    power = 10 ** math.floor(math.log10(least))
    width = next(power * step for step in (1, 2, 5, 10) if power * step >= least)
    bins = Counter(math.floor(value / width + 1e-9) for value in values)
    places = range(min(bins), max(bins) + 1)
    return {f"{place * width:.4g} to {(place + 1) * width:.4g}": bins[place] for place in places}


def _bars(title: str, counts: Mapping[str, int]) -> str:
    names, largest = max(map(len, counts)), max(counts.values())
    digits = len(str(largest))
    rows = (f"  {name:>{names}}  {n:>{digits}}  {'#' * -(-_WIDTH * n // largest)}" for name, n in counts.items())
    return "\n".join([title, *(row.rstrip() for row in rows)])


def write_report(path: str | Path, reports: Sequence[RowReport]) -> None:
    """Write summary and rows as JSON, one line per row, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    rows = [json_bytes(vars(report) | {"info": report.info and vars(report.info)}) for report in reports]
    summary = json_bytes(summarize(reports), indent=2)
    with atomic_file(path) as temporary:
        temporary.write_bytes(b'{"summary": %s,\n"rows": [\n%s\n]}\n' % (summary, b",\n".join(rows)))
