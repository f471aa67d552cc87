"""LoRA adapters: what a file of them says about itself, the base under it, and the configuration that fits it.

Adapters that training saves stand alone in their file, beside an entry "lora" that holds an :class:`AdapterInfo`. From
it, loading finds and verifies the base checkpoint, and sampling gets by without a ``lora_config`` in its YAML.
The format is described in docs/checkpoints.md.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.config.load import Config, ConfigError, Problem
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.files import find_weights, read_entry, read_tensors, weights_digest

logger = get_logger(__name__)

ENTRY = "lora"
LORA_TARGET = "sat.model.finetune.lora2.LoraMixin"

_ADAPTER = re.compile(r"(?:^|\.)layers\.(\d+)\..*\.matrix_[AB]\.\d+$")
_LORA_PARAMS = "model.network_config.params.modules.lora_config.params"


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What a file says about the adapters in it: ΔW = (alpha / rank)·B·A on the targets of the layers.

    Attributes:
        rank: r, rows of every A.
        alpha: numerator of the scale.
        layers: all layers that have adapters, ascending.
        base: the checkpoint that they were trained on, as ``args.load`` named it.
        base_digest: its :func:`sgm.weights.files.weights_digest`.
        targets: the projections of each layer's attention that have adapters.
    """

    rank: int
    alpha: float
    layers: tuple[int, ...]
    base: str
    base_digest: str
    targets: tuple[str, ...] = ("query_key_value", "dense")

    def to_entry(self) -> dict[str, Any]:
        """Return the plain values that a file holds."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_entry(cls, entry: Any, path: Path) -> "AdapterInfo":
        """Read the entry of the file `path`.

        Raises:
            InputError: it is not one that `to_entry` made.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entry, dict) or entry.keys() != names:
            found = f"holds {sorted(entry)}" if isinstance(entry, dict) else f"is a {type(entry).__name__}"
            raise InputError(f"{path}: its entry '{ENTRY}' {found}, expected {sorted(names)}; save the adapters anew")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        return cls(**values)

    def lora_params(self, num_layers: int) -> dict[str, Any]:
        """Return the parameters of the ``lora_config`` that builds these adapters in a network of `num_layers`."""
        params: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha}
        if self.layers != tuple(range(num_layers)):
            params["layer_range"] = list(self.layers)
        return params


def adapter_layer(name: str) -> int | None:
    """Return the layer whose adapter the tensor `name` is; None where it is no adapter. A prefix does not matter."""
    match = _ADAPTER.search(name)
    return None if match is None else int(match.group(1))


def is_adapter(name: str) -> bool:
    """Whether a tensor is a LoRA matrix, by its name in the SAT checkpoint format, with or without prefix."""
    return adapter_layer(name) is not None


