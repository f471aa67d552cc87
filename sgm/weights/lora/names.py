"""Names of LoRA tensors as training tools write them, brought to one form.

All adapt modules of a CogVideoXTransformer3DModel, ``transformer_blocks.<i>.<module>``:

| written by | names |
|---|---|
| diffusers, finetrainers | ``transformer.<...>.lora_A.weight``; formerly ``lora.down.weight``, ``_lora.down.weight`` |
| PEFT | ``base_model.model.<...>.lora_A.<adapter>.weight``, with any name of the adapter |
| ComfyUI | ``diffusion_model.<...>.lora_A.weight``, with ``<...>.alpha`` |
| kohya's scripts, VideoX-Fun | ``lora_unet_<...>.lora_down.weight``, with ``_`` for dots, and ``<...>.alpha`` |
| wrappers (DDP, compile, FSDP, checkpointing) | any of these with ``module.``, ``_orig_mod.`` and the like, anywhere |
"""

import re
from dataclasses import dataclass
from typing import Literal

QKV_PARTS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
OUTPUT = "attn1.to_out.0"
PARTS = (*QKV_PARTS, OUTPUT)  # modules that SAT adapts
# Adapted projections of a SAT layer → modules of a diffusers block, one per pair, in order.
TARGETS = {"attention.query_key_value": QKV_PARTS, "attention.dense": (OUTPUT,)}
_PLACES = {part: (target, index) for target, parts in TARGETS.items() for index, part in enumerate(parts)}
FILE = "pytorch_lora_weights.safetensors"  # file name that diffusers looks for
HEADER_KEY = "lora_adapter_metadata"  # rank and alpha as JSON in the header, as diffusers writes them
Side = Literal["A", "B", "alpha"]

# What wrapping leaves between the parts of a name; "module" also in front.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_PREFIX = re.compile(r"^(?:(?:base_model|model|transformer|diffusion_model|unet|pipe|dit|network|lora)\.)*")
_FLAT_PREFIX = re.compile(r"^(?:lora|lycoris)_(?:(?:unet|transformer(?!_blocks)|dit|model)_+)*")
_MODULES = {part.replace(".", "_"): part for part in PARTS} | {OUTPUT.removesuffix(".0"): OUTPUT}
_BLOCK = re.compile(r"transformer_blocks[._](\d+)[._](.+)")
_ENDS: dict[str, Side] = {"lora_A": "A", "lora_B": "B", "down": "A", "up": "B"}
_END = re.compile(
    r"(?P<module>.+?)(?:"
    r"\.(?P<side>lora_A|lora_B)(?:\.(?:.+\.)?weight)?"
    r"|(?:\.lora[._]|_lora\.|\.lora_linear_layer\.)(?P<old>down|up)(?:\.weight)?"
    r"|\.(?P<alpha>alpha))"
)
_METHODS = {
    r"lora_magnitude_vector|dora_scale": "it is DoRA, which has no counterpart in SAT; train plain LoRA",
    r"\.hada_": "it is LoHa, and SAT has plain LoRA only; train plain LoRA",
    r"\.lokr_": "it is LoKr, and SAT has plain LoRA only; train plain LoRA",
    r"\.lora_mid": "it is the middle of a convolution's LoRA, and SAT adapts attention only; train plain LoRA",
    r"lora_embedding_": "it adapts an embedding, and SAT adapts attention only; train without it",
    r"modules_to_save|\.diff(_b)?$": "it holds trained weights besides LoRA; merge them into the base with their tool",
    r"\.bias$": "it is a bias, which SAT's LoRA has not; train with bias 'none'",
    r"^lora_te|text_encoder|encoder\.block": "it adapts a text encoder, which is not trained here; train without it",
    r"matrix_[AB]\.": "it has a name of SAT: the file needs no import; args.load takes it",
}


@dataclass(frozen=True)
class LoraName:
    """What a tensor is: a matrix, or the alpha, of a module in a block."""

    layer: int
    module: str
    side: Side


def sat_name(layer: int, part: str, kind: str) -> str:
    """Return SAT's name of the matrix "A" or "B" of a module in `PARTS`."""
    target, index = _PLACES[part]
    return f"transformer.layers.{layer}.{target}.matrix_{kind}.{index}"


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
    if block is None:
        return "it is on no transformer_blocks.<i> of a CogVideoX transformer, but on another part or another model"
    module = block[2].replace(".processor.", ".")
    side = "alpha" if end["alpha"] else _ENDS[end["side"] or end["old"]]
    return LoraName(int(block[1]), _MODULES.get(module, module), side)
