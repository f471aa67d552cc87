"""Check the mesh (tensor, sequence, guidance and context parallel sizes) against model and number of processes."""

from collections.abc import Iterable, Iterator
from typing import Any

import sgm.distributed
from sgm.checks.sampling import params_of, problems_of
from sgm.config.load import Config, Problem
from sgm.distributed import Mesh
from sgm.util import instantiate_from_config


def mesh_of(config: Config) -> Mesh:
    """Return the size of each parallel axis."""
    args = config.args
    return Mesh(
        context=params_of(config.model.get("first_stage_config")).get("cp_size") or 1,
        tensor=args.model_parallel_size,
        sequence=args.sequence_parallel_size,
        cfg=args.cfg_parallel_size,
    )


def check_mesh(config: Config, *, num_patches: int | None = None) -> list[Problem]:
    """Check the sizes of the mesh against the number of processes, heads, tokens and guidance branches.

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
    return [*_network_problems(config, mesh, fewest), *_guidance_problems(config, mesh)]


def _text_length(config: Config) -> int | None:
    modules = params_of(config.model["network_config"]).get("modules") or {}
    return params_of(modules.get("pos_embed_config")).get("text_length")


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
    if section is None or not hasattr(instantiate_from_config(section), "scale"):
        found = f"is {mesh.cfg}, but the sampler has no guidance"
        yield Problem("args.cfg_parallel_size", "", found, "set it to 1, or add a guider_config")


def _give(sizes: Iterable[int]) -> str:
    return f"give {' or '.join(map(str, sizes))}"
