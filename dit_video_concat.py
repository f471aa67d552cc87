"""The CogVideoX diffusion transformer on SAT's model and mixins.

Legend: ``B T C H W`` latents, ``L`` text tokens, ``N`` video patches, ``S = L + N`` tokens (text first), ``D`` hidden
size, ``E`` size of the time embedding.

`DiffusionTransformer` owns the time embedding; each mixin owns the parameters of one concern, under the names of the
released checkpoints (``mixins.<name>.*``, SAT checkpoint format):

    pos_embed     positions of text and patches      Basic3DPositionEmbeddingMixin, Rotary3DPositionEmbeddingMixin
    patch_embed   latents and text → tokens          ImagePatchEmbeddingMixin
    adaln_layer   the block: modulation, attention   AdaLNMixin
    final_layer   tokens → latents                   FinalLayerMixin
    lora          adapters, beside the weights       sgm.modules.lora.AdapterMixin
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import sgm.distributed
from sgm.config.transformer_args import TransformerArgs
from sgm.config.values import AtLeast0, AtLeast1, Depth, Frames, PatchSide, Positive, RotaryBase, Width, spelled
from sgm.modules.block import CompiledBlock, transformer_block
from sgm.modules.block_ops import ModulatedNorm
from sgm.modules.embeddings import patchify, rope_table_3d, rotate, sincos_positions_3d, timestep_embedding, unpatchify
from sgm.modules.geometry import Grid, PatchSize, normalize_patch_size, require_rotary_heads
from sgm.modules.host_activations import HostActivations
from sgm.modules.in_place import gelu
from sgm.modules.kept_attention import KeptAttention, recomputed
from sgm.modules.linears import embedding_mlp, use_plain_linears, zero_linear
from sgm.modules.lora import Dropout, use_adapters
from sgm.modules.step_cache import StepCache
from sgm.parallel.attention import torch_attention
from sgm.parallel.sequence import Attention
from sgm.parallel.tensor import HeadNorm, average_gradients, mark_tensor_parallel, shard_adapters
from sgm.parallel.token_shards import TokenShards
from sgm.util import InputError, get_obj_from_str, instantiate_from_config, nearest, prepare_import
from sgm.weights.adapters import check_lora_params
from sgm.weights.partition import Shard

prepare_import()

from sat.model.base_model import BaseMixin, BaseModel  # noqa: E402
from sat.model.transformer import BaseTransformer  # noqa: E402
from sat.ops.layernorm import RMSNorm  # noqa: E402

MIXINS = ("pos_embed", "patch_embed", "adaln_layer", "final_layer", "lora")
_OF_THE_NETWORK = {"hidden_size", "hidden_size_head", "num_layers", "layer_num", "time_embed_dim"}
INTERPOLATION = ("time_interpolation", "height_interpolation", "width_interpolation")


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tokens: TokenShards, **_: Any) -> torch.Tensor:
    """Full attention over the tokens of all ranks: q, k, v (B, S, heads, head_dim) → the same shape."""
    return tokens.attend(q, k, v)


class ImagePatchEmbeddingMixin(BaseMixin):
    """Latents and text embeddings → one sequence of tokens, text first.

    The projection is a matrix over patches in the order c, pt, ph, pw. First-generation files store a Conv2d weight;
    `sgm.weights.checkpoint` reads and writes both.

    Args:
        in_channels: C of the latents, image latents included.
        hidden_size: D.
        patch_size: (time, height, width).
        text_hidden_size: size of the text embeddings.
        bias: give the patch projection a bias.
        control_channels: C of a control's latents, the last; their columns are a matrix of their own, at first zero.
    """

    def __init__(
        self,
        *,
        in_channels: Width,
        hidden_size: Width,
        patch_size: PatchSize,
        text_hidden_size: Width,
        bias: bool = True,
        control_channels: AtLeast0 = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.channels = [in_channels, control_channels]
        self.proj = nn.Linear(in_channels * math.prod(patch_size), hidden_size, bias=bias)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)
        if control_channels:
            self.control_proj = nn.Linear(control_channels * math.prod(patch_size), hidden_size, bias=False)
            nn.init.zeros_(self.control_proj.weight)

    def word_embedding_forward(
        self, x: torch.Tensor, *, context: torch.Tensor, tokens: TokenShards, **_: Any
    ) -> torch.Tensor:
        """(B, T, C, H, W) and (B, L, text size) → (B, S, D)."""
        # Split before the first weight: see the gradients in sgm.parallel.sequence.
        latents, control = x.split(self.channels, dim=2)
        patches = self.proj(tokens.shard(patchify(latents, self.patch_size)))
        if self.channels[1]:
            patches = patches + self.control_proj(tokens.shard(patchify(control, self.patch_size)))
        return torch.cat((self.text_proj(tokens.shard(context)), patches), dim=1)


class _PositionTable(BaseMixin):
    """Position table (1, L + N, D) of the full grid, added to the tokens; optional in subclasses."""

    pos_embedding: nn.Parameter

    def __init__(self, *, grid: Grid, text_length: int) -> None:
        super().__init__()
        self.grid = grid
        self.text_length = text_length

    def rows(self, grid: Grid, tokens: TokenShards) -> torch.Tensor:
        """Return the rows (1, S, D) of a sample; fewer frames than the table are fine, another size is not."""
        num_text = tokens.num_text
        if num_text != self.text_length or grid[1:] != self.grid[1:] or grid[0] > self.grid[0]:
            raise InputError(
                f"this model's position table is made for {self.text_length} text tokens and "
                f"{self.grid[1]}×{self.grid[2]} patches in up to {self.grid[0]} frames, got {num_text} tokens and "
                f"{grid[1]}×{grid[2]} patches in {grid[0]} frames; sample at the latent_height and latent_width "
                "of the model YAML"
            )
        return tokens.shard_table(self.pos_embedding[:, : num_text + tokens.num_patches], 1)

    def position_embedding_forward(self, _: Any, *, grid: Grid, tokens: TokenShards, **__: Any) -> torch.Tensor | None:
        """Return the rows (1, S, D) to add to the tokens, or None without a table."""
        return self.rows(grid, tokens) if hasattr(self, "pos_embedding") else None


class Basic3DPositionEmbeddingMixin(_PositionTable):
    """Fixed sine-cosine positions of the 2B model, zero for text.

    Args:
        grid: (t, h, w) patches of the largest sample.
        hidden_size: D.
        text_length: tokens of a prompt (L), which the text encoder follows.
        height_interpolation: divisor of row indices.
        width_interpolation: divisor of column indices.
        time_interpolation: divisor of frame indices.
    """

    transformer: Any  # set by SAT

    def __init__(
        self,
        *,
        grid: Grid,
        hidden_size: int,
        text_length: AtLeast0 = 0,
        height_interpolation: Positive = 1.0,
        width_interpolation: Positive = 1.0,
        time_interpolation: Positive = 1.0,
    ) -> None:
        super().__init__(grid=grid, text_length=text_length)
        interpolation = (time_interpolation, height_interpolation, width_interpolation)
        table = sincos_positions_3d(grid, hidden_size, interpolation)
        table = torch.cat((table.new_zeros(text_length, hidden_size), table))
        # A parameter because released checkpoints contain it; never trained.
        self.pos_embedding = nn.Parameter(table[None], requires_grad=False)

    def reinit(self, parent_model: Any = None) -> None:
        """Delete SAT's own position table; 2B checkpoints do not contain it."""
        del self.transformer.position_embeddings


