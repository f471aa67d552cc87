"""Convert a pipeline folder of diffusers, or components of one, to the SAT layout with a matching model YAML.

::

    OUT/transformer/latest, OUT/transformer/1/mp_rank_00_model_states.pt
    OUT/vae/3d-vae.pt
    OUT/t5/                                     text encoder and tokenizer in one folder
    OUT/model.yaml                              names the three; for sample_video.py and train_video.py
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from sgm.config.precision import precision_name
from sgm.config.references import escaped
from sgm.config.values import spelled
from sgm.conversion.diffusers.config import CONTROL_PIPELINE, model_yaml
from sgm.conversion.diffusers.from_sat import FOLDED, SAT_DTYPE, TOKENIZER_FILES, position_table, with_image_channels
from sgm.conversion.diffusers.names import DIFFUSERS_PATCH, autoencoder_from_diffusers, network_from_diffusers
from sgm.conversion.family import shipped_file
from sgm.conversion.writing import new_folder, resolved, total_bytes, write_network
from sgm.io import parse_json, reason_of, require_local
from sgm.modules.encoders.t5_folder import T5Folder
from sgm.modules.geometry import Geometry
from sgm.util import PRECISIONS, InputError, default, instantiate_from_config, nearest_path, without_allocating
from sgm.weights.architecture import POSITION_TABLE
from sgm.weights.checkpoint import save_autoencoder
from sgm.weights.checksums import DTYPES, write_safetensors
from sgm.weights.files import check_values, read_metadata, read_names, read_weights
from sgm.weights.index import misplaced, read_index
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.match import UNUSED_TABLES
from sgm.weights.stored import require_floating

ITERATION = 1
PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Stored:
    """A model of diffusers or transformers on disk.

    Attributes:
        path: folder or file.
        config: its ``config.json``; None for a file without it.
        tensors: its weights, read when they are computed.
        metadata: of the header of its first file.
    """

    path: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_stored(path: str | Path) -> Stored:
    """Find configuration and weights of a component: a folder with ``config.json`` and weight files, or one file.

    An index of weight files stands for all of them.

    Raises:
        InputError: weights are missing, ambiguous or damaged.
    """
    require_local(path)
    path = Path(path)
    if not path.is_file() and not path.is_dir():
        raise InputError(f"there is nothing at {path}; give a folder of diffusers, or a weights file")
    files, file = weight_files(path), config_file(path)
    config = read_json(file) if path.is_dir() or file.is_file() else None
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= read_weights(file)
    require_floating(tensors)
    return Stored(path, config, tensors, read_metadata(files[0]))


def config_file(path: Path) -> Path:
    """Return the path of ``config.json``, which is in the folder of a component, or beside its file."""
    return (path if path.is_dir() else path.parent) / "config.json"


def is_index(path: Path) -> bool:
    """Whether a file is an index of weight files, by its name: ``*.index.json``, of a variant ``*.index.fp16.json``."""
    return path.suffix == ".json" and ".index." in path.name


def weight_files(path: Path) -> list[Path]:
    """Return the weights files of a folder: those of an index, or a single one; or those that `path` is or indexes.

    An index of a variant, such as fp16, is taken if nothing else is there.

    Raises:
        InputError: there are none, several sets, shards are missing, or hold other tensors than their index says; or
            `path` is one of several files of an index.
    """
    if path.is_file():
        return _indexed(path) if is_index(path) else _whole(path)
    indices = sorted(path.glob("*.index.json"))
    if len(indices) == 1:
        return _indexed(indices[0])
    indices = indices or sorted(path.glob("*.index.*.json"))
    files = next(filter(None, (sorted(path.glob(f"*.{end}")) for end in ("safetensors", "bin", "pt"))), [])
    if len(indices) == 1 and {*files} <= read_index(indices[0]).keys():
        return _indexed(indices[0])
    if len(files) != 1 or indices:
        found = ", ".join(file.name for file in [*indices, *files]) or "none"
        cure = "Name the index, or tidy the folder" if indices else "Name the file, or tidy the folder"
        raise InputError(f"{path} should hold one set of weights; found: {found}. {cure}")
    return files


def _whole(path: Path) -> list[Path]:
    """Return a weights file as the only one; refuse it if an index beside it has further ones."""
    for index in filter(is_index, sorted(path.parent.glob("*.json"))):
        files = {}
        with contextlib.suppress(InputError):  # of another model, perhaps
            files = read_index(index)
        if len(files) > 1 and path in files:
            raise InputError(f"{path} is one of {len(files)} files of a model; give their index, {index}")
    return [path]


def _indexed(path: Path) -> list[Path]:
    """Return the files of an index, which hold what it says."""
    index = read_index(path)
    if missing := [file.name for file in index if not os.path.isfile(file)]:  # which takes any name
        raise InputError(f"{path.parent} lacks {', '.join(missing)}; download it again")
    for file, names in index.items():
        if problem := misplaced(file, names, read_names(file)):
            raise InputError(problem)
    return [*index]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}{nearest_path(path)}; correct the path, or download it again") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {spelled(content)}, expected values by name; copy or download it again")
    return content


@dataclass(frozen=True)
class SatModel:
    """A model in the SAT layout, to be written.

    Attributes:
        yaml: the model YAML without paths.
        network: tensors by the network's own names, in the released shapes; None without a transformer.
        autoencoder: tensors by our names; None without a VAE.
        text_encoder: files of the T5 folder; None without one.
    """

    yaml: Mapping[str, Any]
    network: Mapping[str, LazyTensor] | None = None
    autoencoder: Mapping[str, LazyTensor] | None = None
    text_encoder: tuple[Path, ...] | None = None

    def write(self, folder: str | Path, *, file_format: Literal["pt", "safetensors"] = "pt") -> None:
        """Write the folder atomically.

        Args:
            folder: to create.
            file_format: of the weights. ``safetensors`` needs one tensor in memory at a time, ``pt`` all.

        Raises:
            InputError: the folder exists, cannot be written to, or does not fit on the disk.
        """
        copied = sum(path.stat().st_size for path in self.text_encoder or ())
        need = total_bytes(self.network or {}, self.autoencoder or {}) + copied
        with new_folder(folder, need_bytes=need) as temporary:
            if self.network is not None:
                write_network(temporary / "transformer", ITERATION, self.network, file_format=file_format)
            if self.autoencoder is not None:
                path = temporary / "vae" / f"3d-vae.{file_format}"
                if file_format == "safetensors":
                    write_safetensors(path, self.autoencoder)
                else:
                    save_autoencoder(path, {name: tensor.compute() for name, tensor in self.autoencoder.items()})
            if self.text_encoder is not None:
                (temporary / "t5").mkdir()
                check_values(*(path for path in self.text_encoder if path.suffix == ".safetensors"))
                for path in self.text_encoder:
                    shutil.copyfile(path, temporary / "t5" / path.name)
            # Of new/../out, where there is no new, the parts must be found, too.
            named = Path(folder) if Path(folder).parent.is_dir() else resolved(folder)
            content = escaped(self._with_paths(named, file_format))
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            (temporary / "model.yaml").write_text(text, encoding="utf-8")

    def _with_paths(self, folder: Path, file_format: str) -> dict[str, Any]:
        """Return the YAML with the paths of the written files."""
        content: dict[str, Any] = json.loads(json.dumps(self.yaml))
        model = content["model"]
        if self.network is not None:
            content["args"]["load"] = str(folder / "transformer")
        if self.autoencoder is not None:
            model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae" / f"3d-vae.{file_format}")
        if self.text_encoder is not None:
            model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "t5")
        return content


def sat_model_of(
    parts: Mapping[str, Path], *, base: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> SatModel:
    """Describe the SAT model for components of diffusers; weights are found and checked, not read.

    Args:
        parts: folder or file by component: `PARTS`, ``tokenizer`` and ``scheduler``; each optional.
        base: content of a model YAML. None builds it from every ``config.json``; of a transformer without one, it is
            the shipped model of its shapes.
        dtype: of the transformer; None keeps that of its files.

    Raises:
        InputError: a component is incomplete, damaged, or not CogVideoX.
    """
    _refuse_control(parts)
    stored = {name: read_stored(parts[name]) for name in ("transformer", "vae") if name in parts}
    configs = {name: part.config for name, part in stored.items() if part.config is not None}
    files = {name: config_file(part.path) for name, part in stored.items()}
    if "scheduler" in parts:
        files["scheduler"] = parts["scheduler"] / "scheduler_config.json"
        configs["scheduler"] = read_json(files["scheduler"])
    cure = "they belong to another model"
    if base is None and "vae" in stored and "vae" not in configs:
        cure = "it has no config.json, and is no VAE of a released model; say what it is with --base model.yaml"
    if base is None:
        unknown = "transformer" in stored and "transformer" not in configs
        template = _shipped(stored["transformer"]) if unknown else None
        base = model_yaml(configs, files=files, template=template)
        if "transformer" in stored:
            own = default(dtype, next(iter(stored["transformer"].tensors.values())).dtype)
            if own not in PRECISIONS.values():
                found = f"{parts['transformer']} is stored in {str(own).removeprefix('torch.')}"
                raise InputError(f"{found}, in which no model is run; give the precision to write: --dtype bf16")
            base["model"]["precision"] = precision_name(own)
    network = autoencoder = None
    if "transformer" in stored:
        network = _network(stored["transformer"], base, dtype)
    if "vae" in stored:
        autoencoder = _autoencoder(stored["vae"], base, cure)
    text = _t5_files(parts["text_encoder"], parts.get("tokenizer")) if "text_encoder" in parts else None
    return SatModel(base, network, autoencoder, text)


def _refuse_control(parts: Mapping[str, Path]) -> None:
    """Refuse a pipeline whose further channels are those of a control, and would be taken for an image's."""
    index = parts["transformer"].parent / "model_index.json" if "transformer" in parts else None
    if index is not None and index.is_file() and read_json(index).get("_class_name") == CONTROL_PIPELINE:
        raise InputError(f"{index} is that of a {CONTROL_PIPELINE}, which is not imported: see docs/control.md")


