"""ZeRO stage 3 with a trained position table, which no submodule's forward pass reads."""

from pathlib import Path

import pytest

from sgm.config.load import load_config
from sgm.training.metrics import read_metrics
from sgm.training.run import train
from sgm.weights.files import find_weights, read_tensors
from tests.processes import asked, only_run, train_all

MODEL, TABLE = "dit_i2v_5b", "model.diffusion_model.mixins.pos_embed.pos_embedding"
ITERS, BATCH = 2, 4
ZERO = "deepspeed.zero_optimization"
SHARD_ALL = f"{ZERO}.stage3_param_persistence_threshold=0"
# Name of a run → its options. By default, ZeRO-3 does not shard parameters as small as those of the test.
RUNS = {
    "all sharded": [SHARD_ALL],
    "all sharded, recomputed": [SHARD_ALL, "args.checkpoint_activations=true"],
    "small ones whole": [],
}


def options(save: Path, stage: int, *more: str, world: int = 1) -> list[str]:
    return [
        f"args.save={save}",
        f"args.train_iters={ITERS}",
        "args.ema_decay=0.9",
        f"deepspeed.train_micro_batch_size_per_gpu={BATCH // world}",
        f"{ZERO}.stage={stage}",
        *more,
    ]


@pytest.fixture(scope="module")
def stage0(training_yaml, tmp_path_factory) -> Path:
    return train(load_config(training_yaml(MODEL), options(tmp_path_factory.mktemp("stage0"), 0), mode="train")).folder


@pytest.fixture(scope="module")
def sharded_on_two_ranks(request, training_yaml, tmp_path_factory):
    """Return a function: name of a run → its folder."""
    top = tmp_path_factory.mktemp("two")
    jobs = [options(top / name, 3, *RUNS[name], world=2) for (name,) in asked(request, "name")]
    train_all([{"bases": training_yaml(MODEL), "overrides": job} for job in jobs], top, world=2)
    return lambda name: only_run(top / name)


def assert_same(found: Path, reference: Path) -> None:
    numbers = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (found, reference)
    ]
    assert len(numbers[1]) == ITERS
    for now, then in zip(*numbers, strict=True):
        assert now == pytest.approx(then, abs=1e-5, rel=1e-4)
    for name in (str(ITERS), f"{ITERS}-ema"):
        now, then = (read_tensors(find_weights(run / name)) for run in (found, reference))
        assert now.keys() == then.keys() and TABLE in now
        assert max(float((now[key] - then[key]).abs().max()) for key in now) <= 1e-5


def test_the_table_is_trained(stage0):
    begin = read_tensors(find_weights(Path(__file__).parents[2] / "data" / "golden" / MODEL / "transformer"))
    change = read_tensors(find_weights(stage0))[TABLE] - begin[TABLE]
    assert float(change.abs().max()) > 1e-4


def by_default(chosen: str) -> list:
    """Return the names of all runs; but for `chosen`, they are slow."""
    return [name if name == chosen else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.mark.thorough
@pytest.mark.parametrize("name", by_default("all sharded, recomputed"))
def test_one_rank_trains_as_without_zero(stage0, training_yaml, tmp_path, name):
    overrides = options(tmp_path, 3, *RUNS[name])
    assert_same(train(load_config(training_yaml(MODEL), overrides, mode="train")).folder, stage0)


@pytest.mark.parametrize("name", by_default("all sharded"))
def test_two_ranks_train_as_without_zero(stage0, sharded_on_two_ranks, name):
    assert_same(sharded_on_two_ranks(name), stage0)
