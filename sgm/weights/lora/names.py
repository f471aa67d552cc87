"""Names of LoRA tensors as training tools write them, brought to one form.

All adapt modules of a CogVideoXTransformer3DModel, ``transformer_blocks.<i>.<module>`` or ``patch_embed.<module>``:

| written by | names |
|---|---|
| diffusers, finetrainers | ``transformer.<...>.lora_A.weight``; formerly ``lora.down.weight``, ``_lora.down.weight`` |
| PEFT | ``base_model.model.<...>.lora_A.<adapter>.weight``, with any name of the adapter |
| ComfyUI | ``diffusion_model.<...>.lora_A.weight``, with ``<...>.alpha``; or ``diffusion_model.blocks.<i>.q<...>`` |
| kohya's scripts, VideoX-Fun | ``lora_unet_<...>.lora_down.weight``, with ``_`` for dots, and ``<...>.alpha`` |
| wrappers (DDP, compile, FSDP, checkpointing) | any of these with ``module.``, ``_orig_mod.`` and the like, anywhere |

DoRA adds a magnitude for each output: ``<...>.lora_magnitude_vector`` in PEFT and diffusers, ``<...>.dora_scale`` in
kohya's scripts, LyCORIS and ComfyUI. The matrices of LoKr are ``<...>.lokr_w1``, ``lokr_w2``, ``lokr_w2_a`` and so on
in all of them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sgm.util import InputError

QKV_PARTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
OUTPUT = "attn1.to_out.0"
PARTS = (*QKV_PARTS, OUTPUT)  # modules that SAT's own adapters are on
MODULATION = "mixins.adaln_layer.adaLN_modulations.{}.1"
PATCH = "patch_embed.proj"
# What ``lora_config.params.targets`` names → projections in SAT, {} the layer → modules in diffusers, one per pair.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {
        "transformer.layers.{}.attention.query_key_value": QKV_PARTS,
        "transformer.layers.{}.attention.dense": (OUTPUT,),
    },
    "ff": {
        "transformer.layers.{}.mlp.dense_h_to_4h": ("ff.net.0.proj",),
        "transformer.layers.{}.mlp.dense_4h_to_h": ("ff.net.2",),
    },
    "adaln": {MODULATION: ("norm1.linear", "norm2.linear")},
    "patch": {"mixins.patch_embed.proj": (PATCH,)},
    "text": {"mixins.patch_embed.text_proj": ("patch_embed.text_proj",)},
}
IN_LAYERS = ("attention", "ff", "adaln")  # the others are once in a network
PROJECTIONS = {projection: parts for group in GROUPS.values() for projection, parts in group.items()}
MODULES = tuple(part for parts in PROJECTIONS.values() for part in parts)
# Chunks of a block's modulation, of twelve, that the first and the second pair adapt: those of the norms of diffusers.
NORM_CHUNKS = ((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11))
# Modules of a block → those of ComfyUI's own model, whose blocks are ``blocks.<i>``; others have the same names.
COMFYUI = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    OUTPUT: "attn_out",
    "attn1.norm_q": "norm_q",
    "attn1.norm_k": "norm_k",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
_PLACES = {part: (name, index) for name, parts in PROJECTIONS.items() for index, part in enumerate(parts)}
_GROUP_OF = {projection: group for group, own in GROUPS.items() for projection in own}
LAYER = re.compile(r"(?:(?:^|\.)layers|\.adaLN_modulations)\.(\d+)\.")
FILE = "pytorch_lora_weights.safetensors"  # file name that diffusers looks for
BASE, BASE_DIGEST = "ss_sd_model_name", "base_digest"  # in the header: what the adapters were trained on
HEADER_KEY = "lora_adapter_metadata"  # rank and alpha as JSON in the header, as diffusers writes them
Side = Literal["A", "B", "alpha", "magnitude", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]
# Tensors of an adapter by SAT's names: projection, kind and number of the pair.
ADAPTER = re.compile(r"(.+)\.(matrix_A|matrix_B|magnitude|lokr_w1|lokr_w2|lokr_w2_a|lokr_w2_b)\.(\d+)")
_KINDS = {"A": "matrix_A", "B": "matrix_B", "magnitude": "magnitude"}

# What wrapping leaves between the parts of a name; "module" also in front.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_PREFIX = re.compile(r"^(?:(?:base_model|model|transformer|diffusion_model|unet|pipe|dit|network|lora)\.)*")
_FLAT_PREFIX = re.compile(r"^(?:lora|lycoris)_(?:(?:unet|transformer(?!_blocks)|dit|model)_+)*")
_MODULES = {part.replace(".", "_"): part for part in MODULES} | {OUTPUT.removesuffix(".0"): OUTPUT}
_OF_COMFYUI = {theirs: part for part, theirs in COMFYUI.items()}
_BLOCK = re.compile(r"(?:(transformer_)?blocks[._](\d+)[._])?(.+)")
_TENSOR = re.compile(r"transformer_blocks\.(\d+)\.(.+?)(\.weight|\.bias)?")
_ENDS: dict[str, Side] = {"lora_A": "A", "lora_B": "B", "down": "A", "up": "B"}
_ENDS |= {"alpha": "alpha", "lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}
_ENDS |= {"lokr_w1": "lokr_w1", "lokr_w1_a": "lokr_w1_a", "lokr_w1_b": "lokr_w1_b"}
_ENDS |= {"lokr_w2": "lokr_w2", "lokr_w2_a": "lokr_w2_a", "lokr_w2_b": "lokr_w2_b"}
_END = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.(?P<side>lora_A|lora_B)(?:\.(?:.+\.)?weight)?"
    r"|(?:\.lora[._]|_lora\.|\.lora_linear_layer\.)(?P<old>down|up)(?:\.(?:.+\.)?weight)?"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.(?:.+\.)?weight)?"
    r"|\.(?P<lokr>lokr_w[12](?:_[ab])?)"
    r"|\.(?P<one>alpha|dora_scale))"
)
_METHODS = {
    **{
        pattern: f"it is {method}, and there are LoRA, DoRA and LoKr only; train one of them"
        for pattern, method in {
            r"\.hada_": "LoHa",
            r"\.b?oft_": "OFT",
            r"\.ia3_l": "(IA)³",
            r"\.vera_lambda": "VeRA",
            r"\.[wb]_norm$": "a trained norm of LyCORIS",
        }.items()
    },
    r"\.lokr_t2": "it is the middle of a convolution's LoKr, which is not supported; train without use_tucker",
    r"\.lora_mid": "it is the middle of a convolution's LoRA, which is not supported; train plain LoRA",
    r"lora_embedding_": "it adapts a table of embeddings, and there is none; train without it",
    r"modules_to_save|\.diff(_b)?$": "it holds trained weights besides LoRA; merge them into the base with their tool",
    r"\.bias$": "it is a bias, which SAT's LoRA has not; train with bias 'none'",
    r"^lora_te|text_encoder|encoder\.block": "it adapts a text encoder, which is not trained here; train without it",
    r"matrix_[AB]\.": "it has a name of SAT: the file needs no import; args.load takes it",
}


@dataclass(frozen=True)
class LoraName:
    """What a tensor is: a matrix, the alpha or the magnitudes of a module in a block, or outside (layer None)."""

    layer: int | None
    module: str
    side: Side


def sat_name(layer: int | None, part: str, kind: str) -> str:
    """Return SAT's name of the matrix "A" or "B", the "magnitude", or "lokr_w1" and so on, of a module in `MODULES`."""
    projection, index = _PLACES[part]
    return f"{projection.format(layer)}.{_KINDS.get(kind, kind)}.{index}"


