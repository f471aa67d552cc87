"""What a section of YAML may build: a class that fits the place where it stands.

A part is known by how it is called (so that it can be replaced by one that this project has never heard of): a class
fits if it has the methods below, and they take what the callers pass. A section elsewhere may build any trusted class.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import nn

_CALL = "__call__"


@dataclass(frozen=True)
class Part:
    """The kind of class that a section builds.

    Attributes:
        name: of the part, for messages.
        calls: method → its positional arguments, then its keyword arguments as ``name=``.
        is_module: it must be a ``torch.nn.Module``.
    """

    name: str
    calls: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_module: bool = False

    def misfit(self, cls: type) -> str | None:
        """Return why objects of `cls` cannot be this part; None if they can."""
        if self.is_module and not issubclass(cls, nn.Module):
            return "it is not a torch.nn.Module"
        if inspect.isabstract(cls):
            return "it is only a base class"
        for method, words in self.calls.items():
            is_forward = method == _CALL and issubclass(cls, nn.Module)
            found = getattr(cls, "forward" if is_forward else method, None)
            spelled = f"{'a call' if method == _CALL else method}({', '.join(words)})"
            if not callable(found) or (method == _CALL and not is_forward and _CALL not in _methods(cls)):
                return f"it has no {spelled}" if method != _CALL else "it cannot be called"
            if not _takes(found, tuple(words)):
                return f"it does not take {spelled}"
        return None


def _methods(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in vars(base)}


@cache
def _takes(function: object, words: tuple[str, ...]) -> bool:
    try:
        signature = inspect.signature(function)  # pyright: ignore[reportArgumentType]
        named = [word.removesuffix("=") for word in words if word.endswith("=")]
        signature.bind(None, *words[: len(words) - len(named)], **dict.fromkeys(named))
    except TypeError:
        return False
    except ValueError:  # of C, without a signature
        return True
    return True


_MIXIN = Part("a part of the network", is_module=True)
_CODER = Part("half of a VAE", {_CALL: ["video"]}, is_module=True)
_DRAWS = {"draw_idx": ["num", "generator="], "levels": ["idx"]}
_GUIDES = {"prepare_inputs": ["x", "cond", "uncond"], "combine": ["denoised", "timestep="]}
_SAMPLES = ["denoise", "noise", "cond", "uncond", "num_steps=", "scale=", "generators=", "progress="]

# By the key of the section; those in a list by the key of the list.
PARTS: Mapping[str, Part] = {
    "network_config": Part("a network", {_CALL: ["x", "timesteps", "context"]}, is_module=True),
    **dict.fromkeys(
        ("pos_embed_config", "patch_embed_config", "adaln_layer_config", "final_layer_config", "lora_config"), _MIXIN
    ),
    "denoiser_config": Part("a denoiser", {_CALL: ["network", "x", "levels", "cond", "idx="]}),
    "scaling_config": Part("a scaling", {_CALL: ["levels", "idx="]}),
    "weighting_config": Part("a weight by noise level", {_CALL: ["levels"]}),
    "discretization_config": Part("a discretization", {_CALL: ["num", "flip="]}),
    "conditioner_config": Part("a conditioner", {"get_unconditional_conditioning": ["batch", "batch_uc"]}, True),
    "emb_models": Part("an encoder of text", {_CALL: ["texts"]}, is_module=True),
    "first_stage_config": Part("a VAE", {"decode": ["latents"]}, is_module=True),
    "encoder_config": _CODER,
    "decoder_config": _CODER,
    "regularizer_config": Part("a regularizer", {"distribution": ["moments"]}),
    "loss_fn_config": Part("a loss", {_CALL: ["network", "denoiser", "latents", "cond", "idx=", "noise="]}),
    "sigma_sampler_config": Part("a sampler of noise levels", _DRAWS),
    "sampler_config": Part("a sampler", {_CALL: _SAMPLES, "timesteps": ["num_steps"]}),
    "guider_config": Part("a guider", _GUIDES),
    "data": Part("a data set", {"__len__": [], "__getitem__": ["index"]}),
}
