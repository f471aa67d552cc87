"""Clips held against what training needs of them, before it starts: every row, and all that is wrong with it."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sgm.data.buckets.assign import NOWHERE, Buckets, clip_sizes
from sgm.data.clips.decode import ClipError, decode_all, probe, scan
from sgm.data.clips.frames import Selection, select_frames
from sgm.data.rows import Row, VideoInfo
from sgm.io import atomic_file
from sgm.log import is_rank_zero

_BARS, _WIDTH = 10, 40  # of a histogram: bars, and characters of the longest
_SAME_FPS = 0.01  # share by which a stated rate may differ: 30 stands for 29.97


@dataclass(frozen=True)
class RowReport:
    """What was found out about one clip.

    Attributes:
        path: the clip.
        caption: its caption.
        info: what its container says; None where it cannot be read.
        num_frames: frames that training takes of it, before the last one is repeated; 0 where it takes none.
        effective_fps: different frames per second among those; 0 where it takes none.
        problems: why it cannot be used; empty for a good clip.
        notes: what to know of it otherwise.
    """

    path: str
    caption: str
    info: VideoInfo | None = None
    num_frames: int = 0
    effective_fps: float = 0.0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def uncaptioned(self) -> bool:
        """Whether the clip could be used, had it a caption."""
        return len(self.problems) == 1 and self.problems[0].startswith(("its caption", "caption "))


def row_reports(rows: Sequence[Row]) -> list[RowReport]:
    """Report what the data set itself says of its clips, opening none."""
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
    """Check clips side by side, with a progress bar.

    Args:
        rows: the clips and captions.
        video_size: (H, W) that they are trained at.
        fps: frames per second that they are trained at.
        max_num_frames: frames that they are trained with.
        skip: source frames left out at the start and at the end.
        buckets: that clips are divided among; each is then held against its own, or the likeliest, instead.
        decode: decode every frame, too, instead of packets and the first frame; finds damage inside, takes long.
        num_threads: clips checked at a time.

    Returns:
        A report for each row, in their order.
    """

    def check(row: Row) -> RowReport:
        problems = [row.problem] if row.problem else []
        info, selection, shape = None, None, (max_num_frames, *video_size)
        stated: list[str] = []
        try:
            info, times = scan(row.path)
            stated = _stated(row, info)
            if buckets is not None:
                shape = _bucket(info, buckets, fps, skip)
            selection = select_frames(times, fps=fps, max_num_frames=shape[0] if shape else 1, skip=skip)
            if decode:
                decode_all(row.path, info.num_frames)
            if row.image is not None:
                probe(row.image)
        except ClipError as error:
            problems.append(error.reason if error.path == str(row.path) else f"its image {error.path} {error.reason}")
        except ValueError as error:
            problems.append(str(error))
        if buckets is not None:  # which the stated sizes decide about
            problems += stated
            stated = []
        if info is None or selection is None:
            return RowReport(str(row.path), row.caption, info, problems=tuple(problems))
        if shape is None:
            return RowReport(str(row.path), row.caption, info, 0, 0.0, tuple(problems), ("fits no bucket: left out",))
        notes = (*stated, *_notes(info, selection, fps, shape[1:]))
        taken = selection.num_frames, selection.effective_fps
        return RowReport(str(row.path), row.caption, info, *taken, tuple(problems), notes)

    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(check, rows)
        bar = tqdm(found, "check clips", total=len(rows), leave=False, disable=None if is_rank_zero() else True)
        return list(bar)


def _bucket(info: VideoInfo, buckets: Buckets, fps: float, skip: tuple[int, int]) -> tuple[int, int, int] | None:
    index = buckets.choose(clip_sizes([info], fps=fps, skip=skip), np.zeros((1, buckets.num_draws)))[0]
    return None if index == NOWHERE else buckets.buckets[index].shape


def _stated(row: Row, info: VideoInfo) -> list[str]:
    """Return what is wrong with the length, rate and size that the data set itself states: one line, or none."""
    if row.info is None:
        return []
    wrong = [name for name in ("num_frames", "height", "width") if getattr(row.info, name) != getattr(info, name)]
    if info.num_frames > 1 and not math.isclose(row.info.fps, info.fps, rel_tol=_SAME_FPS):
        wrong.append("fps")
    pairs = [(name, round(getattr(row.info, name), 3), round(getattr(info, name), 3)) for name in wrong]
    said = ", ".join(f"{name}={stated} where it has {true}" for name, stated, true in pairs)
    return [f"its columns say {said}; correct or remove them"] if wrong else []


def _notes(info: VideoInfo, selection: Selection, fps: float, video_size: tuple[int, int]) -> tuple[str, ...]:
    notes = []
    if selection.effective_fps < fps:
        notes.append(f"slower than {fps:g} fps: frames come twice, {selection.effective_fps:.3g} a second differ")
    if selection.num_frames < len(selection.indices):
        notes.append(f"short: the last of {selection.num_frames} frames is repeated")
    if info.height < video_size[0] or info.width < video_size[1]:
        notes.append("enlarged")
    return tuple(notes)


def bad_share(reports: Sequence[RowReport]) -> float:
    """Return the share of clips that cannot be used, 0 to 1."""
    return sum(bool(report.problems) for report in reports) / max(len(reports), 1)


def summarize(reports: Sequence[RowReport]) -> dict[str, Any]:
    """Count what was found: clips, bad and noted ones, and the ranges of durations, frame rates and sizes."""
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
        "sizes": dict(Counter(f"{info.height}x{info.width}" for info in infos).most_common()),
    }


def _range(values: Sequence[float]) -> list[float]:
    return [round(min(values), 3), round(max(values), 3)] if values else []


def summary_text(reports: Sequence[RowReport]) -> str:
    """Return the summary on a few lines, for people."""
    found = summarize(reports)
    sizes = [f"{size} ({count})" for size, count in found["sizes"].items()]
    lines = [f"{found['clips']} clips: {found['clips'] - found['bad']} good, {found['bad']} bad"]
    if found["seconds"]:
        lines.append(f"duration {_span(found['seconds'])} s, {_span(found['fps'])} fps")
        lines.append(f"sizes (height x width): {', '.join(sizes[:6])}{', ...' if len(sizes) > 6 else ''}")
    if found["frames_taken"]:
        lines[1] += (
            f", of which training takes {_span(found['frames_taken'])} frames at an effective "
            f"{_span(found['effective_fps'])} fps"
        )
    elif found["clips"] > found["bad"]:
        lines[0] += "; no clip was opened"
    return "\n".join(lines)


def _span(pair: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in pair)
    return low if low == high else f"{low} to {high}"


def table(reports: Sequence[RowReport]) -> str:
    """Return the reports as a table, a line each: what the clip is, what training takes of it, what is wrong."""
    header = ("frames", "fps", "seconds", "size", "taken", "clip", "")
    lines = [header, *(_cells(report) for report in reports)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(width) for cell, width in zip(line[:5], widths, strict=False)), *_last(line, widths)])
        for line in lines
    )


def _last(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [line[5].ljust(widths[5]), line[6]] if line[6] else [line[5]]


def _cells(report: RowReport) -> tuple[str, ...]:
    said = "; ".join([*(f"BAD: {problem}" for problem in report.problems), *report.notes])
    if report.info is None:
        return ("-", "-", "-", "-", "0", report.path, said)
    info = report.info
    size = f"{info.height}x{info.width}"
    return (
        str(info.num_frames),
        f"{info.fps:.4g}",
        f"{info.duration:.2f}",
        size,
        str(report.num_frames),
        report.path,
        said,
    )


def histograms(reports: Sequence[RowReport]) -> str:
    """Return how sizes, durations and frame rates of the good clips are spread, as bars of text."""
    infos = [report.info for report in reports if report.info is not None and not report.problems]
    sizes = Counter(f"{info.height}x{info.width}" for info in infos).most_common()
    rates = Counter(f"{info.fps:.4g}" for info in infos)
    shown = dict(sizes[:_BARS])
    if len(sizes) > _BARS:
        shown["others"] = sum(count for _, count in sizes[_BARS:])
    parts = {
        "size (height x width)": shown,
        "seconds": _binned([info.duration for info in infos]),
        "fps": {rate: rates[rate] for rate in sorted(rates, key=float)}
        if len(rates) <= _BARS
        else _binned([info.fps for info in infos]),
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
    names, most = max(map(len, counts)), max(counts.values())
    digits = len(str(most))
    rows = [f"  {name:>{names}}  {n:>{digits}}  {'#' * -(-_WIDTH * n // most)}".rstrip() for name, n in counts.items()]
    return "\n".join([title, *rows])


def write_report(path: str | Path, reports: Sequence[RowReport]) -> None:
    """Write summary and rows as JSON, a line for each row, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    rows = (json.dumps(_plain(report), ensure_ascii=False) for report in reports)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        summary = json.dumps(summarize(reports), indent=2, ensure_ascii=False)
        file.write(f'{{"summary": {summary},\n"rows": [\n')
        file.write(",\n".join(rows))
        file.write("\n]}\n")


def _plain(report: RowReport) -> dict[str, Any]:
    return vars(report) | {"info": None if report.info is None else vars(report.info)}
