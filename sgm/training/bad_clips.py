"""Unusable clips, found by the check before training or during it, recorded in one file of the run folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sgm.distributed
from sgm.config.args import TrainingArgs
from sgm.config.values import misfit
from sgm.data.cache import listed
from sgm.data.clips.check import RowReport, summary_text, write_report
from sgm.io import parse_json, reason_of, write_json
from sgm.log import get_logger
from sgm.training.inputs.clips import Data
from sgm.util import InputError, RunError

logger = get_logger(__name__)

FILE, REPORT = "bad_clips.json", "data_check.json"
FORMER_AT_START, FORMER_ALL = "excluded_clips.json", "quarantine.json"  # files of older runs, before FILE existed
AUTO_CHECK = 2000  # clips that ``args.check_clips=auto`` opens before training


class BadClips:
    """Collect the bad clips of a run and write them to ``bad_clips.json``.

    The file has two keys, each with path → reason. ``at_start``: clips excluded from the data sets before the first
    step; a resumed run excludes the same clips, so that its samples are the same. ``in_training``: clips that failed
    later; they keep their index, and are replaced by other clips.

    Args:
        folder: of the run.
        num_clips: number of training clips, and of validation clips drawn from the same data.
        max_share: share of them that may be bad.
        at_start: path → reason of training and validation clips excluded at the start.
        known: path → reason of all bad training clips so far.
    """

    def __init__(
        self,
        folder: Path,
        num_clips: int,
        max_share: float,
        *,
        at_start: Mapping[str, str] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.num_clips, self.max_share = folder, num_clips, max_share
        self.at_start, self.reasons = at_start or {}, dict(known or {})
        self._fresh: dict[str, str] = {}

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Record failures of this rank: (path, reason)."""
        for path, reason in failures:
            if path not in self.reasons:
                logger.warning("bad clip %s: %s; another clip takes its place", path, reason)
                self.reasons[path] = self._fresh[path] = reason

    def all_gather_and_write(self) -> int:
        """All-gather new bad clips, write the file on rank zero, return the number of bad clips.

        Collective: all ranks call it.

        Raises:
            RunError: more clips than allowed are bad.
        """
        found = sgm.distributed.all_gather_any(self._fresh)
        self._fresh = {}
        for fresh in found:
            self.reasons |= fresh
        if found and sgm.distributed.rank() == 0:
            _write(self.folder, self.at_start, self.reasons)
        if len(self.reasons) > self.max_share * self.num_clips:
            raise RunError(
                f"{len(self.reasons)} of {self.num_clips} training clips cannot be read, more than "
                f"args.max_bad_share={self.max_share:g} allows:\n{_listed(self.reasons)}\nrepair or remove them "
                "(tools/check_dataset.py lists all), or raise args.max_bad_share"
            )
        return len(self.reasons)


def usable_data(data: Data, args: TrainingArgs, folder: Path, *, resumed: bool) -> tuple[Data, BadClips]:
    """Check the clips on rank zero and exclude bad ones. Collective: all ranks call it.

    ``args.check_clips`` decides whether clips are opened; otherwise only the rows of the data set are checked.

    Args:
        data: from `open_data`. A data set without ``check`` (or ``row_reports`` if clips are not opened) and
            ``without`` is not checked.
        args: with ``max_bad_share`` and ``check_clips``.
        folder: of the run; gets the report of all clips (``data_check.json``) and ``bad_clips.json``.
        resumed: exclude the same clips as at the start of the run, instead of checking.

    Raises:
        InputError: too many clips are bad, or the file of a resumed run cannot be read.
    """
    at_start, in_training = sgm.distributed.run_on_rank_zero(
        lambda: _read(folder) if resumed else (_check(data, args, folder), {})
    )
    checked = usable(data, args, at_start)
    paths = {path for dataset in data.sources for path in getattr(dataset, "paths", ())}
    known = {path: reason for path, reason in at_start.items() if path in paths} | in_training
    return checked, BadClips(folder, sum(map(len, data.sources)), args.max_bad_share, at_start=at_start, known=known)


def usable(data: Data, args: TrainingArgs, bad: Mapping[str, str]) -> Data:
    """Return the data without bad clips (path → reason).

    Raises:
        InputError: no clip is left for training, or for validation.
    """
    checked = data.without(bad)
    empty = [name for name, dataset in zip(args.train_data, checked.train, strict=True) if not len(dataset)]
    if empty or (data.valid and not checked.valid):
        where = ", ".join(empty) or "the validation data"
        raise InputError(f"no clip of {where} can be used:\n{_listed(bad)}")
    return checked


