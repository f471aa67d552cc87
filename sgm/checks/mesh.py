"""Check the mesh (tensor, sequence, guidance and context parallel sizes) against model and number of processes."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import sgm.distributed
from sgm.checks.sampling import params_of, problems_of
from sgm.config.deepspeed_section import follow_batch
from sgm.config.load import Config, Problem
from sgm.distributed import Mesh
from sgm.modules.diffusionmodules.guiders import has_effect
from sgm.util import default, instantiate_from_config
from sgm.weights.adapters import check_shards


def mesh_of(config: Config) -> Mesh:
    """Return the size of each parallel axis."""
    args = config.args
    return Mesh(
        context=params_of(config.model.get("first_stage_config")).get("cp_size") or 1,
        tensor=args.model_parallel_size,
        sequence=args.sequence_parallel_size,
        cfg=args.cfg_parallel_size,
    )


def with_batch(config: Config) -> Config:
    """Return a training configuration whose accumulation follows ``deepspeed.train_batch_size`` where none is given."""
    groups = max(1, sgm.distributed.world_size() // mesh_of(config).ranks)
    return replace(config, deepspeed=follow_batch(config.deepspeed, world_size=groups))


def restart_warnings(config: Config) -> Iterator[str]:
    """Yield why a training run cannot go on after a restart, or with other machines of the launcher's range."""
    machines = _machines()
    if getattr(config.args, "resume", "") == "none" and (_may_restart() or len(machines) > 1):
        yield (
            "args.resume=none: each restart by the launcher would begin a new run, without the iterations of the one "
            "before; set args.resume=auto, and another args.experiment_name for a new run"
        )
    if len(machines) < 2:
        return
    given = f"the run may restart on {machines[0]} to {machines[-1]} machines"
    if reasons := list(_undivided(config)):
        yield f"{given}, and goes on with as many as it was saved on alone: {'; '.join(reasons)}"
        return
    if (local := _ranks_of_a_machine()) is None:
        return
    mesh, section = mesh_of(config), config.deepspeed
    micro, accumulation = section["train_micro_batch_size_per_gpu"], section["gradient_accumulation_steps"]
    total, refused = section.get("train_batch_size"), []
    for number in machines:
        ranks = number * local
        if ranks % mesh.ranks:
            refused.append(f"{number} ({ranks} ranks are no groups of {mesh.ranks})")
            continue
        at_once = micro * ranks // mesh.ranks
        if total is not None and accumulation is not None and total != accumulation * at_once:
            refused.append(f"{number} (deepspeed.gradient_accumulation_steps is given; null lets it follow)")
        elif total is not None and total % at_once:
            refused.append(f"{number} (deepspeed.train_batch_size={total} is no multiple of {at_once})")
    if refused:
        yield f"{given}, and is refused on {', '.join(refused)}"


def _machines() -> range:
    """Return the numbers of machines on which the launcher may restart the run (``NNODES=1:4``); empty if unknown."""
    found = re.fullmatch(r"([1-9]\d*):(\d+)", os.environ.get("NNODES") or os.environ.get("PET_NNODES", ""))
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


def _may_restart() -> bool:
    """Whether the launcher restarts the ranks after a failure."""
    names = ("TORCHELASTIC_MAX_RESTARTS", "MAX_RESTARTS", "PET_MAX_RESTARTS")
    return any(os.environ.get(name, "").strip("0") for name in names)


def _ranks_of_a_machine() -> int | None:
    """Return the number of processes on this machine, as its launcher says, or will; None if it counts devices."""
    names = ("LOCAL_WORLD_SIZE",) if sgm.distributed.is_launched() else ("NPROC_PER_NODE", "PET_NPROC_PER_NODE")
    given = next((os.environ[name] for name in names if os.environ.get(name)), "1")
    return int(given) or None if given.isdecimal() else None  # torchrun takes "gpu" and "auto" too


def _undivided(config: Config) -> Iterator[str]:
    """Yield what cannot be divided over another number of ranks."""
    section = config.deepspeed
    zero, optimizer = section["zero_optimization"], section["optimizer"]
    if params_of(config.data).get("buckets") is not None:
        yield "data.params.buckets divides the clips among the ranks"
    if optimizer["type"].startswith("bitsandbytes.") and (
        "8bit" in optimizer["type"] or optimizer["params"].get("optim_bits") == 8
    ):
        yield f"{optimizer['type']} keeps a scale for each block of a rank's slice"
    if any((zero.get(f"offload_{part}") or {}).get("device") == "nvme" for part in ("optimizer", "param")):
        yield "the state of a machine is on its NVMe"
    if zero.get("mics_shard_size", -1) > 0:
        yield "deepspeed.zero_optimization.mics_shard_size"


