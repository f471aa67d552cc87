"""Sample videos with diffusers, with a LoRA or without.

    python tools/load_cogvideox_lora.py --model_path my-model --lora_path my-lora --prompt "a red circle moves left" \
        --seed 7 --output_path outputs/circle.mp4
    python tools/load_cogvideox_lora.py --model_path my-i2v-model --image_path first.png --prompt "..." \
        --lora_path my-lora --lora_scale 0.8 --enable_model_cpu_offload --vae_tiling --output_path outputs/video.mp4

The model is a pipeline folder of diffusers, such as tools/convert_weight_sat2hf.py writes; the LoRA is what
tools/export_sat_lora_weight.py writes, or any other that diffusers loads. --lora_scale 1 is the LoRA as trained; its
file holds its own scale. Nothing is downloaded. Each video gets a JSON file with its settings.
"""

import argparse
import importlib
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.cli import run_command, tool_parser

PIPELINES = {"CogVideoXPipeline": False, "CogVideoXImageToVideoPipeline": True}  # pipeline → takes an image
# Values of diffusers where a configuration lacks them.
TRANSFORMER = {
    "max_text_seq_length": 226,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "patch_size": 2,
}
VAE = {"block_out_channels": (128, 256, 256, 512)}
SCHEDULERS = {"dpm": "CogVideoXDPMScheduler", "ddim": "CogVideoXDDIMScheduler"}


@dataclass(frozen=True)
class Plan:
    """The checked values of a command line.

    Attributes:
        cls: name of the pipeline's class.
        outputs: seed → video.
        size: (height, width) in pixels.
        num_frames: of a video.
        fps: frames per second.
        text_length: tokens of a prompt.
        image: the first frame (1, 3, H, W) in [0, 1]; None for text to video.
        lora: the LoRA file.
        lora_scale: its strength.
    """

    cls: str
    outputs: Mapping[int, Path]
    size: tuple[int, int]
    num_frames: int
    fps: float
    text_length: int
    image: Any
    lora: Path | None
    lora_scale: float


def _wrong(message: str) -> Exception:
    from sgm.util import InputError  # after parsing, so that --help is fast

    return InputError(message)


