"""Attention kernels by name."""

import sys
from types import ModuleType

import pytest
import torch

from sgm.parallel.attention import attention_named, require_attention, torch_attention
from sgm.util import InputError
from tests.test_dit_golden import GOLDEN, load

CPU = torch.device("cpu")


def qkv(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 2, 7, 3, 16, generator=generator).to(dtype).unbind()


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_kernels_of_torch_are_equal(kernel):
    torch.testing.assert_close(attention_named(kernel)(*qkv()), torch_attention(*qkv()), rtol=1e-6, atol=1e-6)
    require_attention(kernel, device=CPU, dtype=torch.float32, head_dim=16, gradients=True)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_the_device_lacks_is_refused(kernel):
    with pytest.raises(InputError, match=rf"attention '{kernel}' cannot be used on cpu in bfloat16 with heads of 64"):
        require_attention(kernel, device=CPU, dtype=torch.bfloat16, head_dim=64)


def test_a_missing_package_and_an_unknown_name_are_named():
    with pytest.raises(InputError, match=r"'flash3' needs FlashAttention 3, .*No module named 'flash_attn_interface'"):
        require_attention("flash3", device=CPU, dtype=torch.float32, head_dim=16)
    with pytest.raises(InputError, match=r"'flsh' is unknown; give one of auto, cudnn, .*npu"):
        attention_named("flsh")
    with pytest.raises(InputError, match="'sage' has no gradients"):
        require_attention("sage", device=CPU, dtype=torch.float32, head_dim=16, gradients=True)


@pytest.mark.parametrize(
    ("kernel", "module", "function", "more"),
    [
        ("flash3", "flash_attn_interface", "flash_attn_func", ((), {})),
        ("sage", "sageattention", "sageattn", ((), {"tensor_layout": "NHD", "is_causal": False})),
        ("xformers", "xformers.ops", "memory_efficient_attention", ((), {})),
        ("npu", "torch_npu", "npu_fusion_attention", ((3,), {"input_layout": "BSND", "scale": 0.25})),
    ],
)
def test_packages_are_called_with_their_arguments(monkeypatch, kernel, module, function, more):
    """Their layout is that of the network: (batch, tokens, heads, channels), without a mask."""
    calls = []

    def kernel_of_package(q, k, v, *args, **kwargs):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), args, kwargs))
        out = torch_attention(q, k, v)
        return (out, None) if kernel in ("npu", "flash3") else out

    stub = ModuleType(module)
    setattr(stub, function, kernel_of_package)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, stub)
    result = attention_named(kernel)(*qkv())
    assert torch.equal(result, torch_attention(*qkv()))
    assert calls == [((2, 7, 3, 16),) * 3 + more]


def test_the_network_uses_the_attention_that_it_is_given():
    network, inputs, io = load(GOLDEN / "dit_t2v_5b_lora")
    calls = []

    def counting(q, k, v):
        calls.append(q.shape)
        return attention_named("math")(q, k, v)

    network.attention = counting
    with torch.no_grad():
        output = network(*inputs)
    assert len(calls) == len(network.transformer.layers)
    torch.testing.assert_close(output, io["output"], rtol=0, atol=4e-6)