def check_mesh(config: Config, *, num_patches: int | None = None) -> list[Problem]:
    """Check the sizes of the mesh against processes, heads, tokens, adapters and guidance branches.

    Args:
        config: of a run.
        num_patches: patches of the smallest sample; None if unknown.

    Returns:
        Illegal sizes, with the legal ones.
    """
    mesh, world = mesh_of(config), sgm.distributed.world_size()
    problems = problems_of("args", "correct the sizes, or the number of processes", lambda: mesh.check(world))
    if problems:
        return problems
    tokens = [_text_length(config), num_patches]
    fewest = min(count for count in (*tokens, world) if count is not None)
    return [
        *_network_problems(config, mesh, fewest),
        *_adapter_problems(config, mesh),
        *_guidance_problems(config, mesh),
    ]


def _modules(config: Config) -> dict[str, Any]:
    return params_of(config.model["network_config"]).get("modules") or {}


def _text_length(config: Config) -> int | None:
    return params_of(_modules(config).get("pos_embed_config")).get("text_length")


def _adapter_problems(config: Config, mesh: Mesh) -> list[Problem]:
    params = params_of(_modules(config).get("lora_config"))
    cure = "remove it, or choose other adapters"
    return problems_of("args.model_parallel_size", cure, lambda: check_shards(params, mesh.tensor))


def _network_problems(config: Config, mesh: Mesh, fewest: int) -> Iterator[Problem]:
    heads = params_of(config.model["network_config"]).get("num_attention_heads", 0)
    world = sgm.distributed.world_size()
    legal = [n for n in range(1, world + 1) if world % n == 0]
    if heads % mesh.tensor:
        found = f"is {mesh.tensor}, and {heads} heads cannot be shared out evenly"
        yield Problem("args.model_parallel_size", "", found, _give(n for n in legal if heads % n == 0))
        return
    own_heads, args = heads // mesh.tensor, config.args
    if mesh.sequence > fewest:
        found = f"is {mesh.sequence}, and the smallest sample has {fewest} tokens of text or patches to share"
        yield Problem("args.sequence_parallel_size", "", found, _give(n for n in legal if n <= fewest))
    elif args.sequence_attention == "ulysses" and own_heads < mesh.sequence:
        found = f"is {mesh.sequence}, but Ulysses attention needs a head per rank, and there are {own_heads}"
        cure = f"{_give(n for n in legal if n <= own_heads)}, or set args.sequence_attention=ring"
        yield Problem("args.sequence_parallel_size", "", found, cure)
    elif args.sequence_attention == "auto" and own_heads < mesh.sequence and args.attention not in (None, "auto"):
        found = f"is {args.attention}, and {own_heads} heads for {mesh.sequence} ranks need ring attention, "
        cure = f"remove it, or {_give(n for n in legal if n <= own_heads)} as args.sequence_parallel_size"
        yield Problem("args.attention", "", f"{found}which has kernels of its own", cure)


def _guidance_problems(config: Config, mesh: Mesh) -> Iterator[Problem]:
    if mesh.cfg == 1:
        return
    if config.mode != "inference":
        found, cure = f"is {mesh.cfg}, and training has one branch", "set it to 1; use args.sequence_parallel_size"
        yield Problem("args.cfg_parallel_size", "", found, cure)
        return
    section: Any = params_of(config.model.get("sampler_config")).get("guider_config")
    guider: Any = None if section is None else instantiate_from_config(section)
    if not hasattr(guider, "scale"):
        found = f"is {mesh.cfg}, but the sampler has no guidance"
        yield Problem("args.cfg_parallel_size", "", found, "set it to 1, or add a guider_config")
    elif not has_effect(guider, config.args.guidance_scale):
        scale = default(config.args.guidance_scale, guider.scale)
        found = f"is {mesh.cfg}, and a guidance scale of {scale} is no guidance, so that there is one branch"
        yield Problem("args.cfg_parallel_size", "", found, "set it to 1; use args.sequence_parallel_size")


def _give(sizes: Iterable[int]) -> str:
    return f"give {' or '.join(map(str, sizes))}"
