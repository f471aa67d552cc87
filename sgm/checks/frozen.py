"""Check the settings of frozen weights in training: how they are stored (``args.base_weights``), where they wait."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import sgm.distributed
from sgm.checks.sampling import params_of, problems_of
from sgm.config.args import TrainingArgs
from sgm.config.load import Config, Problem
from sgm.util import default
from sgm.weights.quantize import Storage, require_usable


def base_storage(config: Config) -> Storage | None:
    """Return how the frozen weights of a training run are stored; None keeps the precision of the run.

    SAT's switch ``qlora`` of the adapters means nf4, unless ``args.base_weights`` is given.
    """
    args, modules = config.args, params_of(config.model["network_config"]).get("modules") or {}
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    if args.base_weights is None:
        return "nf4" if params_of(modules.get("lora_config")).get("qlora") else None
    return None if args.base_weights == "bf16" else args.base_weights


def frozen_problems(config: Config, *, trains_adapters: bool) -> Iterator[Problem]:
    """Yield what is wrong with storing frozen weights in fewer bits, or letting them wait in host memory.

    Args:
        config: of a training run.
        trains_adapters: whether only adapters are trained.
    """
    args, storage = config.args, base_storage(config)
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    offload = None if args.network_offload == "none" else args.network_offload
    for name, value in {"base_weights": storage, "network_offload": offload}.items():
        path = f"args.{name}"
        if value is not None and not trains_adapters:
            found = f"is {value}, which is for frozen weights, and this run trains them"
            yield Problem(path, "", found, "take the model's _lora.yaml file, or remove it")
        if value is not None and config.deepspeed["zero_optimization"]["stage"] == 3:
            found = f"is {value}, and ZeRO stage 3 shards frozen weights itself"
            yield Problem(path, "", found, "remove it, or set deepspeed.zero_optimization.stage to 2 or less")
    if storage is not None:
        yield from _storage_problems(args, storage)
    yield from _kind_problems(config)
    if offload == "blocks":
        yield from _block_problems(config, args)


def _kind_problems(config: Config) -> Iterator[Problem]:
    modules = params_of(config.model["network_config"]).get("modules") or {}
    kind = params_of(modules.get("lora_config")).get("kind")
    if kind == "dora" and config.deepspeed["zero_optimization"]["stage"] == 3:
        found = "is dora, which needs whole rows of the frozen weights, and ZeRO stage 3 shards them"
        path = "model.network_config.params.modules.lora_config.params.kind"
        yield Problem(path, "", found, "set deepspeed.zero_optimization.stage to 2 or less, or train a LoRA")


def device_problems(config: Config, network: Any) -> Iterator[Problem]:
    """Yield why this device, or the class of the network, cannot have weights stored or offloaded as configured.

    Args:
        config: of a training run.
        network: on the meta device.
    """
    storage = base_storage(config)
    for name, value in {"base_weights": storage, "network_offload": config.args.network_offload}.items():
        if value not in (None, "none") and not hasattr(network, "blocks"):
            found = f"is {value}, but {type(network).__name__} has no property blocks"
            yield Problem(f"args.{name}", "", found, "remove it, or add that property")
    if storage is not None:
        cure = "install it, or remove args.base_weights (and qlora)"
        usable = partial(require_usable, storage, sgm.distributed.device(), gradients=True)
        yield from problems_of("args.base_weights", cure, usable)


def _storage_problems(args: TrainingArgs, storage: Storage) -> Iterator[Problem]:
    path = "args.base_weights"
    if args.model_parallel_size > 1:
        found = f"is {storage}, and model_parallel_size {args.model_parallel_size}: layers are stored whole"
        yield Problem(path, "", found, "remove it, or share clips by args.sequence_parallel_size instead")
    if args.save_full:
        found = f"is true, and base_weights {storage}: the base would be saved as it is stored"
        cure = "set it to false; tools/merge_lora_weight.py writes adapters and the original base as one"
        yield Problem("args.save_full", "", found, cure)
    if args.load is None:
        found = f"is {storage}, and there are no weights to store (args.load)"
        yield Problem(path, "", found, "set args.load, or remove it")


def _block_problems(config: Config, args: TrainingArgs) -> Iterator[Problem]:
    path, params = "args.network_offload", params_of(config.model["network_config"])
    transformer, depth = params.get("transformer_args") or {}, params.get("num_layers", 0)
    recomputed = default(args.checkpoint_activations, transformer.get("checkpoint_activations"))
    if recomputed is True:
        recomputed = depth - transformer.get("checkpoint_skip_layers", 0)
    if recomputed in (None, False, "auto") or recomputed < depth:
        found = "is blocks, and not all blocks are recomputed: the others keep their weights for the backward pass"
        yield Problem(path, "", found, "set args.checkpoint_activations=true, or network_offload=none")
    if args.compile:
        found = "is blocks, and compile is true: a compiled block is bound to its weights"
        yield Problem(path, "", found, "set args.compile=false, or network_offload=none")
