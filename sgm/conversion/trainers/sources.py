"""Find the transformer in a trainer's checkpoint: a ZeRO state, sharded files or one file, with SAT or diffusers names.

Tensors are lazy, under SAT's names without prefix.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgm.config.load import load_config
from sgm.config.values import shortened
from sgm.conversion.diffusers.from_sat import FOLDED
from sgm.conversion.diffusers.names import network_from_diffusers
from sgm.conversion.diffusers.to_sat import ITERATION, config_file, is_index, read_json, weight_files
from sgm.conversion.trainers.zero import PART_FILE, deepspeed_objects, is_zero_state, read_zero_state
from sgm.io import require_local
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.adapters import AdapterInfo, adapters_alone, describe_adapters, is_adapter, read_adapter_info
from sgm.weights.files import WEIGHTS, find_weights, read_metadata, read_weights, weights_digest
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.lora.names import diffusers_name, is_comfyui
from sgm.weights.stored import require_floating

logger = get_logger(__name__)

# Names unique to one layout; the text before them is the prefix of all network names.
_SAT_NAME = re.compile(r"(.*?)(?:mixins\.|transformer\.layers\.\d)")
_DIFFUSERS_NAME = re.compile(r"(.*?)transformer_blocks\.\d")
_RECOMPUTED = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos")


@dataclass(frozen=True)
class Source:
    """A transformer to convert.

    Attributes:
        path: its folder or file.
        tensors: by SAT's names without prefix.
        iteration: of its training; 1 if unknown.
        adapters: description of adapters among the tensors.
        config: the adjacent ``config.json`` of diffusers.
        of_diffusers: whether it had diffusers names.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    iteration: int = ITERATION
    adapters: AdapterInfo | None = None
    config: Mapping[str, Any] | None = None
    of_diffusers: bool = False

    @property
    def adapters_alone(self) -> bool:
        """Whether all tensors are LoRA matrices."""
        return adapters_alone(self.tensors)


def find_state(path: Path) -> Path | None:
    """Return the folder of a ZeRO state: `path`, or the one that its ``latest`` or ``resume/latest`` names; else None.

    Raises:
        InputError: as `named_folder`.
    """
    if not path.is_dir():
        return None
    for latest in (path / "resume" / "latest", path / "latest"):
        if latest.is_file() and is_zero_state(folder := named_folder(latest)):
            return folder
    return path if is_zero_state(path) else None


def named_folder(latest: Path) -> Path:
    """Return the folder beside a file ``latest`` that this names.

    Raises:
        InputError: it names none, or one that is not there.
    """
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise InputError(f"{latest} holds '{shortened(name)}', expected the name of a folder beside it; correct it")
    if not os.path.isdir(latest.parent / name):  # which takes any name
        raise InputError(f"{latest} names '{shortened(name)}', which is not beside it; correct it, or copy that")
    return latest.parent / name


def read_source(
    path: str | Path, *, dtype: torch.dtype | None = None, ema: bool = False, trust: Sequence[str] = ()
) -> Source:
    """Find a transformer and its metadata without reading values.

    Args:
        path: a run folder, a checkpoint folder of DeepSpeed or one tag of it, a folder of sharded model files or its
            index, or a weights file.
        dtype: of the tensors; None keeps that of training or of the files. ZeRO's master weights are float32.
        ema: use the EMA weights of a ZeRO state.
        trust: packages that targets in the run's YAML may come from besides.

    Raises:
        InputError: files are missing or damaged, or hold no CogVideoX transformer.
    """
    require_local(path)
    path = Path(path)
    folder = find_state(path)
    if folder is None:
        if ema:
            raise InputError(f"{path} is not a ZeRO state; the averages of a run are in RUN/<iteration>-ema")
        return _from_files(path, dtype, trust)
    state = read_zero_state(folder)
    what = "moving averages" if ema else "float32 weights"
    logger.info(
        "%s: %s of ZeRO stage %d, %d ranks, iteration %d", folder, what, state.stage, state.world_size, state.iteration
    )
    tensors, of_diffusers = network_tensors(state.tensors(dtype=dtype, ema=ema), folder)
    precisions = {each for each in state.dtypes.values() if each.is_floating_point}
    rest = dtype or (precisions.pop() if len(precisions) == 1 else None)
    source = Source(folder, tensors, state.iteration, of_diffusers=of_diffusers)
    return _of_run(source, rest, trust)


def _from_files(path: Path, dtype: torch.dtype | None, trust: Sequence[str]) -> Source:
    """Describe a transformer in one weights file or several."""
    if (path / "model_index.json").is_file():
        raise InputError(f"{path} is a pipeline of diffusers; give its transformer: {path / 'transformer'}")
    files = find_files(path)
    stored: dict[str, LazyTensor] = {}
    with deepspeed_objects():
        for file in files:
            stored |= read_weights(file)
    if FOLDED in read_metadata(files[0]):
        raise InputError(f"{path} was written with --fold_image_scale; tools/convert_weight_hf2sat.py undoes that")
    beside = config_file(files[0])
    number = re.match(r"(?:global_step)?(\d+)", files[0].parent.name)  # also of 1000-ema
    with deepspeed_objects():
        adapters = read_adapter_info(files[0]) if len(files) == 1 else None
    tensors, of_diffusers = network_tensors({name: tensor.cast(dtype) for name, tensor in stored.items()}, path)
    require_floating(tensors)
    source = Source(
        path=files[0] if len(files) == 1 else path,
        tensors=tensors,
        iteration=int(number[1]) if number else ITERATION,
        adapters=adapters,
        config=read_json(beside) if of_diffusers and beside.is_file() else None,
        of_diffusers=of_diffusers,
    )
    return _of_run(source, dtype, trust)


