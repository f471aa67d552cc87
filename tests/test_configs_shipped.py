"""Check every shipped YAML file against its target classes, and against the published facts of the models."""

import re
from pathlib import Path

import pytest

from sgm.checks.sampling import check_shapes
from sgm.checks.sampling_plan import check_sampling
from sgm.checks.training import check_training_data
from sgm.config.deepspeed_section import engine_config
from sgm.config.load import TRAINING_ARGS, ConfigError, SamplingArgs, load_config
from sgm.config.precision import resolve_training_precision
from sgm.modules.geometry import Geometry
from sgm.util import instantiate_from_config, without_allocating

CONFIGS = Path(__file__).parents[1] / "configs"
RELEASED = sorted(path.stem for path in CONFIGS.glob("cogvideox*.yaml"))
MODELS = [*RELEASED, "toy", "toy_i2v", "toy1.5_i2v", "toy_lora"]


def load(name: str, *more: str, overrides=()):
    return load_config([CONFIGS / f"{stem}.yaml" for stem in (name, *more)], overrides, mode="inference")


def load_training(name: str):
    # The model without a fixed size needs a clip size.
    overrides = ["data.params.video_size=[768,1360]"] if name.startswith("cogvideox1.5_5b_i2v") else []
    bases = [CONFIGS / f"{stem}.yaml" for stem in (name, "toy_sft" if name.startswith("toy") else "sft")]
    return load_config(bases, overrides, mode="train")


