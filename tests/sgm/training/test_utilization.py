import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sgm.distributed
from sgm.checks.cost import sample_flops
from sgm.config.load import load_config
from sgm.training.utilization import Work, peak_flops
from sgm.util import instantiate_from_config


def by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k.register_hook(torch.Tensor.contiguous)  # as fused kernels give it
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).contiguous()


@pytest.mark.parametrize("trains_all", [True, False])
def test_flops_are_those_that_torch_counts(trains_all):
    sgm.distributed.initialize()
    network = instantiate_from_config(load_config(["configs/toy.yaml"], mode="inference").model["network_config"])
    network.requires_grad_(trains_all)
    x = torch.randn(1, 5, network.in_channels, 16, 16, requires_grad=True)
    context = torch.randn(1, 16, network.mixins["patch_embed"].text_proj.in_features)
    network.attention = by_products  # torch counts no fused kernel of CPUs
    with FlopCounterMode(display=False) as counter:
        network(x, torch.tensor([500]), context).sum().backward()
    (p, q, r), (_, T, _, H, W) = network.patch_size, x.shape
    found = sample_flops(network, T * H * W // (p * q * r) + 16, trains_all=trains_all)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_network_of_another_kind_has_no_flops():
    assert sample_flops(torch.nn.Linear(2, 2), 10, trains_all=True) is None
    assert Work(torch.nn.Linear(2, 2), trains_all=True, peak=1.0).take() == (0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("AMD Instinct MI250X", 191.5e12),  # of one die, which is a device
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_name_alone(monkeypatch, name, expected):
    card = type("Properties", (), {"name": name})
    monkeypatch.setattr(
        torch, "get_device_module", lambda _: type("Module", (), {"get_device_properties": lambda _: card})
    )
    device = torch.device("meta")  # no CPU
    assert peak_flops(device, torch.bfloat16, None) == expected
    assert peak_flops(device, torch.float32, None) is None
    assert peak_flops(torch.device("cpu"), torch.float32, None) is None, "not invented"
    assert peak_flops(torch.device("cpu"), torch.float32, 2.5) == 2.5e12