def find_files(path: Path) -> list[Path]:
    """Return the weight files of a folder of sharded files or its index, of a SAT folder, or `path` if it is a file.

    Raises:
        InputError: there are none, or more than one set of them.
    """
    if path.is_file() and PART_FILE.fullmatch(path.name):
        raise InputError(
            f"{path} is a part of a ZeRO state, and the others are needed, too; give its folder: {path.parent}"
        )
    if path.is_file() and is_index(path):
        return weight_files(path)
    is_sat = (path / "latest").is_file() or any(path.glob(f"{WEIGHTS}.*"))
    if path.is_dir() and is_sat and not any(path.glob("*.index.json")):
        return [find_weights(path)]
    try:
        return weight_files(path) if path.is_dir() else [path]
    except InputError as error:
        inside = [file for pattern in ("*/*_states.pt", "*/*/*_states.pt") for file in path.glob(pattern)]
        if states := {str(file.parent) for file in inside if PART_FILE.fullmatch(file.name)}:
            raise InputError(f"{error}, or give one of the ZeRO states in it: {', '.join(sorted(states))}") from error
        raise


def network_tensors(tensors: Tensors, path: Path) -> tuple[dict[str, LazyTensor], bool]:
    """Return the tensors of the transformer by SAT's names without prefix, and whether they had other names.

    Args:
        tensors: of a file, which may hold other models, too.
        path: for messages.

    Raises:
        InputError: there is no CogVideoX transformer.
    """
    if is_comfyui(tensors):
        tensors = {diffusers_name(name): tensor for name, tensor in tensors.items()}
    for pattern in (_DIFFUSERS_NAME, _SAT_NAME):
        found = next((match for name in tensors if (match := pattern.match(name))), None)
        if found is None:
            continue
        prefix = found[1]
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if len(own) < len(tensors):
            logger.info("left out %d tensors of other parts in %s", len(tensors) - len(own), path)
        if pattern is _DIFFUSERS_NAME:
            try:
                return network_from_diffusers(own), True
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
        own = {name: tensor for name, tensor in own.items() if name not in _RECOMPUTED}
        return {name: t if isinstance(t, LazyTensor) else LazyTensor((t,)) for name, t in own.items()}, False
    raise InputError(
        f"{path} holds no CogVideoX transformer, neither in SAT's names (mixins., transformer.layers.) nor in those of "
        f"diffusers (transformer_blocks.) or ComfyUI (blocks.), but e.g. '{next(iter(tensors), 'nothing')}'"
    )


def _of_run(source: Source, dtype: torch.dtype | None, trust: Sequence[str]) -> Source:
    """Complete the state of a train_video.py run: add frozen tensors and the adapters' description."""
    folder = source.path if source.path.is_dir() else source.path.parent
    is_ours = folder.parent.name == "resume" and folder.name.isdecimal()
    if not is_ours or not (folder / "resume.json").is_file():
        return source
    run = folder.parent.parent
    weights = run / folder.name
    source = replace(source, iteration=int(folder.name))
    point = read_json(folder / "resume.json")
    if point.get("zero_stage") == 0 and str(point.get("optimizer")).startswith("schedulefree."):
        raise InputError(
            f"{folder} holds the points at which a schedule-free optimizer trains; their average, its result, is in "
            f"{weights}: convert that. If it was removed, resume the run for its next save (args.resume={run})"
        )
    if source.adapters_alone:
        info = read_adapter_info(weights) if weights.is_dir() else None
        if info is None:
            info = describe_adapters(load_config([_checked_config(run, folder, trust)], mode="train", trust=trust))
        return replace(source, adapters=info)
    if not weights.is_dir():
        load = load_config([_checked_config(run, folder, trust)], mode="train", trust=trust).args.load
        if load is None:
            return source
        weights = Path(load)
    file = find_weights(weights)
    saved, _ = network_tensors({name: tensor.cast(dtype) for name, tensor in read_weights(file).items()}, file)
    rest = {name: tensor for name, tensor in saved.items() if name not in source.tensors and not is_adapter(name)}
    if rest:
        logger.info("%d tensors that were not trained come from %s", len(rest), file)
    return replace(source, tensors=rest | dict(source.tensors))


def _checked_config(run: Path, folder: Path, trust: Sequence[str]) -> Path:
    """Return the configuration of a run without saved weights.

    Raises:
        InputError: it is missing, or its base checkpoint has changed.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{folder} holds only what was trained; the rest is in {run / folder.name} or named in {path}, and neither "
            "exists: restore one of them"
        )
    load = load_config([path], mode="train", trust=trust).args.load
    recorded = read_json(folder / "resume.json").get("base_digest")
    if load is not None and weights_digest(find_weights(load)) != recorded:
        raise InputError(f"{load}, which {path} names as the start of the run, has changed since; restore it")
    return path
