"""Rewrite a file of prompts with a language model: any language in, English in the manner of the models out.

    python tools/enhance_prompts.py prompts.txt --model my-llm --base configs/cogvideox_5b.yaml --out enhanced.txt
    python tools/enhance_prompts.py prompts.txt --model NAME --endpoint http://127.0.0.1:8000/v1 \
        --base configs/cogvideox_5b.yaml --out enhanced.txt

The model is a folder of Hugging Face transformers with a chat template, or the name of one behind an address with
OpenAI's interface; a key for it is read from the variable PROMPT_ENHANCER_KEY. Nothing is downloaded, and without
--endpoint nothing leaves this machine. --base names the video model, whose tokenizer in its T5 folder limits the texts:
one that is too long, or not English, is asked for again and then refused. The images of prompt@@image stay. Originals
and results are kept beside the output, in FILE.json; the same command goes on where it stopped.
"""

import argparse
import os
import sys
from pathlib import Path

from sgm.cli import add_trust, run_command, tool_parser


def work(options: argparse.Namespace) -> None:
    """Write the enhanced prompts."""
    from sgm.config.load import load_config  # after parsing, so that --help is fast
    from sgm.distributed import device
    from sgm.inference.language.enhance import enhance
    from sgm.inference.language.models import ChatModel, Endpoint
    from sgm.inference.prompts import IMAGE_SEPARATOR, read_prompts
    from sgm.io import atomic_file, require_writable
    from sgm.util import PRECISIONS, InputError, default, instantiate_from_config

    for option, value in (("--max_new_tokens", options.max_new_tokens), ("--dtype", options.dtype)):
        if options.endpoint and value is not None:
            raise InputError(f"{option} is for a model on disk, and --endpoint is given, which sets its own; remove it")
    max_new_tokens: int = default(options.max_new_tokens, 1024)
    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens is {max_new_tokens}; give a number of at least 1")
    out, record = options.out, options.out.with_name(f"{options.out.name}.json")
    if out.exists() and options.prompts.exists() and os.path.samefile(out, options.prompts):
        raise InputError(f"--out is the file of prompts, {out}; name another one")
    if out.exists() and not record.exists():
        raise InputError(f"{out} exists and was not written by this command; name another file, or remove it")
    config = load_config(options.base, ["args.input_type=cli"], mode="inference", trust=options.trust)
    conditioner = instantiate_from_config(config.model["conditioner_config"])
    written = options.prompts.read_text(encoding="utf-8-sig", errors="replace") if options.prompts.is_file() else ""
    images = [line.partition(IMAGE_SEPARATOR)[2].strip() for line in written.split("\n") if line.strip()]
    prompts = read_prompts(options.prompts, image2video=any(images))
    require_writable(out.parent)
    if options.endpoint:
        writer = Endpoint(options.endpoint, options.model, with_key=True)
        name, write = writer.name, lambda: writer
    else:
        name, dtype = options.model, PRECISIONS.get(options.dtype)
        folder = Path(options.model).expanduser()
        write = lambda: ChatModel(  # noqa: E731
            folder, device=device(), dtype=dtype, max_new_tokens=max_new_tokens
        )
    enhanced = enhance(prompts, write, conditioner, record, name=name)
    if out.parent.resolve() != options.prompts.parent.resolve():  # images may be relative to the file's folder
        images = [str(prompt.image or "") for prompt in prompts]
    lines = [
        f"{prompt.text}{IMAGE_SEPARATOR}{image}" if image else prompt.text
        for prompt, image in zip(enhanced, images, strict=True)
    ]
    with atomic_file(out) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(lines)} prompts: {out}, with their originals in {record}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    add_trust(parser)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS", help="file with a prompt a line")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="language model on disk, or its name there")
    parser.add_argument("--endpoint", metavar="URL", help="address with OpenAI's interface that serves the model")
    parser.add_argument("--base", nargs="+", required=True, metavar="YAML", help="the video model")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer, thoughts included (1024)")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="precision; without it, that of the files")
    options = parser.parse_args(argv)
    return run_command(
        work,
        options,
        interrupted="interrupted; the same command goes on where this one stopped",
        memory_hint="give --dtype bf16, or a smaller model",
    )


if __name__ == "__main__":
    sys.exit(main())
