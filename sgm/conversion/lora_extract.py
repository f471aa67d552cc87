"""Extract a LoRA from two full models: the difference of their weights, at the rank that is asked for.

Of each projection of the targets (`sgm.weights.lora.names.GROUPS`), B·A is the nearest matrix of that rank to the
difference (Eckart & Young 1936), found by a randomised SVD (Halko et al. 2011), since an exact one of a released model
takes hours. B and A share the singular values. Differences of other weights are left out, and measured.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sgm.conversion.lora import FILE, adapters_to_diffusers
from sgm.conversion.modelspec import default_title, lora_metadata
from sgm.conversion.trainers.sources import Source, read_source
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes
from sgm.log import is_rank_zero
from sgm.util import InputError
from sgm.weights.adapters import DEFAULT_GROUPS, AdapterInfo, is_adapter, short_names
from sgm.weights.checkpoint import save_network
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import WEIGHTS, find_weights, weights_digest
from sgm.weights.lora.dora import parts_of
from sgm.weights.lora.merging import pair_of
from sgm.weights.lora.names import BASE, GROUPS, IN_LAYERS, MODULATION, PROJECTIONS, projection_of
from sgm.weights.match import UNUSED_TABLES

_OVERSAMPLED, _ITERATIONS = 32, 6  # of the randomised SVD


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """An extracted LoRA.

    Attributes:
        path: its file.
        targets: the groups of projections that it adapts.
        captured: share of the squared difference of those projections that it holds.
        outside: share of the squared difference of all weights that is in other ones, which it lacks.
        left_out: the names of those.
        further: shares of the squared difference of all weights that other targets could hold, by their names.
    """

    path: Path
    targets: tuple[str, ...]
    captured: float
    outside: float
    left_out: tuple[str, ...]
    further: Mapping[str, float]

    def __str__(self) -> str:
        """Return the report."""
        held = f"it holds {self.captured:.2%} of the difference of its targets, {', '.join(self.targets)}"
        lines = [f"wrote {self.path}", held]
        if self.left_out:
            names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            num = len(self.left_out)
            lines.append(f"{self.outside:.2%} of the whole difference is in {num} other tensors, left out: {names}")
        if self.further:
            shares = ", ".join(f"{name} ({share:.2%})" for name, share in self.further.items())
            lines.append(f"further --targets could hold of that: {shares}; no LoRA holds biases and norms")
        return "\n".join(lines)


def extract_lora(
    base: str | Path, tuned: str | Path, folder: str | Path, *, rank: int, targets: Sequence[str] = DEFAULT_GROUPS
) -> Extraction:
    """Write the difference of two models as a LoRA: in the layout of the base, of SAT or diffusers.

    Args:
        base: as for :func:`sgm.conversion.trainers.sources.read_source`; of a LoRA in the SAT layout, which records it,
            as for :func:`sgm.weights.files.find_weights`.
        tuned: likewise, in any layout.
        folder: to create.
        rank: r.
        targets: groups of projections, see `sgm.weights.lora.names.GROUPS`.

    Raises:
        InputError: a model cannot be read, has adapters, is another architecture or equal to the other; rank or targets
            are illegal; or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    groups = _groups(targets)
    before, after = _read(base), _read(tuned)
    # Before the work: a base in the SAT layout is recorded.
    digest = "" if before.of_diffusers else weights_digest(find_weights(base))
    _require_same_shapes(before, after)
    projections = _projections(before.tensors, groups)
    width = before.tensors["transformer.layers.0.attention.dense.weight"].shape[0]
    if not 0 < rank <= width:
        raise InputError(f"--rank is {rank}; give a number from 1 to the hidden size, {width}")
    tensors: dict[str, torch.Tensor] = {}
    whole = found = 0.0
    for projection in tqdm(projections, "projections", disable=None if is_rank_zero() else True):
        for index, difference in enumerate(_differences(before, after, projection)):
            a, b, held = _nearest(difference, rank)
            # Patches of one frame are a convolution.
            a = a.reshape(rank, *before.tensors[f"{projection}.weight"].shape[1:])
            tensors[f"{projection}.matrix_A.{index}"], tensors[f"{projection}.matrix_B.{index}"] = a, b
            whole, found = whole + difference.square().sum().item(), found + held
    others = _others(before, after, projections)
    if whole == 0:
        where = f", only in others, e.g. {next(iter(others))}" if others else ""
        raise InputError(
            f"{after.path} and {before.path} do not differ in the projections of {', '.join(groups)}{where}; give "
            "another model, or other --targets"
        )
    info = AdapterInfo(
        rank=rank,
        alpha=rank,
        layers=_layers(before.tensors),
        base=str(base),
        base_digest=digest,
        targets=short_names(groups),
    )
    path = _write(folder, before, tensors, info, default_title(after.path))
    total = whole + sum(others.values())
    return Extraction(
        path=path,
        targets=groups,
        captured=found / whole,
        outside=1 - whole / total,
        left_out=tuple(others),
        further={name: square / total for name, square in _by_group(others).items()},
    )


