"""Write the LoRA adapters of a SAT checkpoint as the file that diffusers loads.

    python tools/export_sat_lora_weight.py --sat_pt_path ckpts/my-lora-06-30-12-00 --lora_save_directory my-lora
    python tools/export_sat_lora_weight.py --sat_pt_path old/mp_rank_00_model_states.pt --alpha 1 \
        --lora_save_directory my-lora

Then `pipe.load_lora_weights("my-lora")` is all: rank and alpha are in the header of the file. Adapters alone and whole
networks with LoRA are read, of any depth and any layers. Checkpoints of the reference do not say their alpha: --alpha
gives it.
"""

import argparse
import sys

from sgm.cli import EXIT_CODES, run_command


def export(options: argparse.Namespace) -> None:
    """Export as the command line says."""
    from sgm.conversion.lora import export_lora

    file = export_lora(
        options.sat_pt_path, options.lora_save_directory, key_prefix=options.key_prefix, alpha=options.alpha
    )
    sys.stdout.write(f"wrote {file}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )
    parser.add_argument("--sat_pt_path", required=True, metavar="PATH", help="run folder, iteration folder or file")
    parser.add_argument("--lora_save_directory", required=True, metavar="DIR", help="made anew; gets one file")
    parser.add_argument("--key_prefix", default="transformer.", help="of the names (transformer.)")
    parser.add_argument("--alpha", type=float, help="lora_alpha of the training, where the checkpoint does not say it")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    return run_command(
        export,
        parser.parse_args(argv),
        interrupted="interrupted; nothing was written",
        memory_hint="this needs no accelerator",
    )


if __name__ == "__main__":
    sys.exit(main())
