"""Translate tensor names between the SAT checkpoint format and diffusers, both ways; values are unchanged.

Names of the network are without the prefix ``model.diffusion_model.``; names of diffusers are those of
CogVideoXTransformer3DModel and AutoencoderKLCogVideoX. docs/conversion.md shows the tables.

Three layouts also differ. SAT fuses query, key and value in one matrix. The twelve chunks of a block's modulation
(shift, scale, gate of attention and of MLP for video, then the same for text) are ordered by norm in diffusers. The
patch projection is a matrix in SAT, and a convolution in diffusers if the temporal patch is 1; the columns of a control
are a matrix of their own in SAT.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import torch

from sgm.util import InputError
from sgm.weights.architecture import CONTROL_WEIGHT, PATCH_WEIGHT, POSITION_TABLE
from sgm.weights.checkpoint import released_patch
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.lora.names import MODULATION, NORM_CHUNKS, OUTPUT, QKV_PARTS
from sgm.weights.match import UNUSED_TABLES

QKV = "transformer.layers.{}.attention.query_key_value"
_BLOCK = "transformer_blocks.{}."
# SAT modules → diffusers modules; {} is the layer.
MODULES = {
    "time_embed.0": ("time_embedding.linear_1",),
    "time_embed.2": ("time_embedding.linear_2",),
    "ofs_embed.0": ("ofs_embedding.linear_1",),
    "ofs_embed.2": ("ofs_embedding.linear_2",),
    "mixins.patch_embed.proj": ("patch_embed.proj",),
    "mixins.patch_embed.text_proj": ("patch_embed.text_proj",),
    "mixins.final_layer.norm_final": ("norm_out.norm",),
    "mixins.final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "mixins.final_layer.linear": ("proj_out",),
    "transformer.final_layernorm": ("norm_final",),
    "transformer.layers.{}.input_layernorm": (_BLOCK + "norm1.norm",),
    "transformer.layers.{}.post_attention_layernorm": (_BLOCK + "norm2.norm",),
    QKV: tuple(_BLOCK + part for part in QKV_PARTS),
    "transformer.layers.{}.attention.dense": (_BLOCK + OUTPUT,),
    "transformer.layers.{}.mlp.dense_h_to_4h": (_BLOCK + "ff.net.0.proj",),
    "transformer.layers.{}.mlp.dense_4h_to_h": (_BLOCK + "ff.net.2",),
    "mixins.adaln_layer.query_layernorm_list.{}": (_BLOCK + "attn1.norm_q",),
    "mixins.adaln_layer.key_layernorm_list.{}": (_BLOCK + "attn1.norm_k",),
    MODULATION: (_BLOCK + "norm1.linear", _BLOCK + "norm2.linear"),
}
DIFFUSERS_PATCH, _DIFFUSERS_POSITIONS = "patch_embed.proj.weight", "patch_embed.pos_embedding"
_LAYER = re.compile(r"(transformer\.layers|mixins\.adaln_layer\.\w+|transformer_blocks)\.(\d+)\b")


def _split(ours: str, index: int, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor of the module at `index` in `MODULES` from the tensor of our module."""
    if ours == MODULATION:
        return torch.cat([tensor.chunk(12)[chunk] for chunk in NORM_CHUNKS[index]])
    return tensor.chunk(len(MODULES[ours]))[index]


