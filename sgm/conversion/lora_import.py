"""Import LoRA adapters of other training tools into a SAT checkpoint.

They are read by `sgm.weights.lora.foreign`. For the other direction and the layout in SAT see `sgm.conversion.lora`.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sgm.config.load import Config
from sgm.conversion.writing import check_new_folder, new_folder
from sgm.log import get_logger
from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.adapters import LORA_TARGET, TITLES, AdapterInfo, is_adapter, kind_of, short_names
from sgm.weights.checkpoint import save_network
from sgm.weights.files import WEIGHTS, find_weights, read_tensors, weights_digest
from sgm.weights.lazy import Tensors, compute
from sgm.weights.lora.dora import base_magnitude
from sgm.weights.lora.files import network_of, require_base
from sgm.weights.lora.foreign import DiffusersLora, listed, read_diffusers_lora
from sgm.weights.lora.names import module_name, part_of, places_of, sat_name
from sgm.weights.match import match_network

logger = get_logger(__name__)


def import_lora(
    config: Config,
    path: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    any_base: bool = False,
) -> Path:
    """Write adapters of another training tool as an adapters-only SAT checkpoint.

    Modules without adapters in an adapted layer get zero matrices, which have no effect.

    Args:
        config: of the base model; a ``lora_config`` in it is ignored.
        path: as for `find_lora`.
        folder: to create.
        base: the base checkpoint; None uses ``args.load`` of `config`.
        alpha: of the training, for files without it.
        any_base: take adapters whose file records another base, too.

    Returns:
        The weights file.

    Raises:
        InputError: the SAT layout cannot express the adapters, they do not match the base, the base does not match the
            configuration, or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    base = config.args.load if base is None else base
    if base is None:
        raise InputError("args.load names no base checkpoint; give it with --transformer_ckpt_path")
    lora = read_diffusers_lora(path, alpha=alpha)
    base_file = find_weights(base)
    if any(is_adapter(name) for name in read_tensors(base_file)):
        raise InputError(
            f"{base_file}, named as the base, holds LoRA of its own; give the checkpoint without it, or merge it "
            "first: python tools/merge_lora_weight.py"
        )
    if not any_base:
        require_base(lora, base_file, "give that, or add --any_base if it is meant for these weights too")
    info = AdapterInfo(
        rank=lora.rank,
        alpha=lora.alpha,
        layers=lora.layers,
        base=str(base),
        base_digest=weights_digest(base_file),
        targets=short_names(lora.groups),
        kind=kind_of(lora.tensors),
        factor=lora.factor,
    )
    network = _network(config, info, lora)
    match_network(network, base_file)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if is_adapter(name)}
    tensors = _to_sat(lora, shapes, network_of(base_file)) if lora.pairs else _kronecker_to_sat(lora, shapes)
    with new_folder(folder, need_bytes=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_network(temporary, 1, tensors, patch_size=network.patch_size, adapters=info)
    said = (lora.path, TITLES[info.kind], lora.rank, lora.alpha, len(lora.layers))
    logger.info("%s: %s of rank %d, alpha %g, %d layers", *said)
    return Path(folder) / "1" / f"{WEIGHTS}.pt"


def _network(config: Config, info: AdapterInfo, lora: DiffusersLora) -> Any:
    """Build the network of `config` with the adapters, without memory."""
    section = copy.deepcopy(config.model["network_config"])
    num_layers = section["params"]["num_layers"]
    if lora.layers[-1] >= num_layers:
        raise InputError(
            f"{lora.path} adapts layer {lora.layers[-1]}, and the model of {', '.join(config.bases)} has layers 0 to "
            f"{num_layers - 1}; give the YAML of the model that the LoRA was trained on"
        )
    section["params"]["modules"]["lora_config"] = {"target": LORA_TARGET, "params": info.lora_params(num_layers)}
    with without_allocating():
        return instantiate_from_config(section)


def _kronecker_to_sat(lora: DiffusersLora, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the matrices of LoKr by SAT's names; zero for modules without."""
    for name, tensor in lora.tensors.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise InputError(
                f"{lora.path}: {name} would have the shape {tuple(tensor.shape)}, and the model needs "
                f"{shapes.get(name, 'none there')}; give the YAML of the model that the LoKr was trained on"
            )
    found = {name: compute(tensor) for name, tensor in lora.tensors.items()}
    dtype = next(iter(found.values())).dtype
    without = {part_of(name) for name in shapes.keys() - found.keys()}
    if without:
        logger.info(
            "%s has no adapters on some %s; they are zero and have no effect", lora.path, listed(sorted(without))
        )
    return {name: found[name] if name in found else torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def _to_sat(lora: DiffusersLora, shapes: Mapping[str, tuple[int, ...]], base: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors by SAT's names; matrices are zero, and magnitudes those of the base, without adapters."""
    places, found = places_of(lora.layers, lora.groups), {}
    for layer, part in places:
        for kind, matrix in zip("AB", lora.pairs.get((layer, part), ()), strict=False):
            name = sat_name(layer, part, kind)
            if (matrix.shape[0], math.prod(matrix.shape[1:])) != shapes[name]:
                raise InputError(
                    f"{lora.path}: a matrix of {module_name(layer, part)} has the shape {tuple(matrix.shape)}, "
                    f"and the model needs {shapes[name]}; give the YAML of the model that the LoRA was trained on"
                )
            found[name] = compute(matrix)
    if zeros := [module_name(layer, part) for layer, part in places if (layer, part) not in lora.pairs]:
        logger.info("%s has no adapters on %s; they are zero and have no effect", lora.path, listed(zeros))
    dtype = next(iter(found.values())).dtype
    names = [sat_name(layer, part, kind) for layer, part in places for kind in "AB"]
    tensors = {name: found[name] if name in found else torch.zeros(shapes[name], dtype=dtype) for name in names}
    for layer, part in places if lora.magnitudes else ():
        name, own = sat_name(layer, part, "magnitude"), lora.magnitudes.get((layer, part))
        if own is not None and tuple(own.shape) != shapes[name]:
            raise InputError(
                f"{lora.path}: the magnitudes of {module_name(layer, part)} are {own.shape[0]}, and the model needs "
                f"{shapes[name][0]}; give the YAML of the model that the DoRA was trained on"
            )
        tensors[name] = base_magnitude(base, name).to(dtype) if own is None else compute(own)
    return tensors
