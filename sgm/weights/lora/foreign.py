"""Read LoRA files of other training tools.

Their names are brought to one form by `sgm.weights.lora.names`. The rank is inferred from the shapes; for alpha see
`_alpha`.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sgm.config.values import spelled
from sgm.io import parse_json, reason_of, require_local
from sgm.log import get_logger
from sgm.util import InputError
from sgm.weights.files import read_entry, read_metadata, read_shards
from sgm.weights.lazy import AnyTensor, LazyTensor
from sgm.weights.lora.lokr import read_kronecker
from sgm.weights.lora.names import (
    BASE,
    BASE_DIGEST,
    FILE,
    HEADER_KEY,
    MODULES,
    PATCH,
    LoraName,
    groups_of,
    module_name,
    parse_lora_name,
    sat_name,
)
from sgm.weights.stored import StoredTensor, is_dense, require_floating

logger = get_logger(__name__)

# File names of diffusers and PEFT.
_FILES = (FILE, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
_PEFT_CONFIG = "adapter_config.json"
_FINETRAINERS_KEY = "lora_config"

# Initialisations that also change the base: the adapters do not match the released one.
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

# Settings of PEFT that make something else of the same matrices.
_OTHER_USES = ("layer_replication", "use_qalora", "alora_invocation_tokens")
_TYPES: dict[str, tuple[Any, str]] = {name: (bool, "true or false") for name in ("use_rslora", "use_dora")}
_TYPES |= {"lora_alpha": (int | float | str, "a number above 0")}
_TYPES |= {name: (Mapping, "a mapping") for name in ("rank_pattern", "alpha_pattern")}

Pair = tuple[AnyTensor, AnyTensor]
Module = tuple[int | None, str]  # layer and module within the block, e.g. (0, "attn1.to_q"); None outside of them


@dataclass(frozen=True, kw_only=True)
class DiffusersLora:
    """LoRA adapters on modules of a CogVideoXTransformer3DModel.

    Attributes:
        path: their file.
        rank: r.
        alpha: numerator of the scale alpha / r.
        pairs: A [r, D_in] and B [D_out, r] of each adapted module; memory-mapped, and checked when they are computed.
            A of patches of one frame is that of a convolution, [r, C, p, p].
        magnitudes: of DoRA, [D_out] of each adapted module; empty for others.
        kronecker: of LoKr, the matrices of each adapted module, which has no pair then; empty for others.
        factor: of LoKr.
        base: name and digest of what they were trained on, in files that were exported here; None in others.
    """

    path: Path
    rank: int
    alpha: float
    pairs: Mapping[Module, Pair]
    magnitudes: Mapping[Module, AnyTensor] = field(default_factory=dict)
    kronecker: Mapping[Module, Mapping[str, AnyTensor]] = field(default_factory=dict)
    factor: int = -1
    base: tuple[str, str] | None = None

    @property
    def modules(self) -> list[Module]:
        """The adapted modules."""
        return [*self.pairs, *self.kronecker]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have adapters, ascending."""
        return tuple(sorted({layer for layer, _ in self.modules if layer is not None}))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the adapted modules, see `sgm.weights.lora.names.GROUPS`."""
        return groups_of(self.tensors)

    @property
    def tensors(self) -> dict[str, AnyTensor]:
        """The matrices and magnitudes by SAT's names."""
        matrices = {
            sat_name(layer, part, kind): matrix
            for (layer, part), pair in self.pairs.items()
            for kind, matrix in zip("AB", pair, strict=True)
        }
        matrices |= {sat_name(*module, "magnitude"): own for module, own in self.magnitudes.items()}
        return matrices | {
            sat_name(*module, kind): tensor for module, own in self.kronecker.items() for kind, tensor in own.items()
        }


