"""Attention kernels by name: those that torch selects from, and those of optional packages, imported on use.

All take and return (B, S, heads, head_dim). ``sage`` computes in 8 bits: its results are approximate, and it has no
gradients. The others are exact up to rounding.
"""

import importlib
import math
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgm.parallel.sequence import Attention
from sgm.util import InputError

_OF_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Module → how it is installed.
_PACKAGES = {
    "flash3": ("flash_attn_interface", "FlashAttention 3, built from the folder hopper of its repository"),
    "sage": ("sageattention", "the package sageattention"),
    "xformers": ("xformers.ops", "the package xformers"),
    "npu": ("torch_npu", "the package torch_npu, of the version of torch"),
}
WITHOUT_GRADIENTS = ("sage",)


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention by the kernel that torch selects."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if torch.compiler.is_compiling() and q.is_cpu:
        # The kernel that makes them writes them head by head, which attention reads faster there.
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_named(kernel: str) -> Attention:
    """Return an attention by its name.

    Raises:
        InputError: an unknown name, or its package cannot be imported.
    """
    if kernel == "auto":
        return torch_attention
    if kernel in _OF_TORCH:
        return _Selected(_OF_TORCH[kernel])
    if kernel not in _PACKAGES:
        raise InputError(f"attention '{kernel}' is unknown; give one of {', '.join(['auto', *_OF_TORCH, *_PACKAGES])}")
    name, source = _PACKAGES[kernel]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a package built for another torch or device fails in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"attention '{kernel}' needs {source}, which cannot be imported ({reason})") from error
    return _CALLS[kernel](module)


def is_traceable(attention: Attention) -> bool:
    """Whether torch can compile a graph with this attention in it: calls of packages may break one."""
    return attention is torch_attention or isinstance(attention, _Selected)


class _Selected:
    """Attention by one of torch's kernels, which raises where that cannot be used."""

    def __init__(self, backend: SDPBackend) -> None:
        self.backend = backend

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(self.backend):
            return torch_attention(q, k, v)


def _flash3(module: ModuleType) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: Any = module.flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp as well

    return attention


def _sage(module: ModuleType) -> Attention:
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _xformers(module: ModuleType) -> Attention:
    return lambda q, k, v: module.memory_efficient_attention(q, k, v)


def _npu(module: ModuleType) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        return module.npu_fusion_attention(q, k, v, q.shape[2], input_layout="BSND", scale=scale)[0]

    return attention


_CALLS = {"flash3": _flash3, "sage": _sage, "xformers": _xformers, "npu": _npu}


def require_attention(
    kernel: str, *, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool = False
) -> None:
    """Try an attention on a few tokens.

    Args:
        kernel: its name.
        device: of the network.
        dtype: of the network.
        head_dim: channels of a head.
        gradients: whether a backward pass follows.

    Raises:
        InputError: it cannot be used; says why.
    """
    if kernel == "auto":
        return
    if gradients and kernel in WITHOUT_GRADIENTS:
        raise InputError(f"attention '{kernel}' has no gradients: it is for sampling")
    attention = attention_named(kernel)
    q, k, v = torch.zeros(3, 1, 16, 2, head_dim, device=device, dtype=dtype).requires_grad_(gradients).unbind()
    try:
        with warnings.catch_warnings(record=True) as reasons:  # torch says why it takes no kernel
            warnings.simplefilter("always")
            out = attention(q, k, v)
            if gradients:
                out.sum().backward()
    except Exception as error:  # kernels refuse devices, dtypes and sizes in their own ways
        said = [str(error), *(str(reason.message) for reason in reasons)]
        reason = "; ".join(text.splitlines()[0].partition(" (Triggered internally")[0] for text in said)
        where = f"on {device.type} in {str(dtype).removeprefix('torch.')} with heads of {head_dim} channels"
        raise InputError(f"attention '{kernel}' cannot be used {where}: {reason}") from error
