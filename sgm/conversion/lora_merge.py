"""Merge LoRAs: into their base, into one LoRA that adds what all add, or into the average of checkpoints of one run.

The sum of adapters is one adapter of the summed rank (`sgm.weights.lora.several`), so merging several is merging one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sgm.conversion.writing import check_new_folder, new_folder, total_bytes, write_network
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.adapters import (
    TITLES,
    WRAPPED,
    AdapterInfo,
    adapters_alone,
    find_base,
    is_adapter,
    short_names,
)
from sgm.weights.checkpoint import save_network
from sgm.weights.files import WEIGHTS, find_weights, read_names, weights_digest
from sgm.weights.lazy import AnyTensor, LazyTensor, Tensors, compute, meta
from sgm.weights.lora.dora import base_magnitude
from sgm.weights.lora.files import (
    Lora,
    is_sat,
    network_of,
    read_any_lora,
    records_alpha,
    require_base,
    warn_without_effect,
)
from sgm.weights.lora.foreign import listed
from sgm.weights.lora.lokr import shapes_of
from sgm.weights.lora.merging import kronecker_changes, merge_adapters, pair_of
from sgm.weights.lora.names import (
    GROUPS,
    IN_LAYERS,
    MODULATION,
    PROJECTIONS,
    module_name,
    part_of,
    places_of,
    projection_of,
    sat_name,
)
from sgm.weights.lora.several import LoraStack, Scaled, block_shapes

logger = get_logger(__name__)

_BASE = "--base_ckpt "


def read_loras(paths: Sequence[str | Path], alpha: float | None) -> list[Lora]:
    """Read LoRAs of any tool; of several, `alpha` is for those that do not record it.

    Raises:
        InputError: as `sgm.weights.lora.files.read_any_lora`; or `alpha` is for none of several.
    """
    alphas = [alpha] * len(paths)
    if alpha is not None and len(paths) > 1:
        alphas = [None if records_alpha(path) else alpha for path in paths]
        if all(own is None for own in alphas):
            raise InputError(f"--alpha is {alpha:g}, and every one of these LoRAs records its own; remove --alpha")
    loras = [read_any_lora(path, alpha=own) for path, own in zip(paths, alphas, strict=True)]
    for lora in loras:
        warn_without_effect(lora)
    return loras


def merge_loras(
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    strengths: Sequence[float] = (1.0,),
    file_format: Literal["pt", "safetensors"] = "pt",
    any_base: bool = False,
) -> Path:
    """Write a checkpoint in the SAT layout with adapters merged into the weights: summed in float32, rounded once.

    Args:
        paths: see `sgm.weights.lora.files.read_any_lora`.
        folder: to create.
        base: of adapters alone, as for :func:`sgm.weights.files.find_weights`; None uses the recorded path.
        alpha: see `read_loras`.
        strengths: factor of each, or of all; 0 gives the network without them.
        file_format: ``"safetensors"`` is written with one tensor in memory at a time, ``"pt"`` with all.
        any_base: take LoRAs that record another base than `base` too, as for a fine-tuned model.

    Returns:
        The weights file.

    Raises:
        InputError: adapters or their base cannot be read or do not fit, or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    factors = _strengths(strengths, len(paths))
    loras = read_loras(paths, alpha)
    network = {
        name: t for name, t in network_of(_base_file(loras, base, any_base=any_base)).items() if not is_adapter(name)
    }
    merged = _merged(network, loras, factors)
    with new_folder(folder, need_bytes=total_bytes(merged)) as temporary:
        write_network(temporary, 1, merged, file_format=file_format)
    _log(loras, factors, "merged into the base")
    return Path(folder) / "1" / f"{WEIGHTS}.{file_format}"


def _merged(network: Tensors, loras: Sequence[Lora], factors: Sequence[float]) -> dict[str, LazyTensor]:
    """Return a network with adapters merged into the weights."""
    plain = {WRAPPED.sub(r".\1", name): tensor for name, tensor in network.items()}
    changes: dict[str, LazyTensor] = {}
    others = []
    for lora, factor in zip(loras, factors, strict=True):
        if lora.kind != "lokr":
            others.append((lora, factor))
            continue
        own = kronecker_changes(lora.tensors, scale=factor * lora.alpha / lora.rank) if factor else {}
        for name, change in own.items():
            changes[name] = LazyTensor((changes[name], change), torch.add) if name in changes else change
    if not others:
        return merge_adapters(plain, alpha=1, changes=changes)
    stack = stack_of_loras([lora for lora, _ in others], [factor for _, factor in others], plain)
    tensors = plain | stack.scaled() if stack.members else plain
    return merge_adapters(tensors, alpha=stack.alpha, shares=stack.shares(0.0), changes=changes)