def find_lora(path: str | Path) -> Path:
    """Return the LoRA file in the folder of a training tool; `path` if it is a file.

    Raises:
        InputError: there is none, or more than one.
    """
    require_local(path)
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"there is no LoRA at {path}; give its file, or the folder that a training tool saved")
    found = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        there = f"several: {', '.join(file.name for file in found)}" if found else "none"
        raise InputError(f"expected one LoRA file in {path}, e.g. {FILE}, and there are {there}; give the file itself")
    return found[0]


def read_diffusers_lora(path: str | Path, *, alpha: float | None = None, option: str = "--alpha") -> DiffusersLora:
    """Describe adapters of another training tool; the matrices are memory-mapped.

    Args:
        path: as for `find_lora`.
        alpha: of the training, for files without it.
        option: that gives `alpha`, for messages.

    Raises:
        InputError: the SAT layout cannot express the adapters, or the file contradicts itself or `alpha`.
    """
    file = find_lora(path)
    found = _matrices(file)
    if any(side.startswith("lokr_") for own in found.values() for side in own):
        return _read_kronecker(file, found, alpha, option)
    pairs = {}
    for module, matrices in found.items():
        missing = [side for side in "AB" if side not in matrices]
        if missing:
            raise InputError(f"{file} lacks lora_{missing[0]} of {_name(module)}; copy or save it again")
        b = matrices["B"]
        is_convolution = len(matrices["A"].shape) == 4 == len(b.shape) and b.shape[2:] == (1, 1)
        pairs[module] = (matrices["A"], LazyTensor((b,), _flat) if is_convolution else b)
    if not pairs:
        raise InputError(f"{file} holds no tensors; copy or save it again")
    if all(layer is None for layer, _ in pairs):
        raise InputError(f"{file} adapts {listed(map(_name, pairs))} only, and no layer; train some of a layer too")
    rank, magnitudes = _rank(file, pairs), _magnitudes(file, found)
    for source, config in _configs(file):
        if config.get("use_dora") and not magnitudes:
            raise InputError(f"{file} is DoRA according to {source}, and holds no magnitudes; copy or save it again")
    stored = {module: _number(matrices["alpha"]) for module, matrices in found.items() if "alpha" in matrices}
    alpha = _alpha(file, rank, pairs, stored, alpha, option)
    return DiffusersLora(
        path=file, rank=rank, alpha=alpha, pairs=pairs, magnitudes=magnitudes, base=_recorded_base(file)
    )


def _recorded_base(file: Path) -> tuple[str, str] | None:
    header = read_metadata(file)
    digest = header.get(BASE_DIGEST)
    return None if digest is None else (header.get(BASE, "a base without name"), digest)


def records_scale(file: Path) -> bool:
    """Return whether a LoRA file, or the configuration of PEFT beside it, says by what its product is scaled."""
    found = _matrices(file).values()
    in_tensors = any(side == "alpha" or side.startswith("lokr_") for own in found for side in own)
    return in_tensors or any(config.get("lora_alpha") is not None for _, config in _configs(file))


def _read_kronecker(
    file: Path, found: Mapping[Module, Mapping[str, StoredTensor]], given: float | None, option: str
) -> DiffusersLora:
    """Describe a LoKr, with a scale of 1: its own is multiplied into w1.

    PEFT scales by alpha / r. LyCORIS and ComfyUI do so where a matrix has the rank, and by 1 elsewhere.
    """
    if given is not None:
        raise InputError(f"{file} is LoKr, whose scale is in the file; leave {option} out")
    if no_layer := [module for module in found if module[1] == PATCH]:
        raise InputError(f"{file} has LoKr on {_name(no_layer[0])}, which is not supported; train without it")
    if all(layer is None for layer, _ in found):
        raise InputError(f"{file} adapts {listed(map(_name, found))} only, and no layer; train some of a layer too")
    config = dict(next((own for source, own in _configs(file) if source == _PEFT_CONFIG), {}))
    if patterns := [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]:
        raise InputError(f"{file} has a {patterns[0]} according to {_PEFT_CONFIG}; train with one rank and alpha")
    matrices, scales = {}, {}
    for module, own in found.items():
        if others := own.keys() & {"A", "B", "magnitude"}:
            raise InputError(
                f"{file} holds {own[others.pop()].name} beside LoKr; save one adapter in a file, of one kind"
            )
        name = _name(module)
        matrices[name] = {side: tensor for side, tensor in own.items() if side != "alpha"}
        sizes = [own[side].shape[0] for side in ("lokr_w1_b", "lokr_w2_b") if side in own and own[side].shape]
        if config:
            scales[name] = _positive(file, "alpha", config.get("alpha")) / _positive(file, "r", config.get("r"))
            if others := [size for size in sizes if size != config["r"]]:
                raise _other_rank(file, _PEFT_CONFIG, config["r"], others[0])
        elif "alpha" in own and sizes:
            scales[name] = _positive(file, "alpha", _number(own["alpha"])) / (sizes[-1] or 1)  # 0 is refused below
        else:
            scales[name] = 1.0
    rank, factor, parts = read_kronecker(str(file), matrices, scales)
    return DiffusersLora(
        path=file,
        rank=rank,
        alpha=float(rank),
        pairs={},
        kronecker={module: parts[_name(module)] for module in found},
        factor=factor,
        base=_recorded_base(file),
    )


