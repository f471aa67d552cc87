"""Export LoRA adapters of SAT checkpoints to diffusers.

The method and the names in SAT are described in sgm.weights.adapters. SAT adapts the fused query-key-value matrix by
three pairs; diffusers adapts its three modules by one pair each. Pairs map one to one, with equal values::

    transformer.layers.<i>.attention.query_key_value.matrix_{A,B}.<0, 1, 2>     A [r, D], B [D, r]
    transformer_blocks.<i>.attn1.{to_q, to_k, to_v}.lora_{A,B}.weight
    transformer.layers.<i>.attention.dense.matrix_{A,B}.0
    transformer_blocks.<i>.attn1.to_out.0.lora_{A,B}.weight

Those of other projections map likewise (`sgm.weights.lora.names.GROUPS`); patches of one frame are a convolution. The
magnitudes of DoRA are ``lora_magnitude_vector`` for diffusers, and ``dora_scale`` for others. LoKr, which diffusers
does not load, has its own names in files for ComfyUI and in those of kohya's scripts and LyCORIS. Names of the
network are without the prefix ``model.diffusion_model.``. For the other direction see `sgm.conversion.lora_import`, for
merging `sgm.conversion.lora_merge`.
"""

import json
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sgm.conversion.modelspec import default_title, lora_metadata
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.adapters import TITLES, adapter_pairs, kind_of
from sgm.weights.checksums import write_safetensors
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.lora.files import any_element, common_rank, read_lora, warn_without_effect
from sgm.weights.lora.lokr import W1, W2, in_parts
from sgm.weights.lora.merging import magnitudes_of
from sgm.weights.lora.names import FILE, HEADER_KEY, PATCH, PROJECTIONS, comfyui_name, module_name, projection_of

logger = get_logger(__name__)

KEY_PREFIX = "transformer."  # prefix of names in diffusers pipelines
Style = Literal["diffusers", "comfyui", "kohya"]
# Ends of the names, and shapes, of magnitudes: of a style, and whether of a convolution.
_MAGNITUDE: dict[tuple[Style, bool], tuple[str, tuple[int, ...]]] = {
    ("diffusers", False): ("lora_magnitude_vector", (-1,)),
    ("diffusers", True): ("lora_magnitude_vector", (1, -1, 1, 1)),
    ("comfyui", False): ("dora_scale", (-1, 1)),
    ("comfyui", True): ("dora_scale", (-1, 1, 1, 1)),
    ("kohya", False): ("dora_scale", (-1, 1)),
    ("kohya", True): ("dora_scale", (-1, 1, 1, 1)),
}
STYLES: dict[Style, str] = {  # prefixes of names
    "diffusers": KEY_PREFIX,
    "comfyui": "diffusion_model.",
    "kohya": "lora_unet_",
}


