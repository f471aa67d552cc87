from pathlib import Path

import pytest
import torch

import sgm.distributed
from sgm.config.deepspeed_section import (
    DEFAULTS,
    check_deepspeed,
    complete_deepspeed,
    default_lr,
    engine_config,
    follow_batch,
)
from sgm.config.load import ConfigError
from sgm.config.refused import REFUSED
from sgm.config.yaml_files import Merged
from tests.sgm.config.loading import training_complaint

ROOT = Path(__file__).parents[3]
FULL = {"network_config": {"params": {"modules": {"final_layer_config": {}}}}}
LORA = {"network_config": {"params": {"modules": {"lora_config": {"target": "x"}}}}}

REFERENCE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_print": 50,
    "gradient_clipping": 0.1,
    "zero_optimization": {
        "stage": 2,
        "cpu_offload": False,
        "contiguous_gradients": False,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1000000000,
        "allgather_bucket_size": 1000000000,
        "load_from_fp32_weights": False,
    },
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "optimizer": {
        "type": "sat.ops.FusedEmaAdam",
        "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4},
    },
    "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
    "wall_clock_breakdown": False,
}


def check(section) -> dict[str, str]:
    """Return the problems of a section, by path."""
    merged = Merged()
    check_deepspeed(section, merged)
    return {problem.path: f"{problem.found} -> {problem.cure}" for problem in merged.problems}


def complete(section=None, model=FULL):
    return complete_deepspeed(section or {}, model)


# Checking


@pytest.mark.parametrize("place", ["fp16", "bf16", "zero_optimization", "optimizer", "optimizer.params"])
@pytest.mark.parametrize("value", [".nan", "9" * 30])
def test_a_number_in_the_place_of_a_section_is_a_problem(place, value):
    assert f"deepspeed.{place} (command line: " in training_complaint(f"deepspeed.{place}={value}")