def sum_loras(
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    strengths: Sequence[float] = (1.0,),
    rank: int | None = None,
    any_base: bool = False,
) -> Path:
    """Write one LoRA in the SAT layout that adds what several add.

    Args:
        paths: see `merge_loras`, as `folder`, `base`, `alpha` and `strengths`.
        folder: to create.
        base: recorded in the result.
        alpha: see `read_loras`.
        strengths: factor of each, or of all.
        rank: of the result, which then is the nearest of that rank; None for the sum of all ranks, which is exact.
        any_base: see `merge_loras`.

    Returns:
        The weights file.

    Raises:
        InputError: as `merge_loras`; or nothing is left.
    """
    check_new_folder(folder)
    factors = _strengths(strengths, len(paths))
    loras = read_loras(paths, alpha)
    if others := [lora for lora in loras if lora.kind != "lora"]:
        raise InputError(
            f"{others[0].path} is {TITLES[others[0].kind]}, whose change of a weight has no small rank: no LoRA is the "
            "sum; merge it into the base (--result network), which tools/extract_lora.py can approximate then"
        )
    stack = stack_of_loras(loras, factors)
    if not stack.members:
        raise InputError("every strength is 0, and nothing is left; give another --strength")
    if rank is not None and not 0 < rank <= stack.rank:
        raise InputError(f"--rank is {rank}; give a number from 1 to the sum of all ranks, {stack.rank}")
    tensors = {name: tensor.compute() for name, tensor in stack.scaled().items()}
    scale = stack.alpha / stack.rank
    if rank is not None:
        tensors, scale = _reduced(tensors, rank, scale), 1.0
    total = default(rank, stack.rank)
    layers = tuple(layer for layer in stack.layers if layer is not None)
    targets = short_names(stack.groups)
    info = replace(
        _info(loras, base, any_base=any_base), rank=total, alpha=scale * total, layers=layers, targets=targets
    )
    return _write(folder, tensors, info, loras, factors)


def average_loras(
    paths: Sequence[str | Path],
    folder: str | Path,
    *,
    base: str | Path | None = None,
    alpha: float | None = None,
    strengths: Sequence[float] = (1.0,),
    any_base: bool = False,
) -> Path:
    """Write the average of the matrices of several LoRAs, checkpoints of one run (Wortsman et al. 2022, model soups).

    Modules without adapters, as other tools may leave them, get ones that have no effect.

    Args:
        paths: see `merge_loras`, as `folder`, `base` and `alpha`; of one rank, alpha and layers.
        folder: to create.
        base: recorded in the result.
        alpha: see `read_loras`.
        strengths: weight of each, divided by their sum.
        any_base: see `merge_loras`.

    Returns:
        The weights file.

    Raises:
        InputError: as `merge_loras`; or the LoRAs are not of one kind.
    """
    check_new_folder(folder)
    weights = _strengths(strengths, len(paths))
    loras = read_loras(paths, alpha)
    first = loras[0]
    for lora in loras[1:]:
        if (lora.rank, lora.alpha, _matrix_shapes(lora)) != (first.rank, first.alpha, _matrix_shapes(first)):
            raise InputError(
                f"{lora.path} (rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.tensors)} matrices) and {first.path} "
                f"(rank {first.rank}, alpha {first.alpha:g}, {len(first.tensors)}) are not of one training; average "
                "checkpoints of one run, or add what they add: --result sum"
            )
    if sum(weights) <= 0 or min(weights) < 0:
        raise InputError(f"the weights {weights} have no average; give a --strength from 0 for each, not all 0")
    make = partial(_mean, [weight / sum(weights) for weight in weights])
    lazy = {name: LazyTensor(tuple(lora.tensors[name] for lora in loras), make) for name in first.tensors}
    targets = short_names(first.groups)
    info = replace(
        _info(loras, base, any_base=any_base),
        rank=first.rank,
        alpha=first.alpha,
        layers=first.layers,
        targets=targets,
        kind=first.kind,
        factor=first.factor,
    )
    tensors = {name: tensor.compute() for name, tensor in lazy.items()}
    return _write(folder, _completed(tensors, info, loras, base, any_base=any_base), info, loras, weights)


def average_weights(decay: float, num: int) -> list[float]:
    """Return the weights of an exponential moving average over `num` checkpoints, the oldest first.

    Raises:
        InputError: the decay is not between 0 and 1.
    """
    if not 0 < decay < 1:
        raise InputError(f"--ema_decay is {decay}; give a number between 0 and 1, such as 0.5")
    return [decay ** (num - 1), *((1 - decay) * decay ** (num - 1 - index) for index in range(1, num))]


