"""LoRA adapters: names, description, initialisation, base, configuration, merging.

ΔW = (alpha / r)·B·A is added to a weight W [D_out, D_in] (Hu et al. 2021, LoRA). A [r, D_in] starts uniform, B
[D_out, r] zero, so that new adapters have no effect. SAT adapts the fused query-key-value matrix by three pairs, one
for each third of its rows, and the projection after the attention by one::

    transformer.layers.<i>.attention.query_key_value.matrix_{A,B}.<0, 1, 2>
    transformer.layers.<i>.attention.dense.matrix_{A,B}.0

Other projections have adapters by ``targets``, see `sgm.weights.lora.names`. rsLoRA (Kalajdzievski 2023) scales by
alpha / √r; files record the numerator of alpha / r, alpha·√r. DoRA has magnitudes too, ``magnitude.<j>`` beside the
matrices, see `sgm.weights.lora.dora`; LoKr has others, see `sgm.weights.lora.lokr`.

| step | where |
|---|---|
| built into the network | dit_video_concat, by ``lora_config``; `with_adapters` adds that when sampling a LoRA file |
| initialised | `initial_matrix` |
| sharded over ranks | sgm.parallel.tensor.shard_adapters |
| saved alone, with an `AdapterInfo` | sgm.weights.checkpoint.save_network |
| loaded on their base (`find_base`) | sgm.weights.checkpoint.load_network |
| several at once, with strengths | sgm.weights.lora.several, `scale_adapters` of sgm.modules.lora |
| merged into the weights | sgm.weights.lora.merging |
| exported to and imported from diffusers | sgm.conversion.lora, sgm.conversion.lora_import |

The file format is described in docs/checkpoints.md.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from sgm.config.load import Config, ConfigError, Problem
from sgm.config.values import spelled
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.architecture import CONTROL_WEIGHT
from sgm.weights.files import PREFIX, find_weights, once_a_version, read_entry, read_names, weights_digest
from sgm.weights.lazy import AnyTensor, Tensors, meta
from sgm.weights.lora.lokr import W1, W2_B
from sgm.weights.lora.names import (
    ADAPTER,
    GROUPS,
    IN_LAYERS,
    LAYER,
    PROJECTIONS,
    groups_of,
    projection_of,
    starts_at_zero,
)
from sgm.weights.partition import Shard, take_shard, unsharded_shape

logger = get_logger(__name__)

ENTRY = "lora"
LORA_TARGET = "sat.model.finetune.lora2.LoraMixin"
# Projections of a layer that SAT's own adapters are on → number of pairs.
TARGETS = {"attention.query_key_value": 3, "attention.dense": 1}
DEFAULT_GROUPS = ("attention",)
# Names of adapted weights, which SAT wraps.
WRAPPED = re.compile(r"\.original\.(weight|bias)$")

_MATRIX = re.compile(r"(.+)\.matrix_([AB])\.(\d+)")
_SHIPPED = re.compile(r"\bcogvideox\S*_lora\.yaml\b")
_LORA_PARAMS = "model.network_config.params.modules.lora_config.params"

Pair = tuple[AnyTensor, AnyTensor]
Kind = Literal["lora", "dora", "lokr"]
TITLES: dict[Kind, str] = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}
_OPTIONAL = {"kind", "factor"}  # in the entry of a file


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """Description of the adapters in a file, its entry "lora".

    Attributes:
        rank: r, rows of every A.
        alpha: numerator of the scale alpha / r.
        layers: all layers that have adapters, ascending.
        base: checkpoint they were trained on, as given in ``args.load``.
        base_digest: its :func:`sgm.weights.files.weights_digest`.
        targets: the projections that have adapters, by the last part of their names in `PROJECTIONS`.
        kind: the method. Not written for LoRA, so that its files stay as they were.
        factor: of LoKr, see `sgm.weights.lora.lokr.factors_of`; not written for others.
    """

    rank: int
    alpha: float
    layers: tuple[int, ...]
    base: str
    base_digest: str
    targets: tuple[str, ...] = ("query_key_value", "dense")
    kind: Kind = "lora"
    factor: int = -1

    def to_entry(self) -> dict[str, Any]:
        """Return the plain values to be saved."""
        values = dataclasses.asdict(self)
        for name in {"lora": ("kind", "factor"), "dora": ("factor",), "lokr": ()}[self.kind]:
            del values[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_entry(cls, entry: Any, path: Path) -> "AdapterInfo":
        """Read the entry of the file `path`.

        Raises:
            InputError: it was not written by `to_entry`.
        """
        names = {field.name for field in dataclasses.fields(cls)} - _OPTIONAL
        if not isinstance(entry, dict) or entry.keys() - _OPTIONAL != names:
            found = f"holds {sorted(entry)}" if isinstance(entry, dict) else f"is {spelled(entry)}"
            raise InputError(f"{path}: its entry '{ENTRY}' {found}, expected {sorted(names)}; save the adapters anew")
        try:
            found = _INFO.validate_python(entry)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            wrong = (
                f"{path}: its entry '{ENTRY}' has {place}={fault['input']!r}: {fault['msg']}; save the adapters anew"
            )
            raise InputError(wrong) from error
        if not (math.isfinite(found.alpha) and found.alpha > 0 and found.rank > 0):
            raise InputError(
                f"{path}: its entry '{ENTRY}' has rank {found.rank} and alpha {found.alpha}, expected numbers above 0; "
                "save the adapters anew"
            )
        return found

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of `targets`, as ``lora_config`` names them."""
        return tuple(group for group in GROUPS if not set(short_names([group])).isdisjoint(self.targets))

    def lora_params(self, num_layers: int) -> dict[str, Any]:
        """Return the ``lora_config`` parameters for these adapters in a network of `num_layers`."""
        params: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha}
        if self.groups != DEFAULT_GROUPS:
            params["targets"] = list(self.groups)
        if self.kind != "lora":
            params["kind"] = self.kind
        if self.kind == "lokr":
            params["factor"] = self.factor
        if self.layers != tuple(range(num_layers)):
            params["layer_range"] = list(self.layers)
        return params

    def mismatch(self, tensors: Tensors) -> str | None:
        """Return how the matrices in `tensors` differ from this description; None if they do not."""
        ranks, layers = ranks_and_layers(tensors)
        if (kind := kind_of(tensors)) != self.kind:
            return f"the adapters are described as {TITLES[self.kind]}, and their tensors are of {TITLES[kind]}"
        if ranks <= {self.rank} and (ranks or self.kind == "lokr") and layers == self.layers:
            found = groups_of(name.removeprefix(PREFIX) for name in tensors)
            said = f"the LoRA is described as one of {', '.join(self.groups)}, and its matrices are of"
            return None if found == self.groups else f"{said} {', '.join(found)}"
        return (
            f"the LoRA is described as rank {self.rank} on the layers {list(self.layers)}, and its matrices have rank "
            f"{', '.join(map(str, sorted(ranks)))} on {list(layers)}"
        )


