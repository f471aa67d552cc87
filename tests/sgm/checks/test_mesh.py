"""Parallel sizes that model, sampler or number of processes do not allow are refused before anything is read."""

import pytest

from sgm.checks.mesh import check_mesh, mesh_of, restart_warnings
from sgm.config.load import ConfigError, load_config
from sgm.weights.lora.several import with_loras

INFERENCE = ["configs/toy.yaml", "configs/toy_inference.yaml"]
TRAINING = ["configs/toy.yaml", "configs/toy_sft.yaml"]


def complaints(*overrides, bases=INFERENCE, mode="inference", **given):
    config = load_config(bases, overrides, mode=mode)
    return {problem.path: f"{problem.found} -> {problem.cure}" for problem in check_mesh(config, **given)}


@pytest.fixture(autouse=True)
def eight_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")


def test_the_mesh_is_read_from_the_configuration():
    overrides = ["args.sequence_parallel_size=2", "args.cfg_parallel_size=2"]
    mesh = mesh_of(load_config(INFERENCE, [*overrides, "model.first_stage_config.params.cp_size=4"], mode="inference"))
    assert (mesh.context, mesh.tensor, mesh.sequence, mesh.cfg, mesh.ranks) == (4, 1, 2, 2, 4)
    assert complaints(*overrides) == {}


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["args.sequence_parallel_size=3"], "args", "legal are 1, 2, 4, 8"),
        (["args.model_parallel_size=8"], "args.model_parallel_size", "cannot be shared out evenly -> give 1 or 2"),
        (
            ["args.sequence_parallel_size=8", "args.sequence_attention=ulysses"],
            "args.sequence_parallel_size",
            "args.sequence_attention=ring",
        ),
        (
            ["args.sequence_parallel_size=8", "args.attention=math"],
            "args.attention",
            "which has kernels of its own -> remove it, or give 1 or 2",
        ),
        (
            ["args.cfg_parallel_size=2", "model.sampler_config.params.guider_config=null"],
            "args.cfg_parallel_size",
            "no guidance",
        ),
        (
            ["args.cfg_parallel_size=2", "args.guidance_scale=0"],
            "args.cfg_parallel_size",
            "a guidance scale of 0 is no guidance",
        ),
    ],
)
def test_what_cannot_be_shared(overrides, path, words):
    found = complaints(*overrides)
    assert [*found] == [path] and words in found[path]


def test_a_sample_may_have_too_few_patches():
    assert complaints("args.sequence_parallel_size=8", num_patches=8) == {}
    found = complaints("args.sequence_parallel_size=8", num_patches=6)
    assert "has 6 tokens of text or patches to share -> give 1 or 2 or 4" in found["args.sequence_parallel_size"]


def test_training_has_no_branches_to_share():
    found = complaints("args.cfg_parallel_size=2", bases=TRAINING, mode="train")
    assert "training has one branch" in found["args.cfg_parallel_size"]


@pytest.mark.parametrize(
    ("params", "said"), [("targets=[attention,ff]", "attention only"), ("kind=dora", "is for whole weights")]
)
def test_adapters_that_cannot_be_sharded(params, said):
    bases = ["configs/toy_lora.yaml", "configs/toy_sft.yaml"]
    lora = f"model.network_config.params.modules.lora_config.params.{params}"
    assert complaints(lora, bases=bases, mode="train") == {}
    found = complaints(lora, "args.model_parallel_size=2", bases=bases, mode="train")
    assert [*found] == ["args.model_parallel_size"] and said in found["args.model_parallel_size"]


def test_loras_that_cannot_be_sharded_are_named():
    bases = [*INFERENCE, "configs/toy_loras.yaml"]
    assert with_loras(load_config(bases, mode="inference")).model
    with pytest.raises(ConfigError, match="args.loras.0.path.*assets/toy_land.* adapts .*attention only"):
        with_loras(load_config(bases, ["args.model_parallel_size=2"], mode="inference"))


@pytest.mark.parametrize(
    ("machines", "overrides", "said"),
    [
        ("4", ["data.params.buckets=[5x64x64]"], None),
        ("1:4", [], None),
        ("0:2", ["deepspeed.train_batch_size=32"], None),  # torchrun refuses it
        ("1:4", ["deepspeed.train_batch_size=96"], None),
        ("1:4", ["deepspeed.train_batch_size=32"], "refused on 3 (deepspeed.train_batch_size=32 is no multiple of 24)"),
        (
            "2:3",
            ["deepspeed.train_batch_size=32", "deepspeed.gradient_accumulation_steps=2"],
            "refused on 3 (deepspeed.gradient_accumulation_steps is given; null lets it follow)",
        ),
        ("1:2", ["args.sequence_parallel_size=16"], "refused on 1 (8 ranks are no groups of 16)"),
        ("1:2", ["data.params.buckets=[5x64x64]"], "as it was saved on alone: data.params.buckets divides the clips"),
        ("1:2", ["deepspeed.optimizer.type=bitsandbytes.optim.AdamW8bit"], "keeps a scale for each block"),
        (
            "1:2",
            ["deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: x}"],
            "the state of a machine is on its NVMe",
        ),
    ],
)
def test_what_cannot_restart_on_other_machines_is_said_before(monkeypatch, machines, overrides, said):
    monkeypatch.setenv("NNODES", machines)
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    more = ["deepspeed.train_micro_batch_size_per_gpu=1", *overrides]
    found = list(restart_warnings(config := load_config(TRAINING, more, mode="train")))
    assert [said in text for text in found] == [True] * (said is not None), found
    monkeypatch.setenv("NPROC_PER_NODE", "0")  # refused later
    list(restart_warnings(config))


@pytest.mark.parametrize(
    ("variables", "resume", "said"),
    [
        ({"MAX_RESTARTS": "3"}, "none", True),
        ({"TORCHELASTIC_MAX_RESTARTS": "1"}, "none", True),
        ({"NNODES": "1:2"}, "none", True),
        ({"MAX_RESTARTS": "3"}, "auto", False),
        ({"MAX_RESTARTS": "0"}, "none", False),
        ({}, "none", False),
    ],
)
def test_restarts_that_would_begin_anew_are_said_before(monkeypatch, variables, resume, said):
    for name in ("NNODES", "PET_NNODES", "MAX_RESTARTS", "PET_MAX_RESTARTS", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = list(restart_warnings(load_config(TRAINING, [f"args.resume={resume}"], mode="train")))
    assert [text.startswith("args.resume=none: each restart") for text in found] == [True] * said
