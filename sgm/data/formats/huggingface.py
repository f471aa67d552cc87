"""Data sets saved by ``datasets``, with clips as bytes in the table or as paths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sgm.data.formats.manifest import Table, refuse_times
from sgm.data.rows import suffix
from sgm.io import reason_of
from sgm.util import InputError

_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Cell:
    """A clip as bytes in the table."""

    container: Path  # folder of the data set
    column: str
    index: int  # of the row
    suffix: str  # of the original file, such as .mp4

    def __str__(self) -> str:
        """Return a name for messages."""
        return f"{self.container}/{self.column}/{self.index}{self.suffix}"

    def read(self) -> bytes:
        """Return the bytes."""
        return _table(self.container)[self.column][self.index].as_py()["bytes"]


def read_dataset(folder: Path) -> Table:
    """Read a folder written by ``Dataset.save_to_disk``, without the bytes of clips.

    Raises:
        InputError: ``datasets`` is not installed, did not write the folder, or the folder has several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if not splits:
            raise InputError(f"'{folder}' has a dataset_dict.json and no folder of a split; save the data set again")
        raise InputError(f"'{folder}' holds the splits {', '.join(splits)}; give one: '{folder / splits[0]}'")
    table = _table(folder)
    return Table(
        folder, folder, table.column_names, partial(_records, folder, table), lambda row, _: f"{folder}, row {row}"
    )


def _records(folder: Path, table: Any, used: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    refuse_times(folder, table.schema, used)
    scalars = [name for name in used if not _holds_bytes(table.schema.field(name).type)]
    embedded = [name for name in used if name not in scalars]
    start = 0
    for batch in table.to_batches(_BATCH):
        values = {name: batch[name].to_pylist() for name in scalars}
        for name in embedded:
            fields = dict(zip((field.name for field in batch[name].type), batch[name].flatten(), strict=True))
            paths, filled = fields["path"].to_pylist(), fields["bytes"].is_valid().to_pylist()
            fallback = ".png" if "image" in name else ".mp4"
            values[name] = [
                Cell(folder, name, start + place, suffix(path or "") or fallback) if has_bytes else path
                for place, (path, has_bytes) in enumerate(zip(paths, filled, strict=True))
            ]
        for place, row in enumerate(zip(*values.values(), strict=True), start + 1):
            yield place, dict(zip(values, row, strict=True))
        start += batch.num_rows


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


@lru_cache(maxsize=8)
def _table(folder: Path) -> Any:
    """Open the table of a data set, memory-mapped, once per process."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"'{folder}': reading it needs datasets; pip install 'datasets'") from error
    try:
        return datasets.load_from_disk(str(folder)).data.table  # type: ignore[union-attr]
    except IndexError as error:
        raise InputError(f"'{folder}' cannot be read by datasets.load_from_disk: it holds no rows") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # of odd JSON files
        raise InputError(f"'{folder}' cannot be read by datasets.load_from_disk: {reason_of(error)}") from error
