"""Check and read a T5 encoder and its tokenizer on disk.

transformers, safetensors and sentencepiece are imported when they are needed.
"""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgm.io import parse_json, require_local
from sgm.log import get_logger
from sgm.util import InputError, nearest_path
from sgm.weights.files import check_values, read_tensors
from sgm.weights.index import TIED, misplaced, read_index

log = get_logger(__name__)

MODEL_DIR_KEY = "model.conditioner_config.params.emb_models[*].params.model_dir"
_VARIANT = re.compile(r"model\.(?:safetensors\.index\.(.+)\.json|((?!.*-of-\d+\.).+)\.safetensors)")
_BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
_SHOWN = 12  # unknown characters that a message lists
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class UnknownText:
    """What a tokenizer does not know of a text.

    Attributes:
        characters: the unknown ones, each once, in order.
        wholly: whether it knows no word of the text.
    """

    characters: str
    wholly: bool

    def __str__(self) -> str:
        """Return the characters for a message."""
        more = f" and {len(self.characters) - _SHOWN} more" if len(self.characters) > _SHOWN else ""
        return ", ".join(f"'{character}'" for character in self.characters[:_SHOWN]) + more


_SIZES = {"d_model": 10**5, "d_ff": 10**6, "d_kv": 10**5, "num_heads": 10**4, "num_layers": 10**3, "vocab_size": 10**7}


# What decides embeddings and no shape of a weight: as the released T5 has it, and what transformers takes without it.
_RELEASED = {
    "feed_forward_proj": ("gated-gelu", "relu"),
    "dense_act_fn": ("gelu_new", "gelu_new"),
    "layer_norm_epsilon": (1e-6, 1e-6),
    "relative_attention_max_distance": (128, 128),
}


