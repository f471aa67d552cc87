from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sgm.util import InputError, instantiate_from_config, without_allocating
from sgm.weights.architecture import describe_architecture
from sgm.weights.match import _require_equal

CONFIGS = Path(__file__).parents[3] / "configs"
LORA = {"transformer.layers.0.attention.dense.matrix_A.0": (128, 1920)}


def shapes_of(*, hidden, layers, patch, final=64, **more):
    shapes = {f"transformer.layers.{i}.input_layernorm.weight": (hidden,) for i in range(layers)}
    shapes["mixins.patch_embed.proj.weight"] = patch
    shapes["mixins.final_layer.linear.weight"] = (final, hidden)
    return shapes | more


@pytest.mark.parametrize(
    ("shapes", "hint"),
    [
        (shapes_of(hidden=1920, layers=30, patch=(1920, 16, 2, 2)), "configs/cogvideox_2b.yaml"),
        (shapes_of(hidden=1920, layers=30, patch=(1920, 64)), "configs/cogvideox_2b.yaml"),
        (shapes_of(hidden=3072, layers=42, patch=(3072, 16, 2, 2)), "configs/cogvideox_5b.yaml"),
        (shapes_of(hidden=3072, layers=42, patch=(3072, 32, 2, 2)), "configs/cogvideox_5b_i2v.yaml"),
        (shapes_of(hidden=3072, layers=42, patch=(3072, 128)), "configs/cogvideox_5b_i2v.yaml"),
        (shapes_of(hidden=3072, layers=42, patch=(3072, 128), final=128), "configs/cogvideox1.5_5b.yaml"),
        (shapes_of(hidden=3072, layers=42, patch=(3072, 256), final=128), "configs/cogvideox1.5_5b_i2v.yaml"),
        (shapes_of(hidden=64, layers=2, patch=(64, 16, 2, 2)), "no shipped one"),
    ],
)
def test_the_shipped_configuration_is_found(shapes, hint):
    assert hint in describe_architecture(shapes).config_hint()


def test_lora_names_the_lora_configuration_and_the_rank():
    one = describe_architecture(shapes_of(hidden=1920, layers=30, patch=(1920, 16, 2, 2), **LORA))
    assert "cogvideox_2b_lora.yaml" in one.config_hint() and "r: 128" in one.config_hint()
    two = describe_architecture(shapes_of(hidden=3072, layers=42, patch=(3072, 128), final=128, **LORA))
    assert "configs/cogvideox1.5_5b_lora.yaml (lora_config: r: 128)" in two.config_hint()


@pytest.mark.parametrize(("more", "what"), [({}, "the weights"), (LORA, "a LoRA")])
def test_weights_of_another_kind_of_model_are_told_in_words_before_shapes(more, what):
    built = shapes_of(hidden=3072, layers=42, patch=(3072, 32, 2, 2), **more)
    for hidden, said in ((3072, "cogvideox_5b"), (64, "of 42 layers of size 64")):
        shapes = shapes_of(hidden=hidden, layers=42, patch=(hidden, 16, 2, 2), **more)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        with pytest.raises(InputError) as error:
            _require_equal("some.pt", built, tensors)
        first, second, *_ = str(error.value).splitlines()
        assert first.startswith(f"{what} of a text-to-video model {said if hidden == 64 else f'({said})'}, and the ")
        assert "the configuration builds an image-to-video model (cogvideox_5b_i2v); use " in first
        assert second == "some.pt does not fit the configured network:"


def test_the_description_tells_what_differs_between_families():
    more = {"mixins.pos_embed.pos_embedding": (1, 126, 64), "ofs_embed.0.weight": (8, 8)}
    text = str(describe_architecture(shapes_of(hidden=64, layers=2, patch=(64, 32, 2, 2), **more)))
    for part in ("hidden size 64", "2 layers", "32 input channels", "temporal patch 1", "126 positions", "ofs"):
        assert part in text
    unknown = describe_architecture(shapes_of(hidden=64, layers=2, patch=(64, 96), final=96))
    assert unknown.in_channels is None and "input channels" not in str(unknown)


def test_without_a_patch_projection_there_is_no_architecture():
    assert describe_architecture({"encoder.conv_in.conv.weight": (32, 3, 3, 3, 3)}) is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_network_of_a_shipped_configuration_is_recognised(path):
    network_config = OmegaConf.select(OmegaConf.load(path), "model.network_config")
    if network_config is None or "target" not in network_config:
        return  # not a model configuration
    with without_allocating():
        network = instantiate_from_config(OmegaConf.to_container(network_config))
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert f"configs/{path.stem}.yaml" in describe_architecture(shapes).config_hint()
