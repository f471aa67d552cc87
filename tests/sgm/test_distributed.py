import importlib
import os
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import sgm.distributed
from sgm.config.args import SamplingArgs, TrainingArgs
from sgm.util import InputError
from tests.processes import run

TWO_RANKS = """
import torch, torch.distributed as dist
import sgm.distributed as d
d.initialize()
d.initialize()
x = torch.tensor([d.data_parallel_rank() + 1.0], device=d.device())
dist.all_reduce(x)
assert d.data_parallel_size() == 2 and x.item() == 3.0
rank = d.data_parallel_rank()
assert d.all_reduce_(torch.tensor([rank, 5 - rank])).tolist() == [1, 9]
assert d.all_reduce_(torch.tensor([rank, 5 - rank]), largest=True).tolist() == [1, 5]
assert d.broadcast_from_rank_zero({"rank": rank}) == {"rank": 0}
assert d.all_gather_objects(rank) == [0, 1] and d.gather_objects(rank) == (None if rank else [0, 1])
assert d.any_rank(rank == 1) and not d.any_rank(rank == 2)
assert d.all_gather_any({}) == [] and d.all_gather_any({1: 2} if rank else {}) == [{}, {1: 2}]
d.barrier()
d.shutdown()
assert not dist.is_initialized()
"""

SHARED = """
import sgm.distributed as d
from sgm.log import configure_logging, get_logger
configure_logging()
d.initialize(mesh=d.Mesh(sequence=2))
get_logger().warning("the prompt is cut")
d.barrier()
d.shutdown()
"""


def test_a_single_process_needs_no_launcher_and_opens_no_port(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    sgm.distributed.initialize()
    sgm.distributed.initialize()
    assert dist.get_world_size() == 1
    assert (sgm.distributed.data_parallel_rank(), sgm.distributed.data_parallel_size()) == (0, 1)
    assert sgm.distributed.all_reduce_(torch.tensor([2.0])).tolist() == [2.0]
    assert (sgm.distributed.broadcast_from_rank_zero("x"), sgm.distributed.all_gather_objects("x")) == ("x", ["x"])


def test_groups_can_be_made_again_after_a_shutdown():
    sgm.distributed.initialize()
    sgm.distributed.shutdown()
    assert not dist.is_initialized() and sgm.distributed.data_parallel_size() == 1
    sgm.distributed.initialize()
    assert dist.is_initialized()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_group_of_all_processes_is_bound_to_the_accelerator(monkeypatch, kind):
    """NCCL otherwise connects late, and guesses the device of a barrier."""
    started = []
    own = torch.device("cpu") if kind == "cpu" else torch.device(kind, 1)
    monkeypatch.setattr(sgm.distributed, "device", lambda: own)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: started.append((backend, options)))
    sgm.distributed._start_groups(rank=0)
    expected = ("gloo", {"device_id": None}) if kind == "cpu" else ("nccl", {"device_id": own})
    assert started == [(expected[0], expected[1] | {"rank": 0})]


