"""Sequence and tensor parallel training equals training on one rank: losses, gradients, weights, evaluation, resume."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sgm.distributed
from sgm.config.load import ConfigError, load_config
from sgm.models.video_diffusion import TrainingInputs
from sgm.training import build
from sgm.training.inputs import shared
from sgm.training.metrics import read_metrics
from sgm.training.prepare import prepare
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import compute
from tests.processes import Training, asked, only_run, selected, train_all

FAMILIES = ["dit_t2v_2b", "dit_t2v_5b_lora", "dit_i2v_5b", "dit_t2v_1.5"]
LORA, I2V, FULL = FAMILIES[1], FAMILIES[2], FAMILIES[3]
ITERS = 3
BATCH = 4
# Clipping is active, ZeRO shards small parameters too, and its buffers are filled several times.
COMMON = [
    f"args.train_iters={ITERS}",
    "args.ema_decay=0.9",
    "deepspeed.gradient_clipping=0.0005",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "deepspeed.zero_optimization.reduce_bucket_size=20000",
]
EVALUATE = [
    f"args.eval_interval={ITERS}",
    "args.eval_iters=1",
    "args.strict_eval=true",
    "args.eval_batch_size=2",
    "args.only_log_video_latents=true",
]
RECOMPUTE = "args.checkpoint_activations=true"


def split(world: int, size: int, accumulation: int = 1, *, layers: int = 1) -> list[str]:
    """Return options for groups of `size` ranks, with tensor parallel size `layers`, that keep the batch."""
    return [
        f"args.sequence_parallel_size={size // layers}",
        f"args.model_parallel_size={layers}",
        f"deepspeed.gradient_accumulation_steps={accumulation}",
        f"deepspeed.train_micro_batch_size_per_gpu={BATCH // accumulation // (world // size)}",
        f"deepspeed.train_batch_size={BATCH}",
    ]


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def ring(attention: str) -> str:
    return f"args.sequence_attention={attention}"


# Name of a run → (model, options). Runs of one launch have the same mesh. They cover both kinds of attention and every
# ZeRO stage; a slow test below covers all combinations.
TWO = {f"{name} on two": (name, [ring("ring"), zero(stage)]) for stage, name in enumerate(FAMILIES)}
FOUR = {f"{name} on four": (name, [ring("ulysses"), RECOMPUTE, zero(3 - stage)]) for stage, name in enumerate(FAMILIES)}
LAYERS = {f"{LORA} by layers": (LORA, [zero(3), RECOMPUTE])}


# Two families by default.
SOME_OF_TWO = [name if TWO[name][0] in (LORA, FULL) else pytest.param(name, marks=pytest.mark.slow) for name in TWO]


def values(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run / "metrics.jsonl") if name in line]


def weights(run: Path, name: str = str(ITERS)) -> dict[str, torch.Tensor]:
    return {name: compute(tensor) for name, tensor in read_tensors(find_weights(run / name)).items()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def samples(run: Path) -> dict[str, torch.Tensor]:
    """Return the latents of a run's evaluations, by path."""
    found = sorted((run / "samples").rglob("*.safetensors"))
    return {path.relative_to(run / "samples").as_posix(): load_file(path)["latents"] for path in found}


def same(found: Path, reference: Path) -> None:
    assert values(found, "loss") == pytest.approx(values(reference, "loss"), abs=1e-5)
    assert values(found, "samples") == values(reference, "samples") == [BATCH * (i + 1) for i in range(ITERS)]
    # Adam is invariant to a wrong factor on the gradients; their norm is not.
    assert values(found, "grad_norm") == pytest.approx(values(reference, "grad_norm"), rel=1e-4)
    assert min(values(reference, "grad_norm")) > 0.0005, "gradients are clipped"
    for name in (str(ITERS), f"{ITERS}-ema"):
        assert difference(weights(found, name), weights(reference, name)) <= 1e-5
    assert difference(weights(reference), weights(reference, f"{ITERS}-ema")) > 2e-5, "it trains"


