"""Configurations of sampling runs, and what all have in common."""

import logging
import re

import pytest
import torch

from sgm.config.load import ConfigError, load_config
from sgm.util import InputError
from tests.sgm.config.loading import ROOT, TOY, complaint, override_complaint, toy, training_complaint

GOLDEN = ROOT / "tests" / "data" / "golden"


def test_the_engine_section_is_a_copy():
    config = toy()
    before = config.model["network_config"]["params"]["hidden_size"]
    config.engine["params"]["network_config"]["params"]["hidden_size"] = before + 1
    assert config.model["network_config"]["params"]["hidden_size"] == before


@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"])
def test_reference_model_files_load_unchanged_and_warn_by_name(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sgm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        config = load_config([GOLDEN / name / "model.yaml"], mode="inference")
    for key in ("model.log_keys", "model.disable_first_stage_autocast", "model.network_config.params.adm_in_channels"):
        assert any(warning.startswith(f"{key} has no effect: ") for warning in config.warnings)
        assert key in caplog.text
    assert any(".encoder_config.params.gather_norm has no effect" in warning for warning in config.warnings)


def test_an_unknown_section():
    text = complaint([TOY], ["arg.seed=1"])
    assert "arg (command line: arg.seed=1): unknown section; did you mean 'args'" in text


def test_a_key_outside_its_section_names_the_section(write):
    text = complaint([TOY, write("seed: 1\nsave: x\n")])
    assert "this belongs to args.seed" in text and "this belongs to args.save" in text


@pytest.mark.parametrize("key", ["on", "YES", "5", "1.5"])
def test_a_section_that_is_no_text(key, write):
    path = write(f"{key}: 1\n")
    assert f"{key} ({path}:1): unknown section" in complaint([TOY, path])


@pytest.mark.parametrize("value", ["5", "[1]", "word"])
def test_a_section_must_have_keys(value):
    with pytest.raises(ConfigError, match="section|indented"):
        load_config([TOY], [f"data={value}"], mode="inference")


def test_no_model_section(write):
    assert "configs/cogvideox_2b.yaml" in complaint([write("args:\n  seed: 1\n")])


def test_unknown_args_name_the_nearest_and_the_place(write):
    path = write("args:\n  sampling_fsp: 8\n")
    text = complaint([TOY, path])
    assert f"args.sampling_fsp ({path}:2): unknown key for args; did you mean 'sampling_fps'?" in text


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("args.seed=seven", "give a whole number"),
        ("args.seed=-1", "at least 0"),
        (f"args.seed={2**63}", f" to {2**63 - 1}"),
        ("args.seed=20000000000000000000000", f" to {2**63 - 1}"),
        ("args.batch_size=0", "from 1 to 10,000"),
        ("args.batch_size=true", "give a whole number"),
        ("args.sampling_num_frames=1.5", "give a whole number of at least 1 and at most 1e+12 or null"),
        ("args.sampling_image_size=480", "give a list of 2"),
        ("args.sampling_image_size=[480]", "give a list of 2"),
        ("args.sampling_image_size=[0,64]", "from 1 to 1,000,000"),
        ("args.input_type=text", "one of txt, cli"),
        ("args.image2video=1", "give true or false"),
        ("args.output_dir=2024", "needs quotes"),
        ("args.base=no", "needs quotes"),
        ("args.text_encoder_offload=gpu", "one of none, cpu, blocks, release"),
        ("args.cfg_parallel_size=3", "1 to 2"),
        ("args.input_file=null", "args.input_file=prompts.txt"),
        ("args.image=a.png", "give args.prompt too"),
    ],
)
def test_wrong_values_in_args(override, cure):
    text = override_complaint(override)
    assert override.split("=")[0] in text and cure in text and f"command line: {override}" in text


def test_the_seeds_of_a_whole_batch_are_in_range():
    last = 2**63 - 4
    seed = toy(f"args.seed={last}", "args.batch_size=4").args.seed
    assert [torch.Generator().manual_seed(seed + k).initial_seed() for k in range(4)][-1] == 2**63 - 1
    assert f"from 0 to {last}" in override_complaint(f"args.seed={last + 1}", "args.batch_size=4")


def test_both_half_precisions():
    text = override_complaint("args.fp16=true", "args.bf16=true")
    assert "args.fp16" in text and "keep the one" in text


NETWORK, VAE = "model.network_config.params", "model.first_stage_config.params"


