"""Data sets described by a list: lines, CSV, JSON, JSONL, Parquet. Paths are relative to the folder of the list.

A reader turns a file into a `Table`; `table_rows` checks it and makes the rows of the data set. No clip is opened.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.data.rows import ClipFile, Faults, Files, Row, VideoInfo, one_line
from sgm.util import InputError, nearest

CAPTION_NAMES = ("caption", "prompt", "text", "txt")
VIDEO_NAMES = ("video", "video_path", "path", "file", "file_name", "filename", "file_path")
IMAGE_NAMES = ("image", "image_path")
CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEO_FILES = ("videos.txt", "video.txt")
IMAGE_FILES = ("images.txt", "image.txt")
_INFO = ("num_frames", "fps", "height", "width")


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what; None finds them by their usual names.

    Attributes:
        caption: captions.
        video: clips: videos, or pictures as videos of one frame.
        image: pictures that image-to-video starts from.
    """

    caption: str | None = None
    video: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Table:
    """A list of clips, read but not checked.

    Attributes:
        path: the file or folder that is to be named in messages.
        root: what paths are relative to.
        columns: names of the columns.
        records: number of the line, and the values by column.
        where: number of a line → how messages name it.
    """

    path: Path
    root: Path
    columns: Sequence[str]
    records: Iterator[tuple[int, Mapping[str, Any]]]
    where: Callable[[int], str]


def table_rows(table: Table, columns: Columns, *, allow_missing_captions: bool = False) -> list[Row]:
    """Return the rows of a table.

    Raises:
        InputError: a column is missing, a path leads elsewhere, a clip comes twice, or none of the clips exists.
    """
    chosen = _choose(table, columns)
    faults, files, rows = Faults(table.path), Files(table.root), []
    seen: dict[str, dict[Any, int]] = {"clip": {}, "id": {}}
    for number, record in table.records:
        try:
            row = _row(record, chosen, files, table.where(number), allow_missing_captions)
            for kind, value in (("clip", str(row.path)), ("id", record.get("id"))):
                first = seen[kind].setdefault(value, number) if value is not None else number
                if first != number:
                    raise ValueError(f"has the {kind} '{value}' of {table.where(first)}; keep one of them")
        except ValueError as error:
            faults.add(table.where(number), str(error))
        else:
            rows.append(row)
    faults.refuse()
    if not rows:
        raise InputError(f"'{table.path}' lists no clips")
    if all(isinstance(row.path, Path) and not files.has(row.path) for row in rows):
        raise InputError(
            f"none of the {len(rows):,} clips that '{table.path}' lists exists, the first is '{rows[0].path}'; paths "
            f"are relative to '{table.root}'"
        )
    return rows


def _choose(table: Table, columns: Columns) -> Columns:
    """Return the columns to read.

    Raises:
        InputError: one is missing; the message names those there are.
    """
    there = f"its columns are {', '.join(table.columns)}"
    for key, name in (("caption", columns.caption), ("video", columns.video), ("image", columns.image)):
        if name is not None and name not in table.columns:
            hint = nearest(name, list(table.columns))
            raise InputError(f"'{table.path}' has no column '{name}' (data.params.{key}_column); {there}{hint}")

    def find(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in table.columns), None)

    caption = columns.caption or find(CAPTION_NAMES + CAPTION_FILES)
    image = columns.image or find(IMAGE_NAMES + IMAGE_FILES)
    video = columns.video or find(VIDEO_NAMES + VIDEO_FILES) or image
    for key, name, names in (("caption", caption, CAPTION_NAMES), ("video", video, VIDEO_NAMES)):
        if name is None:
            cure = f"set data.params.{key}_column to the one that holds the {key}s"
            raise InputError(f"'{table.path}' has no column of {key}s ({', '.join(names)}); {there}; {cure}")
    return Columns(caption, video, image if image != video else None)


def _row(record: Mapping[str, Any], columns: Columns, files: Files, where: str, allow_missing_captions: bool) -> Row:
    clip = _file(record, columns.video, files)
    caption = record.get(columns.caption or "")
    if not isinstance(caption, str | None):
        raise ValueError(f"{columns.caption} is {caption!r}; give text")
    caption = one_line(caption or "")
    picture = None
    if columns.image is not None and record.get(columns.image) not in (None, ""):
        picture = _file(record, columns.image, files)
    problem = None
    if isinstance(clip, Path) and not files.has(clip):
        problem = f"does not exist; {where} names it"
    elif isinstance(picture, Path) and not files.has(picture):
        problem = f"its image {picture} does not exist; {where} names it"
    elif not caption and not allow_missing_captions:
        problem = f"its caption, {where}, is empty; write one, or set allow_missing_captions: true"
    return Row(clip, caption, problem, picture, _info(record))


def _file(record: Mapping[str, Any], column: str | None, files: Files) -> ClipFile:
    value = record.get(column or "")
    if value is None:
        raise ValueError(f"has no value for '{column}'")
    if isinstance(value, str):
        return files.path(value)
    if hasattr(value, "container"):
        return value
    raise ValueError(f"{column} is {value!r}; give the path of a file")


