"""Open the data sets of a training run, and split them into training and validation."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from sgm.config.args import TrainingArgs
from sgm.config.load import Config
from sgm.data.order import derive_seed, split_indices
from sgm.modules.encoders.modules import WORDS_CURE, texts_without_words
from sgm.util import InputError, instantiate_from_config


@dataclass(frozen=True)
class Data:
    """Data sets with the interface of `sgm.data.loader.ClipDataset`.

    Attributes:
        train: one data set for each of ``args.train_data``.
        valid: for validation; may be empty.
    """

    train: tuple[Any, ...]
    valid: tuple[Any, ...]

    @property
    def num_train(self) -> int:
        """Number of training clips."""
        return sum(map(len, self.train))

    @property
    def digest(self) -> str:
        """SHA-256 of the training clips' paths in order; for a data set without paths, of the number of clips."""
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
    """List the clips of a training configuration without opening them.

    Raises:
        InputError: a folder is missing or holds no clips, or the split leaves none for training or evaluation.
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
    """Return the data set of the ``data`` section for a folder.

    Raises:
        InputError: the folder cannot be used, or there is no ``data`` section.
    """
    if not config.data:
        raise InputError("there is no data section; add one as in configs/sft.yaml (target: data_video.SFTDataset)")
    dataset = instantiate_from_config(config.data, data_dir=folder)
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


def _select(dataset: Any, indices: Sequence[int]) -> Any:
    if len(indices) == len(dataset):
        return dataset
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)
