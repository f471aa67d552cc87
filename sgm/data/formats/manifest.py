"""Data sets described by a manifest: lines, CSV, JSON, JSONL, Parquet, with paths relative to its folder.

A reader returns a `Table`; `table_rows` checks it and returns the rows of the data set. No clip is opened.
"""

import csv
import io
import itertools
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sgm.data.rows import ClipFile, Faults, Files, Row, VideoInfo, caption_of, one_line
from sgm.io import JSONError, excessive_json, parse_json, reason_of, require_regular
from sgm.log import get_logger, warn_once
from sgm.util import InputError, nearest, no_character

logger = get_logger(__name__)

CAPTION_NAMES = ("caption", "prompt", "text", "txt")
VIDEO_NAMES = ("video", "video_path", "path", "file", "file_name", "filename", "file_path")
IMAGE_NAMES = ("image", "image_path")
CONTROL_NAMES = ("control", "control_path", "control_video")
MASK_NAMES = ("mask", "mask_path", "mask_video")
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_FILES = ("videos.txt", "video.txt")
IMAGE_FILES = ("images.txt", "image.txt")
CONTROL_FILES = ("controls.txt", "control.txt")
MASK_FILES = ("masks.txt", "mask.txt")
_INFO = ("num_frames", "fps", "height", "width")
_MOST = 2**31 - 1  # of frames, pixels of a side, and frames per second, in arrays of integers
_OTHER_MARKS = {"\t": "tabs", ";": "semicolons"}  # between columns, of spreadsheets of some countries
# Columns of other tools that give the part of a video to which the caption belongs.
_PART = re.compile(
    r"(start|end|begin|stop)(_?(time|s|secs?|seconds?|ms|pts|frame|idx|frame_idx))?|timestamps?|frame_idx"
)
_BETWEEN_VALUES = re.compile(r"[\s,:]*")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None selects the first of the usual names, and "" none."""

    caption: str | None = None
    video: str | None = None  # clips: videos, or pictures as videos of one frame
    image: str | None = None  # first images for image-to-video
    rejected: str | None = None  # clips to which those of `video` are preferred; None: there are none
    control: str | None = None  # clips to follow
    mask: str | None = None  # clips or pictures, white where the loss counts


@dataclass(frozen=True)
class Table:
    """A manifest, not yet checked."""

    path: Path | str  # file, folder or URL, for messages
    root: Path | str  # folder of relative paths
    columns: Sequence[str]
    records: Callable[[Sequence[str]], Iterator[tuple[int, Mapping[str, Any]]]]  # columns → (line number, their values)
    where: Callable[[int, str], str]  # (line number, column) → location for messages


class _CellError(Exception):
    """A fault in the value of a column."""

    def __init__(self, column: str, fault: str) -> None:
        super().__init__(fault)
        self.column = column


def table_rows(table: Table, columns: Columns, *, allow_missing_captions: bool = False) -> list[Row]:
    """Return the rows of a table.

    Raises:
        InputError: a column is missing, a path is outside of the folder, a clip is duplicate, or no clip exists.
    """
    chosen = _existing_columns(table, columns)
    faults, files, rows = Faults(table.path), Files(table.root), []
    seen: dict[str, dict[str | int, int]] = {"clip": {}, "id": {}}
    used = [name for name in dict.fromkeys([*vars(chosen).values(), "id", *_INFO]) if name in table.columns]
    for number, record in table.records(used):
        try:
            row = _row(record, chosen, files, partial(table.where, number), allow_missing_captions)
            for kind, column, value in (("clip", chosen.video or "", str(row.path)), ("id", "id", _id(record))):
                first = seen[kind].setdefault(value, number) if value is not None else number
                if first != number:
                    place = table.where(first, column)
                    raise _CellError(column, f"has the {kind} '{value}' of {place}; keep one of them")
        except _CellError as fault:
            faults.add(table.where(number, fault.column), str(fault))
        else:
            rows.append(row)
    warn_once(logger, _unread_parts(table, rows))
    faults.refuse()
    if not rows:
        raise InputError(f"'{table.path}' lists no clips")
    if all(isinstance(row.path, Path) and not files.has(row.path) for row in rows):
        raise InputError(
            f"none of the {len(rows):,} clips that '{table.path}' lists exists, the first is '{rows[0].path}'; paths "
            f"are relative to '{table.root}'"
        )
    return rows


def _unread_parts(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a warning if columns name parts of clips; a clip inside of a table or archive is cut already."""
    names = [name for name in table.columns if _PART.fullmatch(name.lower())]
    if names and rows and isinstance(rows[0].path, Path):
        some = f"columns {', '.join(names)} of parts are" if names[1:] else f"column {names[0]} of parts is"
        yield (
            f"{table.path}: the {some} not read: a file is trained from its first frame. Where captions describe a "
            "part of a longer file, cut it into a file of its own: ffmpeg -ss START -to END -i IN OUT.mp4"
        )


