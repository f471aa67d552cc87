"""Check and complete the ``deepspeed`` section of a training run, and convert it for the engine.

Keys and types are those of DeepSpeed's pydantic models, imported only when a training section is checked. DeepSpeed
itself silently ignores unknown keys at the top level. Missing keys get DeepSpeed's defaults, or those of `DEFAULTS`.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, WithJsonSchema, create_model

from sgm.config.targets import check_params
from sgm.config.values import AtLeast1, NotNegative, Positive, misfit
from sgm.config.yaml_files import ConfigError, Merged, Problem
from sgm.util import PRECISIONS, prepare_import

DEFAULTS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.1,
    "steps_per_print": 2**31 - 1,  # never: training prints and records its own metrics
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
DEFAULT_STAGE = 2
DEFAULT_OPTIMIZER = "sat.ops.FusedEmaAdam"
DEFAULT_PARAMS = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}  # of the default optimizer
LORA_LR, FULL_LR = 5e-4, 1e-5
_SMALL_LR = 1e-9
_LARGE_EPS = 1e-3
SCALED_LORA_LR = 2e-4  # of adapters whose alpha is near their rank, so that their product counts in full or in half

_OLD_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_OWN_KEYS = ("optimizer", "train_batch_size")  # not for DeepSpeed, see `engine_config`
_OWN_METRICS = "training writes metrics.jsonl and TensorBoard files itself; args.wandb adds Weights & Biases"
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

# Of the loss scaler; released files have them outside fp16, where DeepSpeed has never read them.
_LOSS_SCALER = ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale")

# Upper bounds are far above what can be meant.
_Count = Annotated[int, Field(ge=1, le=100_000_000)]
_MicroBatch = Annotated[int, Field(ge=1, le=10_000)]
_MOST_IN_BUCKET = 100_000_000_000  # elements
_Rate = Annotated[float, Field(ge=0, le=100)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
_Dtype = Literal["fp16", "bf16", "fp32"]


class _TopLevel(BaseModel):
    """The scalar keys of the section, for which DeepSpeed has no model."""

    IGNORED_PARAMS: ClassVar[dict[str, str]] = dict.fromkeys(_MONITORS, _OWN_METRICS)

    train_batch_size: _Count | None = None
    train_micro_batch_size_per_gpu: _MicroBatch = 1
    gradient_accumulation_steps: _Count | None = 1
    gradient_clipping: NotNegative = 0
    steps_per_print: Annotated[int, Field(ge=1)] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Positive = 1
    communication_data_type: _Dtype | None = None
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    disable_allgather: bool = False
    disable_python_gc: bool = False
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False


@cache
def _parts() -> dict[str, type[BaseModel]]:
    """Return a pydantic model for each mapping in the section: DeepSpeed's, or one made from its defaults."""
    prepare_import()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def from_defaults(name: str, defaults: Mapping[str, Any], whole: Any = int) -> type[BaseModel]:
        kinds = {type(None): Any, int: whole}
        fields: dict[str, Any] = {n: (kinds.get(type(v), type(v)), v) for n, v in defaults.items()}
        return create_model(name, **fields)

    enabled: Any = (bool | None, None)  # null: follow model.precision
    # DeepSpeed's own models take what ends a run at its first steps; an enumeration takes true for 1.
    stage: Any = (Annotated[int, Field(ge=0, le=3), WithJsonSchema({"enum": [0, 1, 2, 3]})], 0)
    scaler: dict[str, Any] = {
        "loss_scale": (NotNegative, 0),
        "initial_scale_power": (Annotated[int, Field(ge=0, le=32)], 16),
        "loss_scale_window": (AtLeast1, 1000),
        "hysteresis": (AtLeast1, 2),
        "min_loss_scale": (AtLeast1, 1),
    }
    return {
        "zero_optimization": create_model("zero_optimization", __base__=DeepSpeedZeroConfig, stage=stage),
        "fp16": create_model("fp16", __base__=DeepSpeedFP16Config, enabled=enabled, **scaler),
        "bf16": create_model("bf16", __base__=DeepSpeedBF16Config, enabled=enabled),
        "optimizer": create_model("optimizer", type=(str, DEFAULT_OPTIMIZER), params=(dict[str, Any] | None, None)),
        "activation_checkpointing": create_model("activation_checkpointing"),
        "data_types": create_model("data_types", grad_accum_dtype=(_Dtype | None, None)),
        "aio": from_defaults("aio", AIO_DEFAULT_DICT, AtLeast1),
        "comms_logger": CommsLoggerConfig,
        "flops_profiler": from_defaults("flops_profiler", vars(DeepSpeedFlopsProfilerConfig({}))),
    }


def schema_of_section() -> type[BaseModel]:
    """Return the pydantic model of the whole section."""
    fields: dict[str, Any] = {name: (part | None, None) for name, part in _parts().items()}
    return create_model("deepspeed", __base__=_TopLevel, **fields)


