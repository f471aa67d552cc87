"""Divide the weights of a network into another number of tensor parallel shards.

    python tools/reshard_checkpoint.py --load ckpts/my-sft-06-30-12-00 --save ckpts/in-two --model_parallel_size 2
    python tools/reshard_checkpoint.py --load ckpts/in-two --save ckpts/whole --model_parallel_size 1

Sampling and training here read any number of shards on any number of ranks; SAT itself needs one shard per
rank. Values, precision, the entries of the files and adapters are kept.
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser


def reshard(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.reshard import reshard_checkpoint

    for file in reshard_checkpoint(options.load, options.save, size=options.model_parallel_size):
        sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--load", required=True, metavar="PATH", help="run folder, iteration folder or file")
    parser.add_argument("--save", required=True, metavar="DIR", help="to create")
    parser.add_argument("--model_parallel_size", required=True, type=int, metavar="N", help="number of shards")
    return run_command(reshard, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