def _shipped(transformer: Stored) -> Path:
    """Return the shipped model file of a transformer without a ``config.json``."""
    try:
        return shipped_file(transformer.tensors, transformer.path)
    except InputError as error:
        raise InputError(
            f"{transformer.path} has no config.json; say what it is with --base model.yaml ({error})"
        ) from error


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _network(stored: Stored, content: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    tensors: dict[str, Any] = dict(stored.tensors)
    section = content["model"]["network_config"]
    if FOLDED in stored.metadata:
        factor = _folded(stored)
        channels = section["params"]["in_channels"], section["params"]["out_channels"]
        tensors[DIFFUSERS_PATCH] = with_image_channels(tensors[DIFFUSERS_PATCH], *channels, lambda part: part / factor)
    with _naming(stored.path):
        found = network_from_diffusers(tensors)
    made = complete_network(stored.path, section, found)
    return {name: tensor.cast(dtype) for name, tensor in made.items()}


def _folded(stored: Stored) -> float:
    """Return the factor of ``--fold_image_scale`` in the header."""
    text = stored.metadata[FOLDED]
    with contextlib.suppress(ValueError):
        if 1e-6 <= (factor := float(text)) <= 1e6:
            return factor
    raise InputError(
        f"{stored.path}: {FOLDED} in the header is {spelled(text)}, expected a number such as 0.7; convert it again"
    )


def complete_network(
    path: Path, section: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Add the position table to the tensors of a network; diffusers does not store sine-cosine tables.

    Args:
        path: of the weights, for messages.
        section: ``model.network_config``.
        tensors: by SAT's names without prefix.

    Raises:
        InputError: names or shapes do not match the network.
    """
    result = dict(tensors)
    if POSITION_TABLE not in result and Geometry.from_network(section["params"]).positions == "sincos":
        own = next(iter(result.values())).dtype
        result[POSITION_TABLE] = LazyTensor((position_table(section["params"]),), to_dtype=own)
    with without_allocating():
        state = instantiate_from_config(section).state_dict()
    expected, found = ({n: t for n, t in each.items() if n not in UNUSED_TABLES} for each in (state, result))
    _require_equal_shapes(path, expected, found)
    return result


def _autoencoder(stored: Stored, content: Mapping[str, Any], cure: str) -> dict[str, LazyTensor]:
    with without_allocating():
        vae = instantiate_from_config(content["model"]["first_stage_config"])
    with _naming(stored.path):
        names = autoencoder_from_diffusers(stored.tensors)
    name = stored.metadata.get(SAT_DTYPE)
    dtypes = {str(each).removeprefix("torch."): each for each in DTYPES if each.is_floating_point}
    if name is not None and name not in dtypes:
        raise InputError(
            f"{stored.path}: {SAT_DTYPE} in the header is {spelled(name)}, expected a precision of weights, such as "
            "bfloat16; convert it again"
        )
    dtype = None if name is None else dtypes[name]
    made = {names[each]: LazyTensor((tensor,), to_dtype=dtype) for each, tensor in stored.tensors.items()}
    _require_equal_shapes(stored.path, vae.state_dict(), made, cure)
    return made


def _require_equal_shapes(
    path: Path, expected: Tensors, made: Tensors, cure: str = "they belong to another model"
) -> None:
    """Raise InputError unless weights from `path` have the names and shapes of the configured module."""
    problems = [f"{name} is missing" for name in expected if name not in made]
    problems += [f"{name} is unexpected" for name in made if name not in expected]
    for name in expected.keys() & made.keys():
        shapes = expected[name].shape, made[name].shape
        # The patch projection has one of two shapes.
        if shapes[0] != shapes[1] and (shapes[0].numel(), shapes[0][0]) != (shapes[1].numel(), shapes[1][0]):
            problems.append(f"{name} has the shape {tuple(shapes[1])}, expected {tuple(shapes[0])}")
    if problems:
        shown = "\n  ".join(problems[:6] + ([f"... and {len(problems) - 6} more"] if len(problems) > 6 else []))
        raise InputError(f"{path}: the weights do not fit the configuration:\n  {shown}\n{cure}")


def _t5_files(folder: Path, tokenizer: Path | None) -> tuple[Path, ...]:
    """Return the files of a T5 folder: text encoder and tokenizer (separate folders in diffusers)."""
    require_local(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}{nearest_path(folder)}; give that of the text encoder")
    t5 = T5Folder(folder)
    t5.check_weights()
    files = [folder / "config.json", *t5.shards, *([] if t5.index is None else [t5.index])]
    places = [place for place in (tokenizer, folder, folder.parent / "tokenizer") if place is not None]
    home = next((place for place in places if (place / "spiece.model").is_file()), None)
    if home is None:
        searched = ", ".join(str(place) for place in places)
        raise InputError(f"there is no spiece.model, the tokenizer of T5, in {searched}; copy it there")
    files += [home / name for name in TOKENIZER_FILES if (home / name).is_file()]
    return tuple(files)
