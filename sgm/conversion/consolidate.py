"""What a trainer left, see `sgm.conversion.sources`, as weights in the SAT layout or as a transformer of diffusers."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from sgm.config.load import load_config
from sgm.conversion.diffusers_config import network_params, transformer_config
from sgm.conversion.from_diffusers import require_equal_shapes
from sgm.conversion.names import BLOCK, MODULATION, NETWORK, QKV, network_to_diffusers
from sgm.conversion.sources import Source, read_source
from sgm.conversion.to_diffusers import position_table
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes, write_safetensors, write_shards
from sgm.io import write_json
from sgm.log import get_logger
from sgm.modules.geometry import Geometry
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import ENTRY, adapter_layer, is_adapter
from sgm.weights.architecture import PATCH_WEIGHT, POSITION_TABLE, describe_architecture
from sgm.weights.checkpoint import save_network, write_latest
from sgm.weights.files import WEIGHTS
from sgm.weights.lazy import LazyTensor
from sgm.weights.match import PREFIX, UNUSED_TABLES

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
) -> Source:
    """Write a transformer anew; the output appears when it is complete.

    Args:
        checkpoint_path: see `read_source`.
        output_path: a folder, made anew: ``latest`` and ``<iteration>/mp_rank_00_model_states.*``, or
            ``diffusion_pytorch_model*.safetensors`` and ``config.json``.
        to: the layout.
        dtype: see `read_source`.
        file_format: of the SAT layout. ``safetensors`` is written with one tensor in memory at a time, ``pt`` with all.
        max_shard_size: of a file of diffusers.
        base: model YAML, merged: what the network is. The weights must fit it. Without it there is a ``config.json``
            only where one lies beside the weights.
        ema: see `read_source`.

    Returns:
        What was written.

    Raises:
        InputError: the checkpoint cannot be read or translated, or the output exists or cannot be written to.
    """
    check_new_folder(output_path)
    source = read_source(checkpoint_path, dtype=dtype, ema=ema)
    if source.adapters_alone:
        _check_adapters(source, to, base)
        _write_sat(output_path, source, (1, 1, 1), file_format)
        return source
    section = _section(source, base)
    source = _whole(source, section)
    patch_size = _patch_size(source, section)
    if to == "diffusers":
        _write_diffusers(output_path, source, section, patch_size, max_shard_size)
        return source
    if section is None and source.of_diffusers and POSITION_TABLE not in source.tensors:
        raise InputError(
            f"{source.path} does not say whether its positions are rotary, or a fixed table, which SAT keeps in the "
            "file and diffusers does not; give the model with --base, e.g. configs/cogvideox_5b.yaml"
        )
    _write_sat(output_path, source, patch_size, file_format)
    return source


def _check_adapters(source: Source, to: str, base: Sequence[str]) -> None:
    """Refuse adapters that could not be loaded again, or not written as asked."""
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
    ranks = {tensor.meta().shape[0] for name, tensor in source.tensors.items() if ".matrix_A." in name}
    layers = tuple(sorted({layer for name in source.tensors if (layer := adapter_layer(name)) is not None}))
    if (ranks, layers) != ({info.rank}, info.layers):
        raise InputError(
            f"{source.path} has LoRA of rank {sorted(ranks)} on the layers {list(layers)}, and its run says rank "
            f"{info.rank} on {list(info.layers)}; config.yaml belongs to another training"
        )


def _section(source: Source, base: Sequence[str]) -> dict[str, Any] | None:
    """Return the ``network_config`` of a transformer, from YAML or what lies beside it; None where there is none."""
    if base:
        config = load_config(base, ["args.input_type=cli"], mode="inference")
        section = copy.deepcopy(config.model["network_config"])
    elif source.config is not None:
        section = {"target": "dit_video_concat.DiffusionTransformer", "params": network_params(source.config)}
    else:
        return None
    if not any(map(is_adapter, source.tensors)):
        section["params"]["modules"].pop("lora_config", None)
    return section


def _whole(source: Source, section: Mapping[str, Any] | None) -> Source:
    """Return a network with its position table, if it has one; refuse what is no whole network, or another one."""
    tensors = dict(source.tensors)
    if section is None:
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.layers.")}
        modules = [module for module in NETWORK if "norm" not in module and "ofs" not in module]
        for layer in range(max(layers, default=0) + 1):
            modules += [f"transformer.layers.{layer}.{module}" for module in (QKV, *BLOCK) if "norm" not in module]
            modules += [f"mixins.adaln_layer.{MODULATION}.{layer}.1"]
        plain = {name.replace(".original.", ".") for name in tensors}
        missing = [f"{module}.weight" for module in modules if f"{module}.weight" not in plain]
        if missing:
            raise InputError(
                f"{source.path} holds no whole network: it lacks {', '.join(missing[:5])}"
                f"{' and more' if len(missing) > 5 else ''}. Parameters that were frozen in training are there only if "
                "the trainer saved them (exclude_frozen_parameters=False)"
            )
        return source
    if POSITION_TABLE not in tensors and Geometry.from_network(section["params"]).positions == "sincos":
        own = tensors[PATCH_WEIGHT].meta().dtype
        tensors[POSITION_TABLE] = LazyTensor((position_table(section["params"]),), to_dtype=own)
    with without_allocating():
        wanted = instantiate_from_config(section).state_dict()
    wanted = {name: tensor for name, tensor in wanted.items() if name not in UNUSED_TABLES}
    require_equal_shapes(source.path, wanted, {n: t for n, t in tensors.items() if n not in UNUSED_TABLES})
    return replace(source, tensors=tensors)


def _patch_size(source: Source, section: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """Return (pt, p, p)."""
    if section is not None:
        return Geometry.from_network(section["params"]).patch_size
    shapes = {name: tuple(tensor.meta().shape) for name, tensor in source.tensors.items()}
    if len(shapes[PATCH_WEIGHT]) == 4:
        return 1, shapes[PATCH_WEIGHT][2], shapes[PATCH_WEIGHT][3]
    found = describe_architecture(shapes)
    if found is None or found.temporal_patch is None:
        raise InputError(
            f"{source.path}: the shape {shapes[PATCH_WEIGHT]} of {PATCH_WEIGHT} does not tell the size of patches; "
            "give the model with --base"
        )
    return found.temporal_patch, 2, 2  # what describe_architecture assumes


def _write_sat(
    folder: str | Path, source: Source, patch_size: tuple[int, int, int], file_format: Literal["pt", "safetensors"]
) -> None:
    info, iteration, tensors = source.adapters, source.iteration, dict(source.tensors)
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        if file_format == "pt":
            made = {name: tensor.compute() for name, tensor in tensors.items()}
            save_network(temporary, iteration, made, patch_size=patch_size, adapters=info)
            return
        if PATCH_WEIGHT in tensors:
            tensors[PATCH_WEIGHT] = LazyTensor((tensors[PATCH_WEIGHT],), _released_patch(patch_size))
        named = {PREFIX + name: tensor for name, tensor in tensors.items()}
        metadata = {} if info is None else {ENTRY: json.dumps(info.to_entry())}
        write_safetensors(temporary / str(iteration) / f"{WEIGHTS}.safetensors", named, metadata=metadata)
        write_latest(temporary, iteration)


def _released_patch(patch_size: tuple[int, int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that gives the patch projection its shape in released files."""
    pt, height, width = patch_size
    return lambda weight: weight.flatten(1).unflatten(1, (-1, height, width)) if pt == 1 else weight.flatten(1)


def _write_diffusers(
    folder: str | Path,
    source: Source,
    section: Mapping[str, Any] | None,
    patch_size: tuple[int, int, int],
    max_shard_size: str,
) -> None:
    if section is not None:
        learned = Geometry.from_network(section["params"]).positions == "learned"
    else:  # the rows of text are zero in the table that diffusers computes itself
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