class Rotary3DPositionEmbeddingMixin(_PositionTable):
    """3D rotary positions of the 5B models, applied to queries and keys; with a learned table for 5B-I2V.

    The rotation adapts to the sample's grid; the learned table has a fixed size.

    Args:
        grid: (t, h, w) patches of the largest sample.
        hidden_size: D.
        hidden_size_head: channels of a head.
        text_length: tokens of a prompt (L), which the text encoder follows.
        theta: base of the rotary wavelengths.
        learnable_pos_embed: also add a learned table.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = dict.fromkeys(INTERPOLATION, "rotary positions are not interpolated")

    def __init__(
        self,
        *,
        grid: Grid,
        hidden_size: Width,
        hidden_size_head: Width,
        text_length: AtLeast0,
        theta: RotaryBase = 10000.0,
        learnable_pos_embed: bool = False,
    ) -> None:
        super().__init__(grid=grid, text_length=text_length)
        require_rotary_heads(hidden_size_head)
        self.head_dim, self.theta = hidden_size_head, theta
        self.time_scaling = "extrapolate"
        if learnable_pos_embed:
            self.pos_embedding = nn.Parameter(torch.zeros(1, text_length + math.prod(grid), hidden_size))
        self._rotation: tuple[Any, Any] = (None, None)

    def once_per_forward(self, *, grid: Grid, tokens: TokenShards, device: torch.device) -> dict[str, Any]:
        """Return ``rotation``: cosines and sines (S, head_dim) of this rank's tokens, float32; the last are cached."""
        if self._rotation[0] != (key := (grid, tokens.num_text, tokens.group, device, self.time_scaling)):
            tables = rope_table_3d(
                grid,
                self.head_dim,
                num_text=tokens.num_text,
                theta=self.theta,
                device=device,
                time_scaling=self.time_scaling,
                trained=self.grid[0],
            )
            self._rotation = key, tuple(tokens.shard_table(table, 0) for table in tables)
        return {"rotation": self._rotation[1]}

    def attention_fn(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, rotation: Any, tokens: TokenShards, **_: Any
    ) -> torch.Tensor:
        """Full attention with rotated queries and keys; shapes as in `attend`."""
        return attend(rotate(q, *rotation), rotate(k, *rotation), v, tokens=tokens)


