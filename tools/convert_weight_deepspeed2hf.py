r"""Join a ZeRO state or sharded model files to weights in the SAT layout or a transformer of diffusers.

    python tools/convert_weight_deepspeed2hf.py --checkpoint_path ckpts/sft-06-30-12-00 --to diffusers \
        --base configs/cogvideox_5b.yaml --output_path my-transformer --dtype bf16
    python tools/convert_weight_deepspeed2hf.py --checkpoint_path ckpts/sft-06-30-12-00 --to sat \
        --output_path masters --dtype fp32 --file_format safetensors
    python tools/convert_weight_deepspeed2hf.py --checkpoint_path other-trainer/checkpoint-1000 --to sat \
        --base configs/cogvideox_5b.yaml --output_path transformer

The checkpoint is a run folder of train_video.py (its resume state is read), the checkpoint folder of another DeepSpeed
trainer or one tag of it (ZeRO 1, 2, 3), or a folder of sharded model files, with names of SAT or of diffusers. No
process group is started. Values are the float32 weights of ZeRO, in the precision of training without --dtype.
"""

import argparse
import sys
from pathlib import Path

from sgm.cli import add_trust, file_size, run_command, tool_parser


def convert(options: argparse.Namespace) -> None:
    """Run the tool with parsed options."""
    from sgm.conversion.trainers import consolidate
    from sgm.util import PRECISIONS, InputError, default

    if options.to == "sat" and options.max_shard_size is not None:
        raise InputError("--max_shard_size has no effect on the SAT layout, which is one file; leave it out")
    if options.to == "diffusers" and options.file_format is not None:
        raise InputError("--file_format is for the SAT layout; diffusers gets safetensors: leave it out")
    source = consolidate.convert(
        options.checkpoint_path,
        options.output_path,
        to=options.to,
        dtype=PRECISIONS.get(options.dtype),
        file_format=default(options.file_format, "pt"),
        max_shard_size=default(options.max_shard_size, "5GB"),
        base=options.base,
        ema=options.ema,
        trust=options.trust,
    )
    sys.stdout.write(f"wrote {options.output_path} ({options.to}) from {source.path}, iteration {source.iteration}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    add_trust(parser)
    parser.add_argument("--checkpoint_path", type=Path, required=True, metavar="PATH", help="folder or file; see above")
    parser.add_argument("--output_path", type=Path, required=True, metavar="DIR", help="to create")
    parser.add_argument("--to", choices=("sat", "diffusers"), required=True, help="the layout to write")
    parser.add_argument("--base", nargs="+", default=[], metavar="YAML", help="the model; for config.json of diffusers")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="else as in training, or as in the files")
    parser.add_argument("--ema", action="store_true", help="the moving averages in a ZeRO state, not the weights")
    parser.add_argument("--file_format", choices=("pt", "safetensors"), help="of the SAT layout (pt)")
    parser.add_argument("--max_shard_size", type=file_size, metavar="SIZE", help="of a file of diffusers (5GB)")
    return run_command(
        convert,
        parser.parse_args(argv),
        memory_hint="--to sat: --file_format safetensors holds one tensor at a time",
    )


if __name__ == "__main__":
    sys.exit(main())
