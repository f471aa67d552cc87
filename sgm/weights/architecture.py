"""Infer the model family and the matching shipped configuration from tensor shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PATCH_WEIGHT = "mixins.patch_embed.proj.weight"
# Those that released files hold as convolutions: also beside adapters, and of them.
PATCH_WEIGHTS = (PATCH_WEIGHT, *(f"mixins.patch_embed.proj.{name}" for name in ("original.weight", "matrix_A.0")))
CONTROL_WEIGHT = "mixins.patch_embed.control_proj.weight"  # columns of the patch projection for a control video
POSITION_TABLE = "mixins.pos_embed.pos_embedding"

# (hidden size, layers, input channels, temporal patch) of the shipped model configurations.
CONFIGS = {
    (128, 6, 16, 1): "toy",
    (128, 6, 32, 1): "toy_i2v",
    (128, 6, 32, 2): "toy1.5_i2v",
    (1920, 30, 16, 1): "cogvideox_2b",
    (3072, 42, 16, 1): "cogvideox_5b",
    (3072, 42, 32, 1): "cogvideox_5b_i2v",
    (3072, 42, 16, 2): "cogvideox1.5_5b",
    (3072, 42, 32, 2): "cogvideox1.5_5b_i2v",
}
# Models that also have a _lora configuration.
_WITH_LORA = (
    "toy",
    "cogvideox_2b",
    "cogvideox_5b",
    "cogvideox_5b_i2v",
    "cogvideox1.5_5b",
    "cogvideox1.5_5b_i2v",
)


@dataclass(frozen=True)
class Architecture:
    """Architecture inferred from tensor shapes; None for unknown values."""

    hidden_size: int
    num_layers: int
    in_channels: int | None
    temporal_patch: int | None
    position_rows: int | None
    lora_rank: int | None
    has_ofs: bool

    def __str__(self) -> str:
        """Return the description that error messages show."""
        parts = [f"hidden size {self.hidden_size}", f"{self.num_layers} layers"]
        parts += [f"{self.in_channels} input channels"] if self.in_channels else []
        parts += [f"temporal patch {self.temporal_patch}"] if self.temporal_patch else []
        parts += [f"a table of {self.position_rows} positions"] if self.position_rows else ["no position table"]
        parts += ["an ofs embedding"] if self.has_ofs else []
        parts += [f"LoRA of rank {self.lora_rank}"] if self.lora_rank else []
        return ", ".join(parts)

    @property
    def config(self) -> str | None:
        """The name of the shipped model configuration with this shape; None if there is none."""
        key = (self.hidden_size, self.num_layers, self.in_channels, self.temporal_patch)
        return next((name for shipped, name in CONFIGS.items() if shipped == key), None)

    def kind(self) -> str:
        """Return in words what kind of model this is."""
        task = {16: "a text-to-video model", 32: "an image-to-video model"}.get(self.in_channels or 0, "a model")
        size = f"of {self.num_layers} layers of size {self.hidden_size}"
        return f"{task} {size if self.config is None else f'({self.config})'}"

    def config_hint(self) -> str:
        """Return advice naming the shipped model configuration with this shape."""
        name = self.config
        if name is None:
            return "use the model configuration that it was trained with (no shipped one has this shape)"
        if not self.lora_rank:
            return f"use configs/{name}.yaml"
        if name in _WITH_LORA:
            return f"use configs/{name}_lora.yaml (lora_config: r: {self.lora_rank})"
        return f"use configs/{name}.yaml with a lora_config section (r: {self.lora_rank})"


def describe_architecture(shapes: Mapping[str, Sequence[int]]) -> Architecture | None:
    """Infer an architecture from tensor shapes by name (without prefix); None without a patch projection."""
    patch = next((shapes[name] for name in PATCH_WEIGHTS[:2] if name in shapes), None)
    if patch is None or len(patch) not in (2, 4):
        return None
    # A linear weight [D, C·pt·p·p] gives only C·pt. The output projection has out_channels·pt·p·p rows; all
    # released models have 16 output channels and 2×2 patches, so there are 64 rows or, for a temporal patch of 2, 128.
    volume = {64: 4, 128: 8}.get(shapes.get("mixins.final_layer.linear.weight", (0,))[0])
    if len(patch) == 4:
        in_channels, temporal_patch = patch[1], 1
    else:
        in_channels, temporal_patch = (patch[1] // volume, volume // 4) if volume else (None, None)
    table = shapes.get(POSITION_TABLE)
    return Architecture(
        hidden_size=patch[0],
        num_layers=len({name.split(".")[2] for name in shapes if name.startswith("transformer.layers.")}),
        in_channels=in_channels,
        temporal_patch=temporal_patch,
        position_rows=table[-2] if table else None,
        lora_rank=next((shape[0] for name, shape in shapes.items() if name.endswith(".matrix_A.0")), None),
        has_ofs=any(name.startswith("ofs_embed.") for name in shapes),
    )
