"""Several LoRAs at once, each with its strength: ``args.loras``.

Adapters of the ranks r₁, r₂, ... are one adapter of the rank r₁ + r₂ + ...::

    Σ fᵢ·Bᵢ·Aᵢ = [B₁ B₂ ...]·diag(f)·[A₁; A₂; ...]

so the network has the layers of one LoRA, whichever files they come from, and the factors f, one a row of A, change
with the layer and with the step: fᵢ = strength of the layer × schedule at the step × alphaᵢ/rᵢ.

What a DoRA adds is g·(W + s·B·A) - W (`sgm.weights.lora.dora`), and g is known when sampling starts: it is a LoRA with
the matrix g·B, and a share g - 1 of W beside it. The shares h = Σ strength·(g - 1) of all are one vector for each
projection. LoKr has no small rank: one is sampled alone, with its strength, and several are merged.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgm.config.args import LoraArgs
from sgm.config.load import Config, ConfigError, Problem
from sgm.config.values import spelled
from sgm.log import get_logger
from sgm.modules.geometry import normalize_patch_size
from sgm.util import InputError, default
from sgm.weights.adapters import DEFAULT_GROUPS, LORA_TARGET, TITLES, adapters_alone, is_adapter, read_adapter_info
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.lora.dora import Gains, is_magnitude
from sgm.weights.lora.files import Lora, network_of, read_any_lora, require_base, require_kind
from sgm.weights.lora.lokr import shapes_of
from sgm.weights.lora.merging import in_order
from sgm.weights.lora.names import (
    ADAPTER,
    GROUPS,
    IN_LAYERS,
    MODULATION,
    PARTS,
    PATCH,
    part_of,
    projection_of,
    sat_name,
)

logger = get_logger(__name__)

_GROUP = re.compile(r"(\d+)(?:-(\d+))?")
_OUTSIDE = "embeddings"  # the group of strengths outside of the layers
_MODULES = "model.network_config.params.modules"


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A LoRA with its strength.

    Attributes:
        lora: its adapters.
        strengths: factor of each layer of the network; 0 where it has no adapters.
        outside: factor outside of the layers, of the projections of patches and text; 0 without adapters there.
        schedule: (share of the steps, factor), ascending; linear in between, constant before and after.
        gains: of a DoRA, whose `lora` has them in its matrices.
    """

    lora: Lora
    strengths: Sequence[float]
    outside: float = 0.0
    schedule: Sequence[tuple[float, float]] = ()
    gains: Gains | None = None

    def on(self, base: Tensors) -> "Scaled":
        """Return the same for the weights of a base, as LoRA and gains if it is a DoRA."""
        if self.lora.kind != "dora":
            return self
        gains = Gains(self.lora.tensors, base, self.lora.alpha / self.lora.rank, str(self.lora.path))
        return dataclasses.replace(
            self, lora=dataclasses.replace(self.lora, tensors=gains.put_into(self.lora.tensors)), gains=gains
        )

    def share(self, layer: int | None, part: str, at: float) -> torch.Tensor | None:
        """Return strength·(g - 1) of a module at a share of the steps; None without any."""
        name, factor = sat_name(layer, part, "B"), self.at(at) * self.strength(layer)
        if self.gains is None or not factor or name not in self.lora.tensors:
            return None
        return factor * (self.gains.of(name) - 1)

    def strength(self, layer: int | None) -> float:
        """Return the strength of a layer, or outside of the layers."""
        return self.outside if layer is None else self.strengths[layer]

    def at(self, share: float) -> float:
        """Return the factor of the schedule at a share of the steps; of two points at one share, the later begins."""
        before = [point for point in self.schedule if point[0] <= share]
        after = [point for point in self.schedule if point[0] > share]
        if not self.schedule:
            return 1.0
        if not before or not after:
            return after[0][1] if after else before[-1][1]
        (begin, first), (end, last) = before[-1], after[0]
        return first + (last - first) * (share - begin) / (end - begin)


