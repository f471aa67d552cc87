"""Write a model of diffusers in the SAT layout, with the model YAML that fits it.

    python tools/convert_weight_hf2sat.py --model_path CogVideoX-5b --output_path checkpoints/5b
    python tools/convert_weight_hf2sat.py --transformer_path my_transformer --output_path checkpoints/mine
    python sample_video.py --base checkpoints/5b/model.yaml configs/inference.yaml

A component may be a folder of diffusers or one file. Without a config.json beside it, the
model of a transformer is recognised from its shapes, if it is a shipped one; otherwise give its YAML with --base.
Single components override those of --model_path.
"""

import argparse
import sys
from pathlib import Path

from sgm.cli import add_trust, run_command, tool_parser

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def parts_of(options: argparse.Namespace) -> dict[str, Path]:
    """Return the path of each component."""
    from sgm.conversion.diffusers.to_sat import read_json
    from sgm.conversion.writing import require_use
    from sgm.io import require_local
    from sgm.log import get_logger
    from sgm.util import InputError

    parts: dict[str, Path] = {}
    named: list[str] = []
    if options.model_path is not None:
        require_local(options.model_path)
        index = read_json(options.model_path / "model_index.json")
        if not str(index.get("_class_name", "")).startswith("CogVideoX"):
            raise InputError(f"{options.model_path} is a {index.get('_class_name')}; only CogVideoX is converted")
        parts = {name: options.model_path / name for name in PARTS if (options.model_path / name).is_dir()}
        named = [name for name in PARTS if index.get(name) not in (None, [None, None])]
    for name in PARTS:
        if (path := getattr(options, f"{name}_path", None)) is not None:
            parts[name] = path
    parts = {name: path for name, path in parts.items() if name not in options.without}
    if not parts.keys() & {"transformer", "vae", "text_encoder"}:
        raise InputError("there is nothing to convert; give --model_path, or the path of a component")
    needs = {f"--{name}_path": (getattr(options, f"{name}_path"), [name]) for name in PARTS[:3]}
    require_use(needs | {"--dtype": (options.dtype, ["transformer"])}, parts)
    if "text_encoder" not in parts:
        parts.pop("tokenizer", None)
    elif "tokenizer" in options.without:
        raise InputError("--without tokenizer has no effect: T5 is one folder with it; leave text_encoder out, too")
    if absent := [name for name in named[:3] if name not in parts and name not in options.without]:
        text = "%s names %s, and there is no such folder: model.yaml names that of the shipped model instead"
        get_logger(__name__).warning(text, options.model_path / "model_index.json", ", ".join(absent))
    return parts


def convert(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.config.load import load_config
    from sgm.conversion.diffusers.to_sat import sat_model_of
    from sgm.conversion.writing import check_new_folder
    from sgm.util import PRECISIONS

    check_new_folder(options.output_path)
    parts = parts_of(options)
    base = None
    if options.base:
        config = load_config(options.base, mode="inference", trust=options.trust)
        base = {**config.merged, "model": config.model}
    model = sat_model_of(parts, base=base, dtype=PRECISIONS.get(options.dtype))
    model.write(options.output_path, file_format=options.file_format)
    sys.stdout.write(f"wrote {options.output_path}: {', '.join(sorted(parts))}\n")
    sys.stdout.write(f"sample with it: python sample_video.py --base {options.output_path / 'model.yaml'} ...\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    add_trust(parser)
    parser.add_argument("--model_path", type=Path, metavar="DIR", help="a pipeline folder of diffusers")
    parser.add_argument("--transformer_path", type=Path, metavar="PATH", help="folder or file")
    parser.add_argument("--vae_path", type=Path, metavar="PATH", help="folder or file")
    parser.add_argument("--text_encoder_path", type=Path, metavar="DIR", help="T5; its tokenizer there or beside it")
    parser.add_argument(
        "--base",
        nargs="+",
        default=[],
        metavar="YAML",
        help="the model, if nothing says it",
    )
    parser.add_argument("--output_path", type=Path, required=True, metavar="DIR", help="to create")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="of the transformer; else as it is")
    parser.add_argument(
        "--file_format", choices=("pt", "safetensors"), default="pt", help="safetensors needs the least memory"
    )
    return run_command(
        convert,
        parser.parse_args(argv),
        memory_hint="use --file_format safetensors, which is written tensor by tensor",
    )


if __name__ == "__main__":
    sys.exit(main())