def inference_of(name: str) -> str:
    return "toy_inference" if name.startswith("toy") else "inference"


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_all_models_are_there():
    assert RELEASED == [
        "cogvideox1.5_5b",
        "cogvideox1.5_5b_i2v",
        "cogvideox1.5_5b_i2v_lora",
        "cogvideox1.5_5b_lora",
        "cogvideox_2b",
        "cogvideox_2b_lora",
        "cogvideox_5b",
        "cogvideox_5b_i2v",
        "cogvideox_5b_i2v_lora",
        "cogvideox_5b_lora",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_taken_and_has_an_effect(name):
    assert load(name, inference_of(name)).warnings == ()


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_fit_and_the_sample_is_legal(name):
    config = load(name, inference_of(name))
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    assert check_shapes(config, geometry) == []
    plan = check_sampling(config.args, geometry)
    assert plan.video_frames == config.model["network_config"]["params"]["num_frames"]
    assert plan.image2video is ("i2v" in name)
    assert config.args.image2video is plan.image2video


@pytest.mark.parametrize("name", MODELS)
def test_all_parts_but_the_text_encoder_can_be_built(name):
    model = load(name).model
    with without_allocating():
        network = instantiate_from_config(model["network_config"])
        vae = instantiate_from_config(model["first_stage_config"])
    for part in ("denoiser_config", "sampler_config", "loss_fn_config", "conditioner_config"):
        instantiate_from_config(model[part])
    if name.startswith("toy"):
        assert parameters(network) + parameters(vae) < 25_000_000
    else:
        assert parameters(vae) == 215_583_907


@pytest.mark.parametrize(("name", "count"), [("cogvideox_2b", 1_693_783_872), ("cogvideox_5b", 5_570_283_072)])
def test_parameter_counts_of_the_released_networks(name, count):
    with without_allocating():
        network = instantiate_from_config(load(name).model["network_config"])
    # Tensors in the SAT layout beside the published parameters: the 2B's sine-cosine table (226 text tokens and
    # 13x30x45 patches), and SAT's unused position table in the others.
    tables = {"cogvideox_2b": (226 + 13 * 30 * 45) * 1920, "cogvideox_5b": 64 * 3072}
    assert parameters(network) - tables[name] == count
    names = [key for key, _ in network.named_parameters() if "position" in key or "pos_embed" in key]
    expected = {
        "cogvideox_2b": "mixins.pos_embed.pos_embedding",
        "cogvideox_5b": "transformer.position_embeddings.weight",
    }
    assert names == [expected[name]]


PUBLISHED = {  # precision, scale_factor, shift, layers, hidden, heads, text tokens, in_channels, fps
    "cogvideox_2b": ("fp16", 1.15258426, 3.0, 30, 1920, 30, 226, 16, 8),
    "cogvideox_5b": ("bf16", 0.7, 1.0, 42, 3072, 48, 226, 16, 8),
    "cogvideox_5b_i2v": ("bf16", 0.7, 1.0, 42, 3072, 48, 226, 32, 8),
    "cogvideox1.5_5b": ("bf16", 0.7, 1.0, 42, 3072, 48, 224, 16, 16),
    "cogvideox1.5_5b_i2v": ("bf16", 0.7, 1.0, 42, 3072, 48, 224, 32, 16),
}


@pytest.mark.parametrize("name", RELEASED)
def test_published_values(name):
    config = load(name, "inference")
    model, network = config.model, config.model["network_config"]["params"]
    precision, scale, shift, layers, hidden, heads, text, in_channels, fps = PUBLISHED[name.removesuffix("_lora")]
    assert (model["precision"], model["scale_factor"]) == (precision, scale)
    assert (network["num_layers"], network["hidden_size"], network["num_attention_heads"]) == (layers, hidden, heads)
    assert network["in_channels"] == in_channels and network["time_embed_dim"] == 512
    assert network["modules"]["pos_embed_config"]["params"]["text_length"] == text
    assert config.args.sampling_fps == fps
    shifts = re.findall(r"shift_scale: ([\d.]+)", config.to_yaml())
    assert [float(found) for found in shifts] == [shift] * 3
    assert model["sampler_config"]["params"]["num_steps"] == 50
    guider = model["sampler_config"]["params"]["guider_config"]["params"]
    assert guider == {"scale": 6, "exp": 5, "num_steps": 50}


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("cogvideox1.5_5b", {"r": 128, "lora_alpha": 64}),
        ("cogvideox1.5_5b_i2v", {"r": 128, "lora_alpha": 64}),
        ("cogvideox_2b", {"r": 128, "lora_alpha": 64}),
        ("cogvideox_5b", {"r": 128, "lora_alpha": 64}),
        ("cogvideox_5b_i2v", {"r": 256, "lora_alpha": 128}),
        ("toy", {"r": 16, "lora_alpha": 16}),
    ],
)
def test_lora_files_add_adapters_only(name, params):
    plain, lora = load(name).merged, load(f"{name}_lora").merged
    modules = lora["model"]["network_config"]["params"]["modules"]
    assert modules.pop("lora_config") == {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
    assert lora["model"].pop("not_trainable_prefixes") == ["all"]
    assert lora == plain


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_trained_with_the_training_file(name):
    config = load_training(name)
    assert config.warnings == ()
    network = config.model["network_config"]["params"]
    assert check_training_data(config, Geometry.from_network(network)) == []
    assert config.data["params"]["max_num_frames"] == network["num_frames"]
    assert config.data["params"]["fps"] == config.args.sampling_fps


@pytest.mark.parametrize("name", MODELS)
def test_training_runs_in_the_precision_of_the_model(name):
    config = load_training(name)
    dtype = resolve_training_precision(config, "accelerator")
    engine = engine_config(config.deepspeed, world_size=1, dtype=dtype)
    expected = config.model["precision"]
    assert {half: engine[half]["enabled"] for half in ("fp16", "bf16")} == {
        "fp16": expected == "fp16",
        "bf16": expected == "bf16",
    }


@pytest.mark.parametrize(
    ("name", "lr"), [("cogvideox_5b", 1e-5), ("cogvideox_5b_lora", 2e-4), ("toy", 1e-3), ("toy_lora", 1e-3)]
)
def test_learning_rates_follow_what_trains(name, lr):
    assert load_training(name).deepspeed["optimizer"]["params"]["lr"] == lr


def test_training_an_image_shaped_model_needs_a_size():
    with pytest.raises(ConfigError, match="data.params.video_size"):
        load_config([CONFIGS / "cogvideox1.5_5b_i2v.yaml", CONFIGS / "sft.yaml"], mode="train")


@pytest.mark.parametrize("name", ["sft", "toy_sft"])
def test_the_commands_in_a_training_file_name_that_file(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    commands = re.findall(r"#   python train_video.py --base configs/(\S+).yaml (\S+)", text)
    assert commands and {file for _, file in commands} == {f"configs/{name}.yaml"}
    assert {model for model, _ in commands} <= {*MODELS}


@pytest.mark.parametrize("name", ["sft", "toy_sft"])
def test_sampling_takes_a_training_file_too(name):
    model = "toy" if name.startswith("toy") else "cogvideox_5b"
    warnings = load(model, name).warnings
    assert len(warnings) == 2 and all(warning.startswith("no effect on sampling: ") for warning in warnings)


@pytest.mark.parametrize("name", MODELS)
def test_the_command_in_a_file_names_that_file(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    commands = re.findall(r"#   python sample_video.py --base (\S+) (\S+)", text)
    assert commands == [(f"configs/{name}.yaml", f"configs/{inference_of(name)}.yaml")]


def test_image_latents_follow_the_generation():
    assert load("cogvideox_5b_i2v").model["scale_image_latents"] is True
    assert load("cogvideox1.5_5b_i2v").model["scale_image_latents"] is False
    assert load("cogvideox1.5_5b_i2v").model["network_config"]["params"]["ofs_embed_dim"] == 512


def test_prompts_are_there():
    path = CONFIGS.parent / load("cogvideox_2b", "inference").args.input_file
    lines = path.read_text().splitlines()
    assert len(lines) >= 3 and all(line.strip() for line in lines)


def test_docs_list_every_key_of_args():
    text = (CONFIGS.parent / "docs" / "configuration.md").read_text()
    missing = [name for name in SamplingArgs.__dataclass_fields__ if f"`{name}`" not in text]
    assert missing == []
    assert [name for name in TRAINING_ARGS if f"`{name}`" not in text] == []