def _groups(targets: Sequence[str]) -> tuple[str, ...]:
    if unknown := [name for name in targets if name not in GROUPS]:
        raise InputError(f"--targets has {unknown[0]}; expected some of {', '.join(GROUPS)}")
    if not set(targets) & set(IN_LAYERS):
        raise InputError(f"--targets has {', '.join(targets) or 'nothing'}; add one of {', '.join(IN_LAYERS)}")
    return tuple(group for group in GROUPS if group in targets)


def _read(path: str | Path) -> Source:
    source = read_source(path)
    if adapter := next(filter(is_adapter, source.tensors), None):
        cure = "give full models; tools/merge_lora_weight.py merges adapters into one"
        raise InputError(f"{source.path} holds a LoRA, e.g. {adapter}; {cure}")
    return source


def _layers(tensors: Mapping[str, object]) -> tuple[int, ...]:
    return tuple(range(sum(name.endswith(".attention.dense.weight") for name in tensors)))


def _projections(tensors: Mapping[str, object], groups: Sequence[str]) -> list[str]:
    """Return the projections of all layers, and those outside of them, in `groups`."""
    return [
        projection.format(layer)
        for group in groups
        for layer in (_layers(tensors) if group in IN_LAYERS else (None,))
        for projection in GROUPS[group]
    ]


def _require_same_shapes(before: Source, after: Source) -> None:
    """Refuse models of different architectures; a patch projection may have two shapes."""
    for name in sorted((before.tensors.keys() | after.tensors.keys()) - {*UNUSED_TABLES}):
        shapes = [tuple(each.tensors[name].shape) if name in each.tensors else None for each in (before, after)]
        if None in shapes or math.prod(shapes[0] or ()) != math.prod(shapes[1] or ()):
            said = " and ".join(f"{s.path} {shape or 'none'}" for s, shape in zip((before, after), shapes, strict=True))
            raise InputError(f"the models differ in more than values: {name} of {said}; give two of one architecture")


def _differences(before: Source, after: Source, projection: str) -> list[torch.Tensor]:
    """Return the differences (D_out, D_in) of a projection that its pairs hold, float32."""
    name = projection_of(projection)[1]
    one, other = (source.tensors[f"{projection}.weight"].compute().float().flatten(1) for source in (before, after))
    return list(parts_of(other - one, len(PROJECTIONS[name]), modulates=name == MODULATION))


def _by_group(squares: Mapping[str, float]) -> dict[str, float]:
    """Return the sum of the squared differences of weights in each group, the largest first."""
    result: dict[str, float] = {}
    for group, own in GROUPS.items():
        pattern = re.compile("|".join(re.escape(name).replace(r"\{\}", r"\d+") + r"\.weight" for name in own))
        if found := [square for name, square in squares.items() if pattern.fullmatch(name)]:
            result[group] = sum(found)
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def _others(before: Source, after: Source, projections: Sequence[str]) -> dict[str, float]:
    """Return the squared differences of all other weights, by name, without those that are equal."""
    adapted = {f"{projection}.weight" for projection in projections}
    result = {}
    for name in before.tensors.keys() - adapted - {*UNUSED_TABLES}:
        one, other = (source.tensors[name].compute().flatten() for source in (before, after))
        if not torch.equal(one, other):
            result[name] = (other.float() - one.float()).square().sum().item()
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def _nearest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A [r, D] and B [D, r] whose product is nearest to a matrix, and the squares that it holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random start: the same models give the same file
        u, values, v = torch.svd_lowrank(matrix, min(2 * rank + _OVERSAMPLED, *matrix.shape), niter=_ITERATIONS)
    a, b = pair_of(u[:, :rank], values[:rank], v[:, :rank], rank)
    return a.contiguous(), b.contiguous(), values[:rank].square().sum().item()


def _write(
    folder: str | Path, before: Source, tensors: Mapping[str, torch.Tensor], info: AdapterInfo, title: str
) -> Path:
    """Write adapters in the layout of their base."""
    if before.of_diffusers:
        theirs, header = adapters_to_diffusers(tensors, alpha=info.rank)
        described = lora_metadata(
            None,
            rank=info.rank,
            alpha=info.rank,
            info=None,  # the digest is of the SAT layout
            title=title,
            implementation="diffusers",
        )
        with new_folder(folder, need_bytes=total_bytes(theirs)) as temporary:
            metadata = described | {BASE: Path(info.base).name} | header
            write_safetensors(temporary / FILE, theirs, metadata=metadata)
        return Path(folder) / FILE
    with new_folder(folder, need_bytes=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_network(temporary, 1, tensors, patch_size=None, adapters=info)
    return Path(folder) / "1" / f"{WEIGHTS}.pt"
