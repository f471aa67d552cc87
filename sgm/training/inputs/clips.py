"""Open the data sets of a training run, and split them into training and validation."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from sgm.checks.sampling import takes_control
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, ConfigError, Problem, digest_of
from sgm.data.clips.index import stamps
from sgm.data.order import derive_seed, split_indices
from sgm.data.remote.objects import RemoteFile
from sgm.data.remote.store import Store, make_store, store_param
from sgm.io import readable_size
from sgm.log import control_characters, get_logger
from sgm.modules.encoders.modules import WORDS_CURE, texts_without_words
from sgm.util import InputError, instantiate_from_config

logger = get_logger(__name__)


@dataclass(frozen=True)
class Split:
    """How training and validation clips were drawn from the same data sets.

    Attributes:
        pools: all clips of each of ``args.train_data``.
        cached: the same clips, with samples from a cache.
        draw: (index of the data set, number of its clips) → indices of training and of validation clips.
        cached_valid: whether the cache serves validation clips too.
    """

    pools: tuple[Any, ...]
    cached: tuple[Any, ...]
    draw: Callable[[int, int], tuple[Sequence[int], Sequence[int]]]
    cached_valid: bool = False

    def data(self) -> "Data":
        """Return the divided data. A clip in several data sets is not trained on if any draws it for validation.

        Raises:
            InputError: that leaves a data set none to train on.
        """
        train, valid, encoded = [], [], []
        draws = [self.draw(index, len(pool)) for index, pool in enumerate(self.pools)]
        places = [_places(pool) for pool in self.pools] if len(self.pools) > 1 else []
        validate = {at[i] for at, (_, held_out) in zip(places, draws, strict=False) if at for i in held_out}
        for index, (pool, cached, (kept, held_out)) in enumerate(zip(self.pools, self.cached, draws, strict=True)):
            if validate and (at := places[index]):
                kept = [i for i in kept if at[i] not in validate]
            if not kept:
                raise InputError(
                    f"args.split: entry {index + 1} of args.train_data has no clip to train on: all are validation "
                    "clips, there or in other entries; name each clip in one of them, or give args.valid_data"
                )
            train.append(_select(cached, kept))
            valid += [_select(pool, held_out)] if held_out else []
            encoded += [_select(cached, held_out)] if held_out and self.cached_valid else []
        return Data(tuple(train), tuple(valid), self, tuple(encoded))


@dataclass(frozen=True)
class Data:
    """Data sets with the interface of `sgm.data.loader.ClipDataset`.

    Attributes:
        train: one data set for each of ``args.train_data``.
        valid: for validation; may be empty.
        split: how both were drawn; None if they are data sets of their own.
        encoded: the clips of `valid` with samples from a cache, for the loss; empty if they are decoded for it too.
    """

    train: tuple[Any, ...]
    valid: tuple[Any, ...]
    split: Split | None = field(default=None, repr=False)
    encoded: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def sources(self) -> tuple[Any, ...]:
        """All clips of each of ``args.train_data``, those for validation included."""
        return self.train if self.split is None else self.split.pools

    def with_cached(self, cached: Sequence[Any], valid: Sequence[Any] | None) -> "Data":
        """Return the data with training clips from `cached`, which has the clips of `sources`.

        Args:
            cached: has samples from a cache.
            valid: the same of the clips of `valid`, unless those are drawn from `sources`; None decodes them.
        """
        if self.split is None:
            return replace(self, train=tuple(cached), encoded=tuple(valid or ()))
        return replace(self.split, cached=tuple(cached), cached_valid=valid is not None).data()

    def without(self, paths: Collection[str]) -> "Data":
        """Return the data without these clips; a split is drawn again, from the clips that are left."""
        if not paths:
            return self
        if self.split is None:
            valid, encoded = (
                tuple(rest for dataset in sets if len(rest := _without(dataset, paths)))
                for sets in (self.valid, self.encoded)
            )
            train = tuple(_without(dataset, paths) for dataset in self.train)
            return replace(self, train=train, valid=valid, encoded=encoded)
        pools, cached = (
            tuple(_without(each, paths) for each in sets) for sets in (self.split.pools, self.split.cached)
        )
        return replace(self.split, pools=pools, cached=cached).data()

    @property
    def num_train(self) -> int:
        """Number of training clips."""
        return sum(map(len, self.train))

    @property
    def digest(self) -> str:
        """SHA-256 of the training clips' paths in order; for a data set without paths, of the number of clips."""
        return digest_of([getattr(dataset, "paths", len(dataset)) for dataset in self.train])

    @property
    def captions_digest(self) -> str:
        """SHA-256 of the captions of `sources` in order, of data sets that have them."""
        return digest_of([getattr(dataset, "captions", None) for dataset in self.sources])

    @property
    def files_digest(self) -> str:
        """SHA-256 of sizes and times of the files of `sources`, which reads no contents; of data sets with rows."""
        stamp = stamps()
        return digest_of([_stamped(getattr(dataset, "rows", ()), stamp) for dataset in self.sources])

    @property
    def validation(self) -> Any:
        """All validation clips as one data set, of frames; None without any."""
        return _joined(self.valid)

    @property
    def validation_inputs(self) -> Any:
        """The same, from a cache where it holds them."""
        return _joined(self.encoded or self.valid)

    def afar_rows(self) -> dict[str, str]:
        """Return rows of the report on what is read from afar: name → text; none if nothing is."""
        clips = (getattr(row.path, "container", None) for each in self.sources for row in getattr(each, "rows", ()))
        shards = {file.url: file for file in clips if isinstance(file, RemoteFile)}
        if not shards:
            return {}
        size, store = readable_size(sum(file.size for file in shards.values())), next(iter(shards.values())).store
        whole = sum(not file.ranges for file in shards.values())
        parts = f", {whole:,} of them whole, as their server sends no parts" if whole else ""
        room = readable_size(store.max_bytes)
        return {
            "afar": f"{len(shards):,} shards, {size}: all of them answer{parts}",
            "kept here": f"up to {room} in {store.folder}, where {readable_size(store.free())} can be used",
        }

    def __str__(self) -> str:
        """Return one line for the report."""
        return f"{self.num_train:,} training clips, {sum(map(len, self.valid)):,} validation clips"


