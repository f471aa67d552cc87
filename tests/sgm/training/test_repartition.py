"""The resume state divided over other ranks and tensor parallel shards."""

import math
from pathlib import Path

import pytest
import torch

from sgm.training.repartition import Layout, SavedState
from sgm.util import InputError
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import compute
from sgm.weights.partition import Shard, take_shard
from tests.processes import only_run, train_all
from tests.sgm.training.test_resume import MODELS, SHARDED, difference, losses

LAYER = "model.diffusion_model.transformer.layers.0"
MATRICES = {
    f"{LAYER}.attention.query_key_value.weight": (24, 5),
    f"{LAYER}.attention.dense.weight": (5, 8),
    "model.diffusion_model.mixins.patch_embed.proj.weight": (3, 7),
}
VECTORS = {f"{LAYER}.attention.query_key_value.bias": (24,), f"{LAYER}.input_layernorm.bias": (1,)}
TENSORS = {name: torch.randn(shape) for name, shape in (MATRICES | VECTORS).items()}
KEYS = ("exp_avg", "ema")


def shapes(size: int) -> list[dict[str, torch.Size]]:
    """Return the shapes of the parameters in one of `size` shards, with and without weight decay."""
    whole = ({name: TENSORS[name] for name in group} for group in (MATRICES, VECTORS))
    return [{name: take_shard(name, each, Shard(0, size)).shape for name, each in group.items()} for group in whole]


def layout(stage: int, world: int, shard: Shard, paddings=()) -> Layout:
    groups = shapes(shard.size)
    numbers: tuple[int, ...] = ()
    if stage == 3:  # the first group in two vectors, as with a small sub_group_size
        (first, *rest), second = groups[0].items(), groups[1]
        groups, numbers = [dict([first]), dict(rest), second], (0, 0, 1)
    return Layout(stage, world, shard, tuple(groups), paddings, numbers)


