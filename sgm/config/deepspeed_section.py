"""The ``deepspeed`` section of a training run: checked key by key, completed, and made ready for the engine.

The dataclasses below are the schema: the keys that DeepSpeed reads for what this training uses of it, with their
types. DeepSpeed itself ignores unknown keys at the top level without a word. Its defaults hold for what a file leaves
out, except for those in `DEFAULTS`. DeepSpeed is not imported here.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from sgm.config.targets import check_params
from sgm.config.yaml_files import ConfigError, Merged, Problem
from sgm.util import PRECISIONS

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

_SCALER_KEYS = ("loss_scale", "loss_scale_window", "initial_scale_power", "hysteresis", "min_loss_scale")

# Parts of DeepSpeed whose work is done elsewhere, and what to do instead.
_REFUSED = {
    "scheduler": "remove it; the learning rate follows args.lr_decay_style, args.warmup and args.lr_decay_ratio",
    "amp": "remove it; model.precision decides in what the network computes",
    "torch_autocast": "remove it; model.precision decides in what the network computes",
    "bfloat16": "write bf16, the present name",
    "compile": "remove it; set args.compile=true",
    "checkpoint": "remove it; args.save, args.save_interval and args.resume decide about checkpoints",
    "tensor_parallel": "remove it; args.model_parallel_size decides which ranks share layers",
    "sequence_parallel_size": "remove it; args.sequence_parallel_size decides which ranks share a sample",
}
_UNUSED = (
    "autotuning compression_training curriculum_learning data_efficiency eigenvalue elasticity expert_parallel "
    "gradient_allreduce_op hybrid_engine managed_gradient_accumulation nebula pipeline progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients weight_quantization"
)
_REFUSED |= dict.fromkeys(_UNUSED.split(), "remove it; this training does not use it")
_OWN_KEYS = ("optimizer", "train_batch_size")  # not for DeepSpeed, see `engine_config`
_OWN_METRICS = "training writes metrics.jsonl and TensorBoard files itself; args.wandb adds Weights & Biases"

_Dtype = Literal["fp32", "fp16", "bf16"]
_Count = float  # counts such as 5e8 are often written as numbers with an exponent


@dataclass(frozen=True, kw_only=True)
class OffloadOptimizer:
    """``zero_optimization.offload_optimizer``: where the optimizer's state lies."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = 1
    super_offload: bool = False
    cpuadam_cores_perc: float = 0.8


@dataclass(frozen=True, kw_only=True)
class OffloadParam:
    """``zero_optimization.offload_param``: where the weights lie, with stage 3."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: int = 5
    buffer_size: _Count = 0
    max_in_cpu: _Count = 0
    pin_memory: bool = True


@dataclass(frozen=True, kw_only=True)
class ZeroOptimization:
    """``zero_optimization``: what ranks share of optimizer, gradients and weights."""

    SECTION_TYPES: ClassVar[dict[str, type]] = {
        "offload_optimizer": OffloadOptimizer,
        "offload_param": OffloadParam,
    }

    stage: Literal[0, 1, 2, 3] = DEFAULT_STAGE
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: _Count = 0
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: _Count = 0
    overlap_comm: bool | None = None
    load_from_fp32_weights: bool = True
    offload_optimizer: dict[str, Any] | None = None
    offload_param: dict[str, Any] | None = None
    cpu_offload: bool = False
    cpu_offload_param: bool = False
    cpu_offload_use_pin_memory: bool = False
    sub_group_size: _Count = 0
    stage3_prefetch_bucket_size: _Count = 0
    stage3_param_persistence_threshold: _Count = 0
    stage3_model_persistence_threshold: _Count = 0
    stage3_max_live_parameters: _Count = 0
    stage3_max_reuse_distance: _Count = 0
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_gather_fp16_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: _Count = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    legacy_stage1: bool = False
    elastic_checkpoint: bool = False
    round_robin_gradients: bool = False
    zero_hpz_partition_size: int = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """``fp16``: the loss scaler; `enabled` must agree with ``model.precision``."""

    enabled: bool | None = None
    auto_cast: bool = False
    loss_scale: float = 0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: int = 1
    fp16_master_weights_and_grads: bool = False


@dataclass(frozen=True, kw_only=True)
class Bf16:
    """``bf16``; `enabled` must agree with ``model.precision``."""

    enabled: bool | None = None
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """``optimizer``: a name, and what its constructor takes."""

    type: str = DEFAULT_OPTIMIZER
    params: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing:
    """``activation_checkpointing``: known, and refused where it switches something on."""

    partition_activations: bool = False
    contiguous_memory_optimization: bool = False
    cpu_checkpointing: bool = False
    number_checkpoints: int | None = None
    synchronize_checkpoint_boundary: bool = False
    profile: bool = False


@dataclass(frozen=True, kw_only=True)
class DataTypes:
    """``data_types``: in what gradients are added up."""

    grad_accum_dtype: _Dtype | None = None


@dataclass(frozen=True, kw_only=True)
class Aio:
    """``aio``: how an nvme disk is read and written."""

    block_size: _Count = 0
    queue_depth: int = 8
    thread_count: int = 1
    intra_op_parallelism: int = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


@dataclass(frozen=True, kw_only=True)
class CommsLogger:
    """``comms_logger``: DeepSpeed's record of what ranks send."""

    enabled: bool = False
    verbose: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    debug: bool = False