_INFO = TypeAdapter(AdapterInfo)


def adapter_layer(name: str) -> int | None:
    """Return the layer of a tensor of an adapter, by its name with or without prefix; None outside of the layers."""
    match = LAYER.search(name)
    return int(match[1]) if match is not None and is_adapter(name) else None


def is_adapter(name: str) -> bool:
    """Whether a tensor is one of an adapter, a matrix or magnitudes, by its name with or without prefix."""
    return ADAPTER.fullmatch(name) is not None


def kind_of(names: Iterable[str]) -> Kind:
    """Return the kind of the adapters among tensors, by their names with or without prefix."""
    kinds = {match[2] for name in names if (match := ADAPTER.fullmatch(name))}
    return "dora" if "magnitude" in kinds else "lokr" if W1 in kinds else "lora"


def is_added(name: str) -> bool:
    """Whether a tensor is trained beside a frozen base, and saved without it: LoRA matrices, and a control's columns.

    Args:
        name: with or without prefix.
    """
    return is_adapter(name) or name.removeprefix(PREFIX) == CONTROL_WEIGHT


def short_names(groups: Iterable[str]) -> tuple[str, ...]:
    """Return the projections of `groups` as an `AdapterInfo` names them: the last word of their names."""
    return tuple(_short(projection) for group in groups for projection in GROUPS[group])


def _short(projection: str) -> str:
    return projection.removesuffix(".{}.1").rpartition(".")[2]


def ranks_and_layers(tensors: Tensors) -> tuple[set[int], tuple[int, ...]]:
    """Return the ranks of all matrices among `tensors`, and their layers, ascending; of whole w2 there is no rank."""
    named = {name: match[2] for name in tensors if (match := ADAPTER.fullmatch(name))}
    ranks = {meta(tensors[name]).shape[0] for name, kind in named.items() if kind in ("matrix_A", W2_B)}
    return ranks, tuple(sorted({layer for name in tensors if (layer := adapter_layer(name)) is not None}))