def _join(ours: str, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the tensor of our module from those in `MODULES`."""
    if ours != MODULATION:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    first, second = tensors
    chunks = dict(zip(NORM_CHUNKS[0] + NORM_CHUNKS[1], [*first.chunk(6), *second.chunk(6)], strict=True))
    return torch.cat([chunks[index] for index in range(12)])


def _whole_patch(patch_size: tuple[int, int, int], *parts: torch.Tensor) -> torch.Tensor:
    """Return the patch projection with the columns of a control last; in both layouts channels come first."""
    return released_patch(patch_size, torch.cat([part.flatten(1) for part in parts], dim=1))


def _parse(name: str) -> tuple[str, str, str]:
    """Return module with {} for the layer, layer, and kind (weight or bias)."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return name, "", ""
    match = _LAYER.match(module)
    return (module, "", kind) if match is None else (f"{match[1]}.{{}}{module[match.end() :]}", match[2], kind)


def network_to_diffusers(
    tensors: Tensors, *, patch_size: tuple[int, int, int], learned_positions: bool
) -> dict[str, LazyTensor]:
    """Translate the tensors of a network without LoRA.

    Args:
        tensors: by SAT's names, of any layers.
        patch_size: (pt, ph, pw).
        learned_positions: whether the position table is trained; diffusers computes untrained ones.

    Returns:
        The tensors of a CogVideoXTransformer3DModel, without SAT's unused tables.

    Raises:
        InputError: tensors that have no counterpart.
    """
    result: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, layer, kind = _parse(name)
        if name == POSITION_TABLE:
            if learned_positions:
                result[_DIFFUSERS_POSITIONS] = LazyTensor((tensor,))
        elif name == PATCH_WEIGHT:
            parts = (tensor, tensors[CONTROL_WEIGHT]) if CONTROL_WEIGHT in tensors else (tensor,)
            result[DIFFUSERS_PATCH] = LazyTensor(parts, partial(_whole_patch, patch_size))
        elif module in MODULES:
            for index, theirs in enumerate(MODULES[module]):
                make: Callable[..., torch.Tensor] = partial(_split, module, index)
                result[f"{theirs.format(layer)}.{kind}"] = LazyTensor((tensor,), make)
        elif name not in (*UNUSED_TABLES, CONTROL_WEIGHT):
            unknown.append(name)
    _refuse(unknown, "diffusers")
    return result


def network_from_diffusers(tensors: Tensors) -> dict[str, LazyTensor]:
    """Translate the tensors of a CogVideoXTransformer3DModel without LoRA; see `network_to_diffusers`.

    The patch projection keeps its shape (as in released SAT files).

    Raises:
        InputError: tensors that have no counterpart, or a query, key, value or norm without its partners.
    """
    modules = {theirs: ours for ours, parts in MODULES.items() for theirs in parts}
    result: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, layer, kind = _parse(name)
        if name == _DIFFUSERS_POSITIONS:
            result[POSITION_TABLE] = LazyTensor((tensor,))
        elif module in modules:
            ours = modules[module]
            names = [f"{theirs.format(layer)}.{kind}" for theirs in MODULES[ours]]
            if missing := [each for each in names if each not in tensors]:
                raise InputError(f"the transformer lacks {', '.join(missing)}; copy or download its files again")
            result[f"{ours.format(layer)}.{kind}"] = LazyTensor(
                tuple(tensors[each] for each in names), partial(_join, ours)
            )
        else:
            unknown.append(name)
    _refuse(unknown, "SAT")
    return result


def _refuse(unknown: list[str], layout: str) -> None:
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise InputError(
            f"these tensors of the transformer have no counterpart in {layout}: {shown}; only CogVideoX transformers "
            "are converted, with adapters merged or in a file of their own"
        )


# Our names, diffusers names, index offset; None counts levels from the other end.
_VAE = (
    ("decoder.up.{}.", "decoder.up_blocks.{}.", None),
    ("encoder.down.{}.", "encoder.down_blocks.{}.", 0),
    (".mid.block_{}.", ".mid_block.resnets.{}.", -1),
    (".block.{}.", ".resnets.{}.", 0),
    (".downsample.conv.", ".downsamplers.0.conv.", 0),
    (".upsample.conv.", ".upsamplers.0.conv.", 0),
    (".nin_shortcut.", ".conv_shortcut.", 0),
)


def autoencoder_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return the name in an AutoencoderKLCogVideoX of each tensor of our autoencoder."""
    return _rename_autoencoder(names, _VAE)


def autoencoder_from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return the name in our autoencoder of each tensor of an AutoencoderKLCogVideoX."""
    inverse = [(theirs, ours, None if offset is None else -offset) for ours, theirs, offset in _VAE]
    return _rename_autoencoder(names, inverse)


def _rename_autoencoder(names: Iterable[str], rules: Iterable[tuple[str, str, int | None]]) -> dict[str, str]:
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new, offset) for old, new, offset in rules]
    result = {name: name for name in names}
    levels = [int(match[1]) for name in result if (match := patterns[0][0].match(name))]
    if not levels:
        raise InputError(
            "there is no decoder among the tensors of the autoencoder; give the released 3d-vae.pt, or the vae folder"
        )

    def renamed(match: re.Match[str], new: str, offset: int | None) -> str:
        return new.format(*(max(levels) - int(n) if offset is None else int(n) + offset for n in match.groups()))

    for name in result:
        for pattern, new, offset in patterns:
            result[name] = pattern.sub(partial(renamed, new=new, offset=offset), result[name])
    return result
