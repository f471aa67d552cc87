"""LoRA adapters of SAT checkpoints: read, written for diffusers, folded into the weights.

ΔW = (alpha / r)·B·A. SAT adapts one matrix of query, key and value by three pairs, and the projection after the
attention by one; diffusers adapts four modules by a pair each, so pairs go over one to one, numbers unchanged:

    transformer.layers.<i>.attention.query_key_value.matrix_{A,B}.<0, 1, 2>     A [r, D], B [D, r]
    transformer_blocks.<i>.attn1.{to_q, to_k, to_v}.lora_{A,B}.weight
    transformer.layers.<i>.attention.dense.matrix_{A,B}.0
    transformer_blocks.<i>.attn1.to_out.0.lora_{A,B}.weight

Names of the network stand here without the prefix ``model.diffusion_model.``. The way back is in
`sgm.conversion.lora_import`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sgm.conversion.names import BLOCK, QKV, QKV_PARTS
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes, write_safetensors
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.adapters import adapter_layer, find_base, is_adapter, read_adapter_info
from sgm.weights.architecture import PATCH_WEIGHT
from sgm.weights.checkpoint import save_network, write_latest
from sgm.weights.files import WEIGHTS, find_weights, read_tensors
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.match import PREFIX, WRAPPED

logger = get_logger(__name__)

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
HEADER_KEY = "lora_adapter_metadata"  # where diffusers has rank and alpha, as JSON, in the header
KEY_PREFIX = "transformer."  # of the names that pipelines of diffusers take

# The adapted projections of a SAT layer, and the modules of a block of diffusers that their pairs belong to, in order.
TARGETS = {QKV: QKV_PARTS, "attention.dense": (BLOCK["attention.dense"],)}

_PROJECTION = re.compile(r"transformer\.layers\.(\d+)\.(attention\.\w+)")
_MATRIX = re.compile(r"(.+)\.matrix_([AB])\.(\d+)")

Pair = tuple[torch.Tensor | LazyTensor, torch.Tensor | LazyTensor]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA adapters from a SAT checkpoint.

    Attributes:
        path: their file.
        rank: r.
        alpha: numerator of the scale.
        tensors: the matrices, and the network under them unless it was left out; mapped, not read.
    """

    path: Path
    rank: int
    alpha: float
    tensors: Mapping[str, torch.Tensor]


def read_lora(
    path: str | Path, *, base: str | Path | None = None, alpha: float | None = None, network: bool = True
) -> Lora:
    """Find the adapters of a checkpoint: of adapters alone, or of a whole network with LoRA.

    Args:
        path: what :func:`sgm.weights.files.find_weights` understands.
        base: the same, for the network under adapters that come alone; else the path that their file records.
        alpha: for files that do not say it: those which reference code wrote.
        network: whether the network is wanted too.

    Raises:
        InputError: the file holds no LoRA or an incomplete one, alpha is unknown or contradicts the file, or the base
            is not found or another one.
    """
    file = find_weights(path)
    tensors = _network_of(file)
    matrices = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    if not matrices:
        raise InputError(f"{file} holds no LoRA matrices; give the folder or file that a LoRA training saved")
    rank = _rank(_pairs(matrices, str(file)), str(file))
    alpha = _alpha(file, rank, matrices, alpha)
    if not any(bool(tensor.any()) for name, tensor in matrices.items() if ".matrix_B." in name):
        logger.warning("the adapters in %s have no effect: every matrix B is zero, as before any training", file)
    if network:
        under = _find_base(file, base)
        if under is not None:  # a base with adapters of its own: those of the file continue them, as in loading
            tensors = {name: tensor for name, tensor in _network_of(under).items() if not is_adapter(name)} | matrices
    return Lora(path=file, rank=rank, alpha=alpha, tensors=tensors if network else matrices)


def merge_adapters(tensors: Tensors, *, alpha: float, strength: float = 1.0) -> dict[str, LazyTensor]:
    """Fold LoRA adapters into the weights: W + strength·(alpha / r)·B·A in float32, rounded to the dtype of W once.

    Args:
        tensors: a network with adapters. Adapted projections are named with or without ``.original``.
        alpha: numerator of the scale.
        strength: 0 gives the network without its adapters, bit for bit.

    Returns:
        The network by its plain names; tensors without adapters are passed on.

    Raises:
        InputError: matrices that lack a partner or a weight, or that do not fit it.
    """
    pairs = _pairs(tensors, "the checkpoint")
    result = {}
    for name, tensor in tensors.items():
        if is_adapter(name):
            continue
        plain = WRAPPED.sub(r".\1", name)
        module, _, kind = plain.rpartition(".")
        own = pairs.pop(module, None) if kind == "weight" else None
        if own is None or strength == 0:
            result[plain] = LazyTensor((tensor,))
            continue
        _require_fitting(module, tensor, own)
        matrices = [matrix for pair in own for matrix in pair]
        result[plain] = LazyTensor((tensor, *matrices), _add(strength * alpha / _meta(matrices[0]).shape[0]))
    if pairs:
        raise InputError(f"the checkpoint has adapters on {next(iter(pairs))} and no weight there; give the whole base")
    return result