@pytest.mark.parametrize(
    "override",
    [
        "args.guidance_scale=.inf",
        "args.guidance_scale=1e30",
        "args.guidance_scale=1e999",
        "args.sampling_fps=100000000",
        "args.batch_size=100000000",
        "args.sampling_image_size=[64,100000000]",
        "args.output_dir=''",
        'args.output_dir="a\\0b"',
        'args.output_dir="\\ud800"',
        "args.distributed_timeout=1000000000",
        "args=5",
        "model.scale_factor=0",
        "model.scale_factor=-1",
        "model.scale_factor=.nan",
        "model.noised_image_dropout=2",
        "model.en_and_decode_n_samples_a_time=0",
        "model.precision=fp8",
        "model.ofs=-.inf",
        f"{NETWORK}.num_layers=0",
        f"{NETWORK}.num_layers=100000",
        f"{NETWORK}.num_attention_heads=0",
        f"{NETWORK}.hidden_size=1000000000",
        f"{NETWORK}.time_compressed_rate=0",
        f"{NETWORK}.time_embed_dim=-1",
        f"{NETWORK}.patch_size=[1,0,2]",
        f"{NETWORK}.patch_size=[65,2,2]",
        f"{NETWORK}.patch_size=1000000000000",
        f"{NETWORK}.height_interpolation=0",
        f"{NETWORK}.modules.pos_embed_config.params.theta=0",
        f"{NETWORK}.modules.patch_embed_config.params.text_hidden_size=0",
        f"{VAE}.decoder_config.params.ch_mult=[]",
        f"{VAE}.encoder_config.params.ch_mult=[1,0]",
        f"{VAE}.encoder_config.params.ch=0",
        f"{VAE}.encoder_config.params.dropout=1.5",
        f"{VAE}.encoder_config.params.num_res_blocks=0",
        "model.denoiser_config.params.num_idx=0",
        "model.denoiser_config.params.discretization_config.params.shift_scale=.nan",
        "model.denoiser_config.params.discretization_config.params.linear_end=-1",
        "model.sampler_config.params.num_steps=0",
        "model.sampler_config.params.guider_config.params.scale=.nan",
        "model.sampler_config.params.guider_config.params.scale=-1",
        "model.sampler_config.params.guider_config.params.num_steps=0",
        "model.loss_fn_config.params.offset_noise_level=.nan",
        "model.loss_fn_config.params.min_snr_value=0",
        "model.loss_fn_config.params.sigma_sampler_config.params.group_num=-1",
        "model.conditioner_config.params.emb_models.0.params.max_length=0",
        "model.sampler_config.params.guider_config.params.exp=1e30",
        "model.sampler_config.params.guider_config.params.num_steps=999999999999",
        "model.loss_fn_config.params.offset_noise_level=1e30",
        "model.loss_fn_config.params.min_snr_value=1e30",
        "model.loss_fn_config.params.min_snr_value=1e-30",
        "model.loss_fn_config.params.sigma_sampler_config.params.strata=999999999999",
        f"{NETWORK}.num_frames=999999999999",
        f"{NETWORK}.modules.pos_embed_config.params.theta=1e-30",
        f"{NETWORK}.modules.pos_embed_config.params.theta=1e30",
        f"{NETWORK}.modules.patch_embed_config.params.in_channels=-1",
        f"{NETWORK}.modules.patch_embed_config.params.control_channels=-1",
        f"{NETWORK}.modules.final_layer_config.params.out_channels=-1",
        f"{NETWORK}.modules.adaln_layer_config.params.recomputed_layers=-1",
    ],
)
def test_values_that_cannot_be_meant(override):
    text = override_complaint(override)
    assert text.startswith("1 problem in") or override == "args=5"
    assert override.partition("=")[0].removesuffix(".0") in text
    for name in ("NoneType", "Error", "Traceback", "None", "True", "False", "object"):
        assert name not in text


def test_braces_are_legal_in_prompts():
    texts = {name: "a {red} circle" for name in ("prompt", "negative_prompt", "inversion")}
    args = toy(*(f"args.{name}={text}" for name, text in texts.items()), "args.video=a.mp4").args
    assert {name: getattr(args, name) for name in texts} == texts


def test_a_section_must_not_be_a_list(write):
    text = complaint([TOY, write("args: [1]")])
    assert "args (" in text and "is [1]" in text


def test_augmentation_dropout_has_no_effect():
    assert toy('args.negative_prompt="\\e[31mred"').warnings == (
        "args.negative_prompt holds control characters, which text encoders drop: \\x1b",
    )
    assert toy("model.augmentation_dropout=0.05").warnings == (
        "model.augmentation_dropout has no effect: the reference reads it nowhere; see noised_image_dropout",
    )