def _existing_columns(table: Table, columns: Columns) -> Columns:
    """Return the columns to read.

    Raises:
        InputError: one is missing; the message lists the existing ones.
    """
    there = f"its columns are {', '.join(table.columns)}"
    for key, name in vars(columns).items():
        if name and name not in table.columns:
            hint = nearest(name, list(table.columns))
            raise InputError(f"'{table.path}' has no column '{name}' (data.params.{key}_column); {there}{hint}")

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in table.columns), None)

    caption = columns.caption or first(CAPTION_NAMES + CAPTION_FILES)
    image = columns.image or first(IMAGE_NAMES + IMAGE_FILES)
    control = _optional(columns.control, first(CONTROL_NAMES + CONTROL_FILES))
    mask = _optional(columns.mask, first(MASK_NAMES + MASK_FILES))
    video = columns.video or first(VIDEO_NAMES + VIDEO_FILES) or image
    for key, name, names in (("caption", caption, CAPTION_NAMES), ("video", video, VIDEO_NAMES)):
        if name is None:
            cure = f"set data.params.{key}_column to the one that holds the {key}s"
            raise InputError(f"'{table.path}' has no column of {key}s ({', '.join(names)}); {there}; {cure}")
    return Columns(caption, video, image if image != video else None, columns.rejected, control, mask)


def _optional(given: str | None, usual: str | None) -> str | None:
    """Return the column of a part that not every run uses: the usual one if none is given, and none for ""."""
    return usual if given is None else given or None


def _row(
    record: Mapping[str, Any],
    columns: Columns,
    files: Files,
    where: Callable[[str], str],
    allow_missing_captions: bool,
) -> Row:
    assert columns.caption is not None and columns.video is not None
    clip = _file(record, columns.video, files)
    caption = record.get(columns.caption)
    if not isinstance(caption, str | None):
        raise _CellError(columns.caption, f"{columns.caption} is {_shown(caption)}; give text")
    caption = caption_of(caption or "")
    if wrong := no_character(caption):
        raise _CellError(columns.caption, f"{columns.caption} holds {wrong}; correct it")
    picture, control, mask = (
        _file(record, name, files) if name is not None and record.get(name) not in (None, "") else None
        for name in (columns.image, columns.control, columns.mask)
    )
    rejected = None if columns.rejected is None else _file(record, columns.rejected, files)
    problem = None
    if isinstance(clip, Path) and not files.has(clip):
        problem = f"does not exist; {where(columns.video)} names it"
    elif isinstance(picture, Path) and not files.has(picture):
        problem = f"its image {picture} does not exist; {where(columns.image or '')} names it"
    elif isinstance(rejected, Path) and not files.has(rejected):
        problem = f"its rejected clip {rejected} does not exist; {where(columns.rejected or '')} names it"
    elif rejected is not None and rejected == clip:
        problem = f"its rejected clip, {where(columns.rejected or '')}, is the clip itself; name another one"
    elif isinstance(control, Path) and not files.has(control):
        problem = f"its control {control} does not exist; {where(columns.control or '')} names it"
    elif isinstance(mask, Path) and not files.has(mask):
        problem = f"its mask {mask} does not exist; {where(columns.mask or '')} names it"
    elif not caption and not allow_missing_captions:
        problem = f"its caption, {where(columns.caption)}, is empty; write one, or set allow_missing_captions: true"
    return Row(clip, caption, problem, picture, _info(record), rejected, control, mask)


def _file(record: Mapping[str, Any], column: str, files: Files) -> ClipFile:
    value = record.get(column)
    if value is None:
        raise _CellError(column, f"has no value for '{column}'")
    if hasattr(value, "container"):
        return value
    if not isinstance(value, str):
        raise _CellError(column, f"{column} is {_shown(value)}; give the path of a file")
    try:
        return files.path(value)
    except ValueError as error:
        raise _CellError(column, str(error)) from error


def _id(record: Mapping[str, Any]) -> str | int | None:
    """Return the ``id`` of a row, or None."""
    value = record.get("id")
    if value is None or value == "" or hasattr(value, "container"):  # the last: a file *.id in an archive
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _CellError("id", f"id is {_shown(value)}; give text or a whole number")
    return value


