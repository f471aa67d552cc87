"""The command line of ``train_video.py``."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sgm import cli
from sgm.log import get_logger, is_rank_zero
from sgm.urls import is_url

EXAMPLES = (
    "python train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml",
    "python train_video.py --base configs/cogvideox_5b_lora.yaml configs/sft.yaml args.train_data=FOLDER",
    "torchrun --standalone --nproc_per_node 8 train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml",
    "python train_video.py --base configs/cogvideox_5b_lora.yaml configs/sft.yaml --check",
    "python train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml --check --devices 64 --card h100",
)

logger = get_logger(__name__)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    return cli.parse(
        argv,
        prog="train_video.py",
        description="Fine-tune or pretrain a model configured by YAML files.",
        examples=EXAMPLES,
        check="check everything, read no weights, train nothing",
        card=True,
        training=True,
    )


def run(options: argparse.Namespace) -> int | None:
    """Train, or only check with ``--check``; return the exit code that the run asks for, if any."""
    from sgm.config.load import load_config  # after parsing, so that --help is fast

    config = load_config(options.base, options.overrides, mode="train", trust=options.trust)
    if options.check:
        _check_for(config, options)
        return None
    import sgm.distributed
    from sgm.training.run import train

    with sgm.distributed.explain_lost_ranks():
        summary = train(config)
        logger.info("%s", summary)
        if not summary.stopped_by_signal:
            return None
        sgm.distributed.barrier()  # a launcher ends the others as soon as one rank has another code than 0
        return summary.exit_code


def _check_for(config: Any, options: argparse.Namespace) -> None:
    """Check the run, as one of so many processes as ``--devices`` says."""
    import sgm.distributed
    from sgm.checks.scaling.cards import card_named
    from sgm.checks.scaling.recommend import check_devices

    card = card_named(options.card)
    if options.card is not None:
        options.card = card.memory
    if options.devices is None:
        _check(config, options)
        return
    check_devices(options.devices, card)
    options.card = card.memory
    with sgm.distributed.planned(options.devices):
        _check(config, options, card)


def _check(config: Any, options: argparse.Namespace, devices: Any = None) -> None:
    """Check the run, and print the findings; those of several ranks are the same, and rank zero prints them.

    Args:
        config: of the run.
        options: of the command line, with the GiB of a card.
        devices: the card of each rank to recommend settings for, if the number of ranks is only planned.
    """
    import sgm.distributed
    from sgm.checks.planner import written_without_files
    from sgm.training.inputs.buckets import bucket_report, plan_buckets
    from sgm.training.inputs.precompute import after_encoding, before_encoding
    from sgm.training.prepare import memory_report, prepare

    if sgm.distributed.is_launched():
        sgm.distributed.configure(config.args)  # before a network is built, for which the ranks connect
    ahead = config.args.precomputed if config.args.precompute else {}
    encoded = after_encoding(config) if ahead else None
    write = partial(cli.write_findings, options)
    with written_without_files(lambda: memory_report(encoded or config, options.card, devices), write):
        checked = before_encoding(config) if ahead else config
        plan = prepare(checked, check_clips=True, for_card=options.card is not None)
    if is_rank_zero():
        write(plan.report(options.card, devices, encoded=encoded))
        if ahead:
            sys.stdout.write(f"encoded first (args.precompute): {', '.join(map(' into '.join, ahead.items()))}\n")
        if plan.division is not None:
            buckets, _ = plan_buckets(plan.data, plan.division, plan.args)
            sys.stdout.write(bucket_report(buckets, plan.args, plan.resume) + "\n")
    _check_nodes(plan)


def _check_nodes(plan: Any) -> None:
    """Compare the ranks that a launcher started, and print the table on rank zero."""
    import sgm.distributed
    from sgm.checks.nodes import check_nodes, listing_digest
    from sgm.weights.files import find_weights

    if not sgm.distributed.is_launched():
        return
    with sgm.distributed.explain_lost_ranks():
        sgm.distributed.initialize()
        digests = {"the configuration": plan.config.digest[:12], "the clips": plan.data.digest[:12]}
        digests["the captions"] = plan.data.captions_digest[:12]
        if plan.args.load is not None:
            digests["args.load"] = listing_digest(find_weights(plan.args.load).parent)
        digests |= {name: listing_digest(path) for name, path in _read_besides(plan) if path.exists()}
        table = check_nodes({"args.save": Path(plan.args.save)}, digests)
        if is_rank_zero():
            sys.stdout.write(table + "\n")
        sgm.distributed.barrier()


def _read_besides(plan: Any) -> Iterator[tuple[str, Path]]:
    """Yield names and local places of what a run reads besides clips and weights: VAE, text encoder and caches."""
    from sgm.config.load import text_encoders

    model, args = plan.config.model, plan.args
    vae = ((model.get("first_stage_config") or {}).get("params") or {}).get("ckpt_path")
    if vae is not None:
        yield "the VAE", Path(vae)
    for _, embedder in text_encoders(model):
        folder = (embedder.get("params") or {}).get("model_dir")
        if folder is not None:
            yield f"the text encoder {folder}", Path(folder)
    for name in ("latent_cache", "text_cache"):
        place = getattr(args, name)
        if place is not None and not is_url(place):
            yield f"args.{name}", Path(place)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong input."""
    return cli.run_command(
        run,
        parse(argv),
        interrupted="interrupted; what was saved is kept, and args.resume=auto resumes from the newest checkpoint",
        memory_hint="encode clips and captions ahead with tools/prepare_dataset.py, set "
        "args.checkpoint_activations=true or lower deepspeed.train_micro_batch_size_per_gpu",
        output="args.save",
    )
