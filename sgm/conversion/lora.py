"""Export LoRA adapters of SAT checkpoints to diffusers.

The method and the names in SAT are described in sgm.weights.adapters. SAT adapts the fused query-key-value matrix by
three pairs; diffusers adapts its three modules by one pair each. Pairs map one to one, with equal values::

    transformer.layers.<i>.attention.query_key_value.matrix_{A,B}.<0, 1, 2>     A [r, D], B [D, r]
    transformer_blocks.<i>.attn1.{to_q, to_k, to_v}.lora_{A,B}.weight
    transformer.layers.<i>.attention.dense.matrix_{A,B}.0
    transformer_blocks.<i>.attn1.to_out.0.lora_{A,B}.weight

Those of other projections map likewise (`sgm.weights.lora.names.GROUPS`); patches of one frame are a convolution. The
magnitudes of DoRA are ``lora_magnitude_vector`` for diffusers, and ``dora_scale`` for ComfyUI.
Names of the network are without the prefix ``model.diffusion_model.``. For the other direction see
`sgm.conversion.lora_import`, for merging `sgm.conversion.lora_merge`.
"""

import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sgm.conversion.modelspec import lora_metadata
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.adapters import TITLES, adapter_pairs
from sgm.weights.checksums import write_safetensors
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.lora.files import any_element, common_rank, read_lora, warn_without_effect
from sgm.weights.lora.merging import magnitudes_of
from sgm.weights.lora.names import FILE, HEADER_KEY, PATCH, PROJECTIONS, comfyui_name, module_name, projection_of

logger = get_logger(__name__)

KEY_PREFIX = "transformer."  # prefix of names in diffusers pipelines
Style = Literal["diffusers", "comfyui"]
# Ends of the names, and shapes, of magnitudes: of a style, and whether of a convolution.
_MAGNITUDE: dict[tuple[Style, bool], tuple[str, tuple[int, ...]]] = {
    ("diffusers", False): ("lora_magnitude_vector", (-1,)),
    ("diffusers", True): ("lora_magnitude_vector", (1, -1, 1, 1)),
    ("comfyui", False): ("dora_scale", (-1, 1)),
    ("comfyui", True): ("dora_scale", (-1, 1, 1, 1)),
}
STYLES: dict[Style, str] = {"diffusers": KEY_PREFIX, "comfyui": "diffusion_model."}  # prefixes of names


def adapters_to_diffusers(
    tensors: Tensors, *, alpha: float, key_prefix: str = KEY_PREFIX, style: Style = "diffusers"
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Translate LoRA adapters to the names and header that ``load_lora_weights`` of diffusers reads.

    All-zero pairs of LoRA are skipped: `sgm.conversion.lora_import` adds them for modules without adapters.

    Args:
        tensors: including the LoRA matrices, and the magnitudes of DoRA.
        alpha: numerator of the scale.
        key_prefix: of the names, also in the header.
        style: ``"comfyui"`` names modules as its own model, and writes a tensor ``<module>.alpha`` for each pair, which
            it reads instead of the header.

    Returns:
        The tensors, and the metadata for the header of their safetensors file.

    Raises:
        InputError: matrices without a partner, with several LoRA ranks, or all zero.
    """
    pairs, magnitudes = adapter_pairs(tensors, "the checkpoint"), magnitudes_of(tensors)
    rank = common_rank(pairs, "the checkpoint")
    result: dict[str, LazyTensor] = {}
    modules = []
    for projection, own in pairs.items():
        layer, target = projection_of(projection)
        for index, (part, pair) in enumerate(zip(PROJECTIONS[target], own, strict=True)):
            if not magnitudes and not any(any_element(matrix) for matrix in pair):
                continue
            # Full names: short ones could match modules of other layers.
            name = module_name(layer, part)
            modules.append(comfyui_name(name) if style == "comfyui" else name)
            a, b = (LazyTensor((matrix,)) for matrix in pair)
            result[f"{key_prefix}{modules[-1]}.lora_A.weight"] = a
            is_convolution = part == PATCH and len(a.shape) == 4
            result[f"{key_prefix}{modules[-1]}.lora_B.weight"] = LazyTensor((b,), _convolution) if is_convolution else b
            if style == "comfyui":
                result[f"{key_prefix}{modules[-1]}.alpha"] = LazyTensor((torch.tensor(float(alpha)),))
            if magnitudes:
                end, shape = _MAGNITUDE[style, is_convolution]
                vector = LazyTensor((magnitudes[projection][index],), partial(torch.reshape, shape=shape))
                result[f"{key_prefix}{modules[-1]}.{end}"] = vector
    if not result:
        raise InputError("every LoRA matrix is zero: there is nothing to write; give the adapters of a training")
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    config = {"r": rank, "lora_alpha": alpha, "target_modules": modules, "bias": "none"}
    config |= {"use_dora": True} if magnitudes else {}
    return result, {HEADER_KEY: json.dumps({key_prefix + name: value for name, value in config.items()})}


def _convolution(b: torch.Tensor) -> torch.Tensor:
    return b[:, :, None, None]


def export_lora(
    path: str | Path,
    folder: str | Path,
    *,
    style: Style = "diffusers",
    key_prefix: str | None = None,
    alpha: float | None = None,
    title: str | None = None,
) -> Path:
    """Write the adapters of a checkpoint as a diffusers LoRA file.

    Args:
        path: see `read_lora`.
        folder: to create; gets only the file.
        style: whose names and alphas: in the header for diffusers, as tensors for ComfyUI.
        key_prefix: of the names; None for that of the style.
        alpha: see `read_lora`.
        title: in the header, see `sgm.conversion.modelspec`; None for the name of the folder.

    Returns:
        The file.

    Raises:
        InputError: the adapters cannot be read, or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    prefix: str = default(key_prefix, STYLES[style])
    if prefix and not prefix.endswith("."):
        raise InputError(f"--key_prefix is '{prefix}'; end it with a dot, as in '{KEY_PREFIX}', or give ''")
    lora = read_lora(path, alpha=alpha)
    warn_without_effect(lora)
    tensors, metadata = adapters_to_diffusers(lora.tensors, alpha=lora.alpha, key_prefix=prefix, style=style)
    named: str = default(title, Path(folder).name)
    described = lora_metadata(
        lora.path, rank=lora.rank, alpha=lora.alpha, info=lora.info, title=named, implementation=style
    )
    num_pairs = sum(name.endswith(".lora_A.weight") for name in tensors)
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        write_safetensors(temporary / FILE, tensors, metadata=described | metadata)
    if style == "diffusers" and prefix != KEY_PREFIX:
        logger.warning("names begin with '%s': pipelines of diffusers take those with '%s'", prefix, KEY_PREFIX)
    said = (lora.path, TITLES[lora.kind], lora.rank, lora.alpha, num_pairs)
    logger.info("%s: %s of rank %d, alpha %g, %d pairs", *said)
    return Path(folder) / FILE