def _info(record: Mapping[str, Any]) -> VideoInfo | None:
    """Return the metadata in the columns of a row; None if one of the four is empty."""
    given = [record.get(name) for name in _INFO]
    if any(value is None or value == "" for value in given):
        return None
    try:
        if any(isinstance(value, bool) or "_" in str(value) for value in given):  # numbers to Python alone
            raise ValueError
        frames, fps, height, width = (float(value) for value in given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        frames = fps = height = width = float("nan")
    whole = all(1 <= value <= _MOST and value.is_integer() for value in (frames, height, width))
    if not whole or not 0 <= fps <= _MOST or (fps == 0 and frames > 1):
        said = ", ".join(f"{name}={_shown(value, quoted=False)}" for name, value in zip(_INFO, given, strict=True))
        raise _CellError(_INFO[0], f"says {said}; give whole numbers, and frames per second: 0 for a single frame")
    return VideoInfo(int(frames), fps, frames / fps if fps else 0.0, int(height), int(width))


def read_lines(root: Path, columns: Columns) -> Table:
    """Read text files, line n for clip n: captions, paths of clips, and optionally of images.

    An empty line is an empty caption or no image; empty lines after the last clip are ignored.

    Raises:
        InputError: a file is missing, or they differ in length.
    """

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if (root / name).is_file()), None)

    names = {
        "caption": columns.caption or first(CAPTION_FILES),
        "video": columns.video or first(VIDEO_FILES) or first(IMAGE_FILES),
        "image": columns.image or first(IMAGE_FILES),
        "control": _optional(columns.control, first(CONTROL_FILES)),
        "mask": _optional(columns.mask, first(MASK_FILES)),
    }
    for kind, names_of in (("caption", CAPTION_FILES), ("video", VIDEO_FILES)):
        if names[kind] is None:
            raise InputError(f"'{root}' has no list of {kind}s ({', '.join(names_of)}); write it, a line for each clip")
    if names["image"] == names["video"]:
        names["image"] = None
    lists = {kind: _text(root / name).split("\n") for kind, name in names.items() if name is not None}
    for lines in lists.values():
        if not lines[-1]:
            lines.pop()  # the text after the last line break
    clips = lists["video"]
    while clips and not clips[-1].strip():
        clips.pop()
    for lines in lists.values():
        while len(lines) > len(clips) and not lines[-1].strip():
            lines.pop()
    lengths = {kind: len(lines) for kind, lines in lists.items()}
    if len({*lengths.values()}) > 1:
        said = ", ".join(f"{names[kind]} has {count:,} lines" for kind, count in lengths.items())
        longest = max(lengths, key=lambda kind: lengths[kind])
        unpaired = f"{root / str(names[longest])}:{min(lengths.values()) + 1}"
        raise InputError(f"'{root}': {said}; line n of each belongs to clip n, and {unpaired} has no partner")
    files = {kind: str(names[kind]) for kind in lists}
    records = (
        (number, dict(zip(files.values(), (value.strip() for value in values), strict=True)))
        for number, values in enumerate(zip(*lists.values(), strict=True), 1)
    )
    return Table(root, root, list(files.values()), lambda _: records, lambda number, file: f"{root / file}:{number}")


def read_csv(path: Path) -> Table:
    """Read a CSV file with a header.

    Raises:
        InputError: the CSV is malformed or without commas, or a row has more or fewer fields than the header.
    """
    faults, records = Faults(path), []
    text = _text(path, newline="")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    longest = csv.field_size_limit(len(text))  # of a cell; Python has one limit, for all readers
    header: list[str] = []
    line = 1  # first line of the record; without a closing quote, a record extends to the end of the file
    try:
        header = [name.strip() for name in next(reader, [])]
        if marks := [marks for mark, marks in _OTHER_MARKS.items() if len(header) == 1 and mark in header[0]]:
            raise InputError(f"{path}:1: separates its columns by {marks[0]}; write commas, as spreadsheets can")
        for name in {name for name in header if header.count(name) > 1}:
            faults.add(f"{path}:1", f"names the column '{name}' twice")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                records.append((line, dict(zip(header, fields, strict=True))))
            elif fields:
                cure = "put quotes around a caption that holds commas"
                faults.add(f"{path}:{line}", f"has {len(fields)} fields, the header {len(header)}; {cure}")
            line = reader.line_num + 1
    except csv.Error as error:
        cure = "end each quoted field with a quote, and write one inside it twice"
        faults.add(f"{path}:{line}", f"is not CSV: {error}, in the record that begins there; {cure}")
    finally:
        csv.field_size_limit(longest)
    faults.refuse()
    return _text_table(path, header, records)


