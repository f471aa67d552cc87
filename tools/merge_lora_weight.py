"""Merge LoRA adapters into the weights of a SAT checkpoint.

    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --output_path ckpts/merged
    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --base_ckpt moved/transformer \
        --strength 0.8 --file_format safetensors --output_path ckpts/merged

The result has the names and shapes of the base and loads with its configuration, without LoRA. A file of adapters alone
records its base; --base_ckpt is for a base that has moved. Whole networks with LoRA need none.
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser


def merge(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.lora import merge_lora

    file = merge_lora(
        options.sat_pt_path,
        options.output_path,
        base=options.base_ckpt,
        alpha=options.alpha,
        strength=options.strength,
        file_format=options.file_format,
    )
    sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--sat_pt_path", required=True, metavar="PATH", help="run folder, iteration folder or file")
    parser.add_argument("--output_path", required=True, metavar="DIR", help="to create")
    parser.add_argument("--base_ckpt", metavar="PATH", help="base of the adapters, if it has moved")
    parser.add_argument("--strength", type=float, default=1.0, help="factor of the adapters (1)")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, if the checkpoint does not record it")
    parser.add_argument(
        "--file_format", choices=("pt", "safetensors"), default="pt", help="safetensors needs little memory (pt)"
    )
    return run_command(merge, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
