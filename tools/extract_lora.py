"""Extract a LoRA from two full models: what the second has learned, at a rank.

    python tools/extract_lora.py --base_ckpt checkpoints/CogVideoX-2b-sat/transformer --tuned_ckpt ckpts/my-run \
        --rank 64 --output_path ckpts/my-lora
    python tools/extract_lora.py --base_ckpt CogVideoX-5b/transformer --tuned_ckpt my-model/transformer \
        --rank 128 --output_path my-lora

Each model is a run folder, a folder or file of the SAT layout, a transformer folder of diffusers, or a ZeRO state. The
LoRA has the layout of the base: a SAT checkpoint of adapters, which records its base, or a file for diffusers. It
adapts the projections of --targets, those of attention if none are given; what else differs is left out, and how much
that is, and which targets could hold it, is printed.

    python tools/extract_lora.py --base_ckpt checkpoints/CogVideoX-2b-sat/transformer --tuned_ckpt ckpts/my-run \
        --rank 64 --targets attention ff adaln --output_path ckpts/my-lora
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser


def extract(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.lora_extract import extract_lora

    given = (options.base_ckpt, options.tuned_ckpt, options.output_path)
    found = extract_lora(*given, rank=options.rank, targets=options.targets)
    sys.stdout.write(f"{found}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--base_ckpt", required=True, metavar="PATH", help="the model before training")
    parser.add_argument("--tuned_ckpt", required=True, metavar="PATH", help="the model after it")
    parser.add_argument("--rank", required=True, type=int, help="of the LoRA")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["attention"],
        help="what it adapts: attention, ff, adaln, patch, text, at least one of the first three (attention)",
    )
    parser.add_argument("--output_path", required=True, metavar="DIR", help="to create")
    return run_command(extract, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