def on_int8() -> list[str]:
    """Model and options of adapters on stored weights."""
    model, options = TWO[f"{LORA} on two"]
    return [model, *options, *split(2, 2, accumulation=2), "args.base_weights=int8"]


class Runs:
    """Return the run folders, by name, of trainings in one launch."""

    def __init__(self, top: Path, training_yaml, world: int) -> None:
        self.top, self.world, self.jobs, self._yaml = top / str(world), world, [], training_yaml
        self.top.mkdir(parents=True)

    def add(self, name: str, model: str, *options: str) -> None:
        save = f"args.save={self.top / name}"
        self.jobs.append({"bases": self._yaml(model), "overrides": [*COMMON, save, *options]})

    def start(self) -> None:
        train_all(self.jobs, self.top.parent, self.world)

    def __getitem__(self, name: str) -> Path:
        return only_run(self.top / name)


@pytest.fixture(scope="module")
def alone(request, training_yaml, tmp_path_factory):
    """One rank: the reference."""
    runs = Runs(tmp_path_factory.mktemp("shared"), training_yaml, 1)
    by_name = {name: model for name, (model, _) in (TWO | FOUR | LAYERS).items()}
    needed = {*(by_name[name] for (name,) in asked(request, "name")), *(m for (m,) in asked(request, "model")), FULL}
    for name in sorted(needed):
        runs.add(name, name, zero(0), f"deepspeed.train_micro_batch_size_per_gpu={BATCH}", *EVALUATE)
    runs.start()
    return runs


@pytest.fixture(scope="module")
def on_two(request, training_yaml, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("shared"), training_yaml, 2)
    for (name,) in asked(request, "name"):
        model, options = TWO[name]
        runs.add(name, model, *options, *split(2, 2, accumulation=2))
    resumes = [[], ["args.exit_interval=2"], ["args.resume=auto"]]
    for more in resumes if selected(request, test_a_resumed_run_equals_an_uninterrupted_one) else []:
        name = "resumed" if more else "straight"
        runs.add(name, LORA, zero(2), *split(2, 2), "args.num_workers=1", *more)
    if selected(request, test_ranks_share_a_base_in_eight_bits):
        runs.add("int8", *on_int8())
    runs.start()
    return runs


@pytest.fixture(scope="module")
def on_four(training_yaml, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("shared"), training_yaml, 4)
    for name, (model, options) in FOUR.items():
        runs.add(name, model, *options, *split(4, 2), "model.first_stage_config.params.cp_size=2", *EVALUATE)
    runs.start()
    return runs


@pytest.fixture(scope="module")
def by_layers(training_yaml, tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("shared"), training_yaml, 2)
    for name, (model, options) in LAYERS.items():
        runs.add(name, model, *options, *split(2, 2, layers=2), *EVALUATE)
    for more in ([], ["args.exit_interval=2"], ["args.resume=auto"]):
        name = "resumed" if more else "straight"
        runs.add(name, LORA, zero(2), *split(2, 2, layers=2), *more)
    runs.start()
    return runs


@pytest.mark.thorough
@pytest.mark.parametrize("name", LAYERS)
def test_two_tensor_parallel_ranks_train_as_one(by_layers, alone, name):
    found, reference = by_layers[name], alone[LAYERS[name][0]]
    same(found, reference)
    assert len([*(found / str(ITERS)).glob("mp_rank_*")]) == len([*(found / f"{ITERS}-ema").glob("mp_rank_*")]) == 2
    assert values(found, "validation_loss") == pytest.approx(values(reference, "validation_loss"), abs=1e-5)
    assert difference(samples(found), samples(reference)) <= 1e-3


@pytest.mark.thorough
def test_a_resumed_tensor_parallel_run_equals_an_uninterrupted_one(by_layers):
    straight, resumed = by_layers["straight"], by_layers["resumed"]
    assert values(resumed, "loss") == values(straight, "loss")
    for name in (str(ITERS), f"{ITERS}-ema"):
        assert difference(weights(resumed, name), weights(straight, name)) == 0