def adapters_to_diffusers(
    tensors: Tensors,
    *,
    alpha: float,
    rank: int | None = None,
    key_prefix: str = KEY_PREFIX,
    style: Style = "diffusers",
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Translate LoRA adapters to the names and header that ``load_lora_weights`` of diffusers reads.

    All-zero pairs of LoRA are skipped: `sgm.conversion.lora_import` adds them for modules without adapters.

    Args:
        tensors: including the LoRA matrices, and the magnitudes of DoRA.
        alpha: numerator of the scale.
        rank: r of LoKr, whose matrices do not tell it.
        key_prefix: of the names, also in the header.
        style: ``"comfyui"`` names modules as its own model, ``"kohya"`` with ``_`` for dots. Both have a tensor
            ``<module>.alpha`` for each module, which is read instead of the header.

    Returns:
        The tensors, and the metadata for the header of their safetensors file.

    Raises:
        InputError: matrices without a partner, with several LoRA ranks, or all zero; or LoKr for diffusers.
    """
    if kind_of(tensors) == "lokr":
        assert rank is not None, "the caller gives the rank of LoKr"
        return _kronecker_tensors(tensors, alpha=alpha, rank=rank, key_prefix=key_prefix, style=style), {}
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
            modules.append(_module(style, layer, part))
            a, b = (LazyTensor((matrix,)) for matrix in pair)
            down, up = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
            result[f"{key_prefix}{modules[-1]}.{down}.weight"] = a
            is_convolution = part == PATCH and len(a.shape) == 4
            result[f"{key_prefix}{modules[-1]}.{up}.weight"] = LazyTensor((b,), _convolution) if is_convolution else b
            if style != "diffusers":
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
    header = {HEADER_KEY: json.dumps({key_prefix + name: value for name, value in config.items()})}
    return result, {} if style == "kohya" else header


def _module(style: Style, layer: int | None, part: str) -> str:
    name = module_name(layer, part)
    return comfyui_name(name) if style == "comfyui" else name.replace(".", "_") if style == "kohya" else name


def _kronecker_tensors(
    tensors: Tensors, *, alpha: float, rank: int, key_prefix: str, style: Style
) -> dict[str, LazyTensor]:
    """Return the matrices of LoKr by the names of LyCORIS, with an alpha for each module.

    The scale alpha / rank is only read where a matrix has the rank. Where w2 is whole, it is multiplied into w1.
    """
    if style == "diffusers":
        raise InputError(
            "the adapters are LoKr, which diffusers cannot load as a LoRA of CogVideoX: merge them into the model "
            "(tools/merge_lora_weight.py, then tools/convert_weight_sat2hf.py), or write the file of other tools with "
            "--style comfyui or kohya of tools/export_sat_lora_weight.py"
        )
    result: dict[str, LazyTensor] = {}
    for projection, parts in in_parts(tensors).items():
        layer, target = projection_of(projection)
        for part, own in zip(PROJECTIONS[target], parts, strict=True):
            if not any(any_element(matrix) for kind, matrix in own.items() if kind != W1):
                continue
            name = f"{key_prefix}{_module(style, layer, part)}"
            result |= {f"{name}.{kind}": LazyTensor((matrix,)) for kind, matrix in own.items()}
            if W2 in own and alpha != rank:
                result[f"{name}.{W1}"] = LazyTensor((own[W1],), partial(torch.mul, other=alpha / rank))
            result[f"{name}.alpha"] = LazyTensor((torch.tensor(float(alpha)),))
    if not result:
        raise InputError("every w2 of the LoKr is zero: there is nothing to write; give the adapters of a training")
    return result


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
        style: whose names and alphas: in the header for diffusers, as tensors for the others.
        key_prefix: of the names; None for that of the style.
        alpha: see `read_lora`.
        title: in the header, see `sgm.conversion.modelspec`; None for that of the weights.

    Returns:
        The file.

    Raises:
        InputError: the adapters cannot be read, or the folder exists or cannot be written to.
    """
    check_new_folder(folder)
    prefix: str = default(key_prefix, STYLES[style])
    end, said = ("_", "an underscore") if style == "kohya" else (".", "a dot")
    if prefix and not prefix.endswith(end):
        raise InputError(f"--key_prefix is '{prefix}'; end it with {said}, as in '{STYLES[style]}', or give ''")
    lora = read_lora(path, alpha=alpha)
    warn_without_effect(lora)
    tensors, metadata = adapters_to_diffusers(
        lora.tensors, alpha=lora.alpha, rank=lora.rank, key_prefix=prefix, style=style
    )
    named: str = default(title, default_title(lora.path))
    described = lora_metadata(
        lora.path, rank=lora.rank, alpha=lora.alpha, info=lora.info, title=named, implementation=style
    )
    num_modules = sum(name.endswith((".lora_A.weight", ".lora_down.weight", f".{W1}")) for name in tensors)
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        write_safetensors(temporary / FILE, tensors, metadata=described | metadata)
    if style == "diffusers" and prefix != KEY_PREFIX:
        logger.warning("names begin with '%s': pipelines of diffusers take those with '%s'", prefix, KEY_PREFIX)
    said = (lora.path, TITLES[lora.kind], lora.rank, lora.alpha, num_modules)
    logger.info("%s: %s of rank %d, alpha %g, %d modules", *said)
    return Path(folder) / FILE
