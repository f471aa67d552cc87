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


def frozen_problems(config: Config, trains_adapters: bool, network: Any) -> Iterator[Problem]:
    """Yield the problems of a training run whose frozen weights are stored in fewer bits, or wait in host memory.

    Args:
        config: of the run.
        trains_adapters: whether only adapters are trained.
        network: on the meta device.
    """
    args, storage = config.args, base_storage(config)
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    given = {
        "base_weights": storage,
        "network_offload": None if args.network_offload == "none" else args.network_offload,
    }
    for name, value in given.items():
        if value is not None:
            yield from _shared_problems(config, f"args.{name}", value, trains_adapters, network)
    if storage is not None:
        yield from _storage_problems(args, storage)
    if args.network_offload == "blocks" and trains_adapters and hasattr(network, "blocks"):
        yield from _block_problems(config, network)


def _shared_problems(config: Config, path: str, value: str, trains_adapters: bool, network: Any) -> Iterator[Problem]:
    if not trains_adapters:
        found = f"is {value}, which is for frozen weights, and this run trains them"
        yield Problem(path, "", found, "take the model's _lora.yaml file, or remove it")
    elif not hasattr(network, "blocks"):
        found = f"is {value}, but {type(network).__name__} has no property blocks"
        yield Problem(path, "", found, "remove it, or add that property")
    if config.deepspeed["zero_optimization"]["stage"] == 3:
        found = f"is {value}, and ZeRO stage 3 shards frozen weights itself"
        yield Problem(path, "", found, "remove it, or set deepspeed.zero_optimization.stage to 2 or less")


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
    cure = "install it, or remove args.base_weights (and qlora)"
    yield from problems_of(path, cure, partial(require_usable, storage, sgm.distributed.device(), gradients=True))


def _block_problems(config: Config, network: Any) -> Iterator[Problem]:
    args, depth, path = config.args, len(network.blocks), "args.network_offload"
    assert isinstance(args, TrainingArgs), "the configuration was loaded for training"
    transformer = params_of(config.model["network_config"]).get("transformer_args") or {}
    recomputed = default(args.checkpoint_activations, transformer.get("checkpoint_activations"))
    if recomputed is True:
        recomputed = depth - transformer.get("checkpoint_skip_layers", 0)
    if recomputed in (None, False, "auto") or recomputed < depth:
        found = (
            "is blocks, and not all blocks are recomputed: the others would keep their weights for the backward pass"
        )
        yield Problem(path, "", found, "set args.checkpoint_activations=true, or network_offload=none")
    if args.compile:
        found = "is blocks, and compile is true: a compiled block is bound to its weights"
        yield Problem(path, "", found, "set args.compile=false, or network_offload=none")
