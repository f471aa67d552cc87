"""The clips of a training run: opened, divided into training and validation, and checked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.data.clips.check import summary_text, write_report
from sgm.data.order import derive_seed, split_indices
from sgm.io import atomic_file
from sgm.log import get_logger
from sgm.util import InputError, instantiate_from_config

logger = get_logger(__name__)

REPORT, EXCLUDED = "data_check.json", "excluded_clips.json"
AUTO_CHECK = 2000  # clips that ``args.check_clips=auto`` opens before training


@dataclass(frozen=True)
class Data:
    """What is trained on and what is validated on: data sets as `sgm.data.loader.ClipDataset` describes them.

    Attributes:
        train: one data set for each of ``args.train_data``.
        valid: those of validation; empty where there is none.
    """

    train: tuple[Any, ...]
    valid: tuple[Any, ...]

    @property
    def num_train(self) -> int:
        """Number of training clips."""
        return sum(map(len, self.train))

    @property
    def digest(self) -> str:
        """SHA-256 of the training clips' paths, in order; of their number where a data set tells no paths."""
        clips = [getattr(dataset, "paths", len(dataset)) for dataset in self.train]
        return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

    @property
    def validation(self) -> Any:
        """All validation clips as one data set."""
        first, *rest = self.valid
        return ConcatDataset(self.valid) if rest else first

    def __str__(self) -> str:
        """Return one line for the report."""
        return f"{self.num_train:,} training clips, {sum(map(len, self.valid)):,} validation clips"


def open_data(config: Config) -> Data:
    """List the clips of a training configuration; none of them is opened.

    Raises:
        InputError: a folder is missing or holds no clips, the split leaves nothing, or there is nothing to evaluate on.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    whole = [open_folder(config, folder) for folder in args.train_data]
    if args.valid_data is not None:
        data = Data(tuple(whole), tuple(open_folder(config, folder) for folder in args.valid_data))
    else:
        train, valid = [], []
        for index, dataset in enumerate(whole):
            kept, held_out = split_indices(len(dataset), args.split, seed=derive_seed(args.seed, "split", index))
            train.append(_select(dataset, kept))
            valid += [_select(dataset, held_out)] if held_out else []
        data = Data(tuple(train), tuple(valid))
    if args.eval_interval is not None and not data.valid:
        raise InputError(
            f"args.eval_interval is {args.eval_interval}, but there are no validation clips; give args.valid_data, or "
            "set some of args.train_data aside with args.split=98,2,0, or remove eval_interval"
        )
    return data


def open_folder(config: Config, folder: str) -> Any:
    """Return one of ``args.train_data`` or ``args.valid_data`` as the data set that the configuration names.

    Raises:
        InputError: it cannot be used, or the configuration has no data section.
    """
    if not config.data:
        raise InputError("there is no data section; add one as in configs/sft.yaml (target: data_video.SFTDataset)")
    return instantiate_from_config(config.data, data_dir=folder)


def _select(dataset: Any, indices: Sequence[int]) -> Any:
    if len(indices) == len(dataset):
        return dataset
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def usable_data(data: Data, args: TrainingArgs, folder: Path, *, resumed: bool) -> tuple[Data, dict[str, str]]:
    """Check the clips on rank zero and leave out those that cannot be used; all ranks call together.

    Clips are opened as ``args.check_clips`` says; of others, what the data set itself says is checked. A resumed run
    leaves out what it left out at its start: its samples must be the same.

    Args:
        data: from `open_data`. A data set without ``check`` (or ``row_reports``, where clips stay closed) and
            ``without`` is taken as it is.
        args: with ``max_bad_share`` and ``check_clips``.
        folder: of the run; gets the report of all clips, and the list of those left out.
        resumed: whether the run goes on.

    Returns:
        The rest, and path → reason of the training clips left out.

    Raises:
        InputError: captions are missing, or too many clips cannot be used.
    """
    found: Any = None
    if sgm.distributed.rank() == 0:
        try:
            found = _read_excluded(folder) if resumed else _check(data, args, folder)
        except InputError as error:
            found = error
    found = sgm.distributed.broadcast_from_rank_zero(found)
    if isinstance(found, InputError):
        raise found
    checked = replace(
        data,
        train=tuple(_without(dataset, found) for dataset in data.train),
        valid=tuple(rest for dataset in data.valid if len(rest := _without(dataset, found))),
    )
    empty = [name for name, dataset in zip(args.train_data, checked.train, strict=True) if not len(dataset)]
    if empty or (data.valid and not checked.valid):
        where = ", ".join(empty) or "the validation data"
        raise InputError(f"no clip of {where} can be used; {folder / REPORT} says why")
    paths = {path for dataset in data.train for path in getattr(dataset, "paths", ())}
    return checked, {path: reason for path, reason in found.items() if path in paths}


def _without(dataset: Any, excluded: dict[str, str]) -> Any:
    return dataset.without(excluded) if excluded and hasattr(dataset, "without") else dataset


def _check(data: Data, args: TrainingArgs, folder: Path) -> dict[str, str]:
    """Return path → reason of unusable clips, having written the report."""
    datasets = (*data.train, *data.valid)
    num_clips = sum(map(len, datasets))
    opening = args.check_clips == "all" or (args.check_clips == "auto" and num_clips <= AUTO_CHECK)
    if not opening:
        said = f"{num_clips:,} clips are not opened before training (args.check_clips={args.check_clips})"
        logger.info("%s; bad ones are replaced when their turn comes", said)
    method = "check" if opening else "row_reports"
    checked = [dataset for dataset in datasets if hasattr(dataset, method)]
    reports = {report.path: report for dataset in checked for report in getattr(dataset, method)()}
    if not reports:
        return {}
    rows = list(reports.values())
    write_report(folder / REPORT, rows)
    logger.info("%s", summary_text(rows))
    uncaptioned = [row for row in rows if row.uncaptioned]
    if uncaptioned:
        listed = "\n".join(f"  {row.path}: {'; '.join(row.problems)}" for row in uncaptioned[:10])
        raise InputError(
            f"{len(uncaptioned)} of {len(rows)} clips have no usable caption:\n{listed}\nwrite the captions, or set "
            "data.params.allow_missing_captions=true to train these clips on an empty one"
        )
    bad = {row.path: "; ".join(row.problems) for row in rows if row.problems}
    if len(bad) > args.max_bad_share * len(rows):
        listed = "\n".join(f"  {path}: {reason}" for path, reason in sorted(bad.items())[:10])
        raise InputError(
            f"{len(bad)} of {len(rows)} clips cannot be used, more than args.max_bad_share={args.max_bad_share:g} "
            f"allows:\n{listed}\nrepair or remove them ({folder / REPORT} lists all), or raise args.max_bad_share"
        )
    for path, reason in sorted(bad.items()):
        logger.warning("quarantined %s: %s", path, reason)
    with atomic_file(folder / EXCLUDED) as temporary:
        temporary.write_text(json.dumps(bad, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return bad


def _read_excluded(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / EXCLUDED).read_text(encoding="utf-8"))
    except FileNotFoundError:  # the data set has no check
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / EXCLUDED} cannot be read: {error}; restore it, or use args.resume=none") from error