def _positive(file: Path, name: str, value: Any) -> float:
    """Return a number of LoKr, in `file` or the configuration of PEFT beside it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise InputError(
            f"{file} is LoKr, and its {name} is {spelled(value)}; expected a number above 0; save it again"
        )
    return float(value)


def _magnitudes(file: Path, found: Mapping[Module, Mapping[str, StoredTensor]]) -> dict[Module, AnyTensor]:
    """Return the magnitudes of all modules; empty for LoRA."""
    having = [module for module, own in found.items() if "magnitude" in own]
    if having and (without := [module for module in found if module not in having]):
        raise InputError(
            f"{file} has magnitudes of DoRA on {_name(having[0])} and none on {_name(without[0])}; save it again, or "
            "train all of them as DoRA"
        )
    result: dict[Module, AnyTensor] = {}
    for module in having:
        vector, num = found[module]["magnitude"], found[module]["B"].shape[0]
        # Of PEFT, LyCORIS and both with convolutions.
        if tuple(vector.shape) not in ((num,), (num, 1), (1, num, 1, 1), (num, 1, 1, 1)):
            raise InputError(
                f"{file}: {vector.name} has the shape {tuple(vector.shape)}, expected {num} magnitudes, one for each "
                "output; those of inputs, which LyCORIS makes without wd_on_output, are another method: train with it"
            )
        result[module] = LazyTensor((vector,), torch.flatten)
    return result


def _flat(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.flatten(1)


def _matrices(file: Path) -> dict[Module, dict[str, StoredTensor]]:
    """Return the tensors of each adapted module: "A", "B", "alpha", "magnitude", or those of LoKr."""
    content, *others = read_shards(file)
    if others:
        raise InputError(
            f"{file} is one of {1 + len(others)} shards of a network, by the names beside it, and a LoRA of another "
            "tool is one file; move or rename it"
        )
    parsed = {name: parse_lora_name(name) for name in content}
    unknown = {name: reason for name, reason in parsed.items() if isinstance(reason, str)}
    if unknown:
        name, reason = next(iter(unknown.items()))
        more = f"; nor can {len(unknown) - 1} more: {listed([*unknown][1:])}" if len(unknown) > 1 else ""
        raise InputError(f"{file}: {name} cannot be taken: {reason}{more}")
    found: dict[Module, dict[str, StoredTensor]] = {}
    for name, known in parsed.items():
        assert isinstance(known, LoraName)
        own = found.setdefault((known.layer, known.module), {})
        if known.side in own:
            other = own[known.side].name
            raise InputError(f"{file} holds {name} twice, under other names ({other}); save one adapter in a file")
        own[known.side] = content[name]
    unknown = {part: next(iter(own.values())).name for (_, part), own in found.items() if part not in MODULES}
    if unknown:
        raise InputError(
            f"{file} adapts {listed(sorted(unknown))}; SAT has adapters on {', '.join(MODULES)} only, and leaving "
            f"others out, e.g. {next(iter(unknown.values()))}, would change the result: train with these target "
            "modules alone, or merge the LoRA with diffusers"
        )
    require_floating({each.name: each for own in found.values() for side, each in own.items() if side != "alpha"})
    return found


def _rank(file: Path, pairs: Mapping[Module, Pair]) -> int:
    ranks: dict[int, list[str]] = {}
    for module, (a, b) in pairs.items():
        dims = (2, 4) if module[1] == PATCH else (2,)
        if len(a.shape) not in dims or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{file}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {_name(module)} have no rank in "
                "common; expected [r, D] and [D, r]"
            )
        if 0 in (*a.shape, *b.shape):
            raise InputError(f"{file} has empty matrices of {_name(module)}; copy or save it again")
        ranks.setdefault(a.shape[0], []).append(_name(module))
    if len(ranks) > 1:
        each = "; ".join(f"{rank}: {listed(names)}" for rank, names in sorted(ranks.items()))
        raise InputError(f"{file} has several ranks, and SAT has one for all: {each}; train with one rank")
    return next(iter(ranks))


def _alpha(
    file: Path,
    rank: int,
    modules: Iterable[Module],
    stored: Mapping[Module, float],
    given: float | None,
    option: str,
) -> float:
    """Find alpha, with ΔW = (alpha / r)·B·A, in any place used by training tools.

    Args:
        file: may record it in its header, or in the configuration of PEFT beside it.
        rank: of the matrices.
        modules: with adapters.
        stored: the ``.alpha`` tensors.
        given: by the user.
        option: that gives it.

    Raises:
        InputError: sources or modules contradict each other.
    """
    found: dict[str, float] = {}
    rslora: dict[str, bool] = {}
    for source, config in _configs(file):
        _require_plain(file, source, config, rank)
        if config.get("lora_alpha") is not None:
            try:
                found[source] = float(config["lora_alpha"])
            except (TypeError, ValueError, OverflowError) as error:
                shown = spelled(config["lora_alpha"])
                raise InputError(f"{file}: lora_alpha is {shown} in {source}; expected a number above 0") from error
        if config.get("use_rslora") is not None:
            rslora[source] = config["use_rslora"]
    if stored:
        found["its .alpha tensors"] = _stored_alpha(file, {module: stored.get(module, rank) for module in modules})
    if given is not None:
        found[option] = given
    for what, values in (("alpha", found), ("use_rslora", rslora)):
        if len(set(values.values())) > 1:
            sources = ", ".join(f"{value} in {source}" for source, value in values.items())
            raise InputError(
                f"{file}: {what} differs between sources: {sources}; leave {option} out, or remove what is wrong"
            )
    if not found:
        logger.info(
            "%s does not record alpha: the rank, %d, is used, as in diffusers. If the training had another lora_alpha, "
            "give it with %s",
            file,
            rank,
            option,
        )
    source, alpha = next(iter(found.items()), ("", float(rank)))
    if not (math.isfinite(alpha) and alpha > 0):
        raise InputError(f"{file}: alpha is {alpha} in {source}; expected a number above 0")
    return alpha * math.sqrt(rank) if any(rslora.values()) else alpha  # rsLoRA scales by alpha / sqrt(r)


def _number(alpha: StoredTensor) -> float:
    """Return the value of an alpha tensor, of any kind."""
    if not is_dense(alpha.values):
        raise InputError(f"{alpha.path}: {alpha.name} is sparse or quantized; expected one number")
    value = alpha.of_any_kind().compute()
    if value.numel() != 1:
        raise InputError(f"{alpha.path}: {alpha.name} has the shape {tuple(value.shape)}; expected one number")
    if value.is_complex() or value.dtype == torch.bool or not math.isfinite(value):
        raise InputError(f"{alpha.path}: {alpha.name} is {value.item()}; expected one number")
    return float(value)


def _stored_alpha(file: Path, values: Mapping[Module, float]) -> float:
    """Return the common alpha of all modules; a module without one has alpha = rank (scale 1)."""
    names: dict[float, list[str]] = {}
    for module, value in values.items():
        names.setdefault(value, []).append(_name(module))
    if len(names) > 1:
        each = "; ".join(f"{value:g}: {listed(own)}" for value, own in sorted(names.items()))
        raise InputError(f"{file} has several alphas, and SAT has one for all: {each}; train with one alpha")
    return next(iter(names))


def _configs(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield training configurations in a file and adjacent to it, each with its source."""
    for key in (HEADER_KEY, _FINETRAINERS_KEY):
        if (entry := read_entry(file, key)) is not None:
            source = f"its header ({key})"
            yield source, _checked(file, source, _of_transformer(file, source, entry))
    beside = file.parent / _PEFT_CONFIG
    if beside.is_file():
        try:
            entry = parse_json(beside.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{beside} cannot be read: {reason_of(error)}; copy or save it again") from error
        yield _PEFT_CONFIG, _checked(file, _PEFT_CONFIG, entry)


def _of_transformer(file: Path, source: str, config: Any) -> Any:
    """Return a configuration without the prefixes of its names, which diffusers gives, and without a text encoder's."""
    if not isinstance(config, Mapping):
        return config
    plain: dict[str, Any] = {}
    for full, value in config.items():
        prefix, _, name = str(full).rpartition(".")
        if prefix.startswith("text_encoder"):
            continue
        if (first := plain.setdefault(name, value)) is not value and first != value:  # NaN differs from itself
            found = f"{name} is {spelled(first)} and {spelled(value)}, under several prefixes,"
            raise InputError(f"{file}: {found} in {source}; save the LoRA of the transformer alone")
    return plain


def _checked(file: Path, source: str, config: Any) -> Mapping[str, Any]:
    """Return a configuration; refuse it if it is none, or if a value in it is of another type."""
    if not isinstance(config, Mapping):
        raise InputError(f"{file}: {source} holds {spelled(config)}; expected settings by name; save it again")
    for name, value in config.items():
        expected, words = _TYPES.get(name, (object, ""))
        is_other = isinstance(value, bool) and expected is not bool  # which Python takes for a number
        if words and value is not None and (is_other or not isinstance(value, expected)):
            raise InputError(f"{file}: {name} is {spelled(value)} in {source}; expected {words}; correct it")
    return config


def _require_plain(file: Path, source: str, config: Mapping[str, Any], rank: int) -> None:
    """Refuse methods not visible in the matrices, and contradicting values."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        raise InputError(
            f"{file} started from init_lora_weights: {start} according to {source}, which also changes the base; let "
            "PEFT make it plain LoRA (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    if config.get("peft_type") not in (None, "LORA", "LOKR"):
        raise InputError(f"{file} is {config['peft_type']} according to {source}; train LoRA, DoRA or LoKr")
    if used := [name for name in _OTHER_USES if config.get(name)]:
        raise InputError(f"{file} was trained with {used[0]} according to {source}; train plain LoRA, without it")
    alpha = config.get("lora_alpha")
    others = {name: value for name, value in (config.get("alpha_pattern") or {}).items() if value != alpha}
    if others:
        common = "none for all" if alpha is None else spelled(alpha)
        raise InputError(
            f"{file} has several alphas according to {source}: {common}, and {spelled(others)}; SAT has one for all; "
            "train with one"
        )
    if config.get("r") not in (None, rank) and not config.get("rank_pattern"):
        raise _other_rank(file, source, config["r"], rank)


def _other_rank(file: Path, source: str, said: Any, rank: int) -> InputError:
    return InputError(
        f"{file} has the rank {spelled(said)} according to {source}, and its matrices have {rank}; save it again"
    )


def _name(module: Module) -> str:
    return module_name(*module)


def listed(names: Iterable[str]) -> str:
    """Return names for a message, the first five."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
