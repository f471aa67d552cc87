import pytest
import torch
from torch import nn

from sgm.config.load import ConfigError
from sgm.training.optim.trainable import choose_trainable


class Lora(nn.Module):
    r, lora_alpha = 4, 8.0


class Layer(nn.Module):
    def __init__(self, adapters: bool) -> None:
        super().__init__()
        self.dense = nn.Module()
        self.dense.weight = nn.Parameter(torch.zeros(3, 3))
        if adapters:
            self.dense.matrix_A = nn.ParameterList([torch.zeros(1, 3)])
            self.dense.matrix_B = nn.ParameterList([torch.zeros(3, 1)])


class Network(nn.Module):
    """Two layers, a patch embedding, and a constant table."""

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList([Layer(adapters), Layer(adapters)])
        self.mixins = nn.ModuleDict({"patch_embed": nn.Linear(2, 3)} | ({"lora": Lora()} if adapters else {}))
        self.table = nn.Parameter(torch.zeros(5), requires_grad=False)


def trained(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_everything_but_constants_is_trained_by_default():
    network = Network()
    found = choose_trainable(network, {})
    assert set(found.names) == trained(network) == {n for n, _ in network.named_parameters()} - {"table"}
    assert (found.num_trained, found.num_total, found.adapters) == (27, 32, False)
    assert str(found) == "27 of 32 parameters (84.38 %): 4 tensors of mixins.patch_embed, transformer.layers"


def test_all_leaves_the_adapters():
    network = Network(adapters=True)
    found = choose_trainable(network, {"not_trainable_prefixes": ["all"]})
    assert found.adapters and found.num_trained == 2 * 2 * 3
    assert set(found.names) == trained(network) == {name for name, _ in network.named_parameters() if "matrix_" in name}
    assert found.description == "LoRA of rank 4, alpha 8 in 2 layers, 4 matrices"


def test_lora_train_means_all():
    assert choose_trainable(Network(adapters=True), {"lora_train": True}).adapters


@pytest.mark.parametrize("prefix", ["mixins.patch_embed", "model.diffusion_model.mixins.patch_embed"])
def test_a_prefix_freezes_matching_parameters(prefix):
    network = Network()
    choose_trainable(network, {"not_trainable_prefixes": [prefix, "first_stage_model", "conditioner"]})
    assert trained(network) == {f"transformer.layers.{layer}.dense.weight" for layer in range(2)}


@pytest.mark.parametrize(
    ("adapters", "model", "message"),
    [
        (False, {"not_trainable_prefixes": ["all"]}, "nothing to train: the base weights are frozen"),
        (False, {"not_trainable_prefixes": ["mixins", "transformer"]}, "take the model's _lora.yaml file"),
        (True, {"not_trainable_prefixes": ["all", "transformer"]}, "a prefix covers the adapters too"),
        (True, {}, "would train 4 tensors of the base model beside the LoRA adapters, e.g. transformer.layers.0"),
        (True, {"not_trainable_prefixes": ["mixins"]}, "would train 2 tensors of the base model beside"),
        (True, {"not_trainable_prefixes": ["transformer"]}, "freezes the adapters but not the base"),
        (False, {"not_trainable_prefixes": ["transformers"]}, "beginning of no parameter.*did you mean 'transformer'"),
    ],
)
def test_unwanted_combinations_are_refused(adapters, model, message):
    with pytest.raises(ConfigError, match=message) as caught:
        choose_trainable(Network(adapters), model)
    assert caught.value.problems[0].path == "model.not_trainable_prefixes"
