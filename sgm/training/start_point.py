"""The start of a run as it would be new, and whether the state that it is resumed from fits it."""

from pathlib import Path
from typing import Any

import sgm.distributed
from sgm.config.load import digest_of
from sgm.config.precision import precision_name
from sgm.training.state import ResumePoint, next_start_number, numbers_digest, state_order
from sgm.weights.adapters import AdapterInfo
from sgm.weights.files import find_weights, weights_digest


def new_point(plan: Any, adapters: AdapterInfo | None) -> ResumePoint:
    """Return the start of a new run, from its `sgm.training.prepare.Plan` and a description of its adapters."""
    config, args, writes = plan.config, plan.args, sgm.distributed.rank() == 0
    return ResumePoint(
        run=Path(),
        iteration=0,
        samples=0,
        world_size=sgm.distributed.world_size(),
        tensor=plan.mesh.tensor,
        zero_stage=plan.deepspeed["zero_optimization"]["stage"],
        precision=precision_name(plan.dtype),
        optimizer=config.deepspeed["optimizer"]["type"],
        trained=plan.trainable.num_trained,
        trained_names=digest_of(sorted(plan.trainable.names)),
        ema=args.ema_decay is not None,
        base_digest=None if args.load is None else weights_digest(find_weights(args.load)),
        config_digest=numbers_digest(config),
        clips=plan.data.digest,
        order=state_order(plan.deepspeed["zero_optimization"]),
        buckets=None if plan.division is None else plan.division.digest,
        captions=plan.data.captions_digest,
        clip_files=plan.data.files_digest if writes else None,  # copies on other machines may have other times
        optimizer_settings=plan.optimizer_settings,
        lora_rank=None if adapters is None else adapters.rank,
        lora_alpha=None if adapters is None else float(adapters.alpha),
        lora_kind=None if adapters is None else adapters.kind,
        start_number=next_start_number(args) if writes else 0,
        global_batch=plan.global_batch if plan.division is None else None,
    )


def check_resume(plan: Any, now: ResumePoint) -> None:
    """Check that the state that a run is resumed from fits its settings; warn if results will differ.

    Args:
        plan: of the run, with a state.
        now: its `new_point`.

    Raises:
        InputError: it does not.
    """
    assert plan.resume is not None
    plan.resume.check(now, plan.config)
    if not plan.resume.is_divided_like(now):
        plan.resume.open().require_divisible(plan.deepspeed["zero_optimization"])
