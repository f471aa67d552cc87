"""Read the adapters of any LoRA file: of a SAT checkpoint, or of another training tool."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sgm.io import require_local
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.adapters import (
    AdapterInfo,
    Kind,
    Pair,
    adapter_pairs,
    is_adapter,
    kind_of,
    ranks_and_layers,
    read_adapter_info,
)
from sgm.weights.architecture import CONTROL_WEIGHT, describe_architecture
from sgm.weights.files import PREFIX, WEIGHTS, find_weights, read_tensors, read_weights, weights_digest
from sgm.weights.lazy import AnyTensor, Tensors, compute
from sgm.weights.lora.foreign import DiffusersLora, find_lora, read_diffusers_lora, records_scale
from sgm.weights.lora.lokr import completed, in_parts
from sgm.weights.lora.names import groups_of, starts_at_zero
from sgm.weights.stored import require_floating

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters in a file.

    Attributes:
        path: the file.
        rank: r.
        alpha: numerator of the scale.
        tensors: matrices, and magnitudes of DoRA, by SAT's names, lazy. In files of other tools, some
            projections of a layer may have none.
        info: its metadata; None in files of other tools and of the reference.
        factor: of LoKr.
        base: name and digest of the weights that they were trained on; None if the file does not say.
    """

    path: Path
    rank: int
    alpha: float
    tensors: Tensors
    info: AdapterInfo | None = None
    factor: int = -1
    base: tuple[str, str] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have adapters, ascending."""
        return ranks_and_layers(self.tensors)[1]

    @property
    def groups(self) -> tuple[str, ...]:
        """What has adapters, see `sgm.weights.lora.names.GROUPS`."""
        return groups_of(self.tensors)

    @property
    def kind(self) -> Kind:
        """The method."""
        return kind_of(self.tensors)

    def has_effect(self) -> bool:
        """Whether any matrix that starts at zero is not zero."""
        return any(any_element(tensor) for name, tensor in self.tensors.items() if starts_at_zero(name))


def read_any_lora(path: str | Path, *, alpha: float | None = None, option: str = "--alpha") -> Lora:
    """Read the adapters of a SAT checkpoint or of another tool.

    Args:
        path: a run folder, an iteration folder or a file of SAT, or as for `sgm.weights.lora.foreign.find_lora`.
        alpha: of the training, for files without it.
        option: that gives `alpha`, for messages.

    Raises:
        InputError: as `read_lora` and `sgm.weights.lora.foreign.read_diffusers_lora`.
    """
    file = find_any_lora(path)
    if is_sat(file):
        return read_lora(file, alpha=alpha, option=option)
    other = read_diffusers_lora(path, alpha=alpha, option=option)
    return Lora(
        path=other.path,
        rank=other.rank,
        alpha=other.alpha,
        tensors=completed(other.tensors),
        factor=other.factor,
        base=other.base,
    )


def require_base(lora: Lora | DiffusersLora, base: Path, cure: str) -> None:
    """Refuse a LoRA that records other weights than those in the file `base` as what it was trained on.

    Raises:
        InputError: with the `cure`.
    """
    if lora.base is not None and (digest := weights_digest(base)) != lora.base[1]:
        require_kind(lora, base)
        raise InputError(
            f"{lora.path} was trained on another base than {base}: that has the digest {digest[:12]}, and the file "
            f"records {lora.base[1][:12]} for '{lora.base[0]}'; {cure}"
        )


def require_kind(lora: Lora | DiffusersLora, base: Path) -> None:
    """Refuse a LoRA of another kind of model than the weights in the file `base`, if what it was trained on is there.

    Raises:
        InputError: it is one.
    """
    if lora.base is None or lora.base[1] == weights_digest(base):
        return
    then, now = _kind_of_weights(lora.base[0]), _kind_of_weights(base)
    if None not in (then, now) and then != now:
        raise InputError(f"{lora.path} is a LoRA of {then}, and {base} is {now}; use it with {lora.base[0]}")


def _kind_of_weights(path: str | Path) -> str | None:
    """Return in words what kind of model weights are; None if they are not there or not recognised."""
    try:
        found = describe_architecture({name: tuple(x.shape) for name, x in network_of(find_weights(path)).items()})
    except (InputError, OSError):
        return None
    return None if found is None else found.kind()


def find_any_lora(path: str | Path) -> Path:
    """Return the file that `read_any_lora` reads.

    Raises:
        InputError: there is none.
    """
    require_local(path)
    folder = Path(path)
    sat = folder.is_dir() and ((folder / "latest").is_file() or any(folder.glob(f"{WEIGHTS}.*")))
    return find_weights(folder) if sat else find_lora(folder)


def records_alpha(path: str | Path) -> bool:
    """Return whether the file that `read_any_lora` reads says its alpha."""
    file = find_any_lora(path)
    return read_adapter_info(file) is not None if is_sat(file) else records_scale(file)


def is_sat(file: Path) -> bool:
    """Whether a file has names of SAT."""
    return any(is_adapter(name) or name.startswith(PREFIX) for name in read_tensors(file))


def read_lora(path: str | Path, *, alpha: float | None = None, option: str = "--alpha") -> Lora:
    """Find the adapters in an adapters-only checkpoint or a whole network with LoRA.

    Args:
        path: as for :func:`sgm.weights.files.find_weights`.
        alpha: for files without it (written by reference code).
        option: that gives `alpha`, for messages.

    Raises:
        InputError: LoRA is missing or incomplete, or alpha is unknown or contradicts the file.
    """
    file = find_weights(path)
    network = network_of(file)
    if CONTROL_WEIGHT in network:
        raise InputError(
            f"{file} holds the columns of a control beside its LoRA, for which several LoRAs or files of other tools "
            "have no place; sample it with args.load, or merge it with tools/convert_weight_sat2hf.py"
        )
    matrices = {name: tensor for name, tensor in network.items() if is_adapter(name)}
    if not matrices:
        raise InputError(f"{file} holds no LoRA matrices; give the folder or file that a LoRA training saved")
    info = read_adapter_info(file)
    if kind_of(matrices) == "lokr":
        if info is None:
            raise InputError(f"{file} holds LoKr and does not say its rank and factor; give a file that was saved here")
        rank, factor = info.rank, info.factor
        in_parts(matrices)
    else:
        rank, factor = common_rank(adapter_pairs(matrices, str(file)), str(file)), -1
    alpha = _alpha(Lora(path=file, rank=rank, alpha=0, tensors=matrices, info=info), alpha, option)
    base = None if info is None else (info.base, info.base_digest)
    return Lora(path=file, rank=rank, alpha=alpha, tensors=matrices, info=info, factor=factor, base=base)


def network_of(file: Path) -> Tensors:
    """Return the tensors of the network in a file, by names without prefix.

    Raises:
        InputError: there are none, or others than floating-point numbers.
    """
    content = read_weights(file)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if name.startswith(PREFIX)}
    if not tensors:
        raise InputError(
            f"{file} holds no tensor under '{PREFIX}' but e.g. '{next(iter(content))}'; give a checkpoint in the SAT "
            "layout (docs/checkpoints.md)"
        )
    require_floating(tensors)
    if len(tensors) < len(content):
        logger.info("left out %d tensors of other parts in %s", len(content) - len(tensors), file)
    return tensors


def _alpha(lora: Lora, given: float | None, option: str) -> float:
    """Return the alpha recorded in a file, or the user's."""
    file, info = lora.path, lora.info
    if given is not None and not (math.isfinite(given) and given > 0):
        raise InputError(f"{option} is {given}; give the lora_alpha of the training YAML, a number above 0")
    if info is None:
        if given is None:
            raise InputError(
                f"{file} does not say the alpha of its LoRA of rank {lora.rank}; give it with {option}: the lora_alpha "
                "of the training YAML, which is 1 where that has none, as in the reference's configurations"
            )
        return given
    if problem := info.mismatch(lora.tensors):
        raise InputError(f"{file}: {problem}; save the adapters anew")
    if given is not None and given != info.alpha:
        raise InputError(f"{option} is {given:g}, but {file} records alpha {info.alpha:g}; leave {option} out")
    return info.alpha


def warn_without_effect(lora: Lora) -> None:
    """Log a warning if it is as before training."""
    if not lora.has_effect():
        logger.warning(
            "the adapters in %s have no effect: every matrix B is zero, or w2 of LoKr, as before any training",
            lora.path,
        )


def common_rank(pairs: Mapping[str, list[Pair]], source: str) -> int:
    """Return the rank of all pairs.

    Raises:
        InputError: there are several.
    """
    ranks = {size for own in pairs.values() for a, b in own for size in (a.shape[0], b.shape[-1])}
    if len(ranks) != 1:
        raise InputError(f"the LoRA matrices in {source} have the ranks {sorted(ranks)}, expected one of them")
    return ranks.pop()


def any_element(tensor: AnyTensor) -> bool:
    """Whether any element is nonzero."""
    return bool(compute(tensor).any())