def test_two_ranks(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    done = run(str(script), [], world=2)
    assert done.returncode == 0, done.stderr


def test_ranks_that_share_a_sample_warn_of_it_once(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    done = run(str(script), [], world=2)
    assert done.returncode == 0 and done.stderr.count("the prompt is cut") == 1, done.stderr


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_the_device_is_the_cpu_where_there_is_nothing_else():
    assert sgm.distributed.device() == torch.device("cpu")
    sgm.distributed.prepare_import()
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_wait_in_the_store_ends_when_a_rank_is_lost(monkeypatch):
    """So that what the rank does on failure is done, before its heartbeats end it."""
    found = threading.Event()
    found.set()
    monkeypatch.setattr(sgm.distributed, "_peers", SimpleNamespace(found=found))
    monkeypatch.setattr(sgm.distributed, "_store", dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    with pytest.raises(dist.DistError, match="given up"):
        sgm.distributed._poll(sgm.distributed._store, ["rank zero/1"])
    with pytest.raises(dist.DistError):
        sgm.distributed._poll(sgm.distributed._store, ["rank zero/1"], found)


@pytest.mark.parametrize(("given", "number"), [(None, 1), ("", 1), ("8", 8)])
def test_the_number_of_processes(monkeypatch, given, number):
    monkeypatch.delenv("WORLD_SIZE", raising=False) if given is None else monkeypatch.setenv("WORLD_SIZE", given)
    assert sgm.distributed.world_size() == number


@pytest.mark.parametrize("given", ["0", "-1", "two", "2.0"])
def test_what_is_no_number_of_processes_is_refused(monkeypatch, given):
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(InputError, match=f"the environment has WORLD_SIZE={given}; it is a number of processes"):
        sgm.distributed.world_size()


@pytest.mark.parametrize(
    ("command", "files"),
    [("training", ("toy_lora", "toy_sft")), ("inference", ("toy", "toy_inference"))],
)
@pytest.mark.parametrize("words", [[], ["--check"]])
def test_variables_of_the_launcher_that_are_missing_are_named(monkeypatch, capsys, command, files, words):
    """Before a network is built, for which the ranks connect, with the timeout of the run."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", ""), ("MASTER_PORT", "")):
        monkeypatch.setenv(name, value)
    main = importlib.import_module(f"sgm.{command}.main").main
    assert main([*(f"configs/{name}.yaml" for name in files), *words]) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE=2, and no MASTER_ADDR or MASTER_PORT; start the processes with torchrun" in error
    assert error.count("error") == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 4}, "cp_size=4 ranks .* among 6 processes; legal are 1, 2, 3, 6"),
        ({"tensor": 4}, "args.model_parallel_size=4 ranks .* legal are 1, 2, 3, 6"),
        ({"cfg": 3}, "args.cfg_parallel_size=3, but guidance has two branches; give 1 or 2"),
        ({"sequence": 0}, "args.sequence_parallel_size=0 ranks"),
        ({"context": 2, "sequence": 3}, "cp_size=2 and args.sequence_parallel_size=3 differ: .* cp_size to 3 or 1"),
        ({"context": 2, "sequence": 3, "cfg": 2}, "cp_size to 6 or 1"),
        ({"tensor": 2, "cfg": 2}, "model_parallel_size=2 × args.cfg_parallel_size=2 = 4 ranks cannot share"),
    ],
)
def test_sizes_that_cannot_share_are_refused_with_the_legal_ones(monkeypatch, sizes, message):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(InputError, match=message):
        sgm.distributed.initialize(mesh=sgm.distributed.Mesh(**sizes))
    assert sgm.distributed.context_group() is None and sgm.distributed.context_parallel_size() == 1


def test_neighbours_share_layers_then_tokens_then_branches():
    mesh = sgm.distributed.Mesh(context=12, tensor=2, sequence=3, cfg=2)
    groups = {axis: mesh.groups(axis) for axis in ("tensor", "sequence", "cfg")}
    assert groups["tensor"] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert groups["sequence"] == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert groups["cfg"] == [[rank, rank + 6] for rank in range(6)]


@pytest.mark.parametrize(
    ("world", "local", "sizes"),
    [
        (8, 4, {}),
        (8, 8, {"sequence": 4, "context": 4}),
        (6, 4, {"context": 3}),
        (16, 8, {"tensor": 2, "sequence": 2, "cfg": 2}),
        (1024, 8, {"tensor": 2, "sequence": 4, "context": 8}),
    ],
)
def test_each_rank_creates_its_own_groups_in_rounds_of_all_ranks(monkeypatch, world, local, sizes):
    """NCCL and torch's names of groups ask that no rank is left out of a round; see `_own_group`."""
    from sat import mpu

    sgm.distributed.initialize()
    mesh = sgm.distributed.Mesh(**sizes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(dist, "get_world_size", lambda: world)

    def made_by(rank: int) -> list[list[int]]:
        made: list[list[int]] = []

        def create(ranks: list[int], use_local_synchronization: bool) -> tuple[int, ...]:
            assert use_local_synchronization
            made.append(ranks)
            return tuple(ranks)

        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "new_group", create)
        sgm.distributed._make_layer_groups(mesh.tensor)
        sgm.distributed._make_groups(mesh)
        return made

    for name in ("_sample_groups", "_axes"):
        monkeypatch.setattr(sgm.distributed, name, {})
    modules = "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_NODE_GROUP"
    for name in modules:
        monkeypatch.setattr(mpu.initialize, name, None)
    rounds = [*zip(*(made_by(rank) for rank in range(world)), strict=True)]
    assert len(rounds) <= 3 + mesh.ranks + 2, "not more for more ranks"
    for groups in rounds:
        members = [rank for group in {tuple(group) for group in groups} for rank in group]
        assert sorted(members) == [*range(world)] and all(rank in group for rank, group in enumerate(groups))
        colours = {dist.distributed_c10d._process_group_color(group): tuple(group) for group in groups}
        assert len(colours) == len({tuple(group) for group in groups}), "NCCL takes equal ones for one group"
    last = (world - 1) // mesh.ranks * mesh.ranks
    assert mpu.get_data_parallel_group() == tuple(range((world - 1) % mesh.tensor, world, mesh.tensor))
    assert mpu.get_model_parallel_group() == tuple(range(world - mesh.tensor, world))
    for axis in ("sequence", "cfg"):
        expected = [tuple(last + rank for rank in group) for group in mesh.groups(axis) if mesh.ranks - 1 in group]
        assert [*sgm.distributed._axes.get(axis, ())] == ([*expected[0]] if getattr(mesh, axis) > 1 else [])


def test_a_mesh_is_declared_once(monkeypatch):
    sgm.distributed.shutdown()
    sgm.distributed.initialize(mesh=sgm.distributed.Mesh())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="already"):
        sgm.distributed.initialize(mesh=sgm.distributed.Mesh(sequence=2))
    sgm.distributed.shutdown()


@pytest.mark.parametrize(
    ("tool", "kind"), [("sgm.inference.run.sample", SamplingArgs), ("sgm.training.run.train", TrainingArgs)]
)
@pytest.mark.parametrize(("given", "precision"), [(True, "high"), (False, "highest")])
def test_products_of_float32_are_rounded_only_if_asked(monkeypatch, tool, kind, given, precision):
    module, _, name = tool.rpartition(".")
    monkeypatch.setattr("sgm.distributed._timeout", None)
    monkeypatch.setattr(f"{module}.prepare", lambda config: 1 / 0)  # what follows
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with pytest.raises(ZeroDivisionError):
            getattr(importlib.import_module(module), name)(SimpleNamespace(args=kind(allow_tf32=given)))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is given
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.parametrize("own", [0, 1])
def test_a_backend_that_cannot_gather_to_one_rank_gathers_to_all(monkeypatch, own):
    monkeypatch.setattr(sgm.distributed, "_is_shared", lambda: True)
    monkeypatch.setattr(sgm.distributed.dist, "get_backend", lambda: "other")
    monkeypatch.setattr(sgm.distributed, "all_gather_objects", lambda value: [value, "b"])
    monkeypatch.setattr(sgm.distributed, "rank", lambda: own)
    assert sgm.distributed.gather_objects("a") == (["a", "b"] if own == 0 else None)