@pytest.mark.parametrize("name", SOME_OF_TWO)
def test_two_ranks_train_as_one(on_two, alone, name):
    same(on_two[name], alone[TWO[name][0]])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_two_groups_with_context_parallel_autoencoder_train_as_one_rank(on_four, alone, name):
    same(on_four[name], alone[FOUR[name][0]])
    assert sorted(path.name for path in (on_four[name] / "resume" / str(ITERS)).glob("rng_*")) == [
        f"rng_{rank:02d}.pt" for rank in range(4)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_evaluation_counts_and_samples_as_one_rank_does(on_four, alone, name):
    found, reference = on_four[name], alone[FOUR[name][0]]
    assert values(found, "validation_loss") == pytest.approx(values(reference, "validation_loss"), abs=1e-5)
    made, expected = samples(found), samples(reference)
    assert len(made) == 2 and difference(made, expected) <= 1e-3


@pytest.mark.slow  # the tensor parallel one above runs by default
def test_a_resumed_run_equals_an_uninterrupted_one(on_two):
    straight, resumed = on_two["straight"], on_two["resumed"]
    assert values(resumed, "loss") == values(straight, "loss")
    assert (resumed / "config_from_2.yaml").is_file()
    for name in (str(ITERS), f"{ITERS}-ema"):
        assert difference(weights(resumed, name), weights(straight, name)) == 0


# One process


@pytest.fixture
def second_of_two(monkeypatch):
    """Act as the second rank of a group of two; `received` is the broadcast from the first."""
    received: list = []
    monkeypatch.setattr(sgm.distributed, "sample_rank", lambda: 1)
    monkeypatch.setattr(sgm.distributed, "broadcast_in_sample_group", lambda value: received.pop(0))
    return received


def test_only_the_first_rank_of_a_sample_reads_and_encodes(second_of_two):
    class Engine:  # without encoders
        input_key = "mp4"

    def read():
        raise AssertionError("the first one reads")

    made = TrainingInputs(torch.zeros(1), {}, torch.zeros(1), torch.zeros(1))
    second_of_two += [{"number": [3]}, made]
    batch = shared.shared_batch(Engine(), read)  # pyright: ignore[reportArgumentType] (a stand-in)
    assert batch == {"number": [3]}
    found = shared.shared_inputs(Engine(), batch, [torch.Generator()])  # pyright: ignore[reportArgumentType]
    assert found is made
    assert build._loader(None, None, None, 0, None, clip_dtype=None) == ()  # pyright: ignore[reportArgumentType] (not looked at)


@pytest.fixture
def plan(training_yaml, tmp_path, monkeypatch):
    """Return a function that prepares a run of a tiny network on four ranks."""
    monkeypatch.setenv("WORLD_SIZE", "4")

    def make(name, *overrides):
        return prepare(load_config(training_yaml(name), [f"args.save={tmp_path / 'runs'}", *overrides], mode="train"))

    return make


def test_the_batch_counts_each_sample_once(plan):
    found = plan(LORA, "args.sequence_parallel_size=2", "deepspeed.train_batch_size=4")
    assert found.global_batch == 4 and "train_batch_size" not in found.deepspeed
    assert "2 clips x 1 steps of accumulation x 2 groups of 2 ranks that share clips = 4" in found.report()
    eight = ["args.sequence_parallel_size=2", "deepspeed.train_batch_size=8"]
    assert plan(LORA, *eight).deepspeed["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match=r"is 8, but 2 \(micro batch\) x 1 .* x 2 \(ranks with samples of their own"):
        plan(LORA, *eight, "deepspeed.gradient_accumulation_steps=1")


@pytest.mark.parametrize(
    ("overrides", "path", "message"),
    [
        (["args.sequence_parallel_size=3"], "args", "legal are 1, 2, 4"),
        (["args.sequence_parallel_size=4", ring("ulysses")], "args.sequence_parallel_size", "give 1 or 2, or set"),
        (["args.cfg_parallel_size=2"], "args.cfg_parallel_size", "training has one branch"),
        (["args.model_parallel_size=4"], "args.model_parallel_size", "2 heads cannot be shared out evenly"),
        (
            ["args.model_parallel_size=2", "deepspeed.optimizer.type=Muon"],
            "deepspeed.optimizer",
            "model_parallel_size=2 divides them",
        ),
        (
            ["args.model_parallel_size=2", zero(0), "args.bf16=true"],
            "deepspeed.zero_optimization.stage",
            "leaves tensor-parallel layers",
        ),
        (["model.first_stage_config.params.cp_size=2"], "model.first_stage_config.params.cp_size", "size=2"),
        (["args.sequence_parallel_size=2", "model.first_stage_config.params.cp_size=4"], "args", "differ"),
    ],
)
def test_impossible_sizes_are_refused_before_weights_are_read(plan, overrides, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(LORA, *overrides)
    assert any(path in problem.path for problem in caught.value.problems)


def test_a_clip_of_too_few_patches_is_refused(plan, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match="the smallest sample has 4 tokens of text or patches"):
        plan(LORA, "args.sequence_parallel_size=16")


# Groups of four ranks (slow)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(("size", "shared_vae"), [(2, False), (4, False), (4, True)])
def test_every_stage_and_attention_trains_as_one_rank(training_yaml, alone, tmp_path, model, size, shared_vae):
    runs = Runs(tmp_path, training_yaml, 4)
    ways = ("ring",) if size == 4 else ("ulysses", "ring")  # two heads
    vae = f"model.first_stage_config.params.cp_size={size if shared_vae else 1}"
    combinations = list(itertools.product(ways, range(4), (False, True)))
    for way, stage, recomputes in combinations:
        options = [zero(stage), ring(way), vae, f"args.checkpoint_activations={recomputes}"]
        runs.add(f"{way} {stage} {recomputes}", model, *options, *split(4, size, 2), *EVALUATE)
    runs.start()
    for way, stage, recomputes in combinations:
        found = runs[f"{way} {stage} {recomputes}"]
        same(found, alone[model])
        assert values(found, "validation_loss") == pytest.approx(values(alone[model], "validation_loss"), abs=1e-5)
        assert difference(samples(found), samples(alone[model])) <= 1e-3


@pytest.mark.parametrize("name", [f"{LORA} on two"])
def test_ranks_share_a_base_in_eight_bits(on_two, name):
    plain, stored = on_two[name], on_two["int8"]
    assert values(stored, "loss") == pytest.approx(values(plain, "loss"), rel=0.02)
    assert 0 < difference(weights(stored), weights(plain)) < 0.1, "adapters alone, trained on other weights"


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_and_sequence_parallel_ranks_train_as_one(training_yaml, alone, tmp_path, model, size):
    runs = Runs(tmp_path, training_yaml, size)
    vae = f"model.first_stage_config.params.cp_size={size}"
    for stage in range(4):
        runs.add(str(stage), model, zero(stage), vae, ring("ring"), *split(size, size, 2, layers=2), *EVALUATE)
    runs.start()
    for stage in range(4):
        same(runs[str(stage)], alone[model])


@pytest.mark.slow
def test_a_run_goes_on_with_other_groups_of_as_many_ranks(training_yaml, alone, tmp_path):
    """ZeRO shards the state over all processes, for any group size; the micro batch keeps the batch."""
    for size, more in ((2, ["args.exit_interval=2"]), (4, ["args.resume=auto"])):
        runs = Runs(tmp_path / str(size), training_yaml, 4)
        runs.top = tmp_path / "runs"
        runs.add("run", FULL, zero(2), *split(4, size), *more)
        runs.start()
    same(only_run(tmp_path / "runs" / "run"), alone[FULL])


@pytest.mark.slow
def test_a_rank_that_cannot_read_ends_the_run(training_yaml, clips, tmp_path):
    data = shutil.copytree(clips, tmp_path / "clips")
    for video in (data / "videos").iterdir():
        video.write_bytes(b"no video")
    overrides = [f"args.train_data=[{data}]", "args.valid_data=null", "args.check_clips=none"]
    training = Training(training_yaml(LORA), [*COMMON, *overrides, *split(2, 2), f"args.save={tmp_path / 'runs'}"], 2)
    assert "none of the 8 clips tried for it can be used" in training.finish(60, code=1)
