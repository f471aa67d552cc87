"""Write files of ZeRO states in DeepSpeed's layout; not a test."""

import math
from pathlib import Path

import torch


def require_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def split(tensors: dict[str, torch.Tensor], world: int, stage: int, padding: int = 0) -> list[torch.Tensor]:
    """Return every rank's partition of the float32 weights of a group."""
    flat = {name: tensor.detach().float().flatten() for name, tensor in tensors.items()}
    if stage < 3:
        pieces = [piece for vector in flat.values() for piece in (vector, torch.full((padding,), math.nan))]
        vector = torch.cat(pieces)
        vector = torch.cat([vector, torch.full((-len(vector) % (2 * world),), math.nan)])
        return [part.clone() for part in vector.chunk(world)]
    shares = [[] for _ in range(world)]
    for vector in flat.values():
        share = math.ceil(len(vector) / world)
        padded = torch.cat([vector, torch.full((share * world - len(vector),), math.nan)])
        for rank in range(world):
            shares[rank].append(padded[rank * share : (rank + 1) * share])
    return [torch.cat(parts) for parts in shares]


def write_state(
    folder: Path, groups, *, stage=2, world=3, frozen=None, buffers=None, shared=None, bf16="", padding=0, steps=()
):
    """Write the files of a ZeRO state as DeepSpeed does.

    Args:
        groups: trained tensors by name.
        steps: of the optimizer of each rank, if any.
    """
    folder.mkdir(parents=True)
    frozen, buffers = frozen or {}, buffers or {}
    module = {name: t.bfloat16() for group in (*groups, frozen) for name, t in group.items()} | buffers
    if stage == 3:
        module = {name: t if name in buffers else torch.empty(0, dtype=t.dtype) for name, t in module.items()}
    parts = [split(group, world, stage, padding) for group in groups]
    for rank in range(world):
        weights = [part[rank] for part in parts]
        if stage == 3:
            state = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": weights}
            state["optimizer_state_dict"] = {"state": {}, "param_groups": []}
        else:
            state = {"zero_stage": stage, "partition_count": [world] * len(groups), "base_optimizer_state": {}}
            state["single_partition_of_fp32_groups"] = weights
            state["param_alignment_paddings"] = [[padding] * len(group) for group in groups]
        if steps:
            state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] = {
                "state": {group: {"step": torch.tensor(steps[rank])} for group in range(len(groups))},
                "param_groups": [{} for _ in groups],
            }
        torch.save({"optimizer_state_dict": state}, folder / f"{bf16}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            fragments = frozen
            if stage == 3:
                fragments = {n: split({n: t}, world, 3)[rank].to(t.dtype) for n, t in frozen.items()}
            content = {
                "module": module,
                "buffer_names": list(buffers),
                "param_shapes": [{name: t.shape for name, t in group.items()} for group in groups],
                "frozen_param_shapes": {name: t.shape for name, t in frozen.items()} or None,
                "frozen_param_fragments": fragments or None,
                "shared_params": shared or {},
                "global_steps": 70,
            }
            name = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(content, folder / f"{name}mp_rank_00_model_states.pt")
    return folder
