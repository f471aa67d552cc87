"""Measure finished videos: alone, against references, and against their prompts.

    python tools/evaluate.py outputs/toy --out outputs/evaluation.json
    python tools/evaluate.py before=outputs/a before=outputs/b after=outputs/c after=outputs/d \
        --reference my_clips/videos --clip my-clip --out outputs/evaluation.json

Each word is a folder of videos, as sampling writes it or any other. Folders with the same NAME= are seeds of one
method; several samples of a prompt in one folder are seeds as well. The table says for each method the mean over its
seeds, and their standard deviation. The definition of every figure is in the JSON file, and in docs/evaluation.md.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import sgm.distributed
from sgm.cli import run_command, tool_parser
from sgm.data.clips.decode import ClipError, read_frames, scan
from sgm.data.formats.folder import files_below
from sgm.data.rows import VIDEO_SUFFIXES
from sgm.inference import measures
from sgm.inference.measures import MEASURES
from sgm.io import atomic_file, parse_json, require_own_json, require_writable, write_json
from sgm.log import bar, get_logger
from sgm.util import InputError

logger = get_logger("evaluate")

SHOWN = 5  # faults that a message lists
PER_PROMPT = 5  # videos that VBench wants of a prompt
SAME_FPS = 0.01  # relative tolerance of frame rates: 30 for 29.97
MAX_NAME = 255 - len("-0.mp4")  # bytes of a file's name without it


@dataclass
class Video:
    """A video to measure.

    Attributes:
        method: what it is compared by.
        seed: which of the seeds of the method.
        name: path in its folder, without suffix.
        path: the file.
        prompt: that it was made from, or None.
        asked: the prompt as the user wrote it, where a language model has rewritten it.
        reference: the file that it should be like, or None.
        figures: what was measured.
        fault: why nothing was, or None.
    """

    method: str
    seed: str
    name: str
    path: Path
    prompt: str | None = None
    asked: str | None = None
    reference: Path | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    fault: str | None = None


def files_in(folder: Path) -> dict[str, Path]:
    """Return the videos of a folder by their names: paths in it without suffix.

    Raises:
        InputError: the folder is missing, holds none, or two of one name.
    """
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {found}; give a folder of videos")
    videos: dict[str, Path] = {}
    for path in sorted(files_below(folder)):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in videos:
                raise InputError(f"{videos[name]} and {path} have one name; remove or rename one of them")
            videos[name] = path
    if not videos:
        raise InputError(f"{folder}: holds no video ({', '.join(VIDEO_SUFFIXES)})")
    return videos


def prompt_of(path: Path) -> tuple[str | None, str | None, str]:
    """Return the prompt of a video, the one that the user wrote, and its seed, from the file beside it."""
    record, text = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        content = parse_json(record.read_bytes()) if record.is_file() else None
        words = text.read_text(encoding="utf-8-sig") if text.is_file() else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{text} is not UTF-8 text (byte {error.start}); save it as UTF-8, or remove it") from error
    except ValueError as error:
        raise InputError(f"the file beside {path} cannot be read: {error}; correct or remove it") from error
    if content is not None:
        if isinstance(content, dict) and isinstance(content.get("prompt"), str):
            asked = content.get("original_prompt")
            return content["prompt"], asked or content["prompt"], str(content.get("seed", ""))
    prompt = " ".join(words.split()) or None
    return prompt, prompt, ""


def listed(words: Sequence[str]) -> list[Video]:
    """Return the videos of all folders, given as ``FOLDER`` or ``NAME=FOLDER``."""
    videos = []
    given = [("", word) if Path(word).exists() or "=" not in word else word.split("=", 1) for word in words]
    if nameless := [f"{name}={folder}" for name, folder in given if not folder]:
        raise InputError(f"{nameless[0]} names no folder; write NAME=FOLDER")
    places = [(name, os.path.realpath(folder)) for name, folder in given]
    if repeated := [word for word, place in zip(words, places, strict=True) if places.count(place) > 1]:
        raise InputError(f"{repeated[-1]} is given twice; each folder counts once")
    for number, (name, folder) in enumerate(given):
        for key, path in files_in(Path(folder)).items():
            prompt, asked, seed = prompt_of(path)
            videos.append(Video(name or folder, f"{number}.{seed}", key, path, prompt, asked))
    _warn_of_unequal(videos)
    return videos


def _warn_of_unequal(videos: Sequence[Video]) -> None:
    """Warn if seeds or methods have other videos than the first: then their means differ for that reason alone."""
    held: dict[tuple[str, str], set[str]] = {}
    for video in videos:
        held.setdefault((video.method, video.seed), set()).add(video.asked or video.name)
    (first, expected), *others = held.items()
    for other, found in others:
        if found != expected:
            who = " and ".join(dict.fromkeys((first[0], other[0])))
            said = "the seeds of %s do not hold the same videos (%d and %d): do not compare their means"
            logger.warning(said, who, len(expected), len(found))
            return


def match(videos: Sequence[Video], folder: Path) -> None:
    """Give each video its reference: the file of its name, or of the name of its prompt's folder.

    Raises:
        InputError: some have none.
    """
    references = files_in(folder)
    for video in videos:
        of_prompt = video.name.rsplit("/", 2)[0]  # <prompt>/<k>/000000 of a sampling run
        video.reference = references.get(video.name) or references.get(of_prompt)
    if missing := [video for video in videos if video.reference is None]:
        raise InputError(
            f"{len(missing)} of {len(videos)} videos have no reference in {folder}: "
            f"{_some([video.name for video in missing])}; it holds {_some([*references])}. Give references the names "
            "of the videos, as paths in their folders; one named as the folder of a prompt serves all its samples"
        )
    unused = references.keys() - {name for name, path in references.items() if path in {v.reference for v in videos}}
    if unused:
        logger.warning("%d references belong to no video, such as %s", len(unused), sorted(unused)[0])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def check(videos: Sequence[Video], *, lpips: bool) -> None:
    """Read the metadata of all videos.

    Raises:
        InputError: those that cannot be read, are too small, or differ from their references.
    """
    faults, shapes, rates = [], {}, {}
    for path in dict.fromkeys(path for video in videos for path in (video.path, video.reference) if path):
        try:
            info = scan(path).info
            shapes[path], rates[path] = (info.num_frames, info.height, info.width), info.fps
            side = measures.LPIPS_SIDE if lpips else measures.MIN_SIDE
            if min(shapes[path][1:]) < side:
                faults.append(f"{path}: {info.height}x{info.width} pixels; the measures need {side}x{side}")
        except ClipError as error:
            faults.append(f"{path}: {error.reason}")
    for video in videos:
        ours, theirs = shapes.get(video.path), shapes.get(video.reference) if video.reference else None
        if ours and theirs and ours != theirs:
            faults.append(f"{video.path} has {_shape(ours)}, its reference {video.reference} {_shape(theirs)}")
    if faults:
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(
            f"{len(faults)} faults of videos; correct or remove them, and cut or scale references like the videos:\n  "
            + "\n  ".join(faults[:SHOWN])
            + more
        )
    pairs = [(v.path, v.reference) for v in videos if v.reference is not None]
    if other := [pair for pair in pairs if not math.isclose(rates[pair[0]], rates[pair[1]], rel_tol=SAME_FPS)]:
        said = "%d of %d videos run at another rate than their references, such as %s at %.4g frames per second, not "
        said += "%.4g: frames are compared by their number, so that they show other times"
        logger.warning(said, len(other), len(pairs), other[0][0], *(rates[path] for path in other[0]))


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} frames of {shape[1]}x{shape[2]}"


def frames_of(path: Path) -> np.ndarray:
    """Return all frames of a video: (T, H, W, 3) uint8.

    Raises:
        InputError: one cannot be decoded.
    """
    try:
        scanned = scan(path)
        return read_frames(path, range(scanned.info.num_frames), scanned)
    except ClipError as error:
        raise InputError(f"{path}: {error.reason}") from error


def measure(
    videos: Sequence[Video], clip: measures.Clip | None, lpips: measures.Lpips | None, device: torch.device
) -> list[Video]:
    """Fill in the figures of all videos; return those that cannot be decoded, with the fault of each.

    `check` reads metadata alone: damaged frames are found here, hours later, and must not cost the figures of others.
    """
    damaged = []
    for video in bar(videos, "videos", leave=True):
        try:
            frames = frames_of(video.path)
            reference = None if video.reference is None else frames_of(video.reference)
        except InputError as error:
            video.fault = str(error)
            damaged.append(video)
            logger.error("%s", error)
            continue
        if reference is not None:
            video.figures |= measures.fidelity(frames, reference, lpips, device=device)
        if clip is not None:
            assert video.prompt is not None
            video.figures["clip"] = clip(frames, video.prompt)
        video.figures["smoothness"] = measures.smoothness(frames)
        video.figures["flicker"] = measures.flicker(frames)
    return damaged


@dataclass
class Figure:
    """A measure of a method: the mean over seeds of the means over their videos.

    Attributes:
        mean: over seeds; None if no video has the figure.
        spread: sample standard deviation of the seeds; None below two.
        seeds: the mean of each.
    """

    mean: float | None
    spread: float | None
    seeds: dict[str, float]


def figure(videos: Sequence[Video], name: str) -> Figure:
    """Return a measure of the videos of one method."""
    by_seed: dict[str, list[float]] = {}
    for video in videos:
        value = video.figures.get(name)
        if value is not None:
            by_seed.setdefault(video.seed, []).append(value)
    means = {seed: statistics.fmean(values) for seed, values in by_seed.items()}
    spread = statistics.stdev(means.values()) if len(means) > 1 else None
    return Figure(statistics.fmean(means.values()) if means else None, spread, means)


def methods_of(videos: Sequence[Video]) -> dict[str, list[Video]]:
    """Return the videos by method, in the order given."""
    return {name: [v for v in videos if v.method == name] for name in dict.fromkeys(v.method for v in videos)}


def used(videos: Sequence[Video]) -> list[str]:
    """Return the measures that were taken, in the order of the table."""
    return [name for name in MEASURES if any(name in video.figures for video in videos)]


def table(videos: Sequence[Video]) -> str:
    """Return the Markdown table: a row for each method."""
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{MEASURES[name].title} {arrows[MEASURES[name].better]}" for name in used(videos)]
    lines = [f"| method | videos | seeds | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for method, own in methods_of(videos).items():
        cells = [method.replace("|", "\\|"), str(len(own)), str(len({video.seed for video in own}))]
        for name in used(videos):
            found, digits = figure(own, name), MEASURES[name].digits
            spread = "" if found.spread is None else f" ± {found.spread:.{digits}f}"
            cells.append("none" if found.mean is None else f"{found.mean:.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(videos: Sequence[Video], damaged: Sequence[Video] = ()) -> dict:
    """Return all figures, for the JSON file, and the videos that were left out of them."""
    left_out = [{"method": video.method, "file": str(video.path), "reason": video.fault} for video in damaged]
    return {
        "measures": {
            name: {"better": MEASURES[name].better, "definition": MEASURES[name].meaning} for name in used(videos)
        },
        "methods": {
            method: {
                "videos": len(own),
                "figures": {name: vars(figure(own, name)) for name in used(videos)},
            }
            for method, own in methods_of(videos).items()
        },
        "videos": [
            {
                "method": video.method,
                "seed": video.seed,
                "file": str(video.path),
                "reference": None if video.reference is None else str(video.reference),
                **video.figures,
            }
            for video in videos
        ],
        **({"left_out": left_out} if left_out else {}),
    }


def vbench_names(videos: Sequence[Video]) -> Iterator[tuple[Video, str]]:
    """Yield each video with its name for VBench: ``<method>/<prompt>-<index>.mp4``.

    Raises:
        InputError: prompts are missing, or are no names of files, nor methods those of folders.
    """
    count: dict[tuple[str, str], int] = {}
    folders: dict[str, str] = {}  # name → method
    for video in videos:
        prompt = video.asked or ""
        folder = video.method.strip("/").replace("/", "_")
        if folders.setdefault(folder, video.method) != video.method or folder in ("", ".", ".."):
            raise InputError(f"--vbench: {video.method} gives its folder no name of its own; write NAME=FOLDER")
        reason = (
            "has no prompt beside it (.json or .txt)"
            if not prompt
            else f"its prompt has {len(prompt.encode())} bytes, and a name at most {MAX_NAME}"
            if len(prompt.encode()) > MAX_NAME
            else "its prompt has a character that no name has"
            if "/" in prompt or "\0" in prompt
            else None
            if video.path.suffix.lower() == ".mp4"
            else "is no mp4"
        )
        if reason:
            raise InputError(
                f"--vbench: {video.path}: {reason}. VBench's standard prompts are short; for other videos, its mode "
                "custom_input takes any names: give it the folder itself"
            )
        index = count[video.method, prompt] = count.get((video.method, prompt), -1) + 1
        yield video, f"{folder}/{prompt}-{index}.mp4"
    fewer = [prompt for (_, prompt), last in count.items() if last + 1 < PER_PROMPT]
    if fewer:
        logger.warning("VBench wants %d videos of a prompt; %d have fewer", PER_PROMPT, len(fewer))


def write_vbench(names: Sequence[tuple[Video, str]], folder: Path) -> None:
    """Copy the videos under the names that VBench looks for."""
    for video, name in names:
        with atomic_file(folder / name) as temporary:
            shutil.copyfile(video.path, temporary)
    logger.info("for VBench: %s", folder)


def work(options: argparse.Namespace) -> None:
    """Check, measure, and write the results.

    Raises:
        InputError: wrong input; or some videos cannot be decoded, and the results are those of the others.
    """
    if options.out.suffix != ".json":
        raise InputError(f"--out {options.out}: name a .json file; the table goes into the .md file beside it")
    if options.lpips is not None and options.reference is None:
        raise InputError("--lpips compares with references; give --reference FOLDER as well")
    measures.require(references=options.reference is not None)
    videos = listed(options.folders)
    if options.reference is not None:
        match(videos, options.reference)
    if options.clip is not None and (silent := [video for video in videos if not video.prompt]):
        cure = "write it into a .txt file of its name"
        raise InputError(f"--clip: {silent[0].path} and {len(silent) - 1} others have no prompt beside them; {cure}")
    check(videos, lpips=options.lpips is not None)
    renamed = [] if options.vbench is None else [*vbench_names(videos)]
    if options.vbench is not None:
        require_writable(options.vbench)
    require_writable(options.out.parent, options.out.name)
    require_own_json(options.out, "measures")
    if (rows_file := options.out.with_suffix(".md")).exists() and not options.out.exists():
        raise InputError(f"{rows_file} exists and was not written by this command; give another --out, or remove it")
    device = sgm.distributed.device()
    lpips = measures.Lpips(options.lpips).to(device) if options.lpips is not None else None
    clip = None
    if options.clip is not None:
        clip = measures.Clip(options.clip, device)
        if cut := sum(clip.cuts(video.prompt or "") for video in videos):
            logger.warning("the prompts of %d of %d videos are longer than CLIP reads, and are cut", cut, len(videos))
    damaged = measure(videos, clip, lpips, device)
    cure = "sample or copy them again, and repeat the command"
    if len(damaged) == len(videos):
        raise InputError(f"{damaged[0].fault}; no video can be decoded: {cure}")
    measured = [video for video in videos if video.fault is None]
    write_json(options.out, report(measured, damaged))
    rows = table(measured)
    with atomic_file(rows_file) as temporary:
        temporary.write_text(f"{rows}\n", encoding="utf-8")
    if options.vbench is not None:
        write_vbench(renamed, options.vbench)
    sys.stdout.write(f"{rows}\n")
    if damaged:
        said = (
            f"{len(damaged)} of {len(videos)} videos cannot be decoded and are left out of {options.out}; {cure}:\n  "
        )
        more = f"\n  and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise InputError(said + "\n  ".join(str(video.fault) for video in damaged[:SHOWN]) + more)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help="folders of videos")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSON to write; a table goes beside it")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="videos of the same names to compare with")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="weights of torchvision's AlexNet: adds LPIPS")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="CLIP model of transformers: adds the CLIP score")
    parser.add_argument(
        "--vbench", type=Path, metavar="FOLDER", help="copies of the videos, named as VBench wants them"
    )
    return run_command(work, parser.parse_args(argv), interrupted="interrupted; nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