class AdaLNMixin(BaseMixin):
    """The transformer block: adaLN-Zero (Peebles & Xie 2023) with separate modulation for text and video.

    Args:
        num_layers: blocks.
        hidden_size: D.
        time_embed_dim: E.
        hidden_size_head: channels of a head.
        qk_ln: normalise queries and keys per head.
        elementwise_affine: give these norms weight and bias.
        recomputed_layers: number of leading blocks with activation checkpointing.
    """

    transformer: Any  # set by SAT
    keeps_attention = False  # of recomputed blocks

    def __init__(
        self,
        *,
        num_layers: Depth,
        hidden_size: Width,
        time_embed_dim: Width,
        hidden_size_head: Width,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
        recomputed_layers: AtLeast0 = 0,
    ) -> None:
        super().__init__()
        self.recomputed_layers = recomputed_layers
        self.block: Any = transformer_block
        self.block_context: Any = nullcontext  # of its number: brings its weights, see sgm.weights.offload
        self.step_cache: StepCache | None = None
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), zero_linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        self.qk_ln = qk_ln
        if qk_ln:
            kind = HeadNorm if sgm.distributed.tensor_parallel_size() > 1 else nn.LayerNorm
            norm = partial(kind, hidden_size_head, eps=1e-6, elementwise_affine=elementwise_affine)
            self.query_layernorm_list = nn.ModuleList(norm() for _ in range(num_layers))
            self.key_layernorm_list = nn.ModuleList(norm() for _ in range(num_layers))

    def layer_forward(self, x: torch.Tensor, mask: Any, *, layer_id: Any, **hook_args: Any) -> torch.Tensor:
        """One block: tokens (B, S, D) and time embedding (B, E) → tokens (B, S, D), of the last block (B, N, D)."""
        index, layers = int(layer_id), self.transformer.layers
        recomputes = index < self.recomputed_layers and torch.is_grad_enabled()
        kept = KeptAttention() if recomputes and self.keeps_attention else None
        block = partial(
            self.block,
            layer=layers[index],
            modulation=self.adaLN_modulations[index],
            norms=(self.query_layernorm_list[index], self.key_layernorm_list[index]) if self.qk_ln else None,
            attention_fn=self.transformer.hooks.get("attention_fn", attend),
            keeps_text=index < len(layers) - 1,  # of the last block, text is not read after attention
            around_attention=None if kept is None else kept.context,
        )

        def run(x: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
            own = () if rows is None else ("emb", "silu_emb", "context")
            of_rows = {name: hook_args[name][rows] for name in own if len(hook_args[name]) > 1}
            with self.block_context(index):
                return block(x, hook_args=hook_args | of_rows)

        if self.step_cache is not None and self.step_cache.in_use:
            group, num_text = hook_args["tokens"].group, hook_args["num_text"]
            return self.step_cache.block(index, run, x, emb=hook_args["emb"], num_text=num_text, group=group)
        return recomputed(run, x, kept) if recomputes else run(x)

    def block_modules(self, index: int) -> list[nn.Module]:
        """Return the modules of a block, wherever they are registered."""
        lists = (self.query_layernorm_list, self.key_layernorm_list) if self.qk_ln else ()
        return [self.transformer.layers[index], self.adaLN_modulations[index], *(norms[index] for norms in lists)]


class FinalLayerMixin(BaseMixin):
    """Tokens → latents: a modulated norm and a projection to patches.

    Args:
        hidden_size: D.
        time_embed_dim: E.
        patch_size: (time, height, width).
        out_channels: C of the output.
        elementwise_affine: give the norm weight and bias.
    """

    def __init__(
        self,
        *,
        hidden_size: Width,
        time_embed_dim: Width,
        patch_size: PatchSize,
        out_channels: Width,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=elementwise_affine, eps=1e-6)
        self.linear = zero_linear(hidden_size, math.prod(patch_size) * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(time_embed_dim, 2 * hidden_size))

    def final_forward(
        self, x: torch.Tensor, *, silu_emb: torch.Tensor, grid: Grid, tokens: TokenShards, **_: Any
    ) -> torch.Tensor:
        """Patches (B, N, D) and activated time embedding (B, E) → (B, T, C_out, H, W)."""
        shift, scale = self.adaLN_modulation[1](silu_emb)[:, None].chunk(2, dim=-1)
        x = torch.addcmul(shift, self.norm_final(average_gradients(x)), 1 + scale)
        return unpatchify(tokens.gather(self.linear(x)), grid, self.patch_size)


class DiffusionTransformer(BaseModel):
    """The network of all CogVideoX models.

    Args:
        num_frames: frames of the longest video.
        time_compressed_rate: video frames per latent frame after the first.
        latent_width: W of the largest latents.
        latent_height: H of the largest latents.
        patch_size: one integer (height and width within a frame) or [time, height, width].
        in_channels: C of the input, image latents included, without those of a control.
        out_channels: C of the output.
        hidden_size: D.
        num_layers: blocks.
        num_attention_heads: heads.
        time_embed_dim: E.
        modules: sections of the mixins; ``lora_config`` is optional.
        transformer_args: see `TransformerArgs`.
        elementwise_affine: give all norms weight and bias.
        height_interpolation: default for the position mixin.
        width_interpolation: likewise.
        time_interpolation: likewise.
        ofs_embed_dim: size of the embedding of ``ofs`` (1.5 I2V), equal to `time_embed_dim`; None without it.
        use_SwiGLU: gate the MLP (Shazeer 2020) instead of GELU; no released model does.
        use_RMSNorm: RMS norms in the blocks instead of layer norms; no released model does.
        control_channels: C of the latents of a control video: 0, or `out_channels`; see docs/control.md.
    """

    IGNORED_PARAMS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("adm_in_channels", "num_classes"), "there is no class or vector condition"),
        "input_time": "the time embedding always enters through adaLN",
        "parallel_output": "the output is whole on every rank",
    }
    SECTION_TYPES: ClassVar[dict[str, type]] = {"transformer_args": TransformerArgs}
    PARAMS_FOR_MODULES: ClassVar[tuple[str, ...]] = INTERPOLATION
    ring_attention: bool | None = None  # see TokenShards
    saving: Any = nullcontext()  # of the forward pass: where tensors for the backward pass wait

    def __init__(
        self,
        *,
        num_frames: Frames,
        time_compressed_rate: AtLeast1,
        latent_width: Width,
        latent_height: Width,
        patch_size: PatchSide | Sequence[PatchSide],
        in_channels: Width,
        out_channels: Width,
        hidden_size: Width,
        num_layers: Depth,
        num_attention_heads: Width,
        time_embed_dim: Width,
        modules: Mapping[str, Any],
        transformer_args: Mapping[str, Any],
        elementwise_affine: bool = True,
        height_interpolation: Positive | None = None,
        width_interpolation: Positive | None = None,
        time_interpolation: Positive | None = None,
        ofs_embed_dim: Width | None = None,
        use_SwiGLU: bool = False,  # noqa: N803
        use_RMSNorm: bool = False,  # noqa: N803
        control_channels: AtLeast0 = 0,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise InputError(
                f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}"
            )
        if ofs_embed_dim is not None and ofs_embed_dim != time_embed_dim:
            raise InputError(
                f"ofs_embed_dim={ofs_embed_dim} must equal time_embed_dim={time_embed_dim}: both embeddings are added"
            )
        args = TransformerArgs.parse(transformer_args)
        sgm.distributed.initialize()
        tensor_shard = Shard(sgm.distributed.tensor_parallel_rank(), sgm.distributed.tensor_parallel_size())
        # Not SAT's layer norm, which on a CPU saves float32 copies of its input.
        norm: Any = RMSNorm if use_RMSNorm else partial(ModulatedNorm, elementwise_affine=elementwise_affine)
        transformer = BaseTransformer(
            num_layers=num_layers,
            vocab_size=1,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            max_sequence_length=args.max_sequence_length,
            layernorm_epsilon=args.layernorm_epsilon,
            layernorm=norm,
            is_gated_mlp=use_SwiGLU,
            activation_func=F.silu if use_SwiGLU else gelu,
            skip_init=args.skip_init,
        )
        del transformer.word_embeddings  # latents are embedded by the patch mixin
        transformer.position_embeddings.requires_grad_(False)
        super().__init__(None, transformer=transformer)
        self.tensor_shard = tensor_shard  # this rank's shard of the layers, see sgm.parallel.tensor
        self.attention: Attention = torch_attention
        self.hidden_size, self.patch_size = hidden_size, normalize_patch_size(patch_size)
        self.in_channels, self.out_channels, self.control_channels = in_channels, out_channels, control_channels
        self.time_embed = embedding_mlp(hidden_size, time_embed_dim)
        self.ofs_embed_dim, self.time_compressed_rate = ofs_embed_dim, time_compressed_rate
        if ofs_embed_dim is not None:
            self.ofs_embed = embedding_mlp(ofs_embed_dim, ofs_embed_dim)
        latent_frames = (num_frames - 1) // time_compressed_rate + 1
        self.grid: Grid = (
            -(-latent_frames // self.patch_size[0]),  # an odd count is padded at the front
            latent_height // self.patch_size[1],
            latent_width // self.patch_size[2],
        )
        interpolation = (time_interpolation, height_interpolation, width_interpolation)
        self._add_mixins(
            modules,
            defaults={
                "hidden_size": hidden_size,
                "time_embed_dim": time_embed_dim,
                "elementwise_affine": elementwise_affine,
                "hidden_size_head": hidden_size // num_attention_heads,
                "num_layers": num_layers,
                "patch_size": self.patch_size,
                "in_channels": in_channels,
                "out_channels": out_channels,
                "grid": self.grid,
                **dict(zip(INTERPOLATION, interpolation, strict=True)),
                "layer_num": num_layers,  # as SAT's LoraMixin names it
                "recomputed_layers": args.recomputed_blocks(num_layers),
            },
        )

    def _add_mixins(self, modules: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Build the mixins; parameters missing in the YAML come from `defaults`."""
        if (control := self.control_channels) not in (0, self.out_channels):
            raise InputError(f"control_channels={control} is neither 0 nor out_channels={self.out_channels}")
        defaults = {**defaults, "control_channels": control or None}
        self.adapter_dropout = Dropout()
        known = [f"{name}_config" for name in MIXINS]
        for name in (name for name in modules if name not in known):
            raise InputError(f"network_config.params.modules.{name} is unknown{nearest(name, known)}")
        if missing := sorted(set(known) - set(modules) - {"lora_config"}):
            raise InputError(f"network_config.params.modules lacks {', '.join(missing)}")
        for name in MIXINS:
            if (section := modules.get(f"{name}_config")) is None:
                continue
            own = section.get("params") or {}
            cls = get_obj_from_str(section["target"])
            if not issubclass(cls, BaseMixin):
                raise InputError(f"network_config.params.modules.{name}_config: {cls.__name__} is no mixin of SAT")
            accepted = inspect.signature(cls).parameters
            if name == "patch_embed" and self.control_channels and "control_channels" not in accepted:
                raise InputError(f"network_config.params.control_channels: {cls.__name__} takes none; remove it")
            for key in (key for key in _OF_THE_NETWORK & own.keys() if own[key] != defaults[key]):
                found = f"is {spelled(own[key])}, and that of the network {defaults[key]}; remove it"
                raise InputError(f"network_config.params.modules.{name}_config.params.{key} {found}")
            extra = {k: v for k, v in defaults.items() if k in accepted and k not in own and v is not None}
            if name == "lora":
                check_lora_params(own, defaults["num_layers"], defaults["hidden_size"], self.tensor_shard.size)
                self._add_lora(section, extra)
            else:
                self.add_mixin(name, instantiate_from_config(section, **extra), reinit=True)
        # After the adapters, whose initial values are drawn as on several ranks: beside SAT's layers.
        use_plain_linears(self.transformer, self.tensor_shard)
        mark_tensor_parallel(self.named_parameters())

    def _add_lora(self, section: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        # SAT would store weights in four bits itself; here training does, see `sgm.weights.quantize`.
        section = {**section, "params": {k: v for k, v in (section.get("params") or {}).items() if k != "qlora"}}
        # SAT initialises per shard; `shard_adapters` draws full matrices, independent of the number of ranks.
        with torch.random.fork_rng(devices=[], enabled=self.tensor_shard.size > 1):
            self.add_mixin("lora", instantiate_from_config(section, **extra), reinit=True)
        self.adapter_dropout = use_adapters(self)
        if self.tensor_shard.size > 1:  # of attention, see `check_lora_params`
            shard_adapters(self.transformer.layers, self.mixins["lora"].layer_range, self.tensor_shard)

    @property
    def blocks(self) -> list[list[nn.Module]]:
        """The modules of each block, of which the mixin with the modulation holds some."""
        mixin: Any = self.mixins["adaln_layer"]
        return [mixin.block_modules(index) for index in range(len(self.transformer.layers))]

    def use_blocks_within(self, context: Any) -> None:
        """Let every block run, and be recomputed, within ``context(index)``: see `sgm.weights.offload`."""
        mixin: Any = self.mixins["adaln_layer"]
        mixin.block_context = context

    def use_time_scaling(self, name: str) -> None:
        """Scale rotary positions of clips longer than `num_frames`, see `sgm.modules.embeddings.TIME_SCALINGS`."""
        mixin: Any = self.mixins["pos_embed"]
        if not hasattr(mixin, "time_scaling"):
            raise InputError(f"args.time_scaling is {name}, and {type(mixin).__name__} has no rotary positions")
        mixin.time_scaling = name

    def use_step_cache(self, kind: str, threshold: float) -> StepCache:
        """Skip blocks when sampling, see `sgm.modules.step_cache`; return what decides."""
        shape = (self.hidden_size, len(self.transformer.layers), self.in_channels, self.patch_size[0])
        mixin: Any = self.mixins["adaln_layer"]
        mixin.step_cache = StepCache(kind, threshold, shape)
        return mixin.step_cache

    def keep_attention(self) -> None:
        """Let recomputed blocks keep the output of attention, see `sgm.modules.kept_attention`."""
        mixin: Any = self.mixins["adaln_layer"]
        mixin.keeps_attention = True

    def offload_activations(self, device: torch.device, host: torch.device) -> None:
        """Let tensors for the backward pass wait on `host`; `device` is that of the network."""
        self.saving = HostActivations(device, host)

    def compile(self, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compile the block with the options of ``torch.compile``; SAT's loop over blocks cannot be compiled."""
        # Up to 8 graphs, see docs/buckets.md; torch would go on uncompiled after 8, or with fullgraph fail.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
        mixin: Any = self.mixins["adaln_layer"]
        mixin.block = CompiledBlock(**options)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, *, ofs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict v (released models), or the target of the denoiser's scaling.

        Args:
            x: (B, T, C_in, H, W) noisy latents, those of image and control already concatenated on C.
            timesteps: (B,) in 0..999; without gradients, blocks take fewer passes if one is expanded to B samples.
            context: (B, L, D_text) text embeddings.
            ofs: (B,), required by models with `ofs_embed_dim`; always 2.0 in released models.

        Returns:
            (B, T, C_out, H, W).

        Raises:
            InputError: wrong shape, or `ofs` missing or not supported by this model.
        """
        grid = self._check_input(x, ofs)
        if not torch.is_grad_enabled() and timesteps.stride(0) == 0 and (ofs is None or ofs.stride(0) == 0):
            timesteps, ofs = timesteps[:1], None if ofs is None else ofs[:1]
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.hidden_size).to(dtype))
        if ofs is not None and self.ofs_embed_dim is not None:
            emb = emb + self.ofs_embed(timestep_embedding(ofs, self.ofs_embed_dim).to(dtype))
        group = sgm.distributed.sequence_group()
        tokens = TokenShards(context.shape[1], math.prod(grid), group, self.ring_attention, self.attention)
        hook_args: dict[str, Any] = {"emb": emb, "silu_emb": F.silu(emb), "num_text": tokens.num_local_text}
        hook_args |= {"context": context, "grid": grid, "tokens": tokens}
        if self.adapter_dropout.seeds is not None:
            positions = torch.arange(sum(tokens.lengths), device=x.device)
            self.adapter_dropout.use_positions(tokens.shard_table(positions, 0))
        for once in [getattr(mixin, "once_per_forward", None) for mixin in self.mixins.values()]:
            hook_args |= {} if once is None else once(grid=grid, tokens=tokens, device=x.device)
        with self.saving:
            return super().forward(x, None, None, **hook_args)[0]

    def _check_input(self, x: torch.Tensor, ofs: torch.Tensor | None) -> Grid:
        """Check shapes; return the grid of patches of `x`."""
        channels = self.in_channels + self.control_channels
        if x.ndim != 5 or x.shape[2] != channels:
            raise InputError(
                f"the network takes (B, T, {channels}, H, W), got {tuple(x.shape)}; image-to-video models take the "
                "noisy latents and the image latents concatenated on the channel axis, then those of a control"
            )
        size = (x.shape[1], x.shape[3], x.shape[4])
        (t, rest_t), (h, rest_h), (w, rest_w) = map(divmod, size, self.patch_size)
        if rest_t or rest_h or rest_w:
            raise InputError(
                f"latents of {size} (T, H, W) cannot be cut into patches of {self.patch_size}; pad or resize them"
            )
        if (ofs is None) != (self.ofs_embed_dim is None):
            raise InputError(
                "this model needs ofs (2.0)" if ofs is None else "ofs is given, but this model has no ofs_embed_dim"
            )
        return t, h, w