@dataclass(frozen=True)
class T5Folder:
    """A T5 encoder and its tokenizer on disk."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        file = self.path / "config.json"
        try:
            config = parse_json(file.read_bytes())
        except FileNotFoundError as error:
            raise InputError(f"T5 folder {self.path} has no config.json; copy it from text_encoder/") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not readable JSON ({error}); copy it again from text_encoder/") from error
        if not isinstance(config, dict) or not isinstance(config.get("d_model"), int):
            raise InputError(f"{file} describes no T5 (it has no 'd_model'); copy config.json from text_encoder/")
        for name, most in _SIZES.items():
            if not isinstance(size := config.get(name, 1), int) or not 1 <= size <= most:
                cure = f"expected a whole number from 1 to {most:,}; copy it again from text_encoder/"
                raise InputError(f"{file}: {name} is {reprlib.repr(size)}; {cure}")
        return config

    @cached_property
    def tokenizer(self) -> Any:
        """The ``sentencepiece.SentencePieceProcessor`` of ``spiece.model``."""
        import sentencepiece

        file = self.path / "spiece.model"
        if not file.is_file():
            raise InputError(
                f"T5 folder {self.path} has no tokenizer: spiece.model is missing; copy it from tokenizer/"
            )
        tokenizer = sentencepiece.SentencePieceProcessor()
        try:
            tokenizer.LoadFromSerializedProto(file.read_bytes())
        except (OSError, RuntimeError) as error:
            raise InputError(f"{file} is not a sentencepiece model{_lfs_hint(file)}; copy it again") from error
        if tokenizer.pad_id() < 0 or tokenizer.eos_id() < 0:
            raise InputError(f"{file} defines no pad or no end token, so it is not a T5 tokenizer; copy T5's own file")
        return tokenizer

    def unknown_texts(self, texts: Sequence[str]) -> dict[str, UnknownText]:
        """Return text → what the tokenizer does not know, of texts with unknown characters.

        T5 v1.1 reads English: it sees one and the same unknown token for all characters of other scripts.
        """
        tokenizer = self.tokenizer
        unknown, found = tokenizer.unk_id(), {}
        for text, ids in zip(texts, tokenizer.encode(list(texts)), strict=True):
            if unknown in ids:
                pieces = list(zip(ids, tokenizer.encode(text, out_type=str), strict=True))
                lost = "".join(piece for number, piece in pieces if number == unknown)
                knows = any(letter.isalnum() for number, piece in pieces if number != unknown for letter in piece)
                found[text] = UnknownText("".join(dict.fromkeys(lost)), not knows)
        return found

    @cached_property
    def _weights(self) -> tuple[Path, str | None]:
        """The file of the weights or their index, and its variant: None, or such as fp16 where it is alone."""
        for name in ("model.safetensors.index.json", "model.safetensors"):
            if (self.path / name).is_file():
                return self.path / name, None
        matches = {file: _VARIANT.fullmatch(file.name) for file in sorted(self.path.glob("model.*"))}
        found = [(file, match[1] or match[2]) for file, match in matches.items() if match]
        if len(found) > 1:
            names = ", ".join(file.name for file, _ in found)
            raise InputError(f"T5 folder {self.path} has several sets of weights: {names}; keep one of them")
        if not found:
            raise InputError(
                f"T5 folder {self.path} has no weights: neither model.safetensors nor model.safetensors.index.json is "
                "there; copy them from text_encoder/"
            )
        return found[0]

    @property
    def index(self) -> Path | None:
        """The index of weights in several files."""
        file = self._weights[0]
        return file if file.suffix == ".json" else None

    @cached_property
    def _listed(self) -> dict[Path, frozenset[str]] | None:
        """The weight files with the names of their tensors, of a folder with an index."""
        return None if self.index is None else read_index(self.index)

    @cached_property
    def shards(self) -> list[Path]:
        """The weight files; files listed in an index may be missing."""
        return [self._weights[0]] if self._listed is None else [*self._listed]

    @property
    def unreleased(self) -> dict[str, Any]:
        """Values of ``config.json`` that change embeddings with the same weights, where the released T5 has others."""
        found = {name: self.config.get(name, absent) for name, (_, absent) in _RELEASED.items()}
        found = {name: value for name, value in found.items() if value != _RELEASED[name][0]}
        names = (_BLOCK.match(name) for shard in self.shards for name in read_tensors(shard))
        blocks = 1 + max((int(match[1]) for match in names if match), default=-1)
        layers = self.config.get("num_layers", blocks)
        return found if layers == blocks else {**found, "num_layers": layers}  # further blocks are left out

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The most common dtype of the stored tensors, from the file headers."""
        from safetensors import safe_open

        counts: Counter[str] = Counter()
        for shard in self.shards:
            with safe_open(shard, framework="pt") as file:
                counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
        return STORED_DTYPES.get(counts.most_common(1)[0][0], torch.float32)

    def check(self) -> None:
        """Check names, sizes and headers of all files, without reading weights.

        Raises:
            InputError: all problems of the folder, in one message.
        """
        require_local(self.path)
        if not self.path.is_dir():
            raise InputError(
                f"T5 folder '{self.path}' does not exist{nearest_path(self.path)} ({MODEL_DIR_KEY}). Nothing is "
                "downloaded at run time: put the files of text_encoder/ and tokenizer/ of a released CogVideoX "
                "diffusers repository into one folder (hf download zai-org/CogVideoX-2b --include 'text_encoder/*' "
                "'tokenizer/*') and name that folder"
            )
        problems = [problem for check in (self._check_config, self._check_weights) for problem in check()]
        if problems:
            raise InputError("\n".join([f"T5 folder '{self.path}' ({MODEL_DIR_KEY}) is not usable:", *problems]))

    def check_weights(self) -> None:
        """Check names and shapes of the weights; values are not read.

        Raises:
            InputError: files are missing or damaged, or do not fit index or configuration.
        """
        from transformers import T5Config, T5EncoderModel

        if problems := [*self._check_weights()]:
            raise InputError("\n".join([f"T5 folder '{self.path}' is not usable:", *problems]))
        try:
            with torch.device("meta"):
                expected = T5EncoderModel(T5Config.from_dict(self.config)).state_dict()
        except Exception as error:  # of any kind, for values of any kind
            file = self.path / "config.json"
            raise InputError(f"{file} describes no T5 that transformers knows; copy it again") from error
        held = {name: tensor.shape for shard in self.shards for name, tensor in read_tensors(shard).items()}
        missing = expected.keys() - held.keys() - (TIED if TIED & held.keys() else set())
        found = [f"{name} is missing" for name in sorted(missing)]
        found += [
            f"{name} has the shape {tuple(held[name])}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in held and held[name] != tensor.shape
        ]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise InputError(
                f"the weights in {self.path} do not fit its config.json: {found[0]}{more}; the folder mixes two models "
                "or is incomplete, copy it again"
            )

    def load(self, dtype: torch.dtype) -> nn.Module:
        """Read the encoder of a checked folder to the CPU (transformers keeps some layers of an fp16 T5 in float32).

        Raises:
            InputError: the weights do not fit the configuration, are damaged or not finite.
        """
        from transformers import T5EncoderModel
        from transformers.utils import logging as transformers_logging

        log.info("loading T5 from %s (%s)", self.path, str(dtype).removeprefix("torch."))
        shows_progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with ThreadPoolExecutor(1) as pool:
                check = pool.submit(check_values, *self.shards)  # while transformers copies them
                loaded: Any = T5EncoderModel.from_pretrained(
                    str(self.path),
                    dtype=dtype,
                    variant=self._weights[1],
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
                check.result()
        except RuntimeError as error:  # transformers reports mismatched shapes this way
            raise InputError(f"the weights in {self.path} do not fit its config.json: {error}") from error
        finally:
            if shows_progress:
                transformers_logging.enable_progress_bar()
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"the weights in {self.path} lack {len(missing)} tensors that its config.json asks for, e.g. "
                f"{missing[0]}; the folder mixes two models or is incomplete, copy it again"
            )
        return model.eval().requires_grad_(False)

    def _check_config(self) -> Iterator[str]:
        config = tokenizer = None
        try:
            config = self.config
        except InputError as error:
            yield str(error)
        try:
            tokenizer = self.tokenizer
        except InputError as error:
            yield str(error)
        if config and tokenizer and tokenizer.get_piece_size() > config.get("vocab_size", 32128):
            yield (
                f"spiece.model has {tokenizer.get_piece_size()} tokens but config.json says vocab_size "
                f"{config['vocab_size']}; the two files belong to different models"
            )

    def _check_weights(self) -> Iterator[str]:
        from safetensors import SafetensorError, safe_open

        try:
            shards = self.shards
        except InputError as error:
            yield str(error)
            return
        for shard in shards:
            if not os.path.isfile(shard):  # which takes any name
                yield f"{shard.name} is missing, though the index lists it; copy it from text_encoder/"
                continue
            try:
                # Opening maps the file and compares its size with the header; the tensors stay on disk.
                with safe_open(shard, framework="pt") as file:
                    problem = misplaced(shard, self._listed[shard], file.keys()) if self._listed else ""
                if problem:
                    yield problem
            except (SafetensorError, OSError) as error:
                yield f"{shard.name} is truncated or no safetensors file ({error}){_lfs_hint(shard)}; copy it again"


def _lfs_hint(file: Path) -> str:
    """Return a hint if `file` is the placeholder of a git clone without LFS."""
    with file.open("rb") as stream:
        is_pointer = stream.read(48).startswith(b"version https://git-lfs")
    return ": it is a Git LFS pointer, run 'git lfs pull' where it was cloned" if is_pointer else ""
