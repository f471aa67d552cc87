"""Divide the weights of a network anew: into as many parts as ranks share its layers.

    python tools/reshard_checkpoint.py --load ckpts/my-sft-06-30-12-00 --save ckpts/in-two --model_parallel_size 2
    python tools/reshard_checkpoint.py --load ckpts/in-two --save ckpts/whole --model_parallel_size 1

Sampling and training here read any number of parts on any number of ranks; SAT itself wants one part a rank. Numbers,
precision, and what the files say about themselves stay as they are, adapters included.
"""

import argparse
import sys

from sgm.cli import EXIT_CODES, run_command


def reshard(options: argparse.Namespace) -> None:
    """Divide as the command line says."""
    from sgm.conversion.reshard import reshard_checkpoint

    for file in reshard_checkpoint(options.load, options.save, size=options.model_parallel_size):
        sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )
    parser.add_argument("--load", required=True, metavar="PATH", help="run folder, iteration folder or file")
    parser.add_argument("--save", required=True, metavar="DIR", help="made anew")
    parser.add_argument("--model_parallel_size", required=True, type=int, metavar="N", help="parts")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    return run_command(
        reshard,
        parser.parse_args(argv),
        interrupted="interrupted; nothing was written",
        memory_hint="this needs no accelerator",
    )


if __name__ == "__main__":
    sys.exit(main())