def open_data(config: Config) -> Data:
    """List the clips of a training configuration without opening them.

    Raises:
        InputError: a folder is missing or holds no clips, or the split leaves none for training or evaluation.
    """
    args = config.args
    assert isinstance(args, TrainingArgs)
    whole = [open_folder(config, folder) for folder in args.train_data]
    if args.valid_data is not None:
        data = Data(tuple(whole), tuple(_open_validation(config, folder) for folder in args.valid_data))
        trained, valid = ({place for each in sets for place in _places(each)} for sets in (data.train, data.valid))
        if shared := len(trained & valid):
            logger.warning("%d clips of args.valid_data are trained on too: their loss says nothing of others", shared)
    else:

        def draw(index: int, num: int) -> tuple[Sequence[int], Sequence[int]]:
            return split_indices(num, args.split, seed=derive_seed(args.seed, "split", index))

        data = Split(tuple(whole), tuple(whole), draw).data()
    if args.eval_interval is not None and not data.valid:
        raise InputError(
            f"args.eval_interval is {args.eval_interval}, but there are no validation clips; give args.valid_data, or "
            "set some of args.train_data aside with args.split=98,2,0, or remove eval_interval"
        )
    return data


def _open_validation(config: Config, folder: str) -> Any:
    try:
        return open_folder(config, folder)
    except InputError as error:  # of another key than that of training clips
        cure = "correct it, in the file or on the command line"
        raise ConfigError([Problem("args.valid_data", "", str(error), cure)]) from error


def store_of(config: Config) -> Store:
    """Return the store that keeps what this run reads from URLs."""
    args = config.args
    if not isinstance(args, TrainingArgs):
        return Store()
    return make_store(args.remote_cache, args.remote_cache_gb, args.remote_retries)


def open_folder(config: Config, folder: str) -> Any:
    """Return the data set of the ``data`` section for a folder.

    Raises:
        InputError: the folder cannot be used, or there is no ``data`` section.
    """
    if not config.data:
        raise InputError("there is no data section; add one as in configs/sft.yaml (target: data_video.SFTDataset)")
    # A network with a control needs it of every clip; said once, in its own section.
    more = {"control": True} if takes_control(config) and "control" not in (config.data.get("params") or {}) else {}
    more |= store_param(config.data, folder, store_of(config))
    dataset = instantiate_from_config(config.data, data_dir=folder, **more)
    if odd := [caption for caption in getattr(dataset, "captions", ()) if control_characters(caption)]:
        text = "%s: %d captions hold control characters, which text encoders drop; the first: %s"
        logger.warning(text, folder, len(odd), odd[0][:80])
    if config.args.allow_unknown_text or not hasattr(dataset, "with_problems"):
        return dataset
    return dataset.with_problems(_unknown_captions(config, dataset.captions))


def _unknown_captions(config: Config, captions: Sequence[str]) -> dict[str, str]:
    """Return caption → problem, of captions of which the text encoder's tokenizer knows no word."""
    try:
        conditioner = instantiate_from_config(config.model["conditioner_config"])
        reasons = texts_without_words(conditioner, captions)
    except (InputError, KeyError):  # refused by the checks of the model, which name the section or file
        return {}
    return {caption: f"{reason}; {WORDS_CURE}" for caption, reason in reasons.items()}


def _joined(datasets: Sequence[Any]) -> Any:
    return ConcatDataset(datasets) if len(datasets) > 1 else next(iter(datasets), None)


def _places(dataset: Any) -> list[str]:
    """Return where each clip is, however its folder is spelled or linked; empty for a data set without paths."""
    folder_of = cache(os.path.realpath)
    paths = map(os.path.split, getattr(dataset, "paths", ()))
    return [os.path.join(folder_of(folder), name) for folder, name in paths]


def _select(dataset: Any, indices: Sequence[int]) -> Any:
    if len(indices) == len(dataset):
        return dataset
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def _without(dataset: Any, paths: Collection[str]) -> Any:
    return dataset.without(paths) if hasattr(dataset, "without") else dataset


def _stamped(rows: Iterable[Any], stamp: Callable[[Any], Any]) -> list[Any]:
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly
        parts = [file for row in rows for file in (row.path, row.image, row.rejected, row.control, row.mask)]
        files = [file for file in parts if file is not None]
        return list(pool.map(stamp, files))