def starts_at_zero(name: str) -> bool:
    """Whether a tensor of an adapter is zero before training, so that the adapter has no effect, by its name."""
    match = ADAPTER.fullmatch(name)
    return match is not None and match[2] in ("matrix_B", "lokr_w2", "lokr_w2_b")


def part_of(name: str) -> str:
    """Return the module in `MODULES` of a tensor of an adapter by SAT's name."""
    match = ADAPTER.fullmatch(name)
    assert match is not None, "the caller looked for adapters"
    return PROJECTIONS[projection_of(match[1])[1]][int(match[3])]


def module_name(layer: int | None, part: str) -> str:
    """Return the name of a module in diffusers."""
    return part if layer is None else f"transformer_blocks.{layer}.{part}"


def comfyui_name(name: str) -> str:
    """Return the name in ComfyUI's own model of a module or tensor of diffusers."""
    if match := _TENSOR.fullmatch(name):
        return f"blocks.{match[1]}.{COMFYUI.get(match[2], match[2])}{match[3] or ''}"
    return re.sub(r"^(time|ofs)_embedding\.", r"\1_embedding_", name)


def is_comfyui(names: Iterable[str]) -> bool:
    """Whether tensors of a transformer have the names of ComfyUI's own model."""
    return any(re.fullmatch(r"(model\.diffusion_model\.)?blocks\.\d+\.ff_proj\.weight", name) for name in names)