def test_of_two_precisions_the_later_file_decides(write):
    first, second = write("args: {fp16: true}", "1.yaml"), write("args: {bf16: true}", "2.yaml")
    config = load_config([TOY, first, second], mode="inference")
    assert (config.args.fp16, config.args.bf16) == (None, True)
    assert any("args.fp16 has no effect" in warning and "2.yaml" in warning for warning in config.warnings)
    assert load_config([TOY, second, first], mode="inference").args.fp16
    assert "keep the one" in complaint([TOY, write("args: {fp16: true, bf16: true}")])


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("args.deepspeed={}", "deepspeed:, a section of its own"),
        ("args.deepspeed=true", "deepspeed:, a section of its own"),
        ("model.lora_config={}", "model.network_config.params.modules.lora_config"),
        ("model.network_config.params.lora_config={}", "model.network_config.params.modules.lora_config"),
        ("bucket_config.x=1", "data.params.buckets"),
        ("args.bucket_config=1", "data.params.buckets"),
        ("args.lr_warmup_steps=100", "args.auto_warmup_iters, or args.warmup"),
        ("deepspeed.lr_warmup_steps=100", "args.auto_warmup_iters, or args.warmup"),
        ("deepspeed.lr=1e-4", "deepspeed.optimizer.params.lr"),
        ("optimizer.params.lr=1e-4", "deepspeed.optimizer"),
        ("model.seed=1", "args.seed"),
        ("data.train_data=[x]", "args.train_data"),
        ("data.params.train_data=[x]", "args.train_data"),
        ("args.scale_factor=1", "model.scale_factor"),
        ("args.max_num_frames=49", "data.params.max_num_frames"),
        ("args.max_grad_norm=1", "deepspeed.gradient_clipping"),
        ("network_config.target=x", "model.network_config"),
        ("args.gradient_clipping=1", "deepspeed.gradient_clipping"),
        ("args.rank=128", "model.network_config.params.modules.lora_config.params.r"),
        ("args.num_inference_steps=3", "args.num_steps"),
    ],
)
def test_keys_in_the_wrong_place_are_sent_to_the_right_one(override, place):
    text = training_complaint(override)
    assert "1 problem " in text and f"this belongs to {place}" in text and "did you mean" not in text


def test_the_old_switch_of_the_model_compiles_too():
    assert toy("model.compile_model=true").args.compile and not toy().args.compile


def test_everything_is_reported_at_once(write):
    path = write("args:\n  seed: x\n  sed: 1\nmodel:\n  scalefactor: 1\nnonsense: 1\n")
    assert "4 problems" in complaint([TOY, path])


def test_errors_are_input_errors():
    with pytest.raises(InputError) as caught:
        toy("args.seed=x")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("loras", "said"),
    [
        ("5", "args.loras .*is 5.*give a list, each entry a mapping"),
        ("{path: x}", "args.loras .*give a list, each entry a mapping"),
        ("[x]", "args.loras.0 .*is 'x'.*give a mapping"),
        ("[{path: x}, {path: x, strenght: 1}]", "args.loras.1.strenght .*did you mean 'strength'"),
        ("[{strength: 1}]", "args.loras.0.path .*missing"),
        ("[{path: x, strength: {0-2: much}}]", "args.loras.0.strength .*give a number from -100 to 100 or a mapping"),
        ("[{path: x, schedule: [[2, 1]]}]", "args.loras.0.schedule .*from 0 to 1"),
    ],
)
def test_entries_of_a_list_of_mappings_are_checked_one_by_one(loras, said):
    assert re.search(rf"(?s){said}", override_complaint(f"args.loras={loras}"))


def test_entries_of_a_list_of_mappings_are_typed():
    (lora,) = toy("args.loras=[{path: x, strength: {0-2: 1, 3: 0.5}, schedule: [[0, 1]]}]").args.loras
    assert (lora.path, lora.strength, lora.schedule) == ("x", {"0-2": 1.0, "3": 0.5}, ((0.0, 1.0),))


def test_the_home_folder_is_expanded_where_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["args.save=~/runs", "args.train_data=[~/clips]"]
    args = load_config(["configs/toy.yaml", "configs/toy_sft.yaml"], words, mode="train").args
    assert (args.save, *args.train_data) == (str(tmp_path / "runs"), str(tmp_path / "clips"))
    words = ["args.output_dir=~/out", "args.loras=[{path: ~/lora}]", "args.input_type=cli", "args.prompt=~/a cat"]
    args = load_config(["configs/toy.yaml", "configs/toy_inference.yaml"], words, mode="inference").args
    found = (args.output_dir, args.loras[0].path, args.prompt)
    assert found == (str(tmp_path / "out"), str(tmp_path / "lora"), "~/a cat")