@dataclass(frozen=True, kw_only=True)
class FlopsProfiler:
    """``flops_profiler``: DeepSpeed's count of operations."""

    enabled: bool = False
    recompute_fwd_factor: float = 0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSection:
    """The keys that the ``deepspeed`` section may have, and their types; the values here are not DeepSpeed's."""

    SECTION_TYPES: ClassVar[dict[str, type]] = {
        "zero_optimization": ZeroOptimization,
        "fp16": Fp16,
        "bf16": Bf16,
        "optimizer": Optimizer,
        "activation_checkpointing": ActivationCheckpointing,
        "data_types": DataTypes,
        "aio": Aio,
        "comms_logger": CommsLogger,
        "flops_profiler": FlopsProfiler,
    }
    IGNORED_PARAMS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet"), _OWN_METRICS
    )

    train_batch_size: int | None = None
    train_micro_batch_size_per_gpu: int = 1
    gradient_accumulation_steps: int = 1
    gradient_clipping: float = 0
    steps_per_print: int | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1
    communication_data_type: _Dtype | None = None
    zero_optimization: dict[str, Any] | None = None
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    fp16: dict[str, Any] | None = None
    bf16: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    activation_checkpointing: dict[str, Any] | None = None
    data_types: dict[str, Any] | None = None
    aio: dict[str, Any] | None = None
    comms_logger: dict[str, Any] | None = None
    flops_profiler: dict[str, Any] | None = None
    disable_allgather: bool = False
    disable_python_gc: bool = False
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False


def check_loss_scale(section: Mapping[str, Any], merged: Merged) -> None:
    """Report the keys of the loss scaler that stand where DeepSpeed never looks for them."""
    for name in _SCALER_KEYS:
        if name in section:
            found = "stands outside 'fp16:', where DeepSpeed never reads it"
            merged.add(("deepspeed", name), found, f"move it to deepspeed.fp16.{name}, or remove it")


def check_deepspeed(section: Mapping[str, Any], merged: Merged) -> list[str]:
    """Check the section of a training run; add its problems to `merged`, and return warnings."""
    check_loss_scale(section, merged)
    for name, cure in _REFUSED.items():
        if name in section:
            merged.add(("deepspeed", name), "is not for DeepSpeed to decide here", cure)
    elsewhere = {*_SCALER_KEYS, *_REFUSED}
    known = {name: value for name, value in section.items() if name not in elsewhere}
    num_problems = len(merged.problems)
    warnings = check_params(DeepSpeedSection, known, ("deepspeed",), merged)
    if len(merged.problems) == num_problems:  # of the right types, so that values can be judged
        for path, found, cure in [*_value_problems(known), *_zero_problems(known.get("zero_optimization") or {})]:
            merged.add(("deepspeed", *path.split(".")), found, cure)
    return warnings


