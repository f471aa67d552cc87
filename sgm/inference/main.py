"""The command line of ``sample_video.py``."""

import argparse
from collections.abc import Sequence
from functools import partial

from sgm import cli
from sgm.log import get_logger

EXAMPLES = (
    "python sample_video.py --base configs/toy.yaml configs/toy_inference.yaml",
    "python sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml args.load=FOLDER args.seed=7",
    "python sample_video.py --base configs/cogvideox_5b.yaml configs/inference.yaml --check",
    "python sample_video.py --base configs/toy.yaml configs/toy_inference.yaml args.load=RUN_FOLDER_OF_A_TRAINING",
)

logger = get_logger(__name__)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``section.key=value`` is accepted at any position."""
    return cli.parse(
        argv,
        prog="sample_video.py",
        description="Sample videos from a SAT checkpoint, configured by YAML files.",
        examples=EXAMPLES,
        check="check everything, read no weights, sample nothing",
        card=True,
    )


def run(options: argparse.Namespace) -> None:
    """Sample, or only check with ``--check``."""
    from sgm.config.load import load_config  # after parsing, so that --help is fast

    config = load_config(options.base, options.overrides, mode="inference", trust=options.trust)
    if options.check:
        import sgm.distributed
        from sgm.checks.planner import written_without_files
        from sgm.inference.prepare import memory_report, prepare

        if sgm.distributed.is_launched():
            sgm.distributed.configure(config.args)  # before a network is built, for which the ranks connect
        write = partial(cli.write_findings, options)
        with written_without_files(lambda: memory_report(config, options.card), write):
            write(prepare(config, for_card=options.card is not None).report(options.card))
        return
    import sgm.distributed
    from sgm.inference.run import sample

    with sgm.distributed.explain_lost_ranks():
        logger.info("%s", sample(config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong input."""
    return cli.run_command(
        run,
        parse(argv),
        interrupted="interrupted; finished results are kept, and the same command continues from there",
        memory_hint="lower args.batch_size or the size, or set args.vae_tiling=true",
        output="args.output_dir",
    )
