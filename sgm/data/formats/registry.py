"""The formats of data sets, and the rows of a data set in any of them; docs/data.md shows each format."""

from collections.abc import Callable
from pathlib import Path

from sgm.data.formats.folder import LABELS, VIDEOS, list_folder
from sgm.data.formats.huggingface import read_dataset
from sgm.data.formats.manifest import (
    CAPTION_FILES,
    IMAGE_FILES,
    VIDEO_FILES,
    Columns,
    Table,
    read_csv,
    read_json,
    read_jsonl,
    read_lines,
    read_parquet,
    table_rows,
)
from sgm.data.formats.webdataset import read_archives, tar_files
from sgm.data.remote.store import Store
from sgm.data.rows import Row
from sgm.data.tar import COMPRESSED_SUFFIXES
from sgm.urls import is_url, local_path, redacted
from sgm.util import InputError, nearest, nearest_path

MANIFEST = "metadata"  # name of the manifest of a folder, without suffix
_MANIFESTS: dict[str, Callable[[Path], Table]] = {
    "csv": read_csv,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
FORMATS = ("auto", "folder", "lines", *_MANIFESTS, "webdataset", "huggingface")


def list_rows(
    data_dir: str | Path,
    *,
    format: str = "auto",
    columns: Columns | None = None,
    allow_missing_captions: bool = False,
    store: Store | None = None,
) -> list[Row]:
    """Return the rows of a data set in any format, without opening clips.

    Args:
        data_dir: a folder, a manifest, an archive, or a URL of archives.
        format: one of `FORMATS`.
        columns: names of the columns; a folder of clips and captions has none.
        allow_missing_captions: accept a missing or empty caption as an empty one.
        store: that keeps what is read from a URL; None is that of the user's cache.

    Raises:
        InputError: the data set is malformed; the message names file and line.
    """
    if format not in FORMATS:
        hint = nearest(format, list(FORMATS))
        raise InputError(f"data.params.format is '{format}'; give one of {', '.join(FORMATS)}{hint}")
    columns = columns or Columns()
    if is_url(data_dir):
        if format not in ("auto", "webdataset"):
            raise InputError(f"{redacted(str(data_dir))}: a URL names tar files; remove data.params.format={format}")
        table = read_archives(str(data_dir), columns, store)
        return table_rows(table, columns, allow_missing_captions=allow_missing_captions)
    if not str(data_dir).strip():
        raise InputError("the data set has no name; give a folder, manifest, archive or URL, or . for this folder")
    path = local_path(data_dir)
    if format == "auto":
        format = detect(path)
    if format == "folder":
        if any(vars(columns).values()):
            raise InputError(
                f"'{path}' is a folder of clips and captions, which has no columns; remove data.params.caption_column, "
                "video_column, image_column and rejected_column, or set data.params.format"
            )
        return list_folder(path, allow_missing_captions=allow_missing_captions)
    return table_rows(_table(path, format, columns), columns, allow_missing_captions=allow_missing_captions)


def detect(path: Path) -> str:
    """Detect the format of a data set.

    Raises:
        InputError: the type of the file is unknown, or the folder has several manifests.
    """
    if path.is_file():
        is_archive = path.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))  # compressed ones are refused there
        kind = "webdataset" if is_archive else path.suffix[1:].lower()
        if kind not in FORMATS:
            raise InputError(f"'{path}' is no manifest ({', '.join(_MANIFESTS)}), no archive (tar), and no folder")
        return kind
    if (path / VIDEOS).is_dir() and (path / LABELS).is_dir():
        return "folder"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    manifests = [kind for kind in _MANIFESTS if (path / f"{MANIFEST}.{kind}").is_file()]
    if len(manifests) > 1:
        raise InputError(f"'{path}' holds {MANIFEST}.{{{','.join(manifests)}}}; set data.params.format, or keep one")
    if manifests:
        return manifests[0]
    lists = VIDEO_FILES + IMAGE_FILES
    if all(any((path / name).is_file() for name in names) for names in (CAPTION_FILES, lists)):
        return "lines"
    return "webdataset" if tar_files(path) else "folder"


def _table(path: Path, format: str, columns: Columns) -> Table:
    if not path.exists():
        raise InputError(f"data set '{path}' does not exist{nearest_path(path)}")
    if format in ("lines", "huggingface") and not path.is_dir():
        raise InputError(f"data set '{path}' is a file; data.params.format={format} needs a folder")
    if format == "lines":
        return read_lines(path, columns)
    if format == "huggingface":
        return read_dataset(path)
    if format == "webdataset":
        return read_archives(path, columns)
    file = path / f"{MANIFEST}.{format}" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"'{file}' does not exist; data.params.format={format} needs it, or give the file itself")
    return _MANIFESTS[format](file)