def plan_of(options: argparse.Namespace) -> Plan:
    """Check the command line against the files, before any weights are read.

    Raises:
        InputError: something is wrong with it.
    """
    from sgm.io import require_local
    from sgm.util import default
    from sgm.weights.lora.foreign import find_lora

    for name in ("diffusers", "peft", "accelerate"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise _wrong(f"{name} cannot be imported ({error}); install it: pip install -e .[diffusers]") from error
    require_local(options.model_path)
    folder = Path(options.model_path)
    cls = _json(folder / "model_index.json").get("_class_name")
    if cls not in PIPELINES:
        raise _wrong(f"{folder} holds a {cls}; expected one of {', '.join(PIPELINES)}")
    transformer = TRANSFORMER | _json(folder / "transformer" / "config.json")
    vae = VAE | _json(folder / "vae" / "config.json")
    _check_options(options)
    most = _json(folder / "scheduler" / "scheduler_config.json").get("num_train_timesteps", 1000)
    if options.num_inference_steps > most:
        raise _wrong(f"--num_inference_steps is {options.num_inference_steps}; give a number from 1 to {most}")
    size, num_frames = _video_shape(options, transformer, vae)
    return Plan(
        cls=cls,
        outputs=_outputs(options),
        size=size,
        num_frames=num_frames,
        fps=default(options.fps, 16 if transformer.get("patch_size_t") else 8),
        text_length=transformer["max_text_seq_length"],
        image=_image(options.image_path, size, cls),
        lora=None if options.lora_path is None else find_lora(options.lora_path),
        lora_scale=default(options.lora_scale, 1.0),
    )


def _json(path: Path) -> dict[str, Any]:
    from sgm.io import parse_json

    try:
        return dict(parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _wrong(f"{path} cannot be read ({error}); give --model_path a pipeline folder of diffusers") from error


def _check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and options that contradict each other or have no effect."""
    import sgm.distributed

    for name in ("num_inference_steps", "num_videos", "fps"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise _wrong(f"--{name} is {value}; give a number above 0")
    if not 0 <= options.seed <= 2**64 - options.num_videos:
        raise _wrong(f"--seed is {options.seed}; give a number from 0, and below 2^64 for every video")
    for name in ("guidance_scale", "lora_scale"):
        if not math.isfinite(getattr(options, name) or 0):
            raise _wrong(f"--{name} is {getattr(options, name)}; give a number")
    if options.guidance_scale <= 1 and (options.negative_prompt or options.use_dynamic_cfg):
        raise _wrong(
            f"--negative_prompt and --use_dynamic_cfg have no effect with --guidance_scale {options.guidance_scale:g}; "
            "raise it above 1, or remove them"
        )
    if options.lora_scale is not None and options.lora_path is None:
        raise _wrong(f"--lora_scale {options.lora_scale} has no effect without --lora_path; add it")
    on_cpu = sgm.distributed.device().type == "cpu"
    offload = [name for name in ("model", "sequential") if getattr(options, f"enable_{name}_cpu_offload")]
    if len(offload) > 1:
        raise _wrong("--enable_model_cpu_offload and --enable_sequential_cpu_offload exclude each other; keep one")
    if offload and on_cpu:
        raise _wrong(f"--enable_{offload[0]}_cpu_offload needs an accelerator, and there is none; remove it")
    if options.dtype == "fp16" and on_cpu:
        raise _wrong("--dtype is fp16, which a CPU cannot do, and there is no accelerator; give bf16 or fp32")


def _video_shape(
    options: argparse.Namespace, transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """Return (height, width) and the number of frames; those of the model by default."""
    from sgm.util import default

    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    own = (transformer["sample_height"] * scale, transformer["sample_width"] * scale)
    size = (default(options.height, own[0]), default(options.width, own[1]))
    step = scale * transformer["patch_size"]
    if any(length <= 0 or length % step for length in size):
        raise _wrong(f"--height {size[0]} --width {size[1]}: give multiples of {step}")
    num_frames = default(options.num_frames, transformer["sample_frames"])
    compression = vae.get("temporal_compression_ratio", 4)
    if num_frames <= 0 or (num_frames - 1) % compression:
        nearest = max(round((num_frames - 1) / compression), 0) * compression + 1
        raise _wrong(f"--num_frames {num_frames}: give 1 more than a multiple of {compression}, e.g. {nearest}")
    learned = transformer.get("use_learned_positional_embeddings")
    if learned and (*size, num_frames) != (*own, transformer["sample_frames"]):
        raise _wrong(
            f"{num_frames} frames of {size[0]}x{size[1]}: the learned positions of this model fit "
            f"{transformer['sample_frames']} frames of {own[0]}x{own[1]} only; remove --height, --width, --num_frames"
        )
    return size, num_frames


def _outputs(options: argparse.Namespace) -> dict[int, Path]:
    """Return seed → video; several videos get numbered names."""
    from sgm.io import require_writable

    path = Path(options.output_path)
    if path.suffix != ".mp4":
        raise _wrong(f"--output_path is {path}; give a name that ends with .mp4")
    names = [path.stem] if options.num_videos == 1 else [f"{path.stem}_{k}" for k in range(options.num_videos)]
    outputs = {options.seed + k: path.with_name(f"{name}.mp4") for k, name in enumerate(names)}
    require_writable(path.parent, *(video.with_suffix(".json").name for video in outputs.values()))
    for file in [each for video in outputs.values() for each in (video, video.with_suffix(".json"))]:
        if file.exists():
            raise _wrong(f"{file} exists already; nothing is overwritten: remove it, or name another output")
    return outputs


def _image(path: str | None, size: tuple[int, int], cls: str) -> Any:
    """Read the first frame as sample_video.py does: scaled to cover the size, cropped to its centre."""
    from sgm.inference.prompts import load_image

    if PIPELINES[cls] and path is None:
        raise _wrong(f"{cls} makes videos from an image; give it with --image_path")
    if not PIPELINES[cls] and path is not None:
        raise _wrong(f"{cls} takes no image; remove --image_path, or give an image-to-video model")
    return None if path is None else (load_image(path, size)[None] + 1) / 2


def load_pipeline(options: argparse.Namespace, plan: Plan) -> Any:
    """Load the pipeline with its LoRA, on the device.

    Raises:
        InputError: the folder is damaged, or the LoRA does not fit the model.
    """
    import diffusers

    import sgm.distributed
    from sgm.util import PRECISIONS

    cls = getattr(diffusers, plan.cls)
    try:
        pipe = cls.from_pretrained(options.model_path, dtype=PRECISIONS[options.dtype], local_files_only=True)
    except (OSError, ValueError) as error:
        raise _wrong(f"diffusers cannot load {options.model_path}: {error}") from error
    if options.scheduler:
        # "trailing" starts from the last timestep, like this project's sampler.
        scheduler = getattr(diffusers, SCHEDULERS[options.scheduler])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if plan.lora is not None:
        _load_lora(pipe, plan.lora, plan.lora_scale)
    device = sgm.distributed.device()
    if options.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(device=device)
    elif options.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    return pipe


def _load_lora(pipe: Any, file: Path, scale: float) -> None:
    from sgm.weights.files import check_values, read_tensors

    check_values(file)
    held = sum(re.search(r"lora(_A|_down|\.down)\.", name) is not None for name in read_tensors(file))
    if not held:
        raise _wrong(
            f"the LoRA {file} holds no matrices A and B, which alone diffusers loads (LoKr has others): merge it into "
            "the model with tools/merge_lora_weight.py and tools/convert_weight_sat2hf.py"
        )
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="lora", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _wrong(f"the LoRA {file} does not fit this model: {error}") from error
    # diffusers only warns if the model lacks layers of the file, or no name belongs to the transformer.
    taken = sum(".lora_A." in name for name, _ in pipe.transformer.named_parameters())
    if taken != held:
        raise _wrong(
            f"the LoRA {file} does not fit this model: {taken} of its {held} adapters are for modules that there are; "
            "their names begin with 'transformer.', and the depth must be the same"
        )
    pipe.set_adapters(["lora"], [scale])


def sample(options: argparse.Namespace) -> None:
    """Check, load, sample and write."""
    from sgm.inference.results import write_or_keep
    from sgm.inference.video import to_uint8, write_video

    plan = plan_of(options)
    pipe = load_pipeline(options, plan)
    for seed, path in plan.outputs.items():
        started = time.perf_counter()
        frames = to_uint8(_generate(pipe, options, plan, seed) * 2 - 1)
        made = {"seed": seed, "seconds": round(time.perf_counter() - started, 2)}
        record = made | dict(_record(pipe, options, plan))
        write_or_keep(path, lambda place, frames=frames: write_video(place, frames, plan.fps), record)
        sys.stdout.write(f"wrote {path}\n")


def _generate(pipe: Any, options: argparse.Namespace, plan: Plan, seed: int) -> Any:
    """Return the frames (T, 3, H, W) in [0, 1] of one video."""
    import torch

    return pipe(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        height=plan.size[0],
        width=plan.size[1],
        num_frames=plan.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        use_dynamic_cfg=options.use_dynamic_cfg,
        generator=torch.Generator("cpu").manual_seed(seed),  # the same video on every machine
        max_sequence_length=plan.text_length,
        output_type="pt",
        **({} if plan.image is None else {"image": plan.image}),
    ).frames[0]


def _record(pipe: Any, options: argparse.Namespace, plan: Plan) -> Iterator[tuple[str, Any]]:
    """Yield the entries of the JSON file beside a video."""
    import diffusers

    names = ("prompt", "negative_prompt", "image_path", "model_path", "dtype")
    yield from ((name, getattr(options, name)) for name in names)
    yield "lora", None if plan.lora is None else {"file": str(plan.lora), "scale": plan.lora_scale}
    yield "num_frames", plan.num_frames
    yield "size", list(plan.size)
    yield "fps", plan.fps
    yield from ((name, getattr(options, name)) for name in ("num_inference_steps", "guidance_scale", "use_dynamic_cfg"))
    yield "scheduler", type(pipe.scheduler).__name__
    yield "diffusers", diffusers.__version__


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--model_path", required=True, metavar="DIR", help="pipeline folder of diffusers")
    parser.add_argument("--lora_path", metavar="PATH", help="file, or folder with one LoRA")
    parser.add_argument("--lora_scale", type=float, help="strength of the LoRA (1)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative_prompt", help="what the video should not show")
    parser.add_argument("--image_path", metavar="FILE", help="first frame, for image to video")
    parser.add_argument("--num_frames", type=int, help="1 more than a multiple of 4 (the model's)")
    parser.add_argument("--height", type=int, help="pixels (the model's)")
    parser.add_argument("--width", type=int, help="pixels (the model's)")
    parser.add_argument("--fps", type=float, help="frames per second (16 for 1.5 models, otherwise 8)")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="(50)")
    parser.add_argument("--guidance_scale", type=float, default=6.0, help="(6)")
    parser.add_argument("--use_dynamic_cfg", action="store_true", help="let guidance grow along the steps")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="with trailing timesteps (the model's own, unchanged)")
    parser.add_argument("--seed", type=int, default=42, help="of the first video; the next ones count up (42)")
    parser.add_argument("--num_videos", type=int, default=1, help="several get numbered names (1)")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="bf16", help="(bf16); 2B is made for fp16")
    parser.add_argument("--output_path", required=True, metavar="FILE.mp4")
    parser.add_argument("--enable_model_cpu_offload", action="store_true", help="one part at a time on the accelerator")
    parser.add_argument("--enable_sequential_cpu_offload", action="store_true", help="one layer at a time: slow, small")
    parser.add_argument("--vae_tiling", action="store_true", help="decode in tiles: less memory")
    return run_command(
        sample,
        parser.parse_args(argv),
        interrupted="interrupted; finished videos stay",
        memory_hint="add --vae_tiling and --enable_model_cpu_offload, or make a smaller video",
    )


if __name__ == "__main__":
    sys.exit(main())