def read_adapter_info(load: str | Path) -> AdapterInfo | None:
    """Return what the weights file that `load` means says about its adapters; None where it says nothing.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = find_weights(load)
    entry = read_entry(path, ENTRY)
    return None if entry is None else AdapterInfo.from_entry(entry, path)


def find_base(path: Path, base: str | Path | None = None) -> Path | None:
    """Return the weights file that the adapters in `path` belong to; None where `path` holds a whole network.

    Args:
        path: a weights file.
        base: what :func:`sgm.weights.files.find_weights` understands. Without it, the path that the file records is
            looked up from the current folder, then from the folders above the file.

    Raises:
        InputError: there is no base, it is not the one that the adapters were trained on, or none is needed.
    """
    if not all(is_adapter(name) for name in read_tensors(path)):
        if base is not None:
            raise InputError(f"{path} holds a whole network, not adapters alone; remove args.base={base}")
        return None
    info = read_adapter_info(path)
    if base is None:
        base = _recorded_base(path, info)
    found = find_weights(base)
    if all(is_adapter(name) for name in read_tensors(found)):
        raise InputError(f"{found}, named as the base of {path}, holds adapters alone; give their base with args.base")
    digest = weights_digest(found)
    if info is not None and digest != info.base_digest:
        raise InputError(
            f"{path} was trained on another base than {found}: that has the digest {digest[:12]}, and the file records "
            f"{info.base_digest[:12]} for '{info.base}'; give the right one with args.base=<folder or file>"
        )
    return found


def _recorded_base(path: Path, info: AdapterInfo | None) -> Path:
    if info is None:
        raise InputError(
            f"{path} holds LoRA matrices alone and does not say what they were trained on; give that checkpoint with "
            "args.base=<folder or file>"
        )
    candidates = [Path(info.base), *(parent / info.base for parent in path.absolute().parents)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise InputError(
        f"{path} holds adapters of '{info.base}', which is neither in the current folder nor in those above the file; "
        "say where it is with args.base=<folder or file>"
    )


def describe_adapters(config: Config) -> AdapterInfo | None:
    """Return what training with `config` will write beside its adapters; None without a ``lora_config``.

    Where ``args.load`` names adapters alone, the base of these is the base of the new ones too.

    Raises:
        InputError: the checkpoint that training starts from cannot be found or read.
    """
    section = _modules(config.model).get("lora_config")
    if section is None:
        return None
    if config.args.load is None:
        raise InputError("a lora_config adapts a trained network, and args.load is null; set args.load, or train fully")
    params = section.get("params") or {}
    path, base = find_weights(config.args.load), config.args.load
    under = find_base(path, config.args.base)
    if under is not None:
        info = read_adapter_info(path)
        base = config.args.base if info is None else default(config.args.base, info.base)
    return AdapterInfo(
        rank=params["r"],
        alpha=default(params.get("lora_alpha"), 1),
        layers=_layers(params, config.model),
        base=str(base),
        base_digest=weights_digest(default(under, path)),
    )


def with_adapters(config: Config) -> Config:
    """Return `config` with the ``lora_config`` of the adapters that ``args.load`` names, where it has none.

    Files that say nothing about adapters, or cannot be read, change nothing: loading reports on the latter.

    Raises:
        ConfigError: the configuration has a ``lora_config`` that differs from what the file says.
    """
    try:
        info = None if config.args.load is None else read_adapter_info(config.args.load)
    except InputError:
        return config
    modules = _modules(config.model)
    if info is None or not modules:
        return config
    if modules.get("lora_config") is not None:
        problems = list(_differences(info, config))
        if problems:
            raise ConfigError(config.located(problems))
        return config
    model = copy.deepcopy(config.model)
    params = info.lora_params(model["network_config"]["params"]["num_layers"])
    _modules(model)["lora_config"] = {"target": LORA_TARGET, "params": params}
    logger.info("%s holds LoRA adapters; the model gets a lora_config with %s", config.args.load, params)
    return dataclasses.replace(config, model=model, merged={**config.merged, "model": model})


def _differences(info: AdapterInfo, config: Config) -> Iterator[Problem]:
    """Hold the ``lora_config`` of a configuration against what a file says."""
    params = _modules(config.model)["lora_config"].get("params") or {}
    pairs = {
        "r": (params.get("r"), info.rank),
        "lora_alpha": (default(params.get("lora_alpha"), 1), info.alpha),
        "layer_range": (list(_layers(params, config.model)), list(info.layers)),
    }
    for name, (own, held) in pairs.items():
        if own != held:
            found = f"is {own}, but the adapters in {find_weights(str(config.args.load))} were trained with {held}"
            cure = f"set {_LORA_PARAMS}.{name}={str(held).replace(' ', '')}, or remove the lora_config: the file has it"
            yield Problem(f"{_LORA_PARAMS}.{name}", "", found, cure)


def _layers(params: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that a ``lora_config`` gives adapters to."""
    num_layers = model["network_config"]["params"]["num_layers"]
    return tuple(sorted(default(params.get("layer_range"), range(num_layers))))


def _modules(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mixins of a model section; empty where there are none."""
    return ((model.get("network_config") or {}).get("params") or {}).get("modules") or {}