def check_deepspeed(section: Mapping[str, Any], merged: Merged) -> None:
    """Check the section of a training run; add its problems and warnings to `merged`."""
    num_problems, has_unusable = len(merged.problems), any(path[0] == "deepspeed" for path in merged.unusable)
    if stray := [name for name in _LOSS_SCALER if name in section]:
        names = ", ".join(f"deepspeed.{name}" for name in stray)
        merged.warnings.append(f"no effect outside deepspeed.fp16, where DeepSpeed reads them: {names}")
    section = _whole_counts({name: value for name, value in section.items() if name not in stray})
    check_params(schema_of_section(), section, ("deepspeed",), merged)
    for problems_of in (_value_problems, _model_problems):
        if has_unusable or len(merged.problems) > num_problems:
            break  # further checks assume valid types and values
        for path, found, cure in problems_of(section):
            merged.add(("deepspeed", *path.split(".")), found, cure)
    if not has_unusable and len(merged.problems) == num_problems:
        merged.warnings += _odd_values(section)


def _value_problems(section: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    if all((section.get(name) or {}).get("enabled") for name in ("fp16", "bf16")):
        yield "fp16.enabled", "fp16 and bf16 are both enabled", "keep the one that the model was released in"
    yield from _optimizer_problems(section.get("optimizer") or {})
    zero = section.get("zero_optimization") or {}
    yield from _offload_problems(zero)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):  # buffers of as many elements
        if zero.get(name, 0) > _MOST_IN_BUCKET:
            cure = f"give at most {_MOST_IN_BUCKET:,}"
            yield f"zero_optimization.{name}", f"is {zero[name]:g} elements, more than any card holds", cure