def read_json(path: Path) -> Table:
    """Read a JSON file: a list of objects, or such a list under ``data``.

    Raises:
        InputError: not JSON, or no such list.
    """
    text = _text(path)
    try:
        content = parse_json(text, unique=True)
        start = 0
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            content, start = content["data"], _start_of_data(text)
        if not isinstance(content, list):
            raise JSONError(1, "is not a list; give a list of objects, or one under the key 'data'")
        lines = list(_lines_of_entries(text, start, len(content)))
    except JSONError as error:
        raise InputError(f"{path}:{error.line}: {error.fault}") from error
    except RecursionError as error:  # a depth that the first pass just managed
        fault = excessive_json(text, nested=True)
        raise InputError(f"{path}:{fault.line}: {fault.fault}") from error
    return _objects(path, zip(lines, content, strict=True), Faults(path))


def _start_of_data(text: str) -> int:
    """Return the position of the value of ``data`` in a JSON object that has it."""
    decoder = json.JSONDecoder()
    position = _skip(text, text.index("{") + 1)
    while True:
        key, position = decoder.raw_decode(text, position)
        value = _skip(text, position)
        if key == "data":
            return value
        position = _skip(text, decoder.raw_decode(text, value)[1])


def _lines_of_entries(text: str, start: int, count: int) -> Iterator[int]:
    """Yield the first line of each entry of the JSON list at position `start`."""
    decoder, line, counted, position = json.JSONDecoder(), 1, 0, text.index("[", start) + 1
    for _ in range(count):
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        yield line
        position = decoder.raw_decode(text, position)[1]


def _skip(text: str, position: int) -> int:
    """Return the position of the next JSON value, or of the closing bracket."""
    match = _BETWEEN_VALUES.match(text, position)
    assert match is not None, "the pattern matches an empty text"
    return match.end()


def read_jsonl(path: Path) -> Table:
    """Read a file with a JSON object on each line.

    Raises:
        InputError: a line is not a JSON object.
    """
    faults, found = Faults(path), []
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            found += [(number, parse_json(line, unique=True))] if line.strip() else []
        except JSONError as error:
            faults.add(f"{path}:{number}", error.fault)
    return _objects(path, iter(found), faults)


def _objects(path: Path, entries: Iterator[tuple[int, Any]], faults: Faults) -> Table:
    records = []
    for number, entry in entries:
        if isinstance(entry, dict):
            records.append((number, entry))
        else:
            faults.add(f"{path}:{number}", f"is {_shown(entry)}; give an object with caption and video")
    faults.refuse()
    return _text_table(path, list(dict.fromkeys(itertools.chain.from_iterable(entry for _, entry in records))), records)


def read_parquet(path: Path) -> Table:
    """Read a Parquet file.

    Raises:
        InputError: it is damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"'{path}': reading Parquet needs pyarrow; pip install 'pyarrow'") from error
    try:
        content = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a Parquet file, or a damaged one: {error}") from error

    names = content.schema_arrow.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"'{path}' names the column '{twice[0]}' twice; rename or remove one")

    def records(used: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        refuse_times(path, content.schema_arrow, used)
        number = 0
        try:
            batches = (batch.to_pylist() for batch in content.iter_batches(4096, columns=used))
            for number, record in enumerate(itertools.chain.from_iterable(batches), 1):
                yield number, record
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            said = f"is damaged after row {number}: {one_line(str(error))}; copy or write it again"
            raise InputError(f"'{path}' {said}") from error

    return Table(path, path.parent, names, records, lambda row, _: f"{path}, row {row}")


def refuse_times(path: Path, schema: Any, used: Sequence[str]) -> None:
    """Raise an InputError if columns of a schema of pyarrow hold times: not all are values of Python."""
    import pyarrow

    for name in used:
        if pyarrow.types.is_temporal(kind := schema.field(name).type):
            raise InputError(f"the column '{name}' of '{path}' holds {kind}; write it as text or numbers")


def _shown(value: Any, *, quoted: bool = True) -> str:
    """Return the beginning of a value, of any size and depth, for a message."""
    if isinstance(value, str):
        return (json.dumps(value) if quoted else value)[:60]
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    return reprlib.repr(value)


def _text_table(path: Path, columns: Sequence[str], records: Sequence[tuple[int, Mapping[str, Any]]]) -> Table:
    if not records:
        raise InputError(f"'{path}' lists no clips")
    return Table(path, path.parent, columns, lambda _: iter(records), lambda line, _: f"{path}:{line}")


def _text(path: Path, *, newline: str | None = None) -> str:
    """Read a file; `newline` as for `open`: an empty one keeps line ends, which may be part of a quoted name."""
    try:
        require_regular(path)
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {reason_of(error)}") from error