@pytest.mark.parametrize(
    "section",
    [
        REFERENCE,
        {},
        {"zero_optimization": None},
        {"zero_optimization": {"stage3_max_live_parameters": 1e9}},
        {"zero_optimization": {"stage": 3.0, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        {"steps_per_print": DEFAULTS["steps_per_print"], "flops_profiler": {"profile_step": 0, "module_depth": -1}},
        {"fp16": {"enabled": None, "loss_scale": 0, "loss_scale_window": 1e3, "initial_scale_power": 32}},
    ],
)
def test_valid_sections_have_no_problems(section):
    assert check(section) == {}


@pytest.mark.parametrize(
    ("section", "path", "text"),
    [
        ({"gradient_clip": 1}, "gradient_clip", "did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stag": 1}}, "zero_optimization.stag", "did you mean 'stage'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "one of 0, 1, 2, 3"),
        ({"zero_optimization": 2}, "zero_optimization", "a mapping"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device",
            "one of none, cpu, nvme",
        ),
        ({"fp16": {"enabled": "yes"}}, "fp16.enabled", "true or false"),
        ({"fp16": {"loss_scales": 1}}, "fp16.loss_scales", "did you mean 'loss_scale'"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu", "a whole number"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu", "from 1 to"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps", "from 1 to"),
        ({"train_batch_size": 0}, "train_batch_size", "from 1 to"),
        ({"gradient_clipping": -1}, "gradient_clipping", "a number of at least 0"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size", "above 0"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "zero_optimization.reduce_bucket_size", "a whole number"),
        (
            {"zero_optimization": {"prefetch_bucket_size": 1}},
            "zero_optimization.prefetch_bucket_size",
            "did you mean 'stage3_prefetch_bucket_size'",
        ),
        ({"zero_optimization": {"parameter_alignment": True}}, "zero_optimization.parameter_alignment", "remove it"),
        ({"aio": {"blocksize": 1}}, "aio.blocksize", "did you mean 'block_size'"),
        ({"flops_profiler": {"enabled": 1}}, "flops_profiler.enabled", "true or false"),
        (
            {"data_types": {"grad_accum_dtype": "int8"}},
            "data_types.grad_accum_dtype",
            "one of fp16, bf16, fp32",
        ),
        (
            {"activation_checkpointing": {"partition_activation": False}},
            "activation_checkpointing.partition_activation",
            "did you mean 'partition_activations'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization",
            "DeepSpeed refuses it: Partial offloading only supported for ZeRO Stage 3",
        ),
        ({"steps_per_print": 0}, "steps_per_print", "of at least 1"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window", "of at least 1"),
        ({"fp16": {"hysteresis": 0}}, "fp16.hysteresis", "of at least 1"),
        ({"fp16": {"enabled": True, "min_loss_scale": 0}}, "fp16.min_loss_scale", "of at least 1"),
        ({"fp16": {"min_loss_scale": -1}}, "fp16.min_loss_scale", "of at least 1"),
        ({"fp16": {"initial_scale_power": -1}}, "fp16.initial_scale_power", "from 0 to 32"),
        ({"fp16": {"initial_scale_power": 1000}}, "fp16.initial_scale_power", "from 0 to 32"),
        ({"fp16": {"loss_scale": 1e30}}, "fp16.loss_scale", "a number of at least 0"),
        ({"aio": {"block_size": 0}}, "aio.block_size", "of at least 1"),
        ({"aio": {"queue_depth": -1}}, "aio.queue_depth", "of at least 1"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": False}}, "zero_optimization.stage", "one of 0, 1, 2, 3"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", "keep the one"),
        ({"optimizer": {"params": {"lr": "1e-5x"}}}, "optimizer.params.lr", "give a number such as 1e-05"),
        ({"optimizer": {"params": {"lr": -1}}}, "optimizer.params.lr", "0.0005 for adapters"),
        ({"optimizer": {"params": {"lr": float("inf")}}}, "optimizer.params.lr", "give a number"),
        ({"optimizer": {"param": {}}}, "optimizer.param", "did you mean 'params'"),
        ({"optimizer": {"params": [1]}}, "optimizer.params", "a mapping"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "args.lr_decay_style"),
        ({"sparse_attention": {}}, "sparse_attention", "does not use it"),
        ({"compile": {}}, "compile", "args.compile=true"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "activation_checkpointing.cpu_checkpointing",
            "args.checkpoint_activations switches",
        ),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "zero_optimization.cpu_offload", "stage: 1"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param",
            "needs stage 3 or more, and the stage is 2",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.nvme_path",
            "a fast local disk",
        ),
        (
            {"zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.cpu_offload",
            "keep offload_optimizer",
        ),
    ],
)
def test_problems_have_a_path_and_a_cure(section, path, text):
    found = check(section)
    assert [*found] == [f"deepspeed.{path}"]
    assert text in found[f"deepspeed.{path}"]


def test_a_learning_rate_of_zero_is_legal():
    assert check({"optimizer": {"params": {"lr": 0}}}) == {}


def test_monitors_of_deepspeed_warn():
    merged = Merged()
    check_deepspeed({"tensorboard": {"enabled": True}}, merged)
    (warning,) = merged.warnings
    assert "deepspeed.tensorboard has no effect" in warning and "metrics.jsonl" in warning


# Completing


def test_defaults_of_an_empty_section():
    section = complete()
    assert DEFAULTS.items() <= section.items()
    assert section["zero_optimization"] == {"stage": 2}
    assert section["optimizer"]["type"] == "sat.ops.FusedEmaAdam"
    assert section["optimizer"]["params"] == {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-4}


def test_given_values_win_and_are_not_modified():
    given = {"gradient_clipping": 0, "zero_optimization": {"stage": 0}, "optimizer": {"params": {"lr": 0, "eps": 1}}}
    section = complete(given)
    assert section["gradient_clipping"] == 0 and section["zero_optimization"] == {"stage": 0}
    assert section["optimizer"]["params"] == {"lr": 0, "betas": [0.9, 0.95], "eps": 1, "weight_decay": 1e-4}
    section["optimizer"]["params"]["betas"].append(1)
    assert given["optimizer"]["params"] == {"lr": 0, "eps": 1}
    assert complete()["optimizer"]["params"]["betas"] == [0.9, 0.95]


def test_other_optimizers_keep_their_own_defaults():
    assert complete({"optimizer": {"type": "AdamW"}})["optimizer"] == {"type": "AdamW", "params": {"lr": 1e-5}}


def test_default_learning_rate_of_adapters_and_of_all_weights():
    assert default_lr(LORA) == 5e-4 and default_lr(FULL) == 1e-5
    assert complete(model=LORA)["optimizer"]["params"]["lr"] == 5e-4
    assert default_lr({"network_config": {"params": {"modules": {"lora_config": None}}}}) == 1e-5


def test_old_offload_keys_are_renamed():
    zero = {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "cpu_offload_use_pin_memory": False}
    offload = {"device": "cpu", "pin_memory": False}
    expected = {"stage": 3, "offload_optimizer": offload, "offload_param": offload}
    assert complete({"zero_optimization": zero})["zero_optimization"] == expected
    assert complete({"zero_optimization": {"cpu_offload": False}})["zero_optimization"] == {"stage": 2}


def test_counts_with_an_exponent_become_integers():
    buckets = complete({"zero_optimization": {"reduce_bucket_size": 5e8}})["zero_optimization"]
    assert repr(buckets["reduce_bucket_size"]) == "500000000"
    assert complete({"gradient_clipping": 0.1})["gradient_clipping"] == 0.1


def test_ineffective_keys_are_dropped():
    assert "activation_checkpointing" not in complete(REFERENCE)
    assert "tensorboard" not in complete({"tensorboard": {"enabled": True}})


# For the engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_precision_is_written_into_the_section(dtype):
    section = complete({"bf16": {"enabled": True}, "fp16": {"loss_scale": 128}})
    config = engine_config(section, world_size=1, dtype=dtype)
    assert config["bf16"] == {"enabled": dtype is torch.bfloat16}
    assert config["fp16"] == {"enabled": dtype is torch.float16, "loss_scale": 128}
    assert "optimizer" not in config and "optimizer" in section
    assert section["fp16"] == {"loss_scale": 128}


def test_batch_sizes_must_agree_with_the_ranks():
    section = complete({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2})
    # Left to DeepSpeed, which counts ranks that share samples one by one.
    assert "train_batch_size" not in engine_config(section, world_size=4, dtype=torch.float32)
    with pytest.raises(ConfigError, match="is 16, but 2 .* x 2 .* x 2 .* is 8") as caught:
        engine_config(section, world_size=2, dtype=torch.float32)
    assert "gradient_accumulation_steps=4" in str(caught.value)
    with pytest.raises(ConfigError, match="which follows from the others, or give a multiple of 6$"):
        engine_config(section, world_size=3, dtype=torch.float32)


@pytest.mark.parametrize("given", [{}, {"gradient_accumulation_steps": None}])
def test_accumulation_follows_the_batch_where_it_is_not_given(given):
    assert not check({"train_batch_size": 16, **given})
    section = complete({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, **given})
    for ranks, steps in ((1, 8), (2, 4), (4, 2), (8, 1)):
        followed = follow_batch(section, world_size=ranks)
        assert engine_config(followed, world_size=ranks, dtype=torch.float32)["gradient_accumulation_steps"] == steps
        assert follow_batch(followed, world_size=3) == followed, "what is given stays"
    for ranks in (3, 16):
        with pytest.raises(ConfigError, match=rf"is 16, but (.|\n)* give a multiple of {2 * ranks}$"):
            engine_config(follow_batch(section, world_size=ranks), world_size=ranks, dtype=torch.float32)
    assert complete(given)["gradient_accumulation_steps"] == 1


def test_the_keys_follow_the_installed_deepspeed():
    sgm.distributed.prepare_import()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    refused = REFUSED["deepspeed.zero_optimization"]
    assert refused.keys() < {*names}
    null = {"deepspeed.zero_optimization." + name for name in names if name not in refused}
    found = check({"zero_optimization": dict.fromkeys(names, "x")})
    assert null < found.keys() and not any("unknown key" in text for text in found.values())


@pytest.mark.parametrize("section", [REFERENCE, {}, {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8}}])
def test_deepspeed_accepts_the_engine_config(section):
    sgm.distributed.prepare_import()
    from deepspeed.runtime.config import DeepSpeedConfig

    taken = DeepSpeedConfig(engine_config(complete(section), world_size=1, dtype=torch.bfloat16))
    assert taken.zero_config.stage == (section.get("zero_optimization") or {}).get("stage", 2)
    assert taken.bfloat16_config.enabled and not taken.float16_config.enabled
    assert taken.gradient_clipping == 0.1