def clips_left_out(data: Data, args: TrainingArgs, run: Path | None) -> dict[str, str]:
    """Return path → reason of the clips that a start would leave out; `run` is resumed. Writes nothing into it.

    Raises:
        InputError: too many are bad, or the file of a resumed run cannot be read.
    """
    return unusable(_reports(data, args), args) if run is None else _read(run)[0]


def _check(data: Data, args: TrainingArgs, folder: Path) -> dict[str, str]:
    """Write the report and the bad clips; return path → reason of bad clips."""
    reports = _reports(data, args)
    if not reports:
        return {}
    logger.info("%s", summary_text(reports))
    bad = unusable(reports, args)
    write_report(folder / REPORT, reports)
    for path, reason in sorted(bad.items()):
        logger.warning("left out %s: %s", path, reason)
    _write(folder, bad, {})
    return bad


def _reports(data: Data, args: TrainingArgs) -> list[RowReport]:
    """Check all clips, opening them if ``args.check_clips`` says so."""
    datasets = (*data.train, *data.valid) if data.split is None else data.split.cached
    num_clips = sum(map(len, datasets))
    opening = args.check_clips == "all" or (args.check_clips == "auto" and num_clips <= AUTO_CHECK)
    if not opening:
        unopened = f"{num_clips:,} clips are not opened before training (args.check_clips={args.check_clips})"
        logger.info("%s; bad clips are replaced during training", unopened)
    method = "check" if opening else "row_reports"
    checked = [dataset for dataset in datasets if hasattr(dataset, method)]
    return [*{report.path: report for dataset in checked for report in getattr(dataset, method)()}.values()]


def unusable(reports: Sequence[RowReport], args: TrainingArgs) -> dict[str, str]:
    """Return path → reason of unusable clips.

    Raises:
        InputError: they are more than allowed.
    """
    bad = {report.path: "; ".join(report.problems) for report in reports if report.problems}
    if len(bad) > args.max_bad_share * len(reports):
        uncaptioned = all(report.uncaptioned for report in reports if report.problems)
        found = "have no usable caption" if uncaptioned else "cannot be used"
        cure = "repair or remove them (tools/check_dataset.py lists all)"
        if uncaptioned:
            cure = "write the captions, or set data.params.allow_missing_captions=true to train them on an empty one"
        raise InputError(
            f"{len(bad)} of {len(reports)} clips {found}, more than args.max_bad_share={args.max_bad_share:g} "
            f"allows:\n{_listed(bad)}\n{cure}, or raise args.max_bad_share"
        )
    return bad


def _listed(reasons: Mapping[str, str]) -> str:
    return listed([f"{path}: {reason}" for path, reason in sorted(reasons.items())])


def _write(folder: Path, at_start: Mapping[str, str], known: Mapping[str, str]) -> None:
    in_training = {path: reason for path, reason in sorted(known.items()) if path not in at_start}
    write_json(folder / FILE, {"at_start": dict(sorted(at_start.items())), "in_training": in_training})


def _read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return ``at_start`` and ``in_training`` of a run; empty if its data sets have no check."""
    try:
        if (folder / FILE).exists():
            content = parse_json((folder / FILE).read_bytes())
        else:
            former = {"at_start": folder / FORMER_AT_START, "in_training": folder / FORMER_ALL}
            content = {name: parse_json(path.read_bytes()) if path.exists() else {} for name, path in former.items()}
        if not isinstance(content, dict) or content.keys() != {"at_start", "in_training"}:
            raise ValueError("it does not hold 'at_start' and 'in_training', each with paths and reasons")
        for name, value in content.items():
            # Names that are not UTF-8 are no text to `misfit`.
            maps = isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values())
            if not maps and (found := misfit(value, dict[str, str])) is not None:
                raise ValueError(f"'{name}' {found[0]}; {found[1]}")
        return content["at_start"], content["in_training"]
    except (OSError, ValueError) as error:
        raise InputError(
            f"the bad clips of {folder} cannot be read: {reason_of(error)}; restore {FILE}, or use args.resume=none"
        ) from error
