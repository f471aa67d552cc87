"""Write a model as a pipeline folder of diffusers.

    python tools/convert_weight_sat2hf.py --base configs/toy.yaml --output_path outputs/toy_diffusers --verify
    python tools/convert_weight_sat2hf.py --base configs/cogvideox_5b.yaml \
        --transformer_ckpt_path ckpts/my-run --vae_ckpt_path vae/3d-vae.pt --text_encoder_path t5-v1_1-xxl \
        --output_path my-model --dtype bf16

    python tools/convert_weight_sat2hf.py --base configs/toy.yaml --style comfyui --output_path outputs/toy_comfyui

Paths that are not given come from the model YAML. Tensors are written one by one: a conversion needs little more memory
than the largest file. docs/conversion.md has the tables of tensor names.
"""

import argparse
import json
import sys
from pathlib import Path

from sgm.cli import add_trust, file_size, run_command, tool_parser

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def parts_of(options: argparse.Namespace) -> list[str]:
    """Return the components to convert; refuse options that have no effect on them."""
    from sgm.conversion.writing import require_use
    from sgm.util import InputError

    is_comfyui = options.style == "comfyui"
    if is_comfyui and (options.verify or options.lora == "keep" or options.max_shard_size is not None):
        raise InputError(
            "--style comfyui writes one file of the transformer with adapters merged: leave out --verify, --lora keep "
            "and --max_shard_size; tools/export_sat_lora_weight.py --style comfyui writes adapters"
        )
    parts = [part for part in PARTS if part not in options.without and (part == "transformer" or not is_comfyui)]
    if not parts:
        raise InputError(f"--without {' '.join(options.without)} leaves nothing to convert; keep a component")
    needs = {
        "--lora keep": (options.lora == "keep", ["transformer"]),
        "--title": (options.title, ["transformer"]),
        "--fold_image_scale": (options.fold_image_scale, ["transformer"]),
        "--vae_ckpt_path": (options.vae_ckpt_path, ["vae"]),
        "--text_encoder_path": (options.text_encoder_path, ["text_encoder", "tokenizer"]),
        "--dtype": (options.dtype, ["transformer", "text_encoder"]),
        "--max_shard_size": (options.max_shard_size, ["transformer", "vae", "text_encoder"]),
    }
    require_use(needs, parts)
    return parts


def convert(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.config.load import load_config
    from sgm.config.yaml_files import read_merged
    from sgm.conversion.diffusers.from_sat import pipeline_of, write_comfyui
    from sgm.conversion.diffusers.verify import require_diffusers, verify
    from sgm.conversion.family import base_files
    from sgm.conversion.writing import check_new_folder
    from sgm.util import PRECISIONS, InputError
    from sgm.weights.adapters import with_adapters

    check_new_folder(options.output_path)
    is_comfyui, parts = options.style == "comfyui", parts_of(options)
    if options.verify:
        require_diffusers()
    paths = {
        "args.load": options.transformer_ckpt_path,
        "model.first_stage_config.params.ckpt_path": options.vae_ckpt_path,
        "model.conditioner_config.params.emb_models.0.params.model_dir": options.text_encoder_path,
    }
    overrides = [f"{key}={json.dumps(path)}" for key, path in paths.items() if path is not None]
    overrides = ["args.input_type=cli", *overrides, *options.overrides]
    own = read_merged([], overrides).values.get("args", {})
    base = base_files(options.base, own.get("load", options.transformer_ckpt_path), base=own.get("base"))
    config = with_adapters(load_config(base, overrides, mode="inference", trust=options.trust))
    pipeline = pipeline_of(
        config,
        without=[part for part in PARTS if part not in parts],
        dtype=PRECISIONS.get(options.dtype),
        adapters=options.lora,
        fold_image_scale=options.fold_image_scale,
        title=options.title,
        style=options.style,
    )
    if options.lora == "keep" and pipeline.lora is None:
        raise InputError(f"--lora keep has no effect: {config.args.load} holds no adapters; leave it out")
    if is_comfyui:
        sys.stdout.write(f"wrote {write_comfyui(pipeline.parts[0], options.output_path)}\n")
        return

    def check(folder: Path) -> None:
        for name, difference in verify(config, folder).items():
            label = f"{name} with adapters" if name == "transformer" and pipeline.lora else name
            sys.stdout.write(f"{label}: largest difference {difference:.2e}\n")

    size = options.max_shard_size or "5GB"
    pipeline.write(options.output_path, max_shard_size=size, check=check if options.verify else None)
    sys.stdout.write(f"wrote {options.output_path}: {pipeline.cls} of {', '.join(parts)}\n")
    if pipeline.lora is not None:
        sys.stdout.write(f"its adapters: pipe.load_lora_weights('{options.output_path}')\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    add_trust(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the YAML")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="the model; else that of the weights")
    parser.add_argument("--transformer_ckpt_path", metavar="PATH", help="file, run folder or adapters; else args.load")
    parser.add_argument("--vae_ckpt_path", metavar="FILE", help="3d-vae.pt; else that of the YAML")
    parser.add_argument("--text_encoder_path", metavar="DIR", help="T5 and its tokenizer; else that of the YAML")
    parser.add_argument("--output_path", type=Path, required=True, metavar="DIR", help="to create")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="of transformer and T5; else as they are")
    parser.add_argument("--max_shard_size", type=file_size, metavar="SIZE", help="of a weight file (5GB)")
    parser.add_argument(
        "--lora", choices=("merge", "keep"), default="merge", help="adapters: in the weights, or in their own file"
    )
    parser.add_argument(
        "--fold_image_scale", action="store_true", help="1.5-5B-I2V: let diffusers compute exactly what SAT does"
    )
    parser.add_argument(
        "--style", choices=("diffusers", "comfyui"), default="diffusers", help="a pipeline, or one file for ComfyUI"
    )
    parser.add_argument("--title", help="of the transformer, that other tools show (the name of the weights)")
    parser.add_argument("--verify", action="store_true", help="run both implementations and compare (float32)")
    return run_command(
        convert,
        parser.parse_intermixed_args(argv),
        memory_hint="leave out --verify, which holds the network in float32",
    )


if __name__ == "__main__":
    sys.exit(main())