@dataclass(frozen=True, kw_only=True)
class LoraStack:
    """Several LoRAs as one.

    Attributes:
        members: those with an effect anywhere.
        shapes: (D_in, D_out) of each module of diffusers that may have adapters, by its name in a block.
    """

    members: Sequence[Scaled]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        """The sum of all ranks."""
        return sum(member.lora.rank for member in self.members)

    @property
    def alpha(self) -> float:
        """The alpha of the network's adapters: of a single LoRA its own, of several their rank, a scale of 1."""
        return self.members[0].lora.alpha if len(self.members) == 1 else float(self.rank)

    @property
    def kronecker(self) -> Lora | None:
        """The LoKr, which is alone; None of others."""
        return next((member.lora for member in self.members if member.lora.kind == "lokr"), None)

    @property
    def layers(self) -> list[int | None]:
        """The layers in which any LoRA has an effect, ascending; then None if one has outside of them."""
        factors = enumerate(zip(*(m.strengths for m in self.members), strict=True))
        outside = [None] if any(member.outside for member in self.members) else []
        return [*(layer for layer, own in factors if any(own)), *outside]

    @property
    def groups(self) -> tuple[str, ...]:
        """What has adapters, see `sgm.weights.lora.names.GROUPS`."""
        found, outside = {group for member in self.members for group in member.lora.groups}, None in self.layers
        return tuple(group for group in GROUPS if group in found and (outside or group in IN_LAYERS))

    def params(self) -> dict[str, Any]:
        """Return the parameters of the ``lora_config`` of a network with these adapters."""
        inside = [layer for layer in self.layers if layer is not None]
        params: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "layer_range": inside}
        params |= {"kind": "lokr", "factor": self.kronecker.factor} if self.kronecker else {}
        return params if self.groups == DEFAULT_GROUPS else params | {"targets": list(self.groups)}

    @property
    def changes(self) -> bool:
        """Whether the factors differ from step to step."""
        return any(len({factor for _, factor in member.schedule}) > 1 for member in self.members)

    def factors(self, share: float) -> torch.Tensor:
        """Return the factors (number of `layers`, rank) at a share of the steps, float32 on the CPU."""
        scale, columns = self.alpha / self.rank, []
        for member in self.members:
            own = member.at(share) * ((member.lora.alpha / member.lora.rank) / scale)
            column = torch.tensor([member.strength(layer) * own for layer in self.layers])
            columns.append(column[:, None].expand(-1, member.lora.rank))
        return torch.cat(columns, dim=1)

    def shares(self, share: float) -> dict[str, torch.Tensor]:
        """Return h (D_out,) of the projections with DoRA at a share of the steps, float32 on the CPU."""
        result = {}
        for layer in self.layers if any(member.gains for member in self.members) else ():
            for group in (group for group in self.groups if (group in IN_LAYERS) == (layer is not None)):
                for projection, parts in GROUPS[group].items():
                    own = [self._share(layer, part, share) for part in parts]
                    whole = in_order(own) if projection == MODULATION else torch.cat(own)
                    result |= {projection.format(layer): whole} if whole.any() else {}
        return result

    def _share(self, layer: int | None, part: str, at: float) -> torch.Tensor:
        shares = [own for member in self.members if (own := member.share(layer, part, at)) is not None]
        return torch.stack(shares).sum(0) if shares else torch.zeros(self.shapes[part][1])

    def tensors(self) -> dict[str, LazyTensor]:
        """Return the matrices of all LoRAs as one, by SAT's names, lazy; zero where a LoRA has none."""
        if (lora := self.kronecker) is not None:
            return {
                name: LazyTensor((lora.tensors.get(name, torch.zeros(shape)),))
                for layer in self.layers
                for part in self._parts(layer)
                for name, shape in kronecker_shapes(lora, layer, part, self.shapes[part]).items()
            }
        return {
            sat_name(layer, part, kind): self._joined(layer, part, kind)
            for layer in self.layers
            for part in self._parts(layer)
            for kind in "AB"
        }

    def _parts(self, layer: int | None) -> list[str]:
        groups = [group for group in self.groups if (group in IN_LAYERS) == (layer is not None)]
        return [part for group in groups for parts in GROUPS[group].values() for part in parts]

    def scaled(self) -> dict[str, LazyTensor]:
        """Return the matrices as in `tensors`, with the factors of the first step in B."""
        result = self.tensors()
        for layer, factors in zip(self.layers, self.factors(0.0), strict=True):
            if bool((factors == 1).all()):
                continue
            for name in (sat_name(layer, part, "B") for part in self._parts(layer)):
                result[name] = LazyTensor((result[name], factors), _columns)
        return result

    def _joined(self, layer: int | None, part: str, kind: str) -> LazyTensor:
        name, dim = sat_name(layer, part, kind), 0 if kind == "A" else 1
        found = [(member.lora.tensors.get(name), member.lora.rank) for member in self.members]
        tail = next((tuple(each.shape[1:]) for each, _ in found if each is not None), (self.shapes[part][0],))
        shapes = [(rank, *tail) if kind == "A" else (self.shapes[part][1], rank) for _, rank in found]
        pieces = [torch.zeros(shape) if each is None else each for (each, _), shape in zip(found, shapes, strict=True)]
        return LazyTensor((pieces[0],)) if len(pieces) == 1 else LazyTensor(tuple(pieces), partial(_cat, dim))

    def rows(self) -> Iterator[str]:
        """Yield a text for each LoRA: its file, rank, alpha, layers and strength."""
        for member in self.members:
            lora, own = member.lora, sorted({member.strengths[layer] for layer in member.lora.layers})
            what = "" if lora.groups == DEFAULT_GROUPS else f" ({', '.join(lora.groups)})"
            kind = "DoRA of " if member.gains else "LoKr of " if lora.kind == "lokr" else ""
            strength = f"{own[0]:g}" if len(own) == 1 else f"{own[0]:g} to {own[-1]:g}, by layer"
            steps = "; ".join(f"{factor:g} at {share:g}" for share, factor in member.schedule)
            yield (
                f"{lora.path}: {kind}rank {lora.rank}, alpha {lora.alpha:g}, {len(lora.layers)} of "
                f"{len(member.strengths)} layers{what}; strength {strength}{f', of the steps {steps}' if steps else ''}"
            )


