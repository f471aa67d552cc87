"""Print what sampling takes on the device with each preset of configs/memory, as tables of docs/memory.md.

    python -m benchmarks.sampling_memory

Network and T5 are those of the released models at their full size, on fake tensors (`sgm.checks.estimate`); no weights
are needed. The VAE is not included: it runs when the network has finished.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch

from sgm.checks.estimate import sampling_estimate, t5_bytes
from sgm.config.load import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = ("8gb", "12gb", "16gb", "24gb", "48gb", "80gb")
MODELS = {
    "cogvideox_2b": ("49×480×720", torch.float16),
    "cogvideox_5b": ("49×480×720", torch.bfloat16),
    "cogvideox_5b_i2v": ("49×480×720", torch.bfloat16),
    "cogvideox1.5_5b": ("81×768×1360", torch.bfloat16),
    "cogvideox1.5_5b_i2v": ("81×768×1360", torch.bfloat16),
}
GIB = 2**30

# T5 v1.1 XXL, the encoder of all released models, in 16 bits.
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
T5_XXL_BYTES = 2 * 4_762_310_656


def text_encoder_peak(*, storage: str | None = None, blocks: bool = False) -> float:
    """Return the bytes of T5 on the device while prompts are encoded."""
    return t5_bytes(T5_XXL, T5_XXL_BYTES, storage, blocks)


@cache
def network_peak(model: str, settings: Sequence[str] = ()) -> tuple[float, float]:
    """Return bytes on the device while a network samples both branches of guidance: of its weights, and their peak.

    Args:
        model: a file of configs/, without suffix.
        settings: ``args.key=value``, such as ``args.network_offload=blocks``.
    """
    size = MODELS[model][0].split("×")
    given = [f"args.sampling_image_size=[{size[1]},{size[2]}]", "args.only_save_latents=true", *settings]
    config = load_config([CONFIGS / f"{model}.yaml", CONFIGS / "inference.yaml"], given, mode="inference")
    parts = sampling_estimate(config, MODELS[model][1]).phases["network"]
    return parts["weights"], sum(part for name, part in parts.items() if name not in ("text encoder", "VAE"))


def row(preset: str, model: str) -> tuple[float, float, float]:
    """Return GiB on the device while T5 encodes, while the network samples, and of weights beside the VAE at work."""
    bases = [CONFIGS / f"{model}.yaml", CONFIGS / "inference.yaml", CONFIGS / "memory" / f"{preset}.yaml"]
    args = load_config(bases, mode="inference").args
    text = text_encoder_peak(storage=args.text_encoder_weights, blocks=args.text_encoder_offload == "blocks")
    stays = text if args.text_encoder_offload == "none" else 0.0
    passing = "blocks" if args.network_offload == "blocks" else "none"
    settings = [f"args.network_offload={passing}", *([f"args.weights={args.weights}"] if args.weights else [])]
    weights, peak = network_peak(model, tuple(settings))
    beside = weights if args.network_offload == "none" else 0.0
    return text / GIB, (peak + stays) / GIB, (beside + stays) / GIB


def table() -> Iterator[str]:
    """Yield the lines of the table of presets."""
    yield "| preset | model | video | T5 encodes | network samples | beside the VAE |"
    yield "|---|---|---|---|---|---|"
    for preset in PRESETS:
        for model, (size, _) in MODELS.items():
            text, network, beside = row(preset, model)
            yield f"| `{preset}` | {model} | {size} | {text:.1f} | {network:.1f} | {beside:.1f} |"


def eight_bit_table() -> Iterator[str]:
    """Yield the lines of the table of weights in eight bits."""
    yield "| model | video | bfloat16 | `int8` | `fp8` | `int8` in blocks |"
    yield "|---|---|---|---|---|---|"
    for model, (size, _) in MODELS.items():
        settings = (
            (),
            ("args.weights=int8",),
            ("args.weights=fp8",),
            ("args.weights=int8", "args.network_offload=blocks"),
        )
        peaks = " | ".join(f"{network_peak(model, given)[1] / GIB:.1f}" for given in settings)
        yield f"| {model} | {size} | {peaks} |"


if __name__ == "__main__":
    print("\n".join([*table(), "", *eight_bit_table()]))
