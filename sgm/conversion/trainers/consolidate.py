"""Write a trainer's checkpoint as weights in the SAT layout or as a transformer of diffusers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from sgm.config.load import load_config
from sgm.conversion.diffusers.config import network_params, transformer_config
from sgm.conversion.diffusers.names import MODULES, network_to_diffusers
from sgm.conversion.diffusers.to_sat import complete_network, config_file
from sgm.conversion.family import is_shipped, shipped_file
from sgm.conversion.trainers.sources import Source, read_source
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes, write_network, write_shards
from sgm.io import write_json
from sgm.log import get_logger
from sgm.modules.geometry import Geometry
from sgm.util import InputError
from sgm.weights.adapters import is_adapter
from sgm.weights.architecture import PATCH_WEIGHT, PATCH_WEIGHTS, POSITION_TABLE, describe_architecture

logger = get_logger(__name__)

_EXPORT = "tools/export_sat_lora_weight.py"


def convert(
    checkpoint_path: str | Path,
    output_path: str | Path,
    *,
    to: Literal["sat", "diffusers"],
    dtype: torch.dtype | None = None,
    file_format: Literal["pt", "safetensors"] = "pt",
    max_shard_size: str = "5GB",
    base: Sequence[str] = (),
    ema: bool = False,
    trust: Sequence[str] = (),
) -> Source:
    """Convert a transformer; the output appears only when it is complete.

    Args:
        checkpoint_path: see `read_source`.
        output_path: folder to create: ``latest`` and ``<iteration>/mp_rank_00_model_states.*``, or
            ``diffusion_pytorch_model*.safetensors`` and ``config.json``.
        to: the layout.
        dtype: see `read_source`.
        file_format: of the SAT layout. ``safetensors`` is written with one tensor in memory at a time, ``pt`` with all.
        max_shard_size: of a file of diffusers.
        base: model YAML files that the weights must match. Without them, ``config.json`` is written only if the input
            has one, or a shipped model has its shapes.
        ema: see `read_source`.
        trust: packages that targets in YAML may come from besides.

    Returns:
        The converted transformer.

    Raises:
        InputError: the checkpoint cannot be read or translated, or the output exists or cannot be written to.
    """
    check_new_folder(output_path)
    source = read_source(checkpoint_path, dtype=dtype, ema=ema, trust=trust)
    patch_size = None
    if source.adapters_alone:
        _check_adapters(source, to, base)
    else:
        section = _section(source, base, to, trust)
        source = _complete(source, section)
        patch_size = _patch_size(source, section)
        if to == "diffusers":
            _write_diffusers(output_path, source, section, patch_size, max_shard_size)
            return source
        if section is None and source.of_diffusers and POSITION_TABLE not in source.tensors:
            raise InputError(
                f"{source.path} does not say whether its positions are rotary, or a fixed table, which SAT keeps in "
                "the file and diffusers does not; give the model with --base, e.g. configs/cogvideox_5b.yaml"
            )
    with new_folder(output_path, need_bytes=total_bytes(source.tensors)) as temporary:
        options = {"file_format": file_format, "patch_size": patch_size, "adapters": source.adapters}
        write_network(temporary, source.iteration, source.tensors, **options)
    return source


def _check_adapters(source: Source, to: str, base: Sequence[str]) -> None:
    """Refuse adapters that cannot be converted or reloaded."""
    if to == "diffusers":
        raise InputError(
            f"{source.path} holds LoRA adapters alone, which are no transformer; {_EXPORT} writes them for diffusers"
        )
    if base:
        raise InputError("--base has no effect on LoRA adapters alone; leave it out")
    info = source.adapters
    if info is None:
        raise InputError(
            f"{source.path} holds LoRA adapters and does not say of which base; give the run folder of the training"
        )
    if problem := info.mismatch(source.tensors):
        raise InputError(f"{source.path}: {problem}; its config.yaml belongs to another training")


def _section(source: Source, base: Sequence[str], to: str, trust: Sequence[str]) -> dict[str, Any] | None:
    """Return the ``network_config`` of YAML, ``config.json``, or the shipped model of the shapes; None without any."""
    if not base and source.config is None and (source.of_diffusers or to == "diffusers") and is_shipped(source.tensors):
        base = [str(shipped_file(source.tensors, source.path))]
    if base:
        config = load_config(base, ["args.input_type=cli"], mode="inference", trust=trust)
        section = copy.deepcopy(config.model["network_config"])
    elif source.config is not None:
        section = {
            "target": "dit_video_concat.DiffusionTransformer",
            "params": network_params(source.config, config_file(source.path)),
        }
    else:
        return None
    if not any(map(is_adapter, source.tensors)):
        section["params"]["modules"].pop("lora_config", None)
    return section


def _complete(source: Source, section: Mapping[str, Any] | None) -> Source:
    """Add the position table if the network has one; refuse an incomplete or mismatched network."""
    tensors = source.tensors
    if section is None:
        num_layers = 1 + max((int(n.split(".")[2]) for n in tensors if n.startswith("transformer.layers.")), default=0)
        modules = [
            module.format(layer)
            for module in MODULES
            if "norm" not in module and "ofs" not in module
            for layer in range(num_layers if "{}" in module else 1)
        ]
        plain = {name.replace(".original.", ".") for name in tensors}
        missing = [f"{module}.weight" for module in modules if f"{module}.weight" not in plain]
        if missing:
            raise InputError(
                f"{source.path} holds no whole network: it lacks {', '.join(missing[:5])}"
                f"{' and more' if len(missing) > 5 else ''}. Parameters that were frozen in training are there only if "
                "the trainer saved them (exclude_frozen_parameters=False)"
            )
        return source
    return replace(source, tensors=complete_network(source.path, section, source.tensors))


def _patch_size(source: Source, section: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """Return the patch size (pt, p, p)."""
    if section is not None:
        return Geometry.from_network(section["params"]).patch_size
    shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    patch = next((shapes[name] for name in PATCH_WEIGHTS[:2] if name in shapes), ())  # with and without LoRA
    if len(patch) == 4:
        return 1, patch[2], patch[3]
    found = describe_architecture(shapes)
    if found is None or found.temporal_patch is None:
        raise InputError(
            f"{source.path}: the shape {patch} of {PATCH_WEIGHT} does not tell the size of patches; "
            "give the model with --base"
        )
    return found.temporal_patch, 2, 2  # as describe_architecture assumes


def _write_diffusers(
    folder: str | Path,
    source: Source,
    section: Mapping[str, Any] | None,
    patch_size: tuple[int, int, int],
    max_shard_size: str,
) -> None:
    if section is not None:
        learned = Geometry.from_network(section["params"]).positions == "learned"
    else:  # diffusers computes the table itself, with zero rows for text
        table = source.tensors.get(POSITION_TABLE)
        learned = table is not None and bool(table.compute()[:, 0].any())
    tensors = network_to_diffusers(source.tensors, patch_size=patch_size, learned_positions=learned)
    config = None if section is None else transformer_config(section["params"])
    if config is None:
        logger.warning("no config.json is written, without which diffusers loads nothing; --base <model YAML> adds it")
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        write_shards(temporary, tensors, stem="diffusion_pytorch_model", max_shard_size=max_shard_size)
        if config is not None:
            write_json(temporary / "config.json", config)
