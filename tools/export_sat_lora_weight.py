"""Write the LoRA adapters of a SAT checkpoint as a file for diffusers, ComfyUI, kohya's scripts or CogKit.

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --lora_save_directory my-lora
    python tools/export_sat_lora_weight.py --sat_pt_path old/mp_rank_00_model_states.pt --alpha 1 \
        --lora_save_directory my-lora

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/my-lora --style comfyui --lora_save_directory comfy

Load it with `pipe.load_lora_weights("my-lora")`: rank and alpha are in the header of the file. ComfyUI reads alphas
from tensors, which --style comfyui writes; --style kohya has the names of kohya's scripts and LyCORIS. LoKr is for
these two alone. CogKit loads a rank and an alpha of its own, as which --style cogkit writes adapters of any. The
checkpoint holds adapters alone or a whole network with LoRA, of any depth and layers. Checkpoints of the reference do
not record alpha:
give it with --alpha.
"""

import argparse
import sys

from sgm.cli import run_command, tool_parser
from sgm.util import InputError


def export(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.lora import export_lora
    from sgm.conversion.lora_cogkit import export_cogkit_lora

    if options.style == "cogkit":
        if options.key_prefix is not None:
            raise InputError("--key_prefix is given, and CogKit reads names without one; remove it")
        path, folder = options.sat_pt_path, options.lora_save_directory
        sys.stdout.write(f"wrote {export_cogkit_lora(path, folder, alpha=options.alpha, title=options.title)}\n")
        return
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
    styles = ("diffusers", "comfyui", "kohya", "cogkit")
    parser.add_argument("--style", choices=styles, default="diffusers", help="who reads the file (diffusers)")
    parser.add_argument("--key_prefix", help="of the names (transformer., diffusion_model. or lora_unet_)")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, if the checkpoint does not record it")
    parser.add_argument("--title", help="that other tools show (the name of the weights)")
    return run_command(export, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
