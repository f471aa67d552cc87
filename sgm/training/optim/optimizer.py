"""Optimizers by name, parameter groups for weight decay, and what an optimizer needs of DeepSpeed.

ZeRO hands an optimizer flat slices of the parameters, which is right for rules that treat every element alone. `Kind`
says which do not, and `make_optimizer` wraps or refuses them.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode

import sgm.distributed
from sgm.training.optim.average import average_kept, has_master_copies, inside, keep_average
from sgm.training.optim.muon import Muon
from sgm.training.optim.whole import WholeMatrices
from sgm.util import InputError, default, get_obj_from_str, nearest

# SAT's FusedEmaAdam compiles a CUDA extension at its first use; AdamW with `keep_average` has the same update rule.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sat.ops.FusedEmaAdam": torch.optim.AdamW,
    "sat.ops.fused_ema_adam.FusedEmaAdam": torch.optim.AdamW,
    "FusedEmaAdam": torch.optim.AdamW,
    "AdamW": torch.optim.AdamW,
    "FusedAdam": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "Muon": Muon,
    "torch.optim.Muon": Muon,  # which takes matrices only
}


@dataclass(frozen=True)
class Kind:
    """What an optimizer needs.

    Attributes:
        whole: matrices in their shape, since its state or its update is not that of single elements.
        sums: sums over all parameters, since it estimates one rate for all.
        own_rate: a constant schedule, since it finds or averages over its own.
    """

    whole: bool = False
    sums: bool = False
    own_rate: bool = False

    @property
    def elementwise(self) -> bool:
        """Whether ZeRO-3, which updates the parameters in parts, has the same results."""
        return self == Kind()


# By the dotted path of a class or of one that it derives from, or a package above. Others count as elementwise.
KINDS = {
    "bitsandbytes.optim.lamb": Kind(whole=True),  # a rate for each tensor
    "bitsandbytes.optim.lars": Kind(whole=True),
    "came_pytorch": Kind(whole=True),  # moments factored into rows and columns
    "prodigyopt": Kind(sums=True, own_rate=True),
    "schedulefree": Kind(own_rate=True),
    "sgm.training.optim.muon": Kind(whole=True),  # orthogonal updates
    "torch.optim.Adafactor": Kind(whole=True),
    "torchao.optim": Kind(whole=True),  # stores tensors in 8 bits whose elements are multiples of its blocks
    "transformers.optimization": Kind(whole=True),
}


def kind_of(name: str) -> Kind:
    """Return what the optimizer of a YAML name needs."""
    return _kind(resolve_optimizer(name))


def _kind(cls: type) -> Kind:
    paths = [f"{base.__module__}.{base.__qualname__}." for base in cls.__mro__]
    return next((kind for root, kind in KINDS.items() if any(path.startswith(f"{root}.") for path in paths)), Kind())


def steps_in_slices(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ZeRO 1 and 2 may let it update a part of its parameters after the other."""
    cls = type(optimizer)
    # bitsandbytes keeps statistics of blocks of a tensor, whose number a slice does not have.
    return not (_kind(cls).sums or any(base.__module__.startswith("bitsandbytes.") for base in cls.__mro__))


@functools.cache
def _has_fused_kernel(device: torch.device) -> bool:
    """Whether AdamW has a fused kernel for `device`, found by trying, since torch's list of devices is private."""
    weight, gradient, mean, square = ([torch.zeros(1, device=device)] for _ in range(4))
    state = mean, square, [], [torch.zeros((), device=device)]
    choices: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False}
    try:  # the function, since an optimizer's step imports torch's compiler
        adamw(weight, gradient, *state, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.0, eps=1e-8, **choices)
    except RuntimeError:  # includes NotImplementedError, raised without the kernel
        return False
    return True


def resolve_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return an optimizer class by its key in `OPTIMIZERS` or its dotted path.

    Raises:
        InputError: the name is unknown, or the class is no torch optimizer.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." not in name:
        raise InputError(
            f"deepspeed.optimizer.type: unknown optimizer '{name}'{nearest(name, list(OPTIMIZERS))}; known are "
            f"{', '.join(OPTIMIZERS)}, and the dotted path of any other, e.g. torch.optim.SGD"
        )
    try:
        found = get_obj_from_str(name)
    except InputError as error:
        raise InputError(f"deepspeed.optimizer.type: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' is not a subclass of torch.optim.Optimizer; give one, e.g. AdamW"
        )
    if found.__name__ == "CPUOffloadOptimizer":
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' moves gradients on its own, beside DeepSpeed, which does that too; "
            "let DeepSpeed alone: configs/optimizer/cpu_offload.yaml, or "
            "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        )
    return found


