"""What headers say of a run, from a configuration that users may have edited."""

import copy

import pytest
import yaml

from benchmarks.models import network_section
from sgm.conversion.modelspec import default_title, lora_metadata

CONTENT = {"model": {"network_config": network_section("cogvideox_5b")}, "data": {"params": {"video_size": [32, 48]}}}


def described(tmp_path, text: str) -> dict[str, str]:
    file = tmp_path / "1" / "mp_rank_00_model_states.safetensors"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "config.yaml").write_text(text)
    return lora_metadata(file, rank=4, alpha=2.0, info=None, title="t", implementation="diffusers")


def test_a_configuration_tells_architecture_and_resolution(tmp_path):
    found = described(tmp_path, yaml.safe_dump(CONTENT))
    assert found["modelspec.resolution"] == "48x32" and "training_config_digest" in found
    assert found["modelspec.architecture"] == "cogvideox-5b/lora" and found["modelspec.prediction_type"] == "v"


def edited(path: str, value: object) -> str:
    content = copy.deepcopy(CONTENT)
    *parents, last = path.split(".")
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    "text",
    [
        *(edited("data.params.video_size", value) for value in (64, [64], "ab", ["x", "y"])),
        *(edited("data", value) for value in ([1], {"params": [1]})),
        *(edited("model.network_config.params.latent_width", value) for value in (None, "wide")),
        edited("model.network_config", {"params": {"hidden_size": 64}}),
        "[" * 5000,
        f"a: &a [*a]\n{yaml.safe_dump(CONTENT)}",
    ],
)
def test_an_edited_configuration_is_warned_of_and_left_out(tmp_path, text, caplog):
    found = described(tmp_path, text)
    assert found["modelspec.architecture"] == "cogvideox/lora" and found["ss_network_dim"] == "4"
    assert "modelspec.resolution" not in found and "training_config_digest" not in found
    assert f"{tmp_path / 'config.yaml'} is no configuration of a run, and is not read" in caplog.text


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("ckpts/my-lora-06-30/1000/mp_rank_00_model_states.pt", "my-lora-06-30"),
        ("old/mp_rank_00_model_states.safetensors", "old"),
        ("CogVideoX-2b-sat/transformer/1/mp_rank_00_model_states.pt", "CogVideoX-2b-sat"),
        ("CogVideoX1.5-5b/transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "CogVideoX1.5-5b"),
        ("loras/pytorch_lora_weights.safetensors", "loras"),
        ("loras/green_land.v2.safetensors", "green_land.v2"),
        ("CogVideoX1.5-5b", "CogVideoX1.5-5b"),
        ("/1/mp_rank_00_model_states.pt", "CogVideoX"),
    ],
)
def test_weights_without_a_title_have_that_of_their_own_name(path, title):
    assert default_title(path) == title
