"""Which tensor of the SAT checkpoint format is which of diffusers, both ways; no number is changed.

Names of the network stand here without the prefix ``model.diffusion_model.``; names of diffusers are those of
CogVideoXTransformer3DModel and AutoencoderKLCogVideoX. The tables are shown in docs/conversion.md.

Three things differ beside the names. SAT holds query, key and value in one matrix. Its twelve parts of a block's
modulation (shift, scale, gate of attention and of MLP for video, then the same for text) are sorted by norm in
diffusers. And its patch projection is a matrix for every patch, that of diffusers a convolution for frame patches.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch

from sgm.util import InputError
from sgm.weights.architecture import PATCH_WEIGHT, POSITION_TABLE
from sgm.weights.lazy import LazyTensor, Tensors
from sgm.weights.match import UNUSED_TABLES

NETWORK = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
    "transformer.final_layernorm": "norm_final",
}
# Of layer i: the former after "transformer.layers.i.", the latter after "transformer_blocks.i."
BLOCK = {
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
}
# Of layer i: "mixins.adaln_layer.<former>.i"
MIXIN_LISTS = {"query_layernorm_list": "attn1.norm_q", "key_layernorm_list": "attn1.norm_k"}
QKV, MODULATION = "attention.query_key_value", "adaLN_modulations"
QKV_PARTS, MODULATION_PARTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("norm1.linear", "norm2.linear")
DIFFUSERS_PATCH, DIFFUSERS_POSITIONS = "patch_embed.proj.weight", "patch_embed.pos_embedding"
# Of the twelve parts of a block's modulation: those of its first and of its second norm.
_FIRST_NORM, _SECOND_NORM = (0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)

_SAT_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
_SAT_MIXIN = re.compile(r"mixins\.adaln_layer\.(\w+?)\.(\d+)(?:\.1)?\.(weight|bias)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")


def _part(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.chunk(3)[index]


def _modulation_of(norm: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([tensor.chunk(12)[index] for index in norm])


def _join_modulation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    parts = dict(zip(_FIRST_NORM + _SECOND_NORM, [*first.chunk(6), *second.chunk(6)], strict=True))
    return torch.cat([parts[index] for index in range(12)])


def _join(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def network_to_diffusers(
    tensors: Tensors, *, patch_size: tuple[int, int, int], learned_positions: bool
) -> dict[str, LazyTensor]:
    """Translate the tensors of a network without LoRA.

    Args:
        tensors: by SAT's names; of any layers.
        patch_size: (pt, ph, pw).
        learned_positions: whether the position table is trained; diffusers computes the other one itself.

    Returns:
        The tensors of a CogVideoXTransformer3DModel. What SAT holds and never uses is left out.

    Raises:
        InputError: tensors that have no counterpart.
    """
    result: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in UNUSED_TABLES or (name == POSITION_TABLE and not learned_positions):
            continue
        if name == POSITION_TABLE:
            result[DIFFUSERS_POSITIONS] = LazyTensor((tensor,))
        elif name == PATCH_WEIGHT:
            result[DIFFUSERS_PATCH] = LazyTensor((tensor,), _patch_to_diffusers(patch_size))
        elif module in NETWORK:
            result[f"{NETWORK[module]}.{kind}"] = LazyTensor((tensor,))
        elif found := _block_to_diffusers(name, tensor):
            result |= found
        else:
            unknown.append(name)
    _refuse(unknown, "diffusers")
    return result


def _block_to_diffusers(name: str, tensor: torch.Tensor | LazyTensor) -> dict[str, LazyTensor]:
    """Translate a tensor of one layer; empty where it is none."""
    if match := _SAT_LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        if part == QKV:
            targets = {to: _part(index) for index, to in enumerate(QKV_PARTS)}
            return _named(layer, kind, {to: LazyTensor((tensor,), make) for to, make in targets.items()})
        return _named(layer, kind, {BLOCK[part]: LazyTensor((tensor,))} if part in BLOCK else {})
    if match := _SAT_MIXIN.fullmatch(name):
        part, layer, kind = match.groups()
        if part == MODULATION:
            targets = dict(zip(MODULATION_PARTS, map(_modulation_of, (_FIRST_NORM, _SECOND_NORM)), strict=True))
            return _named(layer, kind, {to: LazyTensor((tensor,), make) for to, make in targets.items()})
        return _named(layer, kind, {MIXIN_LISTS[part]: LazyTensor((tensor,))} if part in MIXIN_LISTS else {})
    return {}


def _named(layer: str, kind: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {f"transformer_blocks.{layer}.{module}.{kind}": tensor for module, tensor in tensors.items()}


def _patch_to_diffusers(patch_size: tuple[int, int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    pt, height, width = patch_size
    if pt > 1:
        return lambda tensor: tensor.flatten(1)
    return lambda tensor: tensor.flatten(1).unflatten(1, (-1, height, width))


def network_from_diffusers(tensors: Tensors) -> dict[str, LazyTensor]:
    """Translate the tensors of a CogVideoXTransformer3DModel without LoRA; see `network_to_diffusers`.

    The patch projection keeps its shape: that of diffusers is the released one of either generation.

    Raises:
        InputError: tensors that have no counterpart, or a query, key, value or norm without its partners.
    """
    modules = {theirs: ours for ours, theirs in NETWORK.items()}
    blocks = {theirs: ours for ours, theirs in BLOCK.items()}
    lists = {theirs: ours for ours, theirs in MIXIN_LISTS.items()}
    result: dict[str, LazyTensor] = {}
    unknown, done = [], set()
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        match = _DIFFUSERS_BLOCK.fullmatch(name)
        if name == DIFFUSERS_POSITIONS:
            result[POSITION_TABLE] = LazyTensor((tensor,))
        elif module in modules:
            result[f"{modules[module]}.{kind}"] = LazyTensor((tensor,))
        elif match is None:
            unknown.append(name)
        elif (part := match[2]) in blocks:
            result[f"transformer.layers.{match[1]}.{blocks[part]}.{kind}"] = LazyTensor((tensor,))
        elif part in lists:
            result[f"mixins.adaln_layer.{lists[part]}.{match[1]}.{kind}"] = LazyTensor((tensor,))
        elif part in QKV_PARTS + MODULATION_PARTS:
            group = QKV_PARTS if part in QKV_PARTS else MODULATION_PARTS
            ours = f"transformer.layers.{match[1]}.{QKV}" if part in QKV_PARTS else _modulation(match[1])
            if (ours, kind) not in done:
                done.add((ours, kind))
                names = [f"transformer_blocks.{match[1]}.{each}.{kind}" for each in group]
                result[f"{ours}.{kind}"] = LazyTensor(
                    _together(tensors, names), _join if part in QKV_PARTS else _join_modulation
                )
        else:
            unknown.append(name)
    _refuse(unknown, "SAT")
    return result


def _modulation(layer: str) -> str:
    return f"mixins.adaln_layer.{MODULATION}.{layer}.1"


def _together(tensors: Tensors, names: Iterable[str]) -> tuple[torch.Tensor | LazyTensor, ...]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"the transformer lacks {', '.join(missing)}; copy or download its files again")
    return tuple(tensors[name] for name in names)


def _refuse(unknown: list[str], layout: str) -> None:
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise InputError(
            f"these tensors of the transformer have no counterpart in {layout}: {shown}; only CogVideoX transformers "
            "are converted, with adapters merged or in a file of their own"
        )


_VAE = (
    (".downsample.conv.", ".downsamplers.0.conv."),
    (".upsample.conv.", ".upsamplers.0.conv."),
    (".nin_shortcut.", ".conv_shortcut."),
)


def autoencoder_to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return the name in an AutoencoderKLCogVideoX of each tensor of our autoencoder."""
    names = list(names)
    last = _last_level(names, r"decoder\.up\.(\d+)\.")
    result = {}
    for ours in names:
        # Levels of the decoder are counted from full resolution here and from the latents there.
        name = re.sub(r"decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{last - int(m[1])}.", ours)
        name = re.sub(r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
        name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
        for former, latter in _VAE:
            name = name.replace(former, latter)
        result[ours] = name
    return result


def autoencoder_from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return the name in our autoencoder of each tensor of an AutoencoderKLCogVideoX."""
    names = list(names)
    last = _last_level(names, r"decoder\.up_blocks\.(\d+)\.")
    result = {}
    for theirs in names:
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{last - int(m[1])}.", theirs)
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)
        name = re.sub(r"\.mid_block\.resnets\.([01])\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
        name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
        for former, latter in _VAE:
            name = name.replace(latter, former)
        result[theirs] = name
    return result


def _last_level(names: Iterable[str], pattern: str) -> int:
    levels = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    if not levels:
        raise InputError(
            "there is no decoder among the tensors of the autoencoder; give the released 3d-vae.pt, or the vae folder"
        )
    return max(levels)
