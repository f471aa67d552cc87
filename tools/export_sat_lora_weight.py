"""Write the LoRA adapters of a SAT checkpoint as a file for diffusers, ComfyUI or kohya's scripts.

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --lora_save_directory my-lora
    python tools/export_sat_lora_weight.py --sat_pt_path old/mp_rank_00_model_states.pt --alpha 1 \
        --lora_save_directory my-lora

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/my-lora --style comfyui --lora_save_directory comfy

Load it with `pipe.load_lora_weights("my-lora")`: rank and alpha are in the header of the file. ComfyUI reads alphas
from tensors, which --style comfyui writes; --style kohya has the names of kohya's scripts and LyCORIS. LoKr is for
these two alone. The checkpoint holds adapters alone or a whole network with LoRA, of any depth and layers. Checkpoints
of the reference do not record alpha:
give it with --alpha.
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser


def export(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.lora import export_lora

    file = export_lora(
        options.sat_pt_path,
        options.lora_save_directory,
        style=options.style,
        key_prefix=options.key_prefix,
        alpha=options.alpha,
        title=options.title,
    )
    sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--sat_pt_path", required=True, metavar="PATH", help="run folder, iteration folder or file")
    parser.add_argument("--lora_save_directory", required=True, metavar="DIR", help="to create; gets one file")
    parser.add_argument(
        "--style",
        choices=("diffusers", "comfyui", "kohya"),
        default="diffusers",
        help="names and alphas of a file (diffusers)",
    )
    parser.add_argument("--key_prefix", help="of the names (transformer., diffusion_model. or lora_unet_)")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, if the checkpoint does not record it")
    parser.add_argument("--title", help="that other tools show (the name of the folder)")
    return run_command(export, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