def _value_problems(section: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if (count := section.get(name)) is not None and count < 1:
            yield name, f"is {count}", "give a whole number, at least 1"
    if section.get("gradient_clipping", 0) < 0:
        yield "gradient_clipping", f"is {section['gradient_clipping']}", "give a number above 0, or 0 to clip nothing"
    if all((section.get(name) or {}).get("enabled") for name in ("fp16", "bf16")):
        yield "fp16.enabled", "fp16 and bf16 are both enabled", "keep the one that the model was released in"
    lr = ((section.get("optimizer") or {}).get("params") or {}).get("lr", 0)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < float("inf"):
        cure = f"give a number such as {FULL_LR:g}, or remove it: {LORA_LR:g} for adapters, {FULL_LR:g} for all weights"
        yield "optimizer.params.lr", f"is {lr!r}", cure
    for name, value in (section.get("activation_checkpointing") or {}).items():
        if value:
            cure = "remove it; args.checkpoint_activations=true recomputes the activations of each block"
            yield f"activation_checkpointing.{name}", f"is {value}; DeepSpeed's checkpointing is not used", cure


def _zero_problems(zero: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
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
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.get(old) and zero.get(new) is not None:
            yield f"zero_optimization.{old}", f"is the old name of {new}, which is given too", f"keep {new}"


def default_lr(model: Mapping[str, Any]) -> float:
    """Return the learning rate for a ``model`` section: adapters take much larger steps than all of the weights."""
    modules = ((model.get("network_config") or {}).get("params") or {}).get("modules") or {}
    return LORA_LR if modules.get("lora_config") is not None else FULL_LR


def complete_deepspeed(section: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked section with what it leaves out, and with present names for old ones.

    Args:
        section: of the merged files, without problems.
        model: the ``model`` section, from which the default of the learning rate follows.

    Returns:
        A new dictionary, in which at least the keys of `DEFAULTS`, ``zero_optimization.stage``, ``optimizer.type`` and
        ``optimizer.params.lr`` are set.
    """
    unused = {*DeepSpeedSection.IGNORED_PARAMS, "activation_checkpointing"}
    given = {name: value for name, value in section.items() if value is not None and name not in unused}
    zero = {"stage": DEFAULT_STAGE} | given.get("zero_optimization", {})
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, False):
            zero[new] = {"device": "cpu"} | ({} if pinned is None else {"pin_memory": pinned})
    optimizer = {"type": DEFAULT_OPTIMIZER} | given.get("optimizer", {})
    params = {"lr": default_lr(model)} | (DEFAULT_PARAMS if optimizer["type"] == DEFAULT_OPTIMIZER else {})
    optimizer["params"] = params | (optimizer.get("params") or {})
    complete = DEFAULTS | given | {"zero_optimization": zero, "optimizer": optimizer}
    return _whole_counts(copy.deepcopy(complete))


def _whole_counts(section: Mapping[str, Any]) -> dict[str, Any]:
    """Write 5e8 as the whole number that DeepSpeed takes, in a section and in those inside it."""
    whole = {name: int(value) for name, value in section.items() if isinstance(value, float) and value.is_integer()}
    inner = {name: _whole_counts(value) for name, value in section.items() if isinstance(value, Mapping)}
    return {**section, **whole, **inner}


def engine_config(section: Mapping[str, Any], *, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``deepspeed.initialize`` takes; the optimizer is built apart.

    The user's ``train_batch_size`` counts samples, DeepSpeed's counts each once per rank that works on it: it is left
    out, as it follows from the others.

    Args:
        section: ``Config.deepspeed`` of a training run.
        world_size: ranks that work on different samples; those that share one count once.
        dtype: in what the network computes, see `sgm.config.precision.resolve_training_precision`.

    Raises:
        ConfigError: ``train_batch_size`` is not micro batch × accumulation × ranks.
    """
    micro, steps = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
    total = section.get("train_batch_size")
    if total not in (None, micro * steps * world_size):
        ranks = f"{world_size} (ranks with samples of their own)"
        found = f"is {total}, but {micro} (micro batch) x {steps} (accumulation) x {ranks} is "
        cure = "remove train_batch_size, which follows from the others"
        if total % (micro * world_size) == 0:
            cure += f", or set deepspeed.gradient_accumulation_steps={total // (micro * world_size)}"
        path = "deepspeed.train_batch_size"
        raise ConfigError([Problem(path, "", f"{found}{micro * steps * world_size}", cure)])
    config = copy.deepcopy({name: value for name, value in section.items() if name not in _OWN_KEYS})
    for name in ("fp16", "bf16"):
        config[name] = (config.get(name) or {}) | {"enabled": PRECISIONS[name] is dtype}
    return config
