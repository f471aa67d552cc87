"""Export LoRA adapters to CogKit, whose files say neither rank nor alpha.

Its loader (``cogkit.utils.lora``, as of May 2025) gives the projections of attention of all blocks adapters of rank 128
and alpha 64, and fills them from the file ``adapter_model.safetensors``, whose names have no prefix. Adapters of a
smaller rank get rows and columns of zeros here, and B the ratio of both scales.
"""

import json
from functools import partial
from pathlib import Path

import torch

from sgm.conversion.lora import adapters_to_diffusers
from sgm.conversion.modelspec import default_title, lora_metadata
from sgm.conversion.writing import check_new_folder, new_folder, total_bytes
from sgm.log import get_logger
from sgm.util import InputError, default
from sgm.weights.checksums import write_safetensors
from sgm.weights.lazy import LazyTensor
from sgm.weights.lora.files import read_lora, warn_without_effect
from sgm.weights.lora.names import HEADER_KEY

logger = get_logger(__name__)

FILE = "adapter_model.safetensors"
RANK, ALPHA = 128, 64
MODULES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")


def export_cogkit_lora(
    path: str | Path, folder: str | Path, *, alpha: float | None = None, title: str | None = None
) -> Path:
    """Write the adapters of a checkpoint as CogKit reads them.

    Args:
        path: see `read_lora`.
        folder: to create; gets only the file.
        alpha: see `read_lora`.
        title: in the header, see `sgm.conversion.modelspec`; None for that of the weights.

    Returns:
        The file.

    Raises:
        InputError: the adapters cannot be read, or are of a kind, rank or module that CogKit does not load; or the
            folder exists or cannot be written to.
    """
    check_new_folder(folder)
    lora = read_lora(path, alpha=alpha)
    warn_without_effect(lora)
    if lora.kind == "lokr":
        raise InputError(
            f"{lora.path} is LoKr, and CogKit loads LoRA alone; merge it into the model "
            "(tools/merge_lora_weight.py), or write the file of other tools with --style comfyui or kohya"
        )
    given, _ = adapters_to_diffusers(lora.tensors, alpha=lora.alpha, key_prefix="")
    cure = "export it for diffusers (--style diffusers)"
    if lora.rank > RANK:
        raise InputError(f"{lora.path} is of rank {lora.rank}, and CogKit loads {RANK} at most; {cure}")
    scale = lora.alpha / lora.rank / (ALPHA / RANK)
    kinds = {".lora_A.weight": _rows, ".lora_B.weight": partial(_columns, factor=scale)}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in given.items():
        kind = next((kind for kind in kinds if name.endswith(kind)), "")
        if not kind or not name.removesuffix(kind).endswith(MODULES):
            loaded = ", ".join(module.removeprefix("attn1.") for module in MODULES)
            raise InputError(f"{lora.path} has {name}, and CogKit loads LoRA of {loaded} alone; {cure}")
        tensors[name] = LazyTensor((tensor,), kinds[kind])
    named: str = default(title, default_title(lora.path))
    described = lora_metadata(
        lora.path, rank=RANK, alpha=ALPHA, info=lora.info, title=named, implementation="diffusers"
    )
    config = {HEADER_KEY: json.dumps({"r": RANK, "lora_alpha": ALPHA})}  # for importing it again
    with new_folder(folder, need_bytes=total_bytes(tensors)) as temporary:
        write_safetensors(temporary / FILE, tensors, metadata={"format": "pt"} | described | config)
    text = "%s: LoRA of rank %d, alpha %g, written with rank %d, alpha %d"
    logger.info(text, lora.path, lora.rank, lora.alpha, RANK, ALPHA)
    return Path(folder) / FILE


def _rows(a: torch.Tensor) -> torch.Tensor:
    """Add zeros to A [r, D], to [RANK, D]."""
    return torch.cat((a, a.new_zeros(RANK - a.shape[0], a.shape[1])))


def _columns(b: torch.Tensor, *, factor: float) -> torch.Tensor:
    """Scale B [D, r] in float32, and add zeros, to [D, RANK]."""
    scaled = (b.float() * factor).to(b.dtype)
    return torch.cat((scaled, b.new_zeros(b.shape[0], RANK - b.shape[1])), dim=1)