def diffusers_name(name: str) -> str:
    """Return the name in diffusers of a tensor of ComfyUI's own model."""
    name = name.removeprefix("model.diffusion_model.")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)(\.weight|\.bias)", name):
        return f"transformer_blocks.{match[1]}.{_OF_COMFYUI.get(match[2], match[2])}{match[3]}"
    return re.sub(r"^(time|ofs)_embedding_linear", r"\1_embedding.linear", name)


def projection_of(name: str) -> tuple[int | None, str]:
    """Return the layer of an adapted projection of SAT, and its name in `PROJECTIONS`.

    Raises:
        InputError: there are no adapters on it.
    """
    match = LAYER.search(f"{name}.")
    projection = name if match is None else f"{name[: match.start(1)]}{{}}{name[match.end(1) :]}"
    if projection not in PROJECTIONS:
        known = ", ".join(each.rpartition("{}.")[2] for each in PROJECTIONS)
        raise InputError(f"there are adapters on {name}; only those on {known} can be used")
    return None if match is None else int(match[1]), projection


def groups_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the groups of projections with adapters, by the names of their tensors, in the order of `GROUPS`."""
    projections = {match[1] for name in names if (match := ADAPTER.fullmatch(name))}
    found = {_GROUP_OF[projection_of(name)[1]] for name in projections}
    return tuple(group for group in GROUPS if group in found)


def places_of(layers: Iterable[int], groups: Iterable[str]) -> list[tuple[int | None, str]]:
    """Return layer and module of all adapters of `groups` on `layers`: the network has each of them, or none."""
    layers = tuple(layers)
    return [
        (layer, part)
        for group in groups
        for layer in (layers if group in IN_LAYERS else (None,))
        for parts in GROUPS[group].values()
        for part in parts
    ]


def parse_lora_name(name: str) -> LoraName | str:
    """Return what the tensor `name` is, or the reason why it cannot be taken."""
    for pattern, reason in _METHODS.items():
        if re.search(pattern, name):
            return reason
    plain = _WRAPPERS.sub("", name)
    end = _END.fullmatch(plain)
    if end is None:
        return "it is no matrix or alpha of a LoRA; expected e.g. transformer_blocks.0.attn1.to_q.lora_A.weight"
    path = end["module"]
    block = _BLOCK.fullmatch(_FLAT_PREFIX.sub("", _PREFIX.sub("", path, count=1), count=1))
    layer, module = (None, "") if block is None else (block[2], block[3].replace(".processor.", "."))
    known = _MODULES if block is None or block[1] else {**_MODULES, **_OF_COMFYUI}
    module = known.get(module, module)
    if (layer is None) != module.startswith("patch_embed"):
        return "it is on no transformer_blocks.<i> of a CogVideoX transformer, but on another part or another model"
    side = _ENDS[end["side"] or end["old"] or end["magnitude"] or end["lokr"] or end["one"]]
    return LoraName(None if layer is None else int(layer), module, side)