def _info(record: Mapping[str, Any]) -> VideoInfo | None:
    """Return what the columns of frames, rate and size say, None where one of them says nothing."""
    given = [record.get(name) for name in _INFO]
    if any(value is None or value == "" for value in given):
        return None
    try:
        frames, fps, height, width = (float(value) for value in given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        frames = fps = height = width = float("nan")
    if not (all(value >= 1 and value.is_integer() for value in (frames, height, width)) and 0 <= fps < float("inf")):
        said = ", ".join(f"{name}={value}" for name, value in zip(_INFO, given, strict=True))
        raise ValueError(f"says {said}; give whole numbers, and frames per second")
    return VideoInfo(int(frames), fps, frames / fps if fps else 0.0, int(height), int(width))


# Readers


def read_lines(root: Path, columns: Columns) -> Table:
    """Read text files in which line n belongs to clip n: captions, paths of clips, and perhaps of images.

    Raises:
        InputError: a file is missing, or they differ in length.
    """
    names = {
        "caption": columns.caption or _first_file(root, CAPTION_FILES),
        "video": columns.video or _first_file(root, VIDEO_FILES) or _first_file(root, IMAGE_FILES),
        "image": columns.image or _first_file(root, IMAGE_FILES),
    }
    for kind, names_of in (("caption", CAPTION_FILES), ("video", VIDEO_FILES)):
        if names[kind] is None:
            raise InputError(f"'{root}' has no list of {kind}s ({', '.join(names_of)}); write it, a line for each clip")
    if names["image"] == names["video"]:
        names["image"] = None
    lists = {kind: _text(root / name).split("\n") for kind, name in names.items() if name is not None}
    for lines in lists.values():
        while lines and not lines[-1].strip():
            lines.pop()
    lengths = {kind: len(lines) for kind, lines in lists.items()}
    if len({*lengths.values()}) > 1:
        said = ", ".join(f"{names[kind]} has {count:,} lines" for kind, count in lengths.items())
        longest = max(lengths, key=lambda kind: lengths[kind])
        first = f"{root / str(names[longest])}:{min(lengths.values()) + 1}"
        raise InputError(f"'{root}': {said}; line n of each belongs to clip n, and {first} has no partner")
    files = {kind: str(names[kind]) for kind in lists}
    records = (
        (number, dict(zip(files.values(), (value.strip() for value in values), strict=True)))
        for number, values in enumerate(zip(*lists.values(), strict=True), 1)
    )
    return Table(root, root, list(files.values()), records, lambda number: f"{root / files['video']}:{number}")


def _first_file(root: Path, names: Sequence[str]) -> str | None:
    return next((name for name in names if (root / name).is_file()), None)


def read_csv(path: Path) -> Table:
    """Read a CSV file with a header.

    Raises:
        InputError: it is no CSV, or a row has not the fields of the header.
    """
    faults, records = Faults(path), []
    reader = csv.reader(io.StringIO(_text(path)), strict=True)
    header: list[str] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in {name for name in header if header.count(name) > 1}:
            faults.add(f"{path}:1", f"names the column '{name}' twice")
        for fields in reader:
            if len(fields) == len(header):
                records.append((reader.line_num, dict(zip(header, fields, strict=True))))
            elif fields:
                cure = "put quotes around a caption that holds commas"
                faults.add(f"{path}:{reader.line_num}", f"has {len(fields)} fields, the header {len(header)}; {cure}")
    except csv.Error as error:
        faults.add(f"{path}:{reader.line_num}", f"is no CSV: {error}")
    faults.refuse()
    return _text_table(path, header, records)


def read_json(path: Path) -> Table:
    """Read a JSON file: a list of objects, or such a list under ``data``.

    Raises:
        InputError: it is no JSON, or something else.
    """
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: is no JSON: {error.msg} (column {error.colno})") from error
    start = re.match(r"\s*\[", text)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        start = re.search(r'"data"\s*:\s*\[', text)
    if not isinstance(content, list) or start is None:
        raise InputError(f"{path}:1: is no list; give a list of objects, or one under the key 'data'")
    return _objects(path, zip(_lines_of_entries(text, start.end(), len(content)), content, strict=True), Faults(path))


def _lines_of_entries(text: str, position: int, count: int) -> Iterator[int]:
    """Yield the line on which each entry of a JSON list begins."""
    decoder, between, line, counted = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    for _ in range(count):
        match = between.match(text, position)
        assert match is not None  # it matches nothing, too
        line, counted = line + text.count("\n", counted, match.end()), match.end()
        yield line
        position = decoder.raw_decode(text, match.end())[1]


def read_jsonl(path: Path) -> Table:
    """Read a file with a JSON object on each line.

    Raises:
        InputError: a line is no JSON object.
    """
    faults, found = Faults(path), []
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            found += [(number, json.loads(line))] if line.strip() else []
        except json.JSONDecodeError as error:
            faults.add(f"{path}:{number}", f"is no JSON: {error.msg} (column {error.colno})")
    return _objects(path, iter(found), faults)


def _objects(path: Path, entries: Iterator[tuple[int, Any]], faults: Faults) -> Table:
    records = []
    for number, entry in entries:
        if isinstance(entry, dict):
            records.append((number, entry))
        else:
            faults.add(f"{path}:{number}", f"is {json.dumps(entry)[:60]}; give an object with caption and video")
    faults.refuse()
    return _text_table(path, list(dict.fromkeys(itertools.chain.from_iterable(entry for _, entry in records))), records)


def read_parquet(path: Path) -> Table:
    """Read a Parquet file.

    Raises:
        InputError: it is none, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"'{path}': reading Parquet needs pyarrow; pip install 'cogvideox-sat[data]'") from error
    try:
        content = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is no Parquet file, or a damaged one: {error}") from error
    names = content.schema_arrow.names
    batches = (batch.to_pylist() for batch in content.iter_batches(4096))
    records = enumerate(itertools.chain.from_iterable(batches), 1)
    return Table(path, path.parent, names, records, lambda number: f"{path}, row {number}")


def _text_table(path: Path, columns: Sequence[str], records: Sequence[tuple[int, Mapping[str, Any]]]) -> Table:
    if not records:
        raise InputError(f"'{path}' lists no clips")
    return Table(path, path.parent, columns, iter(records), lambda number: f"{path}:{number}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
