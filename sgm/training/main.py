"""The command line of ``train_video.py``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from sgm import cli
from sgm.log import get_logger

EXAMPLES = (
    "python train_video.py --base configs/toy_lora.yaml configs/toy_sft.yaml",
    "python train_video.py --base configs/cogvideox_5b_lora.yaml configs/sft.yaml args.train_data=[FOLDER]",
    "torchrun --standalone --nproc_per_node 8 train_video.py --base configs/cogvideox_5b.yaml configs/sft.yaml",
    "python train_video.py --base configs/cogvideox_5b_lora.yaml configs/sft.yaml --check",
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
        from sgm.checks.planner import written_without_files
        from sgm.training.inputs.buckets import bucket_report, plan_buckets
        from sgm.training.inputs.precompute import before_encoding
        from sgm.training.prepare import memory_report, prepare

        args: Any = config.args
        ahead = args.precomputed if args.precompute else {}
        write = partial(cli.write_findings, options)
        with written_without_files(lambda: memory_report(config, options.card), write):
            plan = prepare(before_encoding(config) if ahead else config, check_clips=True)
        write(plan.report(options.card))
        if ahead:
            sys.stdout.write(f"encoded first (args.precompute): {', '.join(map(' into '.join, ahead.items()))}\n")
        if plan.division is not None:
            buckets, _ = plan_buckets(plan.data, plan.division, plan.args)
            sys.stdout.write(bucket_report(buckets, plan.args) + "\n")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong input."""
    return cli.run_command(
        run,
        parse(argv),
        interrupted="interrupted; checkpoints are kept, and args.resume=auto resumes from the newest",
        memory_hint="encode clips and captions ahead with tools/prepare_dataset.py, set "
        "args.checkpoint_activations=true or lower deepspeed.train_micro_batch_size_per_gpu",
        output="args.save",
    )