def _columns(b: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return b.float() * factors


def _cat(dim: int, *tensors: torch.Tensor) -> torch.Tensor:
    # torch promotes no two dtypes of which one has eight bits.
    return torch.cat([each.float() if each.element_size() == 1 else each for each in tensors], dim)


def kronecker_shapes(lora: Lora, layer: int | None, part: str, size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the matrices of a module with LoKr, by SAT's names; its size is (D_in, D_out)."""
    shapes = shapes_of(size[1], size[0], lora.rank, lora.factor)
    return {sat_name(layer, part, kind): shape for kind, shape in shapes.items()}


def stack_of(config: Config) -> LoraStack | None:
    """Return the LoRAs of ``args.loras``, whose matrices are not read yet; None if there are none with an effect.

    Raises:
        ConfigError: all problems: files that cannot be read, or do not fit the network or its base, and strengths.
    """
    params = config.model["network_config"]["params"]
    members, problems = [], []
    base = _Base(config)
    for index, entry in enumerate(config.args.loras):
        place = f"args.loras.{index}"
        try:
            members.append(base.under(_scaled(entry, place, params, base)))
        except ConfigError as error:
            problems += error.problems
        except InputError as error:
            problems.append(Problem(f"{place}.path", "", str(error), "give another LoRA, or remove this entry"))
    if problems:
        raise ConfigError(config.located(problems))
    used = [
        m
        for m in members
        if any((*m.strengths, m.outside)) and (not m.schedule or any(factor for _, factor in m.schedule))
    ]
    stack = LoraStack(members=used, shapes=_shapes(params))
    if stack.kronecker is not None and len(used) > 1:
        found = f"holds a LoKr beside others, {stack.kronecker.path}, which can be sampled alone only"
        cure = "merge some into the weights first: tools/merge_lora_weight.py takes all kinds"
        raise ConfigError(config.located([Problem("args.loras", "", found, cure)]))
    if stack.rank > params["hidden_size"]:
        found = f"have {stack.rank} ranks together, more than the hidden size {params['hidden_size']}"
        cure = "merge some into the weights first: tools/merge_lora_weight.py"
        raise ConfigError(config.located([Problem("args.loras", "", found, cure)]))
    return stack if used else None


def with_loras(config: Config) -> Config:
    """Return `config` with a ``lora_config`` for the adapters of ``args.loras``; the same without any.

    Raises:
        ConfigError: there are other adapters, or as `stack_of`.
    """
    if not config.args.loras:
        return config
    if problems := list(_other_adapters(config)):
        raise ConfigError(config.located(problems))
    stack = stack_of(config)
    if stack is None:
        return config
    model = copy.deepcopy(config.model)
    section = {"target": LORA_TARGET, "params": stack.params()}
    model["network_config"]["params"]["modules"]["lora_config"] = section
    return dataclasses.replace(config, model=model, merged={**config.merged, "model": model})


def _other_adapters(config: Config) -> Iterator[Problem]:
    """Yield the adapters of the model or its weights, beside which there can be none of ``args.loras``."""
    load = config.args.load
    info = None if load is None else _tried(lambda: read_adapter_info(load))
    names = () if load is None else default(_tried(lambda: read_tensors(find_weights(load))), ())
    if names and adapters_alone(names):
        base = f"args.load={info.base}" if info is not None else "args.load to its base"
        cure = f"set {base}, and add {{path: {load}}} to args.loras"
        yield Problem("args.load", "", f"holds adapters itself, {load}, beside those of args.loras", cure)
    elif any(map(is_adapter, names)):
        found = f"holds a network with adapters, {load}, beside those of args.loras"
        yield Problem("args.load", "", found, "merge them first: tools/merge_lora_weight.py")
    elif config.model["network_config"]["params"]["modules"].get("lora_config") is not None:
        cure = "take the model's file without _lora: args.loras says what adapters there are"
        yield Problem(f"{_MODULES}.lora_config", "", "is given beside args.loras", cure)


def _tried(work: Callable[[], Any]) -> Any:
    """Return the result of `work`; None for files that cannot be read, which is reported where they are loaded."""
    try:
        return work()
    except InputError:
        return None


class _Base:
    """The weights that adapters are for; looked at only if a LoRA names its own, or is DoRA."""

    def __init__(self, config: Config) -> None:
        load, self._shards = config.args.load, config.args.model_parallel_size
        self._weights: Tensors = {}
        self.path: Path | None = None if load is None else _tried(lambda: find_weights(load))

    def under(self, member: Scaled) -> Scaled:
        """Return a LoRA on the weights of this base, which DoRA depends on."""
        kind = member.lora.kind
        if kind != "lora" and self._shards > 1:
            raise InputError(
                f"{member.lora.path} is {TITLES[kind]}, which is for whole weights, and args.model_parallel_size "
                "above 1 shards them; share videos by args.sequence_parallel_size instead"
            )
        if member.lora.groups != DEFAULT_GROUPS and self._shards > 1:
            raise InputError(
                f"{member.lora.path} adapts {', '.join(member.lora.groups)}, and args.model_parallel_size above 1 "
                "shards adapters of attention only; share videos by args.sequence_parallel_size instead"
            )
        if kind != "dora":
            return member
        if self.path is None:
            raise InputError(f"{member.lora.path} is DoRA, which depends on the weights of args.load; give them")
        self._weights = self._weights or network_of(self.path)
        return member.on(self._weights)

    def require(self, lora: Lora, place: str) -> None:
        """Refuse a LoRA that was trained on other weights."""
        if self.path is not None:
            own = f"set args.load to that, or {place}.any_base=true if it is meant for these weights too"
            require_base(lora, self.path, own)


def _scaled(entry: LoraArgs, place: str, params: Mapping[str, Any], base: _Base) -> Scaled:
    """Read an entry of ``args.loras``."""
    lora = read_any_lora(entry.path, alpha=entry.alpha, option=f"{place}.alpha")
    if base.path is not None and not entry.any_base:
        require_kind(lora, base.path)  # in these words, before shapes
    _require_fitting(lora, params["num_layers"], _shapes(params))
    if not entry.any_base:
        base.require(lora, place)
    strengths = [float(layer in lora.layers) for layer in range(params["num_layers"])]
    given, outside = layer_strengths(entry.strength, f"{place}.strength", lora, params["num_layers"])
    schedule = entry.schedule or ()
    if list(shares := [share for share, _ in schedule]) != sorted(shares):
        cure = "give [share, factor] in the order of the steps, shares ascending from 0 to 1"
        raise ConfigError(
            [Problem(f"{place}.schedule", "", f"is {spelled([list(point) for point in schedule])}", cure)]
        )
    strengths = [a * b for a, b in zip(strengths, given, strict=True)]
    return Scaled(lora=lora, strengths=strengths, outside=outside, schedule=schedule)


def layer_strengths(
    strength: float | Mapping[str, float], place: str, lora: Lora, num_layers: int
) -> tuple[list[float], float]:
    """Return the strength of each layer, and outside of them (0 where the LoRA has nothing).

    Args:
        strength: of all, or by groups of layers: ``{"0-14": 1.0, "15": 0.5, "embeddings": 1.0}``, which name every
            layer that the LoRA has, and the projections outside of them if it adapts those.
        place: of `strength`, for messages.
        lora: whose strength it is.
        num_layers: of the network.

    Raises:
        ConfigError: a group is not of that form, layers are missing, or named twice.
    """
    has_outside = not set(lora.groups) <= set(IN_LAYERS)
    if not isinstance(strength, Mapping):
        return [float(strength)] * num_layers, float(strength) * has_outside
    found: dict[int, float] = {}
    if (_OUTSIDE in strength) != has_outside:
        what = "adapts the projections of patches or text" if has_outside else "has no adapters outside of the layers"
        cure = f"{'give' if has_outside else 'remove'} the strength of '{_OUTSIDE}'"
        raise ConfigError([Problem(place, "", f"is by layers, and {lora.path} {what}", cure)])
    for group, value in strength.items():
        if group == _OUTSIDE:
            continue
        match = _GROUP.fullmatch(group.replace(" ", ""))
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not layers or layers[-1] >= num_layers:
            cure = f"give layers from 0 to {num_layers - 1}, such as 0-{num_layers - 1} or {num_layers - 1}"
            raise ConfigError([Problem(f"{place}.{group}", "", "is no group of layers of this model", cure)])
        if twice := sorted(found.keys() & set(layers)):
            raise ConfigError(
                [Problem(f"{place}.{group}", "", f"names layer {twice[0]} again", "name each layer once")]
            )
        found |= dict.fromkeys(layers, value)
    if missing := [layer for layer in lora.layers if layer not in found]:
        said = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        cure = "give their strength too, 0 for none"
        raise ConfigError([Problem(place, "", f"leaves out layers with adapters: {said}", cure)])
    return [found.get(layer, 0.0) for layer in range(num_layers)], strength.get(_OUTSIDE, 0.0)


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (D_in, D_out) of each module that may have adapters, from the parameters of a network."""
    size, modules = params["hidden_size"], params["modules"]
    patch = params["in_channels"] * math.prod(normalize_patch_size(params["patch_size"]))
    text = (modules["patch_embed_config"].get("params") or {}).get("text_hidden_size", 0)
    others = {PATCH: (patch, size), "patch_embed.text_proj": (text, size)}
    return block_shapes(size, params["time_embed_dim"]) | others


def block_shapes(size: int, time_embed_dim: int) -> dict[str, tuple[int, int]]:
    """Return (D_in, D_out) of the modules of a block of a hidden size."""
    ff = {"ff.net.0.proj": (size, 4 * size), "ff.net.2": (4 * size, size)}
    modulation = dict.fromkeys(GROUPS["adaln"][MODULATION], (time_embed_dim, 6 * size))
    return dict.fromkeys(PARTS, (size, size)) | ff | modulation


def _require_fitting(lora: Lora, num_layers: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a LoRA of a network of another depth or width."""
    cure = "give a LoRA of this model, or the YAML and weights of the model that it was trained on"
    if lora.layers[-1] >= num_layers:
        raise InputError(f"{lora.path} adapts layer {lora.layers[-1]}, and the model has {num_layers}; {cure}")
    if lora.kind == "lokr":
        _require_fitting_kronecker(lora, shapes, cure)
        return
    for name, tensor in lora.tensors.items():
        size_in, size_out = shapes[part_of(name)]
        expected = (lora.rank, size_in) if ".matrix_A." in name else (size_out, lora.rank)
        expected = (size_out, 1) if is_magnitude(name) else expected
        if (tensor.shape[0], math.prod(tensor.shape[1:])) != expected:
            raise InputError(
                f"{lora.path} is for another model: its {name} has the shape {tuple(tensor.shape)}, and this one needs "
                f"{expected}; {cure}"
            )


def _require_fitting_kronecker(lora: Lora, shapes: Mapping[str, tuple[int, int]], cure: str) -> None:
    for name, tensor in lora.tensors.items():
        match, part = ADAPTER.fullmatch(name), part_of(name)
        assert match is not None, "a name of SAT"
        expected = kronecker_shapes(lora, projection_of(match[1])[0], part, shapes[part]).get(name)
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"{lora.path} is for another model: its {name} has the shape {tuple(tensor.shape)}, and this one needs "
                f"{expected}; {cure}"
            )