def make_optimizer(
    section: Mapping[str, Any],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    ema_decay: float | None = None,
    zero: Mapping[str, Any] | None = None,
    tensor: int | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a ``{type: ..., params: {...}}`` section, ready for its first step.

    Frozen parameters are ignored. Weight decay applies to parameters with more than one axis, not to biases and norms.

    Args:
        section: of the YAML.
        named_parameters: of the network.
        ema_decay: of the moving average of the weights; None for no average.
        zero: the ``zero_optimization`` section of the engine that the optimizer is for; None without DeepSpeed.
        tensor: tensor parallel size; None: that of this process.

    Raises:
        InputError: the type is unknown, refuses a parameter, or cannot work at the ZeRO stage or tensor parallel size.
    """
    name, params = section["type"], dict(section.get("params") or {})
    if "betas" in params:
        params["betas"] = tuple(map(float, params["betas"]))  # torch refuses whole numbers
    cls, kind = resolve_optimizer(name), kind_of(name)
    _check_names(name, cls, params)
    stage = (zero or {}).get("stage", 0)
    _check_stage(name, kind, zero or {}, default(tensor, sgm.distributed.tensor_parallel_size()))
    if kind.sums and stage > 0:
        params["fsdp_in_use"] = True  # the name in prodigyopt for slices of parameters
    groups = _decay_groups(named_parameters, by_axes=cls is Muon, one=kind.sums and not params.get("weight_decay"))
    if kind.sums and stage > 0 and len(groups) > 1:
        raise InputError(
            f"deepspeed.optimizer: '{name}' finds one rate for all parameters, and ZeRO updates those with and without "
            "weight decay separately; set deepspeed.optimizer.params.weight_decay=0, or "
            "deepspeed.zero_optimization.stage=0"
        )
    try:
        if kind.whole and stage > 0:
            optimizer: torch.optim.Optimizer = WholeMatrices(groups, _adapted(cls), params)
        else:
            optimizer = _adapted(cls)(groups, **params)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"deepspeed.optimizer: '{name}' refuses its parameters {params}: {error}") from error
    if cls is torch.optim.AdamW and not {"fused", "foreach"} & params.keys():
        for group in optimizer.param_groups:
            group["fused"] = all(_has_fused_kernel(p.device) for p in group["params"]) or None
    if callable(train := getattr(optimizer, "train", None)):  # schedule-free
        train()
        optimizer.state.clear()  # it made an empty state for parameters that ZeRO replaces
    if ema_decay is not None:
        keep_average(optimizer, ema_decay)
    return optimizer


def _check_names(name: str, cls: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> None:
    """Refuse parameters that the class does not take."""
    if "ema_decay" in params:
        raise InputError("deepspeed.optimizer.params.ema_decay is not supported; set args.ema_decay instead")
    known = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    valid = [key for key in known if key != "params"]
    for key in params.keys() - known.keys():
        raise InputError(
            f"deepspeed.optimizer.params.{key}: '{name}' has no such parameter{nearest(key, valid)}; "
            f"it takes {', '.join(valid)}"
        )


def _check_stage(name: str, kind: Kind, zero: Mapping[str, Any], tensor: int) -> None:
    """Refuse an optimizer whose results would be wrong in the parts that ZeRO or tensor parallelism gives it."""
    if kind.elementwise:
        return
    if zero.get("stage", 0) > 2:
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' needs more than the pieces of parameters that ZeRO stage 3 updates at "
            "a time; set deepspeed.zero_optimization.stage to 0, 1 or 2, or deepspeed.optimizer.type: AdamW"
        )
    if kind.whole and zero.get("round_robin_gradients"):
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' needs whole matrices, and their place is unknown with "
            "round_robin_gradients; set deepspeed.zero_optimization.round_robin_gradients=false"
        )
    if (kind.whole or kind.sums) and tensor > 1:
        raise InputError(
            f"deepspeed.optimizer.type: '{name}' needs whole matrices and sums over them, and "
            f"args.model_parallel_size={tensor} divides them; set it to 1, or deepspeed.optimizer.type: AdamW"
        )


class _SumsAnywhere(TorchFunctionMode):
    """Context in which tensors for CUDA go to the device of the run; prodigyopt reduces its sums there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0].to(sgm.distributed.device())
        return func(*args, **(kwargs or {}))