def stack_of_loras(
    loras: Sequence[Lora], strengths: Sequence[float], base: Mapping[str, AnyTensor] | None = None
) -> LoraStack:
    """Return LoRAs with one strength each as one, without those of strength 0.

    Args:
        loras: the LoRAs.
        strengths: of each.
        base: the weights that they are for, by the names of the network; of LoRAs alone they are not needed.

    Raises:
        InputError: they are of networks of different widths.
    """
    widths = {lora.path: _hidden_size(lora) for lora in loras}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{path} {width}" for path, width in widths.items())
        raise InputError(f"the LoRAs are for models of different hidden sizes: {listed}; give those of one model")
    depth = 1 + max(lora.layers[-1] for lora in loras)
    members = [
        Scaled(
            lora=lora,
            strengths=[strength * (layer in lora.layers) for layer in range(depth)],
            outside=0.0 if set(lora.groups) <= set(IN_LAYERS) else strength,
        ).on(default(base, {}))
        for lora, strength in zip(loras, strengths, strict=True)
        if strength
    ]
    found = {part: shape for lora in loras for part, shape in _shapes(lora).items()}
    time = max((found[part][0] for part in GROUPS["adaln"][MODULATION] if part in found), default=0)
    return LoraStack(members=members, shapes=block_shapes(next(iter(widths.values())), time) | found)


def _shapes(lora: Lora) -> dict[str, tuple[int, int]]:
    """Return (D_in, D_out) of each module with adapters."""
    pairs = (
        (n, a, lora.tensors[n.replace(".matrix_A.", ".matrix_B.")])
        for n, a in lora.tensors.items()
        if ".matrix_A." in n
    )
    return {part_of(name): (math.prod(a.shape[1:]), b.shape[0]) for name, a, b in pairs}