def adapters_to_diffusers(
    tensors: Tensors, *, alpha: float, key_prefix: str = KEY_PREFIX
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Translate LoRA adapters into what ``load_lora_weights`` of diffusers reads, scale included.

    Pairs that are zero throughout are left out: they stand where other tools trained no adapter.

    Args:
        tensors: with the matrices among them; others are not looked at.
        alpha: numerator of the scale.
        key_prefix: of the names, and of rank and alpha in the header.

    Returns:
        The tensors, and the metadata for the header of their safetensors file.

    Raises:
        InputError: matrices that lack a partner, of several ranks, or all zero.
    """
    pairs = _pairs(tensors, "the checkpoint")
    rank = _rank(pairs, "the checkpoint")
    result: dict[str, LazyTensor] = {}
    modules = []
    for projection, own in pairs.items():
        layer, target = _projection(projection)
        for part, pair in zip(TARGETS[target], own, strict=True):
            if not any(_any(matrix) for matrix in pair):
                continue
            # Full names: which layers there are besides, and whether short names would reach them, is not known here.
            modules.append(f"transformer_blocks.{layer}.{part}")
            for kind, matrix in zip("AB", pair, strict=True):
                result[f"{key_prefix}{modules[-1]}.lora_{kind}.weight"] = LazyTensor((matrix,))
    if not result:
        raise InputError("every LoRA matrix is zero: there is nothing to write; give the adapters of a training")
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    config = {"r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    return result, {HEADER_KEY: json.dumps({key_prefix + name: value for name, value in config.items()})}


def export_lora(
    path: str | Path, folder: str | Path, *, key_prefix: str = KEY_PREFIX, alpha: float | None = None
) -> Path:
    """Write the adapters of a checkpoint as the file that diffusers loads; see `read_lora`.

    Args:
        path: the checkpoint.
        folder: made anew; gets the file and nothing else.
        key_prefix: of the names.
        alpha: for files that do not say it.

    Returns:
        The file.

    Raises:
        InputError: the adapters cannot be read, or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    if key_prefix and not key_prefix.endswith("."):
        raise InputError(f"--key_prefix is '{key_prefix}'; end it with a dot, as in '{KEY_PREFIX}', or give ''")
    lora = read_lora(path, alpha=alpha, network=False)
    tensors, metadata = adapters_to_diffusers(lora.tensors, alpha=lora.alpha, key_prefix=key_prefix)
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        write_safetensors(temporary / FILE, tensors, metadata=metadata)
    if key_prefix != KEY_PREFIX:
        logger.warning("names begin with '%s': pipelines of diffusers take those with '%s'", key_prefix, KEY_PREFIX)
    logger.info("%s: LoRA of rank %d, alpha %g, %d pairs", lora.path, lora.rank, lora.alpha, len(tensors) // 2)
    return Path(folder) / FILE


def merge_lora(
    path: str | Path,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    strength: float = 1.0,
    file_format: Literal["pt", "safetensors"] = "pt",
) -> Path:
    """Write a checkpoint in the SAT layout with its adapters folded into the weights.

    Args:
        path: adapters alone, or a whole network with LoRA; see `read_lora`.
        folder: made anew.
        base: the network under adapters that come alone, if it has moved.
        alpha: for files that do not say it.
        strength: how much of the adapters is added; 0 for the network without them.
        file_format: ``"safetensors"`` is written with one tensor in memory at a time, ``"pt"`` with all.

    Returns:
        The weights file.

    Raises:
        InputError: the adapters or their base cannot be read, or the folder exists or cannot be written to.
    """
    if not math.isfinite(strength):
        raise InputError(f"--strength is {strength}; give a number, 1 for the adapters as they were trained")
    check_new_folder(folder)
    lora = read_lora(path, base=base, alpha=alpha)
    merged = merge_adapters(lora.tensors, alpha=lora.alpha, strength=strength)
    relative = Path("1") / f"{WEIGHTS}.{file_format}"
    with new_folder(folder, need_bytes=total_bytes(merged)) as temporary:
        if file_format == "pt":
            made = {name: tensor.compute() for name, tensor in merged.items()}
            save_network(temporary, 1, made, patch_size=_stored_patch(made))
        else:
            write_safetensors(temporary / relative, {PREFIX + name: tensor for name, tensor in merged.items()})
            write_latest(temporary, 1)
    logger.info("%s: merged LoRA of rank %d, alpha %g, strength %g", lora.path, lora.rank, lora.alpha, strength)
    return Path(folder) / relative


def _network_of(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the network in a file, by their names without prefix."""
    content = read_tensors(file)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if name.startswith(PREFIX)}
    if not tensors:
        raise InputError(
            f"{file} holds no tensor under '{PREFIX}' but e.g. '{next(iter(content))}'; give a checkpoint in the SAT "
            "layout (docs/checkpoints.md)"
        )
    if len(tensors) < len(content):
        logger.info("left out %d tensors of other parts in %s", len(content) - len(tensors), file)
    return tensors


def _find_base(file: Path, base: str | Path | None) -> Path | None:
    try:
        return find_base(file, base)
    except InputError as error:  # its advice is for configurations
        message = str(error).replace("args.base=", "--base_ckpt ").replace("args.base", "--base_ckpt")
        raise InputError(message) from error


def _alpha(file: Path, rank: int, matrices: Mapping[str, torch.Tensor], given: float | None) -> float:
    """Return the alpha of the adapters in a file: what it says, or what is given where it says nothing."""
    if given is not None and not (math.isfinite(given) and given > 0):
        raise InputError(f"--alpha is {given}; give the lora_alpha of the training YAML, a number above 0")
    info = read_adapter_info(file)
    if info is None:
        if given is None:
            raise InputError(
                f"{file} does not say the alpha of its LoRA of rank {rank}; give it with --alpha: the lora_alpha of "
                "the training YAML, which is 1 where that has none, as in the reference's configurations"
            )
        return given
    layers = tuple(sorted({layer for name in matrices if (layer := adapter_layer(name)) is not None}))
    if (info.rank, info.layers) != (rank, layers):
        raise InputError(
            f"{file} says that its LoRA has rank {info.rank} on the layers {list(info.layers)}, and its matrices have "
            f"rank {rank} on {list(layers)}; save the adapters anew"
        )
    if given is not None and given != info.alpha:
        raise InputError(f"--alpha is {given:g}, but {file} records alpha {info.alpha:g}; leave --alpha out")
    return info.alpha


def _pairs(tensors: Tensors, source: str) -> dict[str, list[Pair]]:
    """Return the pairs of each adapted projection, by its name and in the order of `TARGETS`; layers ascend."""
    found: dict[str, dict[tuple[str, int], torch.Tensor | LazyTensor]] = {}
    for name, tensor in tensors.items():
        if is_adapter(name) and (match := _MATRIX.fullmatch(name)):
            found.setdefault(match[1], {})[match[2], int(match[3])] = tensor
    result = {}
    for projection in sorted(found, key=_projection):
        matrices = found[projection]
        wanted = [(kind, index) for index in range(len(TARGETS[_projection(projection)[1]])) for kind in "AB"]
        if set(wanted) != set(matrices):
            differing = sorted(set(wanted) ^ set(matrices))
            listed = ", ".join(f"matrix_{kind}.{index}" for kind, index in differing)
            raise InputError(
                f"the adapters of {projection} in {source} are not the {len(wanted)} matrices that belong there: "
                f"{listed} missing or too many; give a checkpoint that was saved completely"
            )
        result[projection] = [(matrices["A", index], matrices["B", index]) for index in range(len(wanted) // 2)]
    return result


def _projection(name: str) -> tuple[int, str]:
    """Return layer and target of an adapted projection."""
    match = _PROJECTION.fullmatch(name)
    if match is None or match[2] not in TARGETS:
        raise InputError(f"there are adapters on {name}; only those on {' and '.join(TARGETS)} can be converted")
    return int(match[1]), match[2]


def _rank(pairs: Mapping[str, list[Pair]], source: str) -> int:
    ranks = {size for own in pairs.values() for a, b in own for size in (_meta(a).shape[0], _meta(b).shape[-1])}
    if len(ranks) != 1:
        raise InputError(f"the LoRA matrices in {source} have the ranks {sorted(ranks)}, expected one of them")
    return ranks.pop()


def _require_fitting(projection: str, weight: torch.Tensor | LazyTensor, own: list[Pair]) -> None:
    """Raise InputError unless the pairs of a projection add up to the shape of its weight."""
    shapes = [(_meta(a).shape, _meta(b).shape) for a, b in own]
    rows = sum(b[0] for _, b in shapes)
    columns = {a[1] for a, _ in shapes}
    if tuple(_meta(weight).shape) != (rows, *columns) or any(a[0] != b[1] for a, b in shapes):
        listed = ", ".join(f"A {tuple(a)} B {tuple(b)}" for a, b in shapes)
        raise InputError(
            f"the adapters of {projection} ({listed}) do not fit its weight {tuple(_meta(weight).shape)}; give the "
            "base that they were trained on"
        )


def _add(scale: float) -> Callable[..., torch.Tensor]:
    """Return the function that adds the product of every (A, B) to its rows of a weight."""

    def add(weight: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        products = [b.float() @ a.float() for a, b in zip(matrices[::2], matrices[1::2], strict=True)]
        return (weight.float() + scale * torch.cat(products)).to(weight.dtype)

    return add


def _meta(tensor: torch.Tensor | LazyTensor) -> torch.Tensor:
    return tensor.meta() if isinstance(tensor, LazyTensor) else tensor


def _any(tensor: torch.Tensor | LazyTensor) -> bool:
    """Whether any element is not zero."""
    return bool((tensor.compute() if isinstance(tensor, LazyTensor) else tensor).any())


def _stored_patch(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    """Return a patch size with which `save_network` leaves the patch projection in the shape that it has."""
    shape = tensors[PATCH_WEIGHT].shape if PATCH_WEIGHT in tensors else ()
    return (1, shape[2], shape[3]) if len(shape) == 4 else (2, 1, 1)