def content(stage: int, tensors: dict[str, torch.Tensor], shard: Shard) -> dict:
    """Return the files of one rank: each key of the state is the weights times a number."""
    own = layout(stage, 1, shard)
    flat = [torch.cat([take_shard(name, tensors[name], shard).flatten() for name in group]) for group in own.groups]
    padded = [
        torch.nn.functional.pad(v, (0, each.length - len(v))) for v, each in zip(flat, own.vectors(0), strict=True)
    ]
    base = {
        "state": {
            number: {"step": torch.tensor(3.0), **{key: vector * (2 + i) for i, key in enumerate(KEYS)}}
            for number, vector in enumerate(padded)
        },
        "param_groups": [{"lr": 0.1, "params": [0, 1] if stage == 3 else [0]}, {"lr": 0.1, "params": [len(flat) - 1]}],
    }
    weights_key, base_key = {3: ("fp32_flat_groups", "optimizer_state_dict")}.get(
        stage, ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    return {weights_key: flat, base_key: base, "partition_count": 1, "zero_stage": stage}


def files(stage: int, partitions: dict[tuple[int, int], dict], size: int) -> dict[str, dict]:
    """Return a folder: name → content, from the partitions by ZeRO rank and tensor parallel rank."""
    found = {}
    for (rank, index), partition in partitions.items():
        found[f"zero_pp_rank_{rank}_mp_rank_{index:02d}_optim_states.pt"] = {"optimizer_state_dict": partition}
        model = f"zero_pp_rank_{rank}_" * (stage == 3) + f"mp_rank_{index:02d}_model_states.pt"
        found[model] = {
            "param_shapes": layout(stage, 1, Shard(index, size)).groups,
            "module": {name: take_shard(name, each, Shard(index, size)) for name, each in TENSORS.items()},
            "buffer_names": [],
        }
    return found


def opened(folder: dict[str, dict], stage: int, size: int) -> SavedState:
    return SavedState(Path("resume/3"), list(folder), stage=stage, size=size, read=lambda path: folder[path.name])


def divided(saved: SavedState, stage: int, world: int, size: int, paddings=()) -> dict[str, dict]:
    """Return the folder that `world` ranks of each of `size` shards would have saved."""
    own = {
        (rank, index): saved.partition(layout(stage, world, Shard(index, size), paddings), rank)
        for rank in range(world)
        for index in range(size)
    }
    return files(stage, own, size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_state_divided_again_and_again_stays_the_same(stage):
    first = files(stage, {(0, 0): content(stage, TENSORS, Shard())}, 1)
    folder, size = first, 1
    for world, then in ((4, 1), (3, 2), (1, 2), (5, 1), (2, 2), (1, 1)):
        paddings = ((1, 0, 0), (3, 0)) if stage < 3 and then == 1 and world > 1 else ()
        folder, size = divided(opened(folder, stage, size), stage, world, then, paddings), then
        lengths = {
            tuple(v.length for v in layout(stage, world, Shard(0, then), paddings).vectors(r)) for r in range(world)
        }
        assert len(lengths) == 1, "all ranks have vectors of the same lengths"
    (name,) = (name for name in first if "optim" in name)
    before, after = (each[name]["optimizer_state_dict"] for each in (first, folder))
    _assert_equal(after, before, stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_reads_the_files_of_the_few_that_have_its_elements(stage):
    folder = divided(opened(files(stage, {(0, 0): content(stage, TENSORS, Shard())}, 1), stage, 1), stage, 8, 1)
    read = []
    saved = SavedState(
        Path("resume/3"),
        list(folder),
        stage=stage,
        size=1,
        read=lambda path: read.append(path.name) or folder[path.name],
    )
    saved.require_divisible({})
    saved.partition(layout(stage, 4, Shard()), 2)
    optim = [name for name in read if "optim" in name]
    assert [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in optim for rank in (0, 4, 5)] == [True] * 3
    assert len(optim) <= 5, "two vectors, whose slices begin and end within those of others"


def _assert_equal(after: dict, before: dict, stage: int) -> None:
    own = layout(stage, 1, Shard())
    for number, vector in enumerate(own.vectors(0)):
        used = sum(span.count for span in vector.spans)
        for key in before:
            if isinstance(before[key], list):
                assert torch.equal(after[key][number][:used], before[key][number])
            elif isinstance(before[key], dict):
                state = after[key]["state"][number]
                assert state.keys() == before[key]["state"][number].keys() and state["step"] == 3
                assert all(torch.equal(state[k], before[key]["state"][number][k]) for k in KEYS)
                assert after[key]["param_groups"] == before[key]["param_groups"]


def test_whole_matrices_keep_their_state_wherever_they_lie():
    """Muon and its like keep the state of a matrix whole on each rank that holds a part of it."""
    saved = content(2, TENSORS, Shard())
    saved["base_optimizer_state"]["inner"] = [
        {
            "state": {number: {"momentum": TENSORS[name] * 5} for number, name in enumerate(names)},
            "param_groups": [{"lr": 0.1, "params": [*range(len(names))]}],
        }
        for names in (MATRICES, VECTORS)
    ]
    folder = files(2, {(0, 0): saved}, 1)
    for world in (4, 2):
        folder = divided(opened(folder, 2, 1), 2, world, 1)
    for rank in range(2):
        vectors = layout(2, 2, Shard()).vectors(rank)
        inner = folder[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"][
            "base_optimizer_state"
        ]["inner"]
        for vector, own in zip(vectors, inner, strict=True):
            names = [span.name for span in vector.spans]
            assert own["param_groups"] == [{"lr": 0.1, "params": [*range(max(1, len(names)))]}]
            assert all(torch.equal(own["state"][i]["momentum"], TENSORS[n] * 5) for i, n in enumerate(names))


@pytest.mark.parametrize("value", [torch.zeros(3), {"codes": torch.zeros(26), "scales": torch.zeros(3)}])
def test_a_state_that_is_no_value_per_weight_is_refused(value):
    """As that of optimizers in 8 bits, which have a scale for a block of a slice."""
    saved = content(1, TENSORS, Shard())
    saved["base_optimizer_state"]["state"][1]["quantized"] = value
    with pytest.raises(InputError, match=r"resume/3: the optimizer's quantized has .* as many ranks as before, 1,"):
        opened(files(1, {(0, 0): saved}, 1), 1, 1).require_divisible({})
    with pytest.raises(InputError, match=r"offload_optimizer.device is nvme, .* resume with device: cpu once"):
        opened(files(1, {(0, 0): saved}, 1), 1, 1).require_divisible({"offload_optimizer": {"device": "nvme"}})


def test_a_number_for_a_vector_of_zeros_is_taken_as_values():
    """Prodigy keeps one zero where all weights of a rank are zero."""
    folder = divided(opened(files(1, {(0, 0): content(1, TENSORS, Shard())}, 1), 1, 1), 1, 2, 1)
    for rank, value in enumerate((torch.ones(92), torch.tensor(0))):
        partition = folder[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"]["optimizer_state_dict"]
        assert len(partition["base_optimizer_state"]["state"][0]["ema"]) == 92
        partition["base_optimizer_state"]["state"][0]["p0"] = value
    whole = opened(folder, 1, 1).partition(layout(1, 1, Shard()), 0)
    p0 = whole["base_optimizer_state"]["state"][0]["p0"]
    assert p0.tolist() == [1.0] * 92 + [0.0] * (len(p0) - 92)


def test_files_of_ranks_that_are_missing_or_of_other_parameters_are_told():
    folder = divided(opened(files(2, {(0, 0): content(2, TENSORS, Shard())}, 1), 2, 1), 2, 2, 1)
    other = Layout(2, 1, Shard(), (dict(list(shapes(1)[0].items())[1:]), shapes(1)[1]))
    with pytest.raises(InputError, match=r"trained .*query_key_value.weight with shape \(24, 5\).* with None"):
        opened(folder, 2, 1).partition(other, 0)
    del folder["zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    with pytest.raises(InputError, match=r"is divided over \[2, 2\] ranks, and has the files of 1"):
        opened(folder, 2, 1)


def test_without_zero_tensor_parallel_shards_are_joined_and_divided():
    names = list(TENSORS)

    def saved(size: int, states: list[dict]) -> SavedState:
        folder = files(0, {}, size)
        for index, state in enumerate(states):
            module = {name: take_shard(name, each, Shard(index, size)) for name, each in TENSORS.items()}
            folder[f"mp_rank_{index:02d}_model_states.pt"] = {"module": module, "optimizer": state, "buffer_names": []}
        return opened(folder, 0, size)

    state = {i: {"step": torch.tensor(3.0), "ema": TENSORS[name] * 2} for i, name in enumerate(names)}
    whole = {"state": state, "param_groups": [{"params": [*range(len(names))]}]}
    halves = [saved(1, [whole]).unsharded(names, Shard(index, 2)) for index in range(2)]
    assert halves[0]["state"][0]["ema"].shape == (12, 5)
    assert all(each["ema"].is_contiguous() for half in halves for each in half["state"].values()), "for fused kernels"
    found = saved(2, halves)
    joined = found.unsharded(names, Shard())
    assert joined["param_groups"] == whole["param_groups"]
    assert all(torch.equal(joined["state"][i]["ema"], state[i]["ema"]) for i in state)
    assert all(torch.equal(each, TENSORS[name]) for name, each in found.module(Shard()).items())


# Ranks and mesh, one iteration each.
LEGS = [(4, {"model": 2}), (2, {"sequence": 2}), (1, {}), (4, {"model": 2, "sequence": 2}), (2, {"model": 2})]
ALL = [(kind, stage, LEGS) for kind in MODELS for stage in (0, 1, 2, 3)]
ALL.append(("int8", 2, [(2, {}), (1, {}), (2, {})]))  # adapters on a base in 8 bits
QUICK = ("full", 3, [LEGS[1], LEGS[2], LEGS[0]])
DROPOUT = "model.network_config.params.modules.lora_config.params.lora_dropout=0.5"


def computed(tensors) -> dict[str, torch.Tensor]:
    return {name: compute(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("kind", "stage", "legs"), [QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL)])
def test_a_run_goes_on_with_other_ranks_and_meshes(training_yaml, tmp_path, kind, stage, legs):
    """The weights and averages of a run whose ranks and mesh change are those of one that never stopped."""

    def job(name: str, ranks: int, mesh: dict[str, int], *more: str) -> dict:
        overrides = [
            f"args.save={tmp_path / name}",
            f"args.train_iters={len(legs)}",
            "args.ema_decay=0.9",
            f"deepspeed.train_micro_batch_size_per_gpu={4 * math.prod(mesh.values()) // ranks}",
            f"deepspeed.zero_optimization.stage={stage}",
            *[f"args.{axis}_parallel_size={size}" for axis, size in mesh.items()],
            *SHARDED,
            *([DROPOUT] if kind != "full" else []),
            *(["args.base_weights=int8"] if kind == "int8" else []),
        ]
        return {"bases": training_yaml(MODELS.get(kind, MODELS["lora"])), "overrides": [*overrides, *more]}

    for ranks, mesh in legs:
        jobs = [job("parts", ranks, mesh, "args.exit_interval=1", "args.resume=auto")]
        train_all(jobs + ([job("whole", 1, {})] if ranks == 1 else []), tmp_path, ranks)
    parts, whole = (only_run(tmp_path / name) for name in ("parts", "whole"))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5) and len(losses(whole)) == len(legs)
    for name in (f"{len(legs)}", f"{len(legs)}-ema"):
        written = [computed(read_tensors(find_weights(run / name))) for run in (parts, whole)]
        assert difference(*written) <= 1e-5