def _optimizer_problems(optimizer: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield values that no optimizer takes; others are left to its class."""
    kind, params = str(optimizer.get("type") or DEFAULT_OPTIMIZER).lower(), optimizer.get("params") or {}
    hints: dict[str, Any] = {
        "lr": _Rate,
        "eps": NotNegative if "came" not in kind else tuple[NotNegative, NotNegative],
        "weight_decay": Annotated[float, Field(ge=0, le=1)],
    }
    hints["betas"] = tuple[_Beta, _Beta] if "adam" in kind else Annotated[list[_Beta], Field(min_length=1)]
    cures = {
        "lr": f"give a number such as {FULL_LR:g}, or remove it: {LORA_LR:g} for adapters, {FULL_LR:g} for all weights",
        "betas": "give two numbers, each from 0 to below 1, such as [0.9, 0.95]" if "adam" in kind else None,
    }
    for name, value in params.items():
        if name in hints and (problem := misfit(value, hints[name])):
            yield f"optimizer.params.{name}", problem[0], cures.get(name) or problem[1]


def _odd_values(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is possible, and hardly meant."""
    params = (section.get("optimizer") or {}).get("params") or {}
    if params.get("lr") == 0:
        yield "deepspeed.optimizer.params.lr is 0, so nothing is learnt"
    elif params.get("lr", 1) < _SMALL_LR or params.get("lr", 1) > 1:
        yield f"deepspeed.optimizer.params.lr is {params['lr']:g}; usual are {FULL_LR:g} to {LORA_LR:g}"
    eps = params.get("eps")
    if eps == 0:
        yield "deepspeed.optimizer.params.eps is 0, so weights without gradients become NaN"
    elif isinstance(eps, float | int) and eps > _LARGE_EPS:
        yield f"deepspeed.optimizer.params.eps is {eps:g}, larger than most gradients; usual are 1e-10 to 1e-6"


def _offload_problems(zero: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    stage = zero.get("stage", DEFAULT_STAGE)
    needed = {"offload_optimizer": 1, "cpu_offload": 1, "offload_param": 3, "cpu_offload_param": 3}
    for name, lowest in needed.items():
        value = zero.get(name)
        device = value.get("device", "none") if isinstance(value, Mapping) else "cpu" if value else "none"
        path = f"zero_optimization.{name}"
        if device != "none" and stage < lowest:
            yield path, f"needs stage {lowest} or more, and the stage is {stage}", f"set stage: {lowest}, or remove it"
        if device == "nvme" and not (isinstance(value, Mapping) and value.get("nvme_path")):
            yield f"{path}.nvme_path", "is missing, and device is nvme", "name a folder on a fast local disk"
    for old, new in _OLD_NAMES.items():
        if zero.get(old) and zero.get(new) is not None:
            yield f"zero_optimization.{old}", f"is the old name of {new}, which is given too", f"keep {new}"


def _model_problems(section: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield combinations of values that DeepSpeed's models refuse."""
    zero = _complete_zero(section.get("zero_optimization") or {})
    for name, values in {**section, "zero_optimization": zero}.items():
        if name not in ("zero_optimization", "fp16", "bf16"):
            continue
        try:
            _parts()[name](**(values or {}))
        except ValidationError as error:
            for problem in error.errors():
                found = problem.get("ctx", {}).get("error", problem["msg"])
                yield ".".join([name, *map(str, problem["loc"])]), f"DeepSpeed refuses it: {found}", "correct it"


def trains_adapters(model: Mapping[str, Any]) -> bool:
    """Whether the ``model`` section has a LoRA."""
    modules = ((model.get("network_config") or {}).get("params") or {}).get("modules") or {}
    return modules.get("lora_config") is not None


def default_lr(model: Mapping[str, Any], optimizer: str = DEFAULT_OPTIMIZER) -> float:
    """Return the default learning rate: larger for adapters than for all weights, 1 for an optimizer that finds it."""
    if optimizer.startswith("prodigyopt."):
        return 1.0
    if not trains_adapters(model):
        return FULL_LR
    params = model["network_config"]["params"]["modules"]["lora_config"].get("params") or {}
    rank, alpha = params.get("r"), params.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float)):
        return LORA_LR
    scaled = alpha * (rank**0.5 if params.get("rank_stabilized") else 1) >= rank / 2
    return SCALED_LORA_LR if scaled else LORA_LR


def complete_deepspeed(section: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked section with defaults for missing keys, and current names for old ones.

    Args:
        section: of the merged files, without problems.
        model: the ``model`` section, for the default of the learning rate.

    Returns:
        A new dictionary with at least the keys of `DEFAULTS`, ``zero_optimization.stage``, ``optimizer.type`` and
        ``optimizer.params.lr``. With ``train_batch_size`` and no accumulation, this is None, see `follow_batch`.
    """
    unused = {*_MONITORS, *_LOSS_SCALER, "activation_checkpointing"}
    given = {name: value for name, value in section.items() if value is not None and name not in unused}
    zero = _complete_zero(given.get("zero_optimization", {}))
    optimizer = {"type": DEFAULT_OPTIMIZER} | given.get("optimizer", {})
    params = {"lr": default_lr(model, optimizer["type"])} | (
        DEFAULT_PARAMS if optimizer["type"] == DEFAULT_OPTIMIZER else {}
    )
    optimizer["params"] = params | (optimizer.get("params") or {})
    follows = {"gradient_accumulation_steps": None} if "train_batch_size" in given else {}
    complete = DEFAULTS | follows | given | {"zero_optimization": zero, "optimizer": optimizer}
    return _whole_counts(copy.deepcopy(complete))


def _complete_zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``zero_optimization`` with its stage, and with current names for old ones."""
    pin_memory = zero.get("cpu_offload_use_pin_memory")
    offload = {"device": "cpu"} | ({} if pin_memory is None else {"pin_memory": pin_memory})
    kept = {name: value for name, value in zero.items() if name not in (*_OLD_NAMES, "cpu_offload_use_pin_memory")}
    return {"stage": DEFAULT_STAGE} | kept | {new: offload for old, new in _OLD_NAMES.items() if zero.get(old)}


def _whole_counts(section: Mapping[str, Any]) -> dict[str, Any]:
    """Convert whole floats such as 5e8 to integers, as DeepSpeed needs, at any depth."""
    whole = {name: int(value) for name, value in section.items() if isinstance(value, float) and value.is_integer()}
    inner = {name: _whole_counts(value) for name, value in section.items() if isinstance(value, Mapping)}
    return {**section, **whole, **inner}


def follow_batch(section: Mapping[str, Any], *, world_size: int) -> dict[str, Any]:
    """Return a complete section with the accumulation that ``train_batch_size`` asks for, where none was given.

    Args:
        section: from `complete_deepspeed`.
        world_size: data parallel size. Where it cannot have that batch, accumulation is 1, and `engine_config` says so.
    """
    if section["gradient_accumulation_steps"] is not None:
        return dict(section)
    steps, rest = divmod(section["train_batch_size"], section["train_micro_batch_size_per_gpu"] * world_size)
    return {**section, "gradient_accumulation_steps": 1 if rest else steps}


def engine_config(section: Mapping[str, Any], *, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``, without the optimizer.

    ``train_batch_size`` is left out: the user's counts samples, DeepSpeed's counts a sample once per rank of its group.

    Args:
        section: ``Config.deepspeed`` of a training run.
        world_size: data parallel size: number of groups of ranks.
        dtype: of the network, see `sgm.config.precision.resolve_training_precision`.

    Raises:
        ConfigError: ``train_batch_size`` is not micro batch × accumulation × ranks.
    """
    micro, steps = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
    total = section.get("train_batch_size")
    if total not in (None, micro * steps * world_size):
        ranks = f"{world_size} (ranks with samples of their own)"
        found = f"is {total}, but {micro} (micro batch) x {steps} (accumulation) x {ranks} is "
        cure = f"remove train_batch_size, which follows from the others, or give a multiple of {micro * world_size}"
        if total % (micro * world_size) == 0:
            cure = f"set deepspeed.gradient_accumulation_steps={total // (micro * world_size)}, or to null: it follows"
        path = "deepspeed.train_batch_size"
        raise ConfigError([Problem(path, "", f"{found}{micro * steps * world_size}", cure)])
    config = copy.deepcopy({name: value for name, value in section.items() if name not in _OWN_KEYS})
    for name in ("fp16", "bf16"):
        config[name] = (config.get(name) or {}) | {"enabled": PRECISIONS[name] is dtype}
    return config
