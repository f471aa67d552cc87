"""Merge one or several LoRAs: into their base, into one LoRA, or into the average of checkpoints.

    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --output_path ckpts/merged
    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --base_ckpt moved/transformer \
        --strength 0.8 --file_format safetensors --output_path ckpts/merged
    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-style ckpts/my-motion --strength 0.8 1 \
        --result sum --rank 64 --output_path ckpts/both
    python tools/merge_lora_weight.py --sat_pt_path ckpts/my-lora/800 ckpts/my-lora/900 ckpts/my-lora/1000 \
        --result average --ema_decay 0.5 --output_path ckpts/soup

Results: `network` has the names and shapes of the base and loads with its configuration, without LoRA. `sum` is one
LoRA that adds what all add, each with its strength: of the sum of all ranks, or the nearest of --rank. `average` is a
LoRA of averaged matrices, for checkpoints of one run. Files of diffusers and other tools are read too. A file of
adapters alone records its base; --base_ckpt is for a base that has moved, and for files that record none.
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser
from sgm.util import InputError


def merge(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.lora_merge import average_loras, average_weights, merge_loras, sum_loras

    for name, result in {"rank": "sum", "ema_decay": "average"}.items():
        if getattr(options, name) is not None and options.result != result:
            raise InputError(f"--{name} has no effect with --result {options.result}; give --result {result}")
    if options.file_format is not None and options.result != "network":
        raise InputError(f"--file_format has no effect with --result {options.result}; remove it")
    if options.ema_decay is not None and options.strength is not None:
        raise InputError("--strength and --ema_decay both give the weights of an average; remove one")
    strengths = options.strength or [1.0]
    if options.ema_decay is not None:
        strengths = average_weights(options.ema_decay, len(options.sat_pt_path))
    given = (options.sat_pt_path, options.output_path)
    if options.any_base and options.base_ckpt is None:
        raise InputError("--any_base is given without a base; give it with --base_ckpt")
    common = {"base": options.base_ckpt, "alpha": options.alpha, "strengths": strengths, "any_base": options.any_base}
    if options.result == "network":
        file = merge_loras(*given, **common, file_format=options.file_format or "pt")
    elif options.result == "sum":
        file = sum_loras(*given, **common, rank=options.rank)
    else:
        file = average_loras(*given, **common)
    sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--sat_pt_path", required=True, nargs="+", metavar="PATH", help="run folders, iteration folders or files"
    )
    parser.add_argument("--output_path", required=True, metavar="DIR", help="to create")
    parser.add_argument(
        "--result", choices=("network", "sum", "average"), default="network", help="see above (network)"
    )
    parser.add_argument("--base_ckpt", metavar="PATH", help="base of the adapters, if it has moved or is not recorded")
    parser.add_argument("--any_base", action="store_true", help="merge into it what was trained on another base, too")
    parser.add_argument("--strength", type=float, nargs="+", help="factor of all adapters, or of each (1)")
    parser.add_argument("--rank", type=int, help="of a sum: the nearest LoRA of this rank (the sum of all ranks)")
    parser.add_argument("--ema_decay", type=float, help="of an average: weights of a moving average, oldest first")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, if a checkpoint does not record it")
    parser.add_argument("--file_format", choices=("pt", "safetensors"), help="safetensors needs little memory (pt)")
    return run_command(merge, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
