"""Convert a LoRA of diffusers, PEFT, kohya's scripts, VideoX-Fun, ComfyUI and others to a SAT checkpoint.

    python tools/import_hf_lora_weight.py --lora my-lora --base configs/cogvideox_5b.yaml --output_path ckpts/my-lora
    python tools/import_hf_lora_weight.py --lora pytorch_lora_weights.safetensors --alpha 64 \
        --base configs/cogvideox_2b.yaml --transformer_ckpt_path 2b-sat/transformer --output_path ckpts/my-lora

The result holds the adapters alone and names their base: sample it with the same YAML and args.load=ckpts/my-lora.
Alpha is taken from the header of the file, from adapter_config.json beside it, or from its .alpha tensors.
cogvideox-factory writes none: give the --lora_alpha of that training as --alpha; without it, alpha is the rank, as in
diffusers. Adapters may be on the modules that docs/adapters.md lists, of one rank and alpha. A file that was exported
here records its base, and is refused on another one.
"""

import argparse
import json
import sys

from sgm.cli import add_trust, run_command, tool_parser


def convert(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.config.load import load_config
    from sgm.conversion.family import base_files
    from sgm.conversion.lora_import import import_lora
    from sgm.conversion.writing import check_new_folder

    check_new_folder(options.output_path)
    base = options.transformer_ckpt_path
    overrides = ["args.input_type=cli"]  # no prompts are read
    overrides += [] if base is None else [f"args.load={json.dumps(base)}"]
    config = load_config(base_files(options.base, base), overrides, mode="inference", trust=options.trust)
    file = import_lora(
        config, options.lora, options.output_path, base=base, alpha=options.alpha, any_base=options.any_base
    )
    sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    add_trust(parser)
    parser.add_argument("--lora", required=True, metavar="PATH", help="file, or folder of the training tool")
    parser.add_argument(
        "--base", nargs="+", default=[], metavar="YAML", help="the base model; else that of its weights"
    )
    parser.add_argument("--transformer_ckpt_path", metavar="PATH", help="its checkpoint; else args.load of the YAML")
    parser.add_argument("--output_path", required=True, metavar="DIR", help="to create")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, if the files do not record it")
    parser.add_argument("--any_base", action="store_true", help="take a LoRA whose file records another base, too")
    return run_command(convert, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
