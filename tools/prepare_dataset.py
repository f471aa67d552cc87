"""Encode the clips and captions of a training run once, into a cache; see docs/precomputing.md.

    python tools/prepare_dataset.py --base configs/toy_lora.yaml configs/toy_sft.yaml --out outputs/toy_cache

With args.latent_cache and args.text_cache, training needs no decoding, VAE or T5. The same command continues after an
interruption, and tries failed clips again; with --verify it also reads all results, and mends damaged ones. --upload
copies the finished cache to a URL, which training reads as well.

Exit codes: 0 all clips are encoded, 1 some failed, 2 wrong input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sgm import cli
from sgm.urls import is_url, local_path, redacted, url_problem

EXAMPLES = (
    "python tools/prepare_dataset.py --base configs/toy_lora.yaml configs/toy_sft.yaml --out outputs/toy_cache",
    "torchrun --standalone --nproc_per_node 8 tools/prepare_dataset.py --base configs/cogvideox_5b.yaml "
    "configs/sft.yaml --out cache",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``section.key=value`` may appear anywhere."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=_folder, required=True, metavar="FOLDER", help="the cache")
        parser.add_argument("--upload", metavar="URL", help="copy the finished cache there, such as s3://bucket/cache")
        parser.add_argument("--vae", action="store_true", help="latents of clips; without a switch: --vae --text")
        parser.add_argument("--text", action="store_true", help="embeddings of captions")
        parser.add_argument("--images", action="store_true", help="latents of the first images of image-to-video")
        parser.add_argument("--verify", action="store_true", help="read finished results; encode damaged ones again")
        parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), help="dtype on disk (that of the encoder)")
        parser.add_argument(
            "--batch_size", type=int, default=1, metavar="N", help="clips or captions at once: faster on some devices"
        )
        parser.add_argument("--shard_mb", type=float, default=256, help="megabytes per file; a kill loses at most one")

    return cli.parse(
        argv,
        prog="tools/prepare_dataset.py",
        description="Encode the clips and captions of a training run once, into a cache.",
        examples=EXAMPLES,
        training=True,
        check="print number and size of the results, and the memory to encode them; encode nothing",
        more=more,
    )


def _folder(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"a cache is written here first: --out FOLDER --upload {redacted(text)}")
    return local_path(text)


def run(options: argparse.Namespace) -> None:
    """Encode, or check; the number of failures is written to ``options.num_failed``."""
    import sgm.distributed  # after parsing, so that --help is fast
    from sgm.checks.estimate import memory_text
    from sgm.config.load import load_config
    from sgm.data.cache import Kind, upload_cache
    from sgm.data.remote.folder import RemoteFolder
    from sgm.data.rows import listed
    from sgm.io import readable_size
    from sgm.training.inputs.clips import store_of
    from sgm.training.inputs.precompute import plan_jobs, run_jobs
    from sgm.util import InputError

    if not 0 < options.shard_mb <= 1e6:
        raise InputError(f"--shard_mb is {options.shard_mb:g}; give megabytes, more than 0 and at most 1,000,000")
    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}; give the number of clips to encode at once, 1 or more")
    if options.upload is not None and not is_url(options.upload):
        raise InputError(f"--upload is '{options.upload}'; give a URL such as s3://bucket/cache, or only --out")
    if options.upload is not None and (problem := url_problem(options.upload)):
        raise InputError(f"--upload {problem[0]}; {problem[1]}")
    config = load_config(options.base, options.overrides, mode="encode", trust=options.trust)
    switches: dict[Kind, bool] = {"text": options.text, "latents": options.vae, "images": options.images}
    kinds: list[Kind] = [kind for kind, on in switches.items() if on] or ["text", "latents"]
    sgm.distributed.configure(config.args)
    with sgm.distributed.explain_lost_ranks():
        sgm.distributed.initialize()
        given = {"shard_bytes": round(options.shard_mb * 1e6), "batch_size": options.batch_size}
        jobs = plan_jobs(config, kinds, dtype=options.dtype, **given)
        failures = {} if options.check else run_jobs(jobs, options.out, verify=options.verify)
    options.num_failed = len(failures)
    descriptions = [job.description for job in jobs]
    if options.upload is not None and sgm.distributed.rank() == 0:
        there = RemoteFolder(options.upload, store_of(config))
        if options.check:
            there.look_up(f"{each.kind}.json" for each in descriptions)
        else:
            num = upload_cache(options.out, there, descriptions)
            sys.stdout.write(f"{options.upload}: {num:,} files copied, the others were there\n")
    if sgm.distributed.rank() == 0:
        for job in jobs:
            num, shards = sum(1 for _ in job.description.keys()), len(job.description.shards)
            size, missing = readable_size(job.num_bytes), len(job.description.missing(options.out))
            memory = f"; encoding takes about {memory_text(job.memory())}" if options.check else ""
            sys.stdout.write(
                f"{job.description.kind}: {num:,} in {shards:,} shards, {size}; {missing:,} missing{memory}\n"
            )
        if failures:
            sys.stdout.write(f"{len(failures):,} could not be encoded; the same command tries them again:\n")
            lines = [f"{key}: {reason}" for key, reason in failures.items()]
            sys.stdout.write(f"{listed(lines)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse(argv)
    options.num_failed = 0
    code = cli.run_command(
        run,
        options,
        interrupted="interrupted; what is finished stays, and the same command goes on from there",
        memory_hint="set model.first_stage_config.params.encode_chunk=8, which changes latents a little",
    )
    return code or int(options.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
