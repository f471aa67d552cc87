"""The network against outputs and gradients of the reference implementation, through YAML and checkpoint."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from sgm.util import instantiate_from_config, without_allocating
from sgm.weights.checkpoint import load_network

GOLDEN = Path(__file__).parent / "data" / "golden"
FAMILIES = ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return GOLDEN / request.param


def network_config(family):
    return OmegaConf.load(family / "model.yaml").model.network_config


def load(family):
    with without_allocating():
        network = instantiate_from_config(network_config(family))
    load_network(network, family / "transformer", dtype=torch.float32, device="cpu")
    io = load_file(family / "io.safetensors")
    x = torch.cat((io["latents"], io["concat"]), dim=2) if "concat" in io else io["latents"]
    return network.eval(), (x, io["timesteps"], io["context"]), io


def test_output_is_that_of_the_reference(family):
    network, inputs, io = load(family)
    with torch.no_grad():
        output = network(*inputs)
    torch.testing.assert_close(output, io["output"], rtol=0, atol=2e-5)


def test_gradients_are_those_of_the_reference(family):
    network, inputs, io = load(family)
    network(*inputs).square().sum().backward()
    parameters = dict(network.named_parameters())
    expected = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    assert len(expected) >= 2
    for name, value in expected.items():
        if name == "matrix_A0":
            name = "transformer.layers.0.attention.query_key_value.matrix_A.0"
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert (gradient - value).norm() / value.norm() <= 1e-4, name
