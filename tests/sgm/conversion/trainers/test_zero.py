"""ZeRO states written by hand; test_consolidate.py reads those of real trainings."""

import shutil
from pathlib import Path

import pytest
import schedulefree
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.conversion.trainers.sources import find_files, read_source
from sgm.conversion.trainers.zero import read_zero_state
from sgm.util import InputError
from tests.sgm.conversion.trainers.zero_files import require_equal, write_state

OPTIM, MODEL = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"


class Averaged(TorchDispatchMode):
    """Counts the elements that are averaged: of each call of lerp."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.lerp.Scalar and not result.is_meta:
            self.found.append(result.numel())
        return result


@pytest.fixture
def some(tmp_path):
    """Return a function that writes a small state of odd sizes, and the tensors in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (7,), "c": (1,), "d": (2, 2, 2), "e": (1,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    groups = [{name: tensors[name] for name in each} for each in ("ad", "bce")]

    def write(**changes):
        return write_state(tmp_path / "state", groups, **changes)

    return write, tensors


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_partitions_become_tensors(some, stage, world):
    write, tensors = some
    extra = {
        "frozen": {"f": torch.arange(10.0).view(5, 2).bfloat16()},
        "buffers": {"n": torch.tensor([3])},
        "shared": {"s": "a"},
    }
    padding = 3 if stage < 3 and world == 2 else 0  # DeepSpeed's zero_optimization.parameter_alignment
    state = read_zero_state(write(stage=stage, world=world, padding=padding, **extra))
    assert (state.stage, state.world_size, state.iteration) == (stage, world, 70)
    wanted = tensors | {"f": torch.arange(10.0).view(5, 2), "n": torch.tensor([3]), "s": tensors["a"]}
    masters = {name: lazy.compute() for name, lazy in state.tensors(dtype=torch.float32).items()}
    require_equal(masters, wanted)
    own = {name: lazy.compute() for name, lazy in state.tensors().items()}
    require_equal(own, {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted.items()})


def spoil(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        (2, lambda f: (f / OPTIM.format(1)).unlink(), "3 ranks at stage 2, and lacks zero_pp_rank_1_"),
        (3, lambda f: (f / MODEL.format(2)).unlink(), "lacks zero_pp_rank_2_mp_rank_00_model_states.pt"),
        (3, lambda f: (f / MODEL.format(0)).unlink(), "lacks zero_pp_rank_0_mp_rank_00_model_states.pt"),
        (2, lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "lacks mp_rank_00_model_states.pt"),
        (2, lambda f: [path.unlink() for path in f.glob("*optim*")], "lacks the files zero_pp_rank_<rank>"),
        (2, lambda f: shutil.copy(f / OPTIM.format(0), f / OPTIM.format(3)), "files of several states"),
        (2, lambda f: shutil.copy(f / OPTIM.format(0), f / f"bf16_{OPTIM.format(0)}"), "mixes two states"),
        (2, lambda f: (f / "mp_rank_01_model_states.pt").touch(), "tensor-parallel"),
        (2, lambda f: (f / OPTIM.format(1)).write_bytes(b"PK\x03\x04 cut"), "truncated or damaged"),
        (
            2,
            lambda f: spoil(f / OPTIM.format(1), lambda c: c["optimizer_state_dict"].update(partition_count=[2, 2])),
            "stage 2 of 3 ranks: .*stage 2 of 2 ranks: zero_pp_rank_1",
        ),
        (
            2,
            lambda f: spoil(f / OPTIM.format(1), lambda c: c["optimizer_state_dict"].update(zero_stage=4)),
            "has ZeRO stage 4",
        ),
        (
            3,
            lambda f: spoil(
                f / OPTIM.format(1), lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=[torch.zeros(3)])
            ),
            r"partitions of \[\d+, 3, \d+\] elements",
        ),
        (
            3,
            lambda f: spoil(f / MODEL.format(1), lambda c: c.update(frozen_param_fragments=None)),
            "lacks the frozen parameter f",
        ),
        (2, lambda f: torch.save({"optimizer_state_dict": spoil}, f / OPTIM.format(1)), "could run code"),
    ],
)
def test_incomplete_and_mixed_states_are_refused(some, stage, change, said):
    folder = some[0](stage=stage, frozen={"f": torch.arange(10.0)})
    change(folder)
    with pytest.raises(InputError, match=said):
        read_zero_state(folder)


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_of_different_saves_are_refused(some, stage):
    folder = some[0](stage=stage, steps=(70, 70, 80))
    said = f"mixes the files of several saves: {OPTIM.format(0)} of step 70, {OPTIM.format(2)} of step 80"
    with pytest.raises(InputError, match=said):
        read_zero_state(folder)
    shutil.rmtree(folder)
    assert read_zero_state(some[0](stage=stage, steps=(70, 70, 70))).world_size == 3


def test_states_in_a_folder_without_latest_are_named(some, tmp_path):
    folder = some[0](stage=2)
    with pytest.raises(InputError, match=f"found: none.*or give one of the ZeRO states in it: {folder}$"):
        find_files(tmp_path)