def _hidden_size(lora: Lora) -> int:
    """Return D of the network of a LoRA, which adapts a module of a block."""
    part, (size_in, size_out) = next(item for item in _shapes(lora).items() if not item[0].startswith("patch_embed"))
    return {"ff.net.2": size_out}.get(part, size_out // 6 if part.startswith("norm") else size_in)


def _reduced(tensors: Mapping[str, torch.Tensor], rank: int, scale: float) -> dict[str, torch.Tensor]:
    """Return the matrices of rank `rank` whose products are nearest to scale·B·A (Eckart & Young 1936)."""
    result: dict[str, torch.Tensor] = {}
    for name_a, a in tensors.items():
        if ".matrix_A." not in name_a:
            continue
        name_b = name_a.replace(".matrix_A.", ".matrix_B.")
        # The product has the singular values of the small one between the two orthogonal bases.
        left, right = torch.linalg.qr(tensors[name_b].double()), torch.linalg.qr(a.double().flatten(1).T)
        u, values, vt = torch.linalg.svd(scale * left.R @ right.R.T)
        num = min(rank, len(values))
        own_a, own_b = pair_of(left.Q @ u[:, :num], values[:num], right.Q @ vt.T[:, :num], rank)
        result[name_a], result[name_b] = own_a.float().reshape(-1, *a.shape[1:]), own_b.float()
    return result


def _matrix_shapes(lora: Lora) -> dict[str, torch.Size]:
    return {name: meta(tensor).shape for name, tensor in lora.tensors.items()}


def _mean(weights: Sequence[float], *tensors: torch.Tensor) -> torch.Tensor:
    total = sum(weight * tensor.float() for weight, tensor in zip(weights, tensors, strict=True))
    assert isinstance(total, torch.Tensor)
    return total.to(tensors[0].dtype)


def _completed(
    tensors: dict[str, torch.Tensor],
    info: AdapterInfo,
    loras: Sequence[Lora],
    base: str | Path | None,
    *,
    any_base: bool,
) -> dict[str, torch.Tensor]:
    """Return adapters with ones of no effect for all modules of the described layers and groups that have none."""
    first = "lokr_w1" if info.kind == "lokr" else "A"
    lacking = [place for place in places_of(info.layers, info.groups) if sat_name(*place, first) not in tensors]
    if not lacking:
        return tensors
    file = _base_file(loras, base, any_base=any_base)
    weights = {WRAPPED.sub(r".\1", name): tensor for name, tensor in network_of(file).items()}
    dtype, made = next(iter(tensors.values())).dtype, dict(tensors)
    logger.info("there are no adapters on %s; they get ones without effect", listed(module_name(*x) for x in lacking))
    for place in lacking:
        projection = sat_name(*place, first).rsplit(".", 2)[0]
        weight = weights.get(f"{projection}.weight")
        if weight is None:
            raise InputError(f"{file} has no {projection}, which {loras[0].path} adapts; give the base of that")
        outputs, inputs = weight.shape[0] // len(PROJECTIONS[projection_of(projection)[1]]), weight.shape[1:]
        shapes: dict[str, tuple[int, ...]] = {"A": (info.rank, *inputs), "B": (outputs, info.rank)}
        if info.kind == "lokr":
            shapes = {**shapes_of(outputs, math.prod(inputs), info.rank, info.factor)}
        made |= {sat_name(*place, kind): torch.zeros(shape, dtype=dtype) for kind, shape in shapes.items()}
        if info.kind == "dora":
            name = sat_name(*place, "magnitude")
            made[name] = base_magnitude(weights, name).to(dtype)
    return made


def _strengths(given: Sequence[float], num: int) -> list[float]:
    """Return a strength for each LoRA."""
    if wrong := [value for value in given if not abs(value) <= 100]:
        cure = "give a number from -100 to 100, 1 for the adapters as they were trained"
        raise InputError(f"--strength is {wrong[0]:g}; {cure}")
    if len(given) not in (1, num):
        raise InputError(f"--strength has {len(given)} numbers for {num} LoRAs; give one for all, or one for each")
    return list(given) * num if len(given) == 1 else list(given)


def _recorded(loras: Sequence[Lora], *, any_base: bool) -> Lora | None:
    """Return a LoRA that says where the base of all is; None if none does."""
    known = [lora for lora in loras if lora.base is not None]
    for lora in () if any_base else known[1:]:
        if lora.base and known[0].base and lora.base[1] != known[0].base[1]:
            raise InputError(
                f"{known[0].path} was trained on '{known[0].base[0]}' and {lora.path} on '{lora.base[0]}', which "
                f"is another base; give LoRAs of one base, or the base with {_BASE}<path> --any_base"
            )
    return next((lora for lora in known if lora.info is not None), None)


def _base_file(loras: Sequence[Lora], base: str | Path | None, *, any_base: bool) -> Path:
    """Return the file of the network that LoRAs are merged into."""
    recorded = _recorded(loras, any_base=any_base)
    alone = recorded is not None and adapters_alone(read_names(recorded.path))
    if base is not None and alone:
        return _checked(loras, base, any_base=any_base)
    if len(loras) == 1 and is_sat(loras[0].path):
        return find_base(loras[0].path, base, option=_BASE) or loras[0].path
    if recorded is not None and alone:
        found = find_base(recorded.path, base, option=_BASE)
        assert found is not None, "adapters alone have a base"
        return found
    if base is None:
        names = ", ".join(str(lora.path) for lora in loras)
        raise InputError(f"no file of adapters alone records its base among {names}; give it with {_BASE}<path>")
    return _checked(loras, base, any_base=any_base)


def _checked(loras: Sequence[Lora], base: str | Path, *, any_base: bool) -> Path:
    """Return the weights file of a given base, which is that of all LoRAs that record one."""
    file = find_weights(base)
    if adapters_alone(read_names(file)):
        raise InputError(f"{file} holds adapters alone; give their base with {_BASE}<path>")
    for lora in () if any_base else loras:
        cure = f"leave {_BASE}out, give the right one, or add --any_base if it is meant for these weights too"
        require_base(lora, file, cure)
    return file


def _info(loras: Sequence[Lora], base: str | Path | None, *, any_base: bool) -> AdapterInfo:
    """Return a description with the base of all LoRAs; what it says of the adapters is to be replaced."""
    recorded = _recorded(loras, any_base=any_base)
    if base is not None:
        digest = weights_digest(_checked(loras, base, any_base=any_base))
        return AdapterInfo(rank=1, alpha=1.0, layers=(), base=str(base), base_digest=digest)
    if recorded is None or recorded.info is None:
        raise InputError(
            f"no LoRA records its base as a path, which the result has to name; give it with {_BASE}<path>"
        )
    return recorded.info


def _write(
    folder: str | Path, tensors: Tensors, info: AdapterInfo, loras: Sequence[Lora], factors: Sequence[float]
) -> Path:
    """Write adapters in the SAT layout."""
    made = {name: compute(tensor) for name, tensor in tensors.items()}
    with new_folder(folder, need_bytes=sum(tensor.nbytes for tensor in made.values())) as temporary:
        save_network(temporary, 1, made, patch_size=None, adapters=info)
    _log(loras, factors, f"one {TITLES[info.kind]} of rank {info.rank}, alpha {info.alpha:g}")
    return Path(folder) / "1" / f"{WEIGHTS}.pt"


def _log(loras: Sequence[Lora], factors: Sequence[float], result: str) -> None:
    for lora, factor in zip(loras, factors, strict=True):
        said = (lora.path, TITLES[lora.kind], lora.rank, lora.alpha, factor, result)
        logger.info("%s: %s of rank %d, alpha %g, strength %g, %s", *said)
