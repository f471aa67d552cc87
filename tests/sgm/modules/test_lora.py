import copy
import itertools

import pytest
import torch
from torch import nn

import sgm.distributed
from sgm.modules.lora import Adapter, Dropout, LoraLinear, use_adapters


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_compute_what_those_of_sat_do(parts, dropout):
    sgm.distributed.initialize()  # SAT's layers take part in their groups
    torch.manual_seed(0)
    linear = nn.Linear(8, 12).requires_grad_(False)
    sat = nn.Sequential(LoraLinear(nn.Linear, parts, 8, 12, 2, 3, dropout, original_obj=linear)).double()
    for parameter in sat.parameters():
        nn.init.normal_(parameter)
    own = copy.deepcopy(sat)
    use_adapters(own)
    assert type(own[0]) is Adapter and own.state_dict().keys() == sat.state_dict().keys()
    x, results = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), []
    for module in (sat, own):
        module.requires_grad_(False)
        trained = [parameter.requires_grad_() for name, parameter in module.named_parameters() if "matrix_" in name]
        torch.manual_seed(1)  # of dropout
        out = module(x)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, *trained))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_depends_on_the_sample_and_its_elements_alone():
    seeds, positions, channels = torch.tensor([3, 4, 2**32 - 1]), torch.arange(40), torch.arange(64)
    layer = torch.tensor(5)
    whole = Dropout(seeds, positions).keeps(layer, 0.25, channels, 64)
    assert float(whole.float().mean()) == pytest.approx(0.75, abs=0.02)
    alone = Dropout(seeds[1:2], positions).keeps(layer, 0.25, channels, 64)
    assert torch.equal(alone[0], whole[1]), "not on its batch"
    shard = Dropout(seeds, positions[7:20]).keeps(layer, 0.25, channels[32:], 64)
    assert torch.equal(shard, whole[:, 7:20, 32:]), "not on what a rank has of it"
    others = [whole[0], whole[1], whole[2], Dropout(seeds, positions).keeps(torch.tensor(6), 0.25, channels, 64)[0]]
    for one, other in itertools.combinations(others, 2):  # 0.75² + 0.25² of independent masks are equal
        assert float((one == other).float().mean()) == pytest.approx(0.625, abs=0.04)


def test_a_frozen_layer_keeps_its_input_and_what_the_rank_takes():
    adapter = LoraLinear(nn.Linear, 3, 8, 12, 2, original_obj=nn.Linear(8, 12))
    adapter.original.requires_grad_(False)
    use_adapters(adapter)
    saved, x = [], torch.randn(2, 5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        adapter(x)
    assert sorted(shape.numel() for shape in saved) == [8] * 3 + [2 * 5 * 6, 2 * 5 * 8], "B, A·x, and x"