def test_the_iteration_is_in_the_name_of_the_folder_without_zero(tmp_path):
    for name, iteration in (("global_step70", 70), ("1000-ema", 1000), ("step", 1)):
        (tmp_path / name).mkdir()
        torch.save({"module": {"mixins.a": torch.ones(1)}}, tmp_path / name / "mp_rank_00_model_states.pt")
        assert read_source(tmp_path / name).iteration == iteration


A, SPARSE = torch.ones(2), torch.ones(3).to_sparse()
ENTRIES = [
    *(("model", {"param_shapes": value}) for value in ([3], [{"a": "x"}], [{"a": 3}], [{"a": [16.0, 1]}], [{3: [1]}])),
    *(("model", {"param_shapes": [{"a": (-5, -3)}, {}]}), ("model", {"global_steps": "x"})),
    *(("model", {"module": value}) for value in ([1], {"a": 3})),
    *(("model", {"shared_params": ["a"]}), ("model", {"buffer_names": 3}), ("model", {"frozen_param_shapes": [1]})),
    *(("model", {"frozen_param_fragments": value}) for value in ([1], {"f": 3}, {"f": SPARSE})),
    *(("optim", {"partition_count": value}) for value in (None, ["1"], [1.0], "x", 10**9, 0)),
    *(("optim", {"param_alignment_paddings": value}) for value in (3, [3], [[0]], [[0], [0]])),
    *(("optim", {"zero_stage": [2]}), ("optim", {"base_optimizer_state": {"param_groups": 3}})),
    *(("optim", {"base_optimizer_state": {"param_groups": [3], "state": 3}}),),
    *(
        ("optim", {"base_optimizer_state": {"state": {0: {"z": A}}, "param_groups": [{"train_mode": True, **group}]}})
        for group in ({}, {"betas": 3}, {"betas": ["x"]}, {"betas": [0]})
    ),
    *(("optim", {"single_partition_of_fp32_groups": [value, A]}) for value in (A[None], SPARSE, [A], None)),
]


@pytest.mark.parametrize(("kind", "change"), ENTRIES)
def test_entries_that_deepspeed_does_not_write_are_refused(some, kind, change):
    folder = some[0](stage=2, world=1, frozen={"f": torch.arange(10.0)})
    path = folder / (OPTIM.format(0) if kind == "optim" else "mp_rank_00_model_states.pt")
    spoil(path, lambda content: (content["optimizer_state_dict"] if kind == "optim" else content).update(change))
    with pytest.raises(InputError, match=f"(?s){path.name}.*copy the whole folder again|param_shapes"):
        read_zero_state(folder)


def test_damaged_and_non_finite_states_are_refused_when_they_are_computed(some):
    folder = some[0](stage=2)
    path = folder / OPTIM.format(1)
    good = path.read_bytes()
    content = torch.load(path, weights_only=True)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    flipped = bytearray(good)
    flipped[good.index(content.numpy().tobytes())] ^= 1
    path.write_bytes(flipped)
    state = read_zero_state(folder)
    with pytest.raises(InputError, match=rf"{path.name}: weights\[0\] is damaged"):
        state.tensors()["a"].compute()
    path.write_bytes(good)
    spoil(path, lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].fill_(float("inf")))
    with pytest.raises(InputError, match="not finite"):
        [tensor.compute() for tensor in read_zero_state(folder).tensors().values()]


def test_averages_of_a_state_without_them_are_refused(some):
    with pytest.raises(InputError, match="holds no moving average"):
        read_zero_state(some[0]()).tensors(ema=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_weights_of_a_schedule_free_optimizer_are_its_average(some, stage):
    folder, parts = some[0](stage=stage), "single_partition_of_fp32_groups"
    plain = shutil.copytree(folder, folder.with_name("plain"))
    for path in folder.glob(OPTIM.format("*")):

        def train(content, path=path):
            state = content["optimizer_state_dict"]
            weights = [nn.Parameter(part) for part in state[parts]]
            optimizer = schedulefree.AdamWScheduleFree([{"params": [p]} for p in weights], lr=0.1, betas=(0.8, 0.9))
            optimizer.train()
            for _ in range(3):
                for p in weights:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            saved = optimizer.state_dict()
            state |= {parts: [p.detach().clone() for p in weights], "base_optimizer_state": saved}
            optimizer.eval()
            spoil(
                plain / path.name,
                lambda other: other["optimizer_state_dict"].update({parts: [p.detach() for p in weights]}),
            )

        spoil(path, train)
    found, averages = (
        {name: tensor.compute() for name, tensor in read_zero_state(each).tensors(dtype=torch.float32).items()}
        for each in (folder, plain)
    )
    require_equal(found, averages)
    with Averaged() as averaged:
        for tensor in read_zero_state(folder).tensors(dtype=torch.float32).values():
            tensor.compute()
    assert sum(averaged.found) == sum(map(torch.numel, some[1].values())), "each element once, no whole partition"
