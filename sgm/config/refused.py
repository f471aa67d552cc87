"""Table of refused keys: known from other files, but unsupported here, with the reason and the fix.

The table is indexed by section of the configuration, or by class named in ``target:`` (including subclasses). Some keys
have one value without effect, which is accepted and not passed to the constructor. A parameter of a class that is
listed for its section is set by the code, not in YAML.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.config.values import spelled

_NO_VALUE = object()


@dataclass(frozen=True)
class Refused:
    """A key that is refused.

    Attributes:
        why: what was found, or why only the value `only` is accepted.
        cure: how to fix it.
        only: the accepted value, beside null.
    """

    why: str
    cure: str
    only: Any = _NO_VALUE

    def misfit(self, value: Any) -> tuple[str, str] | None:
        """Return what was found and the fix; None if `value` is accepted."""
        if self.only is _NO_VALUE:
            return self.why, self.cure
        if value is None or (value == self.only and isinstance(value, bool) is isinstance(self.only, bool)):
            return None
        return f"is {spelled(value)}, but {self.why}", self.cure


def _only(value: Any, why: str) -> Refused:
    spelled = str(value).lower() if isinstance(value, bool) else value
    return Refused(why, f"remove it; only {spelled} is supported", value)


def _each(why: str, cures: Mapping[str, str]) -> dict[str, Refused]:
    return {name: Refused(why, cure) for name, cure in cures.items()}


_UNUSED = (
    "autotuning compression_training curriculum_learning data_efficiency eigenvalue elasticity expert_parallel "
    "gradient_allreduce_op hybrid_engine managed_gradient_accumulation nebula pipeline progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients weight_quantization"
).split()
_PRECISION = "remove it; set model.precision"
_DEEPSPEED = {
    "scheduler": "remove it; the learning rate follows args.lr_decay_style, args.warmup and args.lr_decay_ratio",
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "bfloat16": "write bf16, the current name",
    "compile": "remove it; set args.compile=true",
    "checkpoint": "remove it; set args.save, args.save_interval and args.resume",
    "tensor_parallel": "remove it; set args.model_parallel_size",
    "sequence_parallel_size": "remove it; set args.sequence_parallel_size",
    **dict.fromkeys(_UNUSED, "remove it; this training does not use it"),
}
_ARGS = {
    "clip_grad": "remove it, and set deepspeed.gradient_clipping",
    "gradient_accumulation_steps": "remove it, and set deepspeed.gradient_accumulation_steps",
    "lr": "remove it, and set deepspeed.optimizer.params.lr",
    "weight_decay": "remove it, and set deepspeed.optimizer.params.weight_decay",
    "zero_stage": "remove it, and set deepspeed.zero_optimization.stage",
}
_ZERO = ("compute_grad_norm", "leaf_module", "parameter_alignment", "zenflow")
_ACTIVATIONS = (
    "partition_activations contiguous_memory_optimization cpu_checkpointing number_checkpoints "
    "synchronize_checkpoint_boundary profile"
).split()
_CHECKPOINTING = "remove it; args.checkpoint_activations switches recomputation of the blocks on and off"
_NO_FIXED_FRAMES = {"fixed_frames": _only(0, "no frames are kept from a condition")}
_NO_ZERO = {"do_append_zero": _only(False, "the noise levels are √ᾱ, where zero is pure noise")}
_VAE = {
    "attn_resolutions": _only([], "this VAE has no attention"),
    "pad_mode": _only("first", "the causal padding repeats the first frame"),
}

REFUSED: Mapping[str, Mapping[str, Refused]] = {
    "args": {
        "checkpoint_num_layers": Refused("every block is recomputed by itself", _CHECKPOINTING, 1),
        **_each("belongs elsewhere", _ARGS),
    },
    "data.params": {
        "data_dir": Refused("is set for each folder", "remove it; set args.train_data and args.valid_data"),
        "store": Refused("is set by the run", "remove it; set args.remote_cache"),
    },
    "deepspeed": _each("is not supported in the deepspeed section", _DEEPSPEED),
    "deepspeed.zero_optimization": _each(
        "is not supported", dict.fromkeys(_ZERO, "remove it; this training does not use it")
    ),
    "deepspeed.activation_checkpointing": dict.fromkeys(
        _ACTIVATIONS, Refused("DeepSpeed's checkpointing is not used", _CHECKPOINTING, only=False)
    ),
    "model.conditioner_config.params.emb_models": {"is_trainable": _only(False, "text encoders are frozen here")},
    "sgm.modules.encoders.modules.FrozenT5Embedder": {"freeze": _only(True, "T5 is not trained here")},
    "sgm.modules.diffusionmodules.denoiser.DiscreteDenoiser": _NO_ZERO,
    "sgm.modules.diffusionmodules.sigma_sampling.DiscreteSampling": _NO_ZERO,
    "sgm.modules.diffusionmodules.sampling.VideoSampler": _NO_FIXED_FRAMES,
    "sgm.modules.diffusionmodules.loss.VideoDiffusionLoss": _NO_FIXED_FRAMES,
    "vae_modules.cp_enc_dec.ContextParallelEncoder3D": _VAE,
    "vae_modules.cp_enc_dec.ContextParallelDecoder3D": _VAE,
    "sgm.config.transformer_args.TransformerArgs": {
        "checkpoint_num_layers": _only(1, "every block is recomputed by itself"),
        "model_parallel_size": _only(1, "args.model_parallel_size sets the tensor parallel size"),
        "layernorm_order": _only("pre", "the blocks normalise their input"),
        "is_decoder": _only(False, "there is no cross-attention"),
        "hidden_dropout": _only(0, "the block has no dropout"),
    },
}


def refused_by(cls: Any) -> Mapping[str, Refused]:
    """Return the refused parameters of a class and its bases."""
    places = [f"{base.__module__}.{base.__qualname__}" for base in getattr(cls, "__mro__", ())]
    return {name: entry for place in reversed(places) for name, entry in REFUSED.get(place, {}).items()}