@functools.cache
def _adapted(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return an optimizer of a library whose step works on any device, and whose state DeepSpeed saves and loads."""
    adapt = {"prodigyopt": _adapted_prodigy, "torchao": _adapted_torchao}.get(cls.__module__.partition(".")[0])
    return cls if adapt is None else adapt(cls)


def _adapted_prodigy(cls: Any) -> type[torch.optim.Optimizer]:
    class Adapted(cls):
        def step(self, closure: Any = None) -> Any:
            with _SumsAnywhere():
                return super().step(closure)

    return Adapted


def _adapted_torchao(cls: Any) -> type[torch.optim.Optimizer]:
    class Adapted(cls):
        def step(self, closure: Any = None) -> Any:
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            # torchao compiles its update, which on a CPU takes a compiler and minutes.
            with torch.compiler.set_stance("force_eager") if on_cpu else contextlib.nullcontext():
                return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            return found | {"state": {key: _map(_plain_parts, state) for key, state in found["state"].items()}}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            states = {key: _map(_from_parts, state) for key, state in state_dict["state"].items()}
            super().load_state_dict(state_dict | {"state": states})

    return Adapted


def _map(function: Callable[[Any], Any], state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in state.items()}


def _plain_parts(value: Any) -> Any:
    """Return a quantized tensor as plain ones; torch.load moves no others to a device that a function chooses."""
    if not hasattr(value, "__tensor_flatten__"):
        return value
    names, context = value.__tensor_flatten__()
    cls = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class": cls, "tensors": {name: getattr(value, name) for name in names}, "context": context}


def _from_parts(value: Any) -> Any:
    if not (isinstance(value, dict) and "class" in value):
        return value
    cls: Any = get_obj_from_str(value["class"])
    return cls.__tensor_unflatten__(value["tensors"], value["context"])


def settings_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the settings in the groups of an optimizer; the others are part of its state."""
    cls = getattr(optimizer, "cls", type(optimizer))
    return tuple(name for name in optimizer.defaults if name in inspect.signature(cls).parameters)


# Settings that DeepSpeed's optimizers load with a state; those of the loss scaling are objects that hold its state too.
_LOADED = ("clip_grad", "dynamic_loss_scale", "loss_scaler", "loss_scale_config")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@contextlib.contextmanager
def settings_kept(engine: Any) -> Iterator[None]:
    """Context in which a DeepSpeed engine may load a state, and after which it has the settings of its configuration.

    They are those of the optimizer, of gradient clipping, and of loss scaling. Collective: all ranks enter it.
    """
    zero, groups = engine.optimizer, _settings_of_groups(engine)
    given = {name: copy.copy(value) for name, value in vars(zero).items() if name in _LOADED}
    yield
    # The point at which a schedule-free optimizer trains depends on its betas.
    betas = [[list(group.get("betas", ())) for group in each] for each in (_settings_of_groups(engine), groups)]
    with average_kept(engine) if betas[0] != betas[1] else contextlib.nullcontext():
        for group, current in zip(inside(zero).param_groups, groups, strict=True):
            group.update(current)
    for name, value in given.items():
        if name.startswith("loss_scale"):
            _take_scale(value, getattr(zero, name))
        setattr(zero, name, value)


def _settings_of_groups(engine: Any) -> list[dict[str, Any]]:
    """Return the settings in the groups of the optimizer of a DeepSpeed engine."""
    optimizer = inside(engine.optimizer)
    names = settings_of(optimizer)
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def _take_scale(current: Any, loaded: Any) -> None:
    """Take scale and counters of a loaded loss scaler of DeepSpeed, if both are dynamic."""
    if not all(getattr(each, "dynamic", vars(each).get("dynamic_loss_scale")) for each in (current, loaded)):
        return
    vars(current).update({name: value for name, value in vars(loaded).items() if name in _SCALE})
    least = vars(current).get("min_scale", vars(current).get("min_loss_scale"))  # with ZeRO, without
    current.cur_scale = max(current.cur_scale, default(least, 0))
    if "cur_hysteresis" in vars(current):
        current.cur_hysteresis = min(current.cur_hysteresis, current.delayed_shift)


def _decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, by_axes: bool = False, one: bool = False
) -> list[dict[str, Any]]:
    """Return the parameter groups with and without weight decay; omit empty ones.

    Args:
        named_parameters: of the network.
        by_axes: divide those with weight decay into matrices and others.
        one: return one group.
    """
    matrices, others, no_decay = [], [], []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            axes = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves sharded parameters empty
            if one or axes == 2 or (axes > 1 and not by_axes):
                matrices.append(parameter)
            else:
                (others if axes > 1 else no_decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the values in the groups of an optimizer, without parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def discard_initial_update(engine: Any, initial: list[dict[str, Any]]) -> None:
    """Undo the update with zero gradients that ``deepspeed.initialize`` makes in 16 bits without ZeRO.

    That update decays the weights and counts in bias correction and average. Call this before loading a state.

    Args:
        engine: of DeepSpeed.
        initial: `group_values` of the optimizer before.
    """
    if has_master_copies(engine.optimizer):
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
        for group, values in zip(engine.optimizer.optimizer.param_groups, initial, strict=True):
            group.update(values)