def initial_matrix(
    name: str, shape: Sequence[int], shard: Shard, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return what is added to a network before training, float32: uniform as in He et al. 2015, a = √5, or zero.

    Args:
        name: of the matrix.
        shape: of this rank's shard.
        shard: the shard to return. Every rank draws the full matrix, so values do not depend on the number of ranks.
        generator: CPU generator; None uses torch's global one.
    """
    whole = torch.zeros(unsharded_shape(name, shape, shard.size))
    if is_adapter(name) and not starts_at_zero(name):  # the columns of a control start at zero, too
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    return take_shard(name, whole, shard)


def adapter_pairs(tensors: Tensors, source: str) -> dict[str, list[Pair]]:
    """Return the pairs (A, B) of each adapted projection, by its name, layers ascending; names are without prefix.

    Args:
        tensors: including the LoRA matrices.
        source: for messages.

    Raises:
        InputError: a projection not in `PROJECTIONS`, or a wrong number of matrices.
    """
    found: dict[str, dict[tuple[str, int], AnyTensor]] = {}
    for name, tensor in tensors.items():
        if is_adapter(name) and (match := _MATRIX.fullmatch(name)):
            found.setdefault(match[1], {})[match[2], int(match[3])] = tensor
    places = {name: projection_of(name) for name in found}
    result = {}
    for projection in sorted(found, key=lambda name: (places[name][0] is None, places[name])):
        matrices, num = found[projection], len(PROJECTIONS[places[projection][1]])
        if differing := sorted({(kind, index) for index in range(num) for kind in "AB"} ^ matrices.keys()):
            listed = ", ".join(f"matrix_{kind}.{index}" for kind, index in differing)
            raise InputError(
                f"the adapters of {projection} in {source} are not the {2 * num} matrices that belong there: {listed} "
                "missing or too many; give a checkpoint that was saved completely"
            )
        result[projection] = [(matrices["A", index], matrices["B", index]) for index in range(num)]
    return result


# --- Adapter files and their base.


def read_adapter_info(load: str | Path) -> AdapterInfo | None:
    """Return the description of the adapters in the weights file at `load`; None without adapters.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    return _adapter_info(find_weights(load))


@once_a_version
def _adapter_info(path: Path) -> AdapterInfo | None:
    entry = read_entry(path, ENTRY)
    return None if entry is None else AdapterInfo.from_entry(entry, path)


def adapters_alone(names: Iterable[str]) -> bool:
    """Whether a checkpoint lacks its base: all its tensors are LoRA matrices, or the columns of a control."""
    return all(map(is_added, names))


def find_base(path: Path, base: str | Path | None = None, *, option: str = "args.base=") -> Path | None:
    """Return the base weights file of the adapters in `path`; None if `path` holds a whole network.

    Args:
        path: a weights file.
        base: as for :func:`sgm.weights.files.find_weights`. None resolves the path recorded in the file, from the
            current folder, then from the parents of the file.
        option: the command-line option that sets `base`, for messages.

    Raises:
        InputError: the base is missing, is not the recorded one, or is not needed.
    """
    if not adapters_alone(read_names(path)):
        if base is not None:
            raise InputError(f"{path} holds a whole network, not adapters alone; remove {option}{base}")
        return None
    info = read_adapter_info(path)
    found = find_weights(_recorded_base(path, info, option) if base is None else base)
    cure = f"{option}<folder or file>"
    if adapters_alone(read_names(found)):
        raise InputError(f"{found}, named as the base of {path}, holds adapters alone; give their base with {cure}")
    digest = weights_digest(found)
    if info is not None and digest != info.base_digest:
        raise InputError(
            f"{path} was trained on another base than {found}: that has the digest {digest[:12]}, and the file records "
            f"{info.base_digest[:12]} for '{info.base}'; give the right one with {cure}"
        )
    return found


def _recorded_base(path: Path, info: AdapterInfo | None, option: str) -> Path:
    cure = f"{option}<folder or file>"
    if info is None:
        raise InputError(
            f"{path} holds LoRA matrices alone and does not say what they were trained on; give that checkpoint with "
            f"{cure}"
        )
    for candidate in (Path(info.base), *(parent / info.base for parent in path.absolute().parents)):
        if candidate.exists():
            return candidate
    raise InputError(
        f"{path} holds adapters of '{info.base}', which is neither in the current folder nor in those above the file; "
        f"say where it is with {cure}"
    )


# --- The configuration of adapters.


def check_lora_params(params: Mapping[str, Any], num_layers: int, most: int, shards: int = 1) -> None:
    """Refuse parameters of ``lora_config`` that the mixin accepts and fails on later.

    Args:
        params: of the section.
        num_layers: of the network.
        most: the largest rank.
        shards: number of tensor parallel ranks.

    Raises:
        InputError: the first wrong one.
    """
    rank, alpha, dropout, layers = map(params.get, ("r", "lora_alpha", "lora_dropout", "layer_range"))
    groups, kind, factor = _groups(params), default(params.get("kind"), "lora"), params.get("factor")
    in_range = layers is None or (
        isinstance(layers, Sequence) and all(i in range(num_layers) and layers.count(i) == 1 for i in layers)
    )
    known = isinstance(groups, Sequence) and all(group in GROUPS and groups.count(group) == 1 for group in groups)
    for name, legal, expected in (
        ("r", isinstance(rank, int) and 0 < rank <= most, f"a whole number from 1 to the hidden size {most}"),
        ("lora_alpha", alpha is None or alpha > 0, "a number above 0"),
        ("factor", factor is None or factor == -1 or factor > 0, "a number above 0, or -1 for the nearest to the root"),
        ("factor", factor in (None, -1) or kind == "lokr", "none: it is of kind: lokr"),
        ("targets", kind != "lokr" or "patch" not in groups, "others than patch for kind: lokr, or another kind"),
        ("kind", kind in get_args(Kind), f"one of {', '.join(get_args(Kind))}"),
        ("lora_dropout", dropout is None or 0 <= dropout < 1, "a number from 0 to below 1"),
        ("layer_range", in_range, f"a list of layers from 0 to {num_layers - 1}, each once"),
        (
            "targets",
            known and not {*groups}.isdisjoint(IN_LAYERS),
            f"some of {', '.join(GROUPS)}, each once; at least one of {', '.join(IN_LAYERS)}",
        ),
        (
            "lora_dropout",
            not dropout or tuple(groups) == DEFAULT_GROUPS,
            "0 with targets beside attention, whose tokens have no dropout",
        ),
    ):
        if not legal:
            raise InputError(f"{_LORA_PARAMS}.{name} is {spelled(params.get(name))}; give {expected}")
    check_shards(params, shards)


def check_shards(params: Mapping[str, Any], shards: int) -> None:
    """Refuse adapters of ``lora_config`` that tensor parallelism does not shard.

    Raises:
        InputError: there are several ranks, and they are not LoRA of attention.
    """
    groups, kind = _groups(params), default(params.get("kind"), "lora")
    if shards > 1 and tuple(groups) != DEFAULT_GROUPS:
        raise InputError(
            f"{_LORA_PARAMS}.targets is {spelled(params.get('targets'))}, and args.model_parallel_size above 1 shards "
            "adapters of attention only; set it to 1, and share clips by args.sequence_parallel_size instead"
        )
    if shards > 1 and kind != "lora":
        raise InputError(
            f"{_LORA_PARAMS}.kind is {kind}, which is for whole weights, and args.model_parallel_size above 1 shards "
            "them; set it to 1, and share clips by args.sequence_parallel_size instead"
        )


def _groups(params: Mapping[str, Any]) -> Sequence[str]:
    """Return what a ``lora_config`` adapts."""
    given = default(params.get("targets"), DEFAULT_GROUPS)
    return given if isinstance(given, str) else tuple(given)


def _alpha_of(params: Mapping[str, Any], numerator: float) -> float:
    """Return the ``lora_alpha`` for which `scale_numerator` is `numerator`."""
    if not params.get("rank_stabilized"):
        return numerator
    alpha = numerator / math.sqrt(params["r"])
    return float(round(alpha)) if math.isclose(alpha, round(alpha)) else alpha  # as it was typed


def scale_numerator(params: Mapping[str, Any]) -> float:
    """Return the numerator of the scale, over r, of a ``lora_config``: its alpha, of rsLoRA alpha·√r."""
    alpha = default(params.get("lora_alpha"), 1)
    return alpha * math.sqrt(params["r"]) if params.get("rank_stabilized") else alpha


def describe_adapters(config: Config) -> AdapterInfo | None:
    """Return the description of the adapters that `config` trains; None without a ``lora_config``.

    If ``args.load`` is an adapters-only file, its base is also the base of the new adapters.

    Raises:
        InputError: the initial checkpoint cannot be found or read.
    """
    section = _modules(config.model).get("lora_config")
    if section is None:
        return None
    if config.args.load is None:
        raise InputError("a lora_config adapts a trained network, and args.load is null; set args.load, or train fully")
    params = section.get("params") or {}
    path, base = find_weights(config.args.load), config.args.load
    base_file = find_base(path, config.args.base)
    if base_file is not None:
        info = read_adapter_info(path)
        base = config.args.base if info is None else default(config.args.base, info.base)
    return AdapterInfo(
        rank=params["r"],
        alpha=scale_numerator(params),
        layers=_layers(params, config.model),
        targets=short_names(group for group in GROUPS if group in _groups(params)),
        kind=default(params.get("kind"), "lora"),
        factor=default(params.get("factor"), -1),
        base=str(base),
        base_digest=weights_digest(default(base_file, path)),
    )


def with_adapters(config: Config) -> Config:
    """Return `config` with a ``lora_config`` for the adapters in ``args.load``, if it has none.

    Files without a description of adapters have no effect, nor do unreadable ones (loading reports them).

    Raises:
        ConfigError: the configuration has a ``lora_config`` that contradicts the file.
    """
    try:
        info = None if config.args.load is None else read_adapter_info(config.args.load)
    except InputError:
        return config
    modules = _modules(config.model)
    if info is None and modules.get("lora_config") is not None and _holds_adapters(config.args.load):
        return keep_alpha(config, 1, f"{config.args.load} records none, and the reference trains with")
    if info is None or not modules:
        return config
    if modules.get("lora_config") is not None:
        config = keep_alpha(config, info.alpha, f"{config.args.load} records")
        problems = list(_differences(info, config))
        if problems:
            raise ConfigError(config.located(problems))
        return config
    model = copy.deepcopy(config.model)
    params = info.lora_params(model["network_config"]["params"]["num_layers"])
    _modules(model)["lora_config"] = {"target": LORA_TARGET, "params": params}
    logger.info("%s holds LoRA adapters; the model gets a lora_config with %s", config.args.load, params)
    return dataclasses.replace(config, model=model, merged={**config.merged, "model": model})


def _holds_adapters(load: str | None) -> bool:
    return load is not None and any(map(is_adapter, read_names(find_weights(load))))


def keep_alpha(config: Config, numerator: float, reason: str) -> Config:
    """Return `config` with the alpha of its checkpoint, if its own is that of a shipped file, meant for new adapters.

    An alpha in any other file or on the command line stays.

    Args:
        config: with a ``lora_config``.
        numerator: of the scale in the checkpoint, see `scale_numerator`.
        reason: the beginning of a message.
    """
    params = _modules(config.model)["lora_config"].get("params") or {}
    source = config.origins.get(f"{_LORA_PARAMS}.lora_alpha", "")
    alpha = _alpha_of(params, numerator)
    if params.get("lora_alpha") in (None, alpha) or not _SHIPPED.search(source):
        return config
    logger.info("%s alpha %g, which is used in place of that for new adapters in %s", reason, alpha, source)
    model = copy.deepcopy(config.model)
    _modules(model)["lora_config"]["params"]["lora_alpha"] = alpha
    return dataclasses.replace(config, model=model, merged={**config.merged, "model": model})


def _differences(info: AdapterInfo, config: Config) -> Iterator[Problem]:
    """Yield contradictions between the ``lora_config`` and the description in its file."""
    params = _modules(config.model)["lora_config"].get("params") or {}
    pairs = {
        "r": (params.get("r"), info.rank),
        "lora_alpha": (default(params.get("lora_alpha"), 1), _alpha_of(params, info.alpha)),
        "layer_range": (list(_layers(params, config.model)), list(info.layers)),
        "targets": (sorted(_groups(params)), sorted(info.groups)),
        "kind": (default(params.get("kind"), "lora"), info.kind),
        "factor": (default(params.get("factor"), -1), info.factor),
    }
    for name, (configured, trained) in pairs.items():
        if configured != trained:
            file = find_weights(str(config.args.load))
            found = f"is {configured}, but the adapters in {file} were trained with {trained}"
            value = str(trained).replace(" ", "")
            cure = f"set {_LORA_PARAMS}.{name}={value}, or remove the lora_config: the file has it"
            yield Problem(f"{_LORA_PARAMS}.{name}", "", found, cure)


def _layers(params: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that a ``lora_config`` adapts, ascending."""
    num_layers = model["network_config"]["params"]["num_layers"]
    return tuple(sorted(default(params.get("layer_range"), range(num_layers))))


def _modules(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mixins of a model section; empty if it has none."""
    return ((model.get("network_config") or {}).get("params") or {}).get("modules") or {}
