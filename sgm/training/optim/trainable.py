"""Select the trained parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sgm.config.load import ConfigError, Problem
from sgm.util import nearest
from sgm.weights.adapters import TITLES, adapter_layer, is_adapter, is_added, kind_of
from sgm.weights.files import PREFIX
from sgm.weights.lora.dora import is_magnitude

# Prefixes in the reference's YAML files for modules that are never trained here.
OUTSIDE = ("first_stage_model", "conditioner", "denoiser", "loss_fn", "sampler")
ALL = "all"
_PATH = "model.not_trainable_prefixes"


@dataclass(frozen=True)
class Trainable:
    """The trained parameters.

    Attributes:
        names: in the network.
        num_trained: number of their elements.
        num_total: number of elements of the whole network.
        adapters: whether they are LoRA matrices.
        description: e.g. ``"LoRA of rank 4, alpha 1 in 6 layers, 24 matrices"``.
    """

    names: tuple[str, ...]
    num_trained: int
    num_total: int
    adapters: bool
    description: str

    def __str__(self) -> str:
        """Return one line for the log."""
        share = 100 * self.num_trained / self.num_total
        return f"{self.num_trained:,} of {self.num_total:,} parameters ({share:.2f} %): {self.description}"


def choose_trainable(network: nn.Module, model: Mapping[str, Any]) -> Trainable:
    """Freeze parameters according to the ``model`` section, and return the trained ones.

    Args:
        network: the diffusion transformer, also on the meta device. Frozen parameters stay frozen.
        model: the section: ``not_trainable_prefixes`` (``all`` is all but the adapters), ``lora_train``.

    Raises:
        ConfigError: nothing is trained, the base would be trained beside adapters, or a prefix matches nothing.
    """
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    prefixes = [*(model.get("not_trainable_prefixes") or ()), *([ALL] if model.get("lora_train") else [])]
    frozen = set()
    for prefix in prefixes:
        own = prefix.removeprefix(PREFIX)
        hit = {name for name in parameters if (not is_added(name) if prefix == ALL else name.startswith(own))}
        if not hit and prefix != ALL and not prefix.startswith(OUTSIDE):
            roots = sorted({name.partition(".")[0] for name in parameters})
            found = f"'{prefix}' is the beginning of no parameter of the network{nearest(own, roots)}"
            cure = f"correct or remove it; the parameters begin with {', '.join(roots)} (after '{PREFIX}')"
            raise ConfigError([Problem(_PATH, "", found, cure)])
        frozen |= hit
    for name in frozen:
        parameters[name].requires_grad_(False)
    names = tuple(name for name in parameters if name not in frozen)
    adapters = tuple(name for name in names if is_adapter(name))
    _check(names, adapters, any(map(is_adapter, parameters)))
    return Trainable(
        names=names,
        num_trained=sum(parameters[name].numel() for name in names),
        num_total=sum(p.numel() for p in network.parameters()),
        adapters=bool(adapters),
        description=_describe(network, names, adapters),
    )


def _check(names: Sequence[str], adapters: Sequence[str], has_lora: bool) -> None:
    if not names and has_lora:
        found, cure = "leaves nothing to train: a prefix covers the adapters too", f"set {_PATH}=[all]"
    elif not names:
        found = "leaves nothing to train: the base weights are frozen and there is no lora_config"
        cure = "take the model's _lora.yaml file, or remove the prefixes to train all weights"
    elif adapters and (others := [name for name in names if not is_added(name)]):
        found = f"would train {len(others):,} tensors of the base model beside the LoRA adapters, e.g. {others[0]}"
        cure = f"set {_PATH}=[all] to train the adapters only, or remove modules.lora_config to train everything"
    elif has_lora and not adapters:
        found, cure = "freezes the adapters but not the base", f"set {_PATH}=[all]"
    else:
        return
    raise ConfigError([Problem(_PATH, "", found, cure)])


def _describe(network: nn.Module, names: Sequence[str], adapters: Sequence[str]) -> str:
    if adapters:
        lora = network.get_submodule("mixins.lora")
        layers = len({adapter_layer(name) for name in adapters} - {None})
        beside = ", and the columns of the control" if len(adapters) < len(names) else ""
        kind, vectors = kind_of(adapters), sum(map(is_magnitude, adapters))
        shown = f"{TITLES[kind]} of rank {lora.r}, alpha {lora.lora_alpha:g} in {layers} layers, "
        shown += f"{len(adapters) - vectors} matrices" + (f" and {vectors} magnitudes" if vectors else "")
        return shown + beside
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    return f"{len(names)} tensors of {', '.join(parts)}"
