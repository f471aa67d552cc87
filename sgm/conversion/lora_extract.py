"""Extract a LoRA from two full models: the difference of their weights, at the rank that is asked for.

Of each adapted projection, B·A is the nearest matrix of that rank to the difference (Eckart & Young 1936), found by a
randomised SVD (Halko et al. 2011), since an exact one of a released model takes hours. B and A share the singular
values. Differences of other weights cannot be expressed, and are measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sgm.conversion.lora import FILE, adapters_to_diffusers
from sgm.conversion.trainers.sources import Source, read_source
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes
from sgm.log import is_rank_zero
from sgm.util import InputError
from sgm.weights.adapters import TARGETS, AdapterInfo, is_adapter
from sgm.weights.checkpoint import save_network
from sgm.weights.checksums import write_safetensors
from sgm.weights.files import WEIGHTS, find_weights, weights_digest
from sgm.weights.match import UNUSED_TABLES

_OVERSAMPLED, _ITERATIONS = 32, 6  # of the randomised SVD


@dataclass(frozen=True)
class Extraction:
    """An extracted LoRA.

    Attributes:
        path: its file.
        captured: share of the squared difference of the adapted projections that it holds.
        outside: share of the squared difference of all weights that is in other ones, which it lacks.
        left_out: the names of those.
    """

    path: Path
    captured: float
    outside: float
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Return the report."""
        lines = [f"wrote {self.path}", f"it holds {self.captured:.2%} of the difference of the attention projections"]
        if self.left_out:
            names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            lines.append(
                f"{self.outside:.2%} of the whole difference is in {len(self.left_out)} other tensors, which a LoRA in "
                f"SAT cannot hold and which are left out: {names}"
            )
        return "\n".join(lines)


def extract_lora(base: str | Path, tuned: str | Path, folder: str | Path, *, rank: int) -> Extraction:
    """Write the difference of two models as a LoRA: in the layout of the base, of SAT or diffusers.

    Args:
        base: as for :func:`sgm.conversion.trainers.sources.read_source`; of a LoRA in the SAT layout, which records it,
            as for :func:`sgm.weights.files.find_weights`.
        tuned: likewise, in any layout.
        folder: to create.
        rank: r.

    Raises:
        InputError: a model cannot be read, has adapters, is another architecture or equal to the other; the rank is
            illegal; or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    before, after = _read(base), _read(tuned)
    _require_same_shapes(before, after)
    projections = _projections(before.tensors)
    width = min(before.tensors[f"{next(iter(projections))}.weight"].shape)
    if not 0 < rank <= width:
        raise InputError(f"--rank is {rank}; give a number from 1 to the hidden size, {width}")
    tensors: dict[str, torch.Tensor] = {}
    whole = found = 0.0
    for projection, parts in tqdm(projections.items(), "projections", disable=None if is_rank_zero() else True):
        for index, difference in enumerate(_difference(before, after, f"{projection}.weight").chunk(parts)):
            a, b, held = _nearest(difference, rank)
            tensors[f"{projection}.matrix_A.{index}"], tensors[f"{projection}.matrix_B.{index}"] = a, b
            whole, found = whole + difference.square().sum().item(), found + held
    others = _others(before, after, projections)
    if whole == 0:
        where = f", only in others, e.g. {next(iter(others))}" if others else ""
        raise InputError(f"{after.path} and {before.path} do not differ in attention projections{where}; give another")
    path = _write(folder, before, base, tensors, rank)
    rest = sum(others.values())
    return Extraction(path, found / whole, rest / (whole + rest), tuple(others))


def _read(path: str | Path) -> Source:
    source = read_source(path)
    if adapter := next(filter(is_adapter, source.tensors), None):
        cure = "give full models; tools/merge_lora_weight.py merges adapters into one"
        raise InputError(f"{source.path} holds a LoRA, e.g. {adapter}; {cure}")
    return source


def _projections(tensors: Mapping[str, object]) -> dict[str, int]:
    """Return the adapted projections of all layers and their number of pairs."""
    names = {name.removesuffix(".weight") for name in tensors}
    layers = range(sum(name.endswith(".attention.dense") for name in names))
    return {f"transformer.layers.{layer}.{target}": num for layer in layers for target, num in TARGETS.items()}


def _require_same_shapes(before: Source, after: Source) -> None:
    """Refuse models of different architectures; a patch projection may have two shapes."""
    for name in sorted((before.tensors.keys() | after.tensors.keys()) - {*UNUSED_TABLES}):
        shapes = [tuple(each.tensors[name].shape) if name in each.tensors else None for each in (before, after)]
        if None in shapes or math.prod(shapes[0] or ()) != math.prod(shapes[1] or ()):
            said = " and ".join(f"{s.path} {shape or 'none'}" for s, shape in zip((before, after), shapes, strict=True))
            raise InputError(f"the models differ in more than values: {name} of {said}; give two of one architecture")


def _difference(before: Source, after: Source, name: str) -> torch.Tensor:
    one, other = (source.tensors[name].compute().float().flatten(1) for source in (before, after))
    return other - one


def _others(before: Source, after: Source, projections: Mapping[str, int]) -> dict[str, float]:
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
    root = values[:rank].sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root).contiguous(), values[:rank].square().sum().item()


def _write(
    folder: str | Path, before: Source, base: str | Path, tensors: Mapping[str, torch.Tensor], rank: int
) -> Path:
    """Write adapters in the layout of their base."""
    if before.of_diffusers:
        theirs, metadata = adapters_to_diffusers(tensors, alpha=rank)
        with new_folder(folder, need_bytes=total_bytes(theirs)) as temporary:
            write_safetensors(temporary / FILE, theirs, metadata=metadata)
        return Path(folder) / FILE
    layers = tuple(range(len(tensors) // (2 * sum(TARGETS.values()))))
    digest = weights_digest(find_weights(base))
    info = AdapterInfo(rank=rank, alpha=rank, layers=layers, base=str(base), base_digest=digest)
    with new_folder(folder, need_bytes=sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_network(temporary, 1, tensors, patch_size=(1, 1, 1), adapters=info)
    return Path(folder) / "1" / f"{WEIGHTS}.pt"
