import logging
import re
import time
from pathlib import Path

import pytest
import torch
import yaml

from sgm.config.load import ConfigError, TrainingArgs, load_config
from sgm.config.targets import check_params
from sgm.config.yaml_files import Merged
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.util import InputError, instantiate_from_config

ROOT = Path(__file__).parents[3]
TOY = ROOT / "configs" / "toy.yaml"
SFT = ROOT / "configs" / "toy_sft.yaml"
GOLDEN = ROOT / "tests" / "data" / "golden"


def training(*overrides: str):
    return load_config([TOY, SFT], overrides, mode="train")


def training_complaint(*overrides: str) -> str:
    return complaint([TOY, SFT], overrides, mode="train")


def toy(*overrides: str, mode="inference"):
    return load_config([TOY], overrides, mode=mode)


def complaint(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **{"mode": "inference"} | kwargs)
    for problem in caught.value.problems:
        assert problem.found and problem.cure
    return str(caught.value)


def override_complaint(*overrides: str) -> str:
    return complaint([TOY], overrides)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "extra.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


class OwnSampler(VideoDDIMSampler):
    pass


# Reading and merging


def test_later_files_win_key_by_key(write):
    extra = write("args:\n  seed: 7\nmodel:\n  sampler_config:\n    params:\n      num_steps: 3\n")
    config = load_config([TOY, extra], mode="inference")
    assert config.args.seed == 7
    assert config.args.load == "assets/toy/transformer"
    assert config.model["sampler_config"]["params"]["num_steps"] == 3
    assert config.model["sampler_config"]["target"].endswith("VPSDEDPMPP2MSampler")


def test_overrides_win_and_are_yaml():
    config = toy("args.seed=7", "args.sampling_image_size=[32, 64]", "args.guidance_scale=2e0", "args.load=null")
    assert config.args.seed == 7
    assert config.args.sampling_image_size == (32, 64)
    assert config.args.guidance_scale == 2.0
    assert config.args.load is None


def test_overrides_reach_into_lists_and_missing_sections():
    path = "model.conditioner_config.params.emb_models.0.params.model_dir"
    config = toy(f"{path}=elsewhere", "data.params.fps=8")
    assert config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] == "elsewhere"
    assert config.data == {"params": {"fps": 8}}


def test_a_mapping_as_override_merges():
    config = toy("model.sampler_config.params={num_steps: 3}")
    assert config.model["sampler_config"]["params"]["num_steps"] == 3
    assert "guider_config" in config.model["sampler_config"]["params"]


def test_aliases_are_separate_copies():
    config = toy("model.first_stage_config.params.encoder_config.params.num_res_blocks=2")
    parts = config.model["first_stage_config"]["params"]
    assert parts["encoder_config"]["params"]["num_res_blocks"] == 2
    assert parts["decoder_config"]["params"]["num_res_blocks"] == 1


def test_references_between_keys(write):
    extra = write("args:\n  output_dir: ${args.load}/videos\n")
    assert load_config([TOY, extra], mode="inference").args.output_dir == "assets/toy/transformer/videos"


def test_numbers_in_scientific_notation(write):
    extra = write("deepspeed:\n  optimizer:\n    params:\n      lr: 1e-5\n      eps: 1.e-8\n")
    params = load_config([TOY, extra], mode="inference").deepspeed["optimizer"]["params"]
    assert params == {"lr": 1e-5, "eps": 1e-8}


def test_digest_follows_values_only(write):
    config = toy()
    assert config.digest == load_config([write(config.to_yaml())], mode="inference").digest
    assert config.digest != toy("args.seed=7").digest
    assert len(config.digest) == 64


def test_the_engine_section_is_a_copy():
    config = toy()
    before = config.model["network_config"]["params"]["hidden_size"]
    config.engine["params"]["network_config"]["params"]["hidden_size"] = before + 1
    assert config.model["network_config"]["params"]["hidden_size"] == before


# Reference files


@pytest.mark.parametrize("name", ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"])
def test_reference_model_files_load_unchanged_and_warn_by_name(name, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sgm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        config = load_config([GOLDEN / name / "model.yaml"], mode="inference")
    for key in ("model.log_keys", "model.disable_first_stage_autocast", "model.network_config.params.adm_in_channels"):
        assert any(warning.startswith(f"{key} has no effect: ") for warning in config.warnings)
        assert key in caplog.text
    assert any(".encoder_config.params.gather_norm has no effect" in warning for warning in config.warnings)


REFERENCE_TRAINING = """
args:
  checkpoint_activations: True
  model_parallel_size: 1
  experiment_name: lora
  mode: finetune
  load: "somewhere"
  no_load_rng: True
  train_iters: 1000
  eval_iters: 1
  eval_interval: 100
  eval_batch_size: 1
  save: ckpts
  save_interval: 100
  log_interval: 20
  train_data: ["{your train data path}"]
  valid_data: ["{your val data path}"]
  split: 1,0,0
  num_workers: 8
  force_train: True
  only_log_video_latents: True
data:
  target: data_video.SFTDataset
  params: {video_size: [480, 720], fps: 8, max_num_frames: 49, skip_frms_num: 3.}
deepspeed:
  train_micro_batch_size_per_gpu: 2
  gradient_accumulation_steps: 1
  steps_per_print: 50
  gradient_clipping: 0.1
  zero_optimization:
    stage: 2
    cpu_offload: false
    contiguous_gradients: false
    overlap_comm: true
    reduce_scatter: true
    reduce_bucket_size: 1000000000
    allgather_bucket_size: 1000000000
    load_from_fp32_weights: false
  zero_allow_untested_optimizer: true
  bf16: {enabled: True}
  fp16: {enabled: False}
  loss_scale: 0
  loss_scale_window: 400
  hysteresis: 2
  min_loss_scale: 1
  optimizer:
    type: sat.ops.FusedEmaAdam
    params: {lr: 0.00001, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 1e-4}
  activation_checkpointing: {partition_activations: false, contiguous_memory_optimization: false}
  wall_clock_breakdown: false
"""


def test_training_keys_are_known_to_sampling_and_warn_in_one_line(write):
    config = load_config([TOY, write(REFERENCE_TRAINING)], mode="inference")
    assert config.args.load == "somewhere"
    lines = [warning for warning in config.warnings if "args.train_iters" in warning]
    assert len(lines) == 1
    assert "args.only_log_video_latents" in lines[0] and "args.mode" in lines[0]
    assert any("data, deepspeed" in warning for warning in config.warnings)


def test_training_reports_their_placeholders(write):
    text = complaint([TOY, write(REFERENCE_TRAINING)], mode="train")
    assert "args.train_data.0 (" in text and "{your train data path}" in text and "2 problems" in text


def test_a_reference_training_file_loads_once_its_placeholders_are_filled(write):
    text = re.sub(r"\{your .* path\}", "disney", REFERENCE_TRAINING)
    config = load_config([ROOT / "configs" / "cogvideox_5b.yaml", write(text)], mode="train")
    assert len(config.warnings) == 1 and "no effect outside deepspeed.fp16" in config.warnings[0]
    assert isinstance(config.args, TrainingArgs)
    assert config.args.train_data == config.args.valid_data == ("disney",)
    assert config.args.split == "1,0,0" and config.args.checkpoint_activations is True
    assert config.data["params"]["skip_frms_num"] == 3
    assert config.deepspeed["optimizer"]["params"]["eps"] == 1e-8
    assert config.deepspeed["bf16"] == {"enabled": True}


def test_interpolation_is_accepted_on_network_and_mixin():
    network = "model.network_config.params"
    base = ROOT / "configs" / "cogvideox_2b.yaml"
    config = load_config([base], [f"{network}.height_interpolation=2.0"], mode="inference")
    assert config.warnings == ()
    mixin = f"{network}.modules.pos_embed_config.params.height_interpolation"
    assert load_config([base], [f"{mixin}=2.0"], mode="inference").warnings == ()
    with pytest.raises(ConfigError, match="height_interpolaton.*did you mean 'height_interpolation'"):
        load_config([base], [f"{network}.height_interpolaton=2.0"], mode="inference")


def test_interpolation_that_no_mixin_takes_warns():
    network = "model.network_config.params"
    overrides = [f"{network}.height_interpolation=2.0", f"{network}.time_interpolation=null"]
    config = load_config([ROOT / "configs" / "cogvideox_5b.yaml"], overrides, mode="inference")
    assert config.warnings == (f"{network}.height_interpolation has no effect: nothing under modules takes it",)


def test_modules_without_a_class_do_not_hide_the_problem():
    modules = "model.network_config.params.modules"
    for target in ("no.such.Class", "3", "null"):
        overrides = (f"{modules}.pos_embed_config.target={target}", f"{modules}.final_layer_config=null")
        text = override_complaint(*overrides, "model.network_config.params.height_interpolation=2.0")
        assert f"{modules}.pos_embed_config.target" in text


@pytest.mark.parametrize("value", ["0.5", "2"])
def test_numbers_of_other_projects_may_be_fractions(value):
    path = "model.network_config.params.modules.lora_config.params.lora_alpha"
    base = ROOT / "configs" / "cogvideox_2b_lora.yaml"
    assert load_config([base], [f"{path}={value}"], mode="inference").warnings == ()
    assert "give a number" in complaint([base], [f"{path}=much"])


# Bad input


def test_no_file():
    assert "--base" in complaint([])


def test_missing_file_names_the_nearest():
    text = complaint([ROOT / "configs" / "toi.yaml", ROOT / "configs" / "nothing.yaml"])
    assert "did you mean 'toy.yaml'" in text and "nothing.yaml" in text and "2 problems" in text


def test_folder_instead_of_a_file(tmp_path):
    assert "is a folder" in complaint([tmp_path])


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "UTF-8" in complaint([tmp_path / "x.yaml"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("args:\n  seed: [1,\n  load: x\n", "line 4, column 1"),
        ("args:\n\tseed: 1\n", "line 2, column 1"),
        ('args:\n  load: "x\n', "line 3, column 1"),
        ("args: &a\n  b: *a\n", "line 1, column 7"),
    ],
)
def test_syntax_errors_give_line_and_column(write, text, place):
    path = write(text)
    message = complaint([path])
    line, column = (word.split(" ")[1] for word in place.split(", "))
    assert place in message and f"{path}:{line}:{column}" in message


def test_syntax_errors_say_where_an_open_bracket_stands(write):
    assert "which begins in line 2" in complaint([write("args:\n  seed: [1,\n  load: x\n")])


def test_syntax_errors_of_several_files_are_reported_together(write):
    text = complaint([write("a: [", "one.yaml"), write("b: }", "two.yaml")])
    assert "one.yaml" in text and "two.yaml" in text


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "word\n"])
def test_files_without_sections(write, text):
    assert "write sections such as 'args:'" in complaint([write(text)])


def test_a_key_written_twice_is_an_error(write):
    path = write("args:\n  seed: 1\n  load: x\n  seed: 2\n")
    text = complaint([TOY, path])
    assert f"args.seed ({path}:4)" in text and "line 2 and in line 4" in text and "remove one" in text


def test_control_characters(write):
    assert "remove the characters" in complaint([write("args:\n  load: a\x07b\n")])


def test_an_unknown_section():
    text = complaint([TOY], ["arg.seed=1"])
    assert "arg (command line: arg.seed=1): unknown section; did you mean 'args'" in text


def test_a_key_outside_its_section_names_the_section(write):
    text = complaint([TOY, write("seed: 1\nsave: x\n")])
    assert "this belongs to args.seed" in text and "this belongs to args.save" in text


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
        (f"args.seed={2**63}", f"from 0 to {2**63 - 1}"),
        ("args.seed=20000000000000000000000", f"from 0 to {2**63 - 1}"),
        ("args.batch_size=0", "from 1 to 10,000"),
        ("args.batch_size=true", "give a whole number"),
        ("args.sampling_num_frames=1.5", "give a whole number of at least 1 or null"),
        ("args.sampling_image_size=480", "give a list of 2"),
        ("args.sampling_image_size=[480]", "give a list of 2"),
        ("args.sampling_image_size=[0,64]", "from 1 to 1,000,000"),
        ("args.input_type=text", "one of txt, cli"),
        ("args.image2video=1", "give true or false"),
        ("args.output_dir=2024", "needs quotes"),
        ("args.negative_prompt=no", "needs quotes"),
        ("args.text_encoder_offload=gpu", "one of none, cpu, blocks, release"),
        ("args.cfg_parallel_size=3", "1 to 2"),
        ("args.input_file=null", "args.input_file=prompts.txt"),
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


@pytest.mark.parametrize(
    "override",
    ["seed", "seed=1", "args..seed=1", "=1", "args.load.x.0=1", "model.conditioner_config.params.emb_models.7=1"],
)
def test_malformed_overrides(override):
    assert override in override_complaint(override)


def test_an_override_that_is_no_yaml():
    assert "in quotes" in override_complaint("args.negative_prompt=[a")


def test_unknown_parameters_are_found_at_any_depth():
    network = "model.network_config.params"
    text = override_complaint(
        f"{network}.hidden_sise=3",
        f"{network}.modules.adaln_layer_config.params.qkln=true",
        "model.sampler_config.params.guider_config.params.scael=1",
        "model.conditioner_config.params.emb_models.0.params.maxlength=3",
        "model.conditioner_config.params.emb_models.0.ucgrate=3",
        "model.scalefactor=1",
    )
    assert "6 problems" in text
    for path, known in [
        (f"{network}.hidden_sise", "hidden_size"),
        (f"{network}.modules.adaln_layer_config.params.qkln", "qk_ln"),
        ("model.sampler_config.params.guider_config.params.scael", "scale"),
        ("model.conditioner_config.params.emb_models.0.params.maxlength", "max_length"),
        ("model.conditioner_config.params.emb_models.0.ucgrate", "ucg_rate"),
        ("model.scalefactor", "scale_factor"),
    ]:
        line = next(line for line in text.splitlines() if line.startswith(f"  - {path} "))
        assert f"did you mean '{known}'?" in line


def test_unknown_targets_name_the_nearest():
    path = "model.sampler_config.target"
    text = override_complaint(f"{path}=sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSample")
    assert f"{path} (" in text and "did you mean 'VPSDEDPMPP2MSampler'" in text
    assert "does not exist" in override_complaint(f"{path}=nowhere.Sampler")
    assert "dotted path" in override_complaint(f"{path}=Sampler")
    assert "dotted path" in override_complaint(f"{path}=5")


@pytest.mark.parametrize(
    ("section", "target", "why"),
    [
        ("sampler_config", "torch.nn.Identity", "is not a sampler: it does not take a call(denoise,"),
        ("sampler_config", "sgm.modules.diffusionmodules.sampling.VideoSampler", "only a base class"),
        ("sampler_config", "sgm.modules.diffusionmodules.guiders.VanillaCFG", "is not a sampler: it cannot be called"),
        ("sampler_config", "torch.zeros", "--trust torch"),
        ("sampler_config.params.guider_config", "torch.nn.Identity", "not a guider: it has no prepare_inputs("),
        ("network_config", "torch.optim.SGD", "not a network: it is not a torch.nn.Module"),
        ("network_config", "torch.nn.Identity", "not a network: it does not take a call(x, timesteps, context)"),
        ("network_config.params.modules.pos_embed_config", "pathlib.Path", "is not trusted"),
        ("denoiser_config", "torch.nn.Linear", "not a denoiser"),
        ("denoiser_config.params.scaling_config", "torch.nn.Identity", "not a scaling"),
        ("first_stage_config", "torch.nn.Identity", "not a VAE: it has no decode(latents)"),
        ("conditioner_config.params.emb_models.0", "subprocess.Popen", "is not trusted"),
        ("conditioner_config.params.emb_models.0", "sgm.io.atomic_file", "not a class"),
        ("loss_fn_config", "torch.nn.MSELoss", "not a loss"),
    ],
)
def test_a_section_takes_a_class_of_its_kind(section, target, why):
    path = f"model.{section}.target"
    text = override_complaint(f"{path}={target}")
    assert "1 problem " in text and f"{path} (" in text and why in text


@pytest.mark.parametrize("target", ["os.getcwd", "pathlib.Path", "torch.nn.Identity", "sgm.data.loader.SampleStream"])
def test_the_data_section_takes_a_data_set(target):
    text = training_complaint(f"data.target={target}")
    assert "1 problem " in text and "data.target (" in text


def test_a_class_of_ones_own_needs_trust_from_the_command_line(monkeypatch):
    target = f"model.sampler_config.target={__name__}.OwnSampler"
    assert toy(target).warnings == ()
    monkeypatch.setattr("sgm.util._trusted", [])
    assert "add --trust tests to the command" in override_complaint(target, "args.trust=[tests]")


def test_a_section_without_target(write):
    path = write("model:\n  loss_fn_config: null\n  sampler_config: {params: {}}\n")
    base = write(TOY.read_text().split("  sampler_config:")[0], "base.yaml")
    text = complaint([base, path])
    assert "model.sampler_config" in text and "has no 'target:'" in text and "write target:" in text


def test_missing_parameters(write):
    config = yaml.safe_load(TOY.read_text())
    del config["model"]["denoiser_config"]
    del config["model"]["network_config"]["params"]["hidden_size"]
    text = complaint([write(yaml.safe_dump(config))])
    assert "model.denoiser_config" in text and "add 'denoiser_config:'" in text
    assert "model.network_config.params.hidden_size" in text and "DiffusionTransformer needs it" in text


def test_values_of_the_wrong_type():
    text = override_complaint("model.network_config.params.hidden_size=big", "model.noised_image_input=5")
    assert "hidden_size" in text and "give a whole number" in text
    assert "model.noised_image_input" in text and "give true or false" in text


@pytest.mark.parametrize(
    "override",
    [
        'args.load="{your CogVideoX-2b-sat path}/transformer"',
        "args.load={your path}",
        'model.conditioner_config.params.emb_models.0.params.model_dir="{your T5 path}"',
    ],
)
def test_placeholders(override):
    text = override_complaint(override)
    assert f"{override.split('=')[0]} (" in text and "still holds a placeholder" in text and "real value" in text


def test_braces_are_legal_in_prompts():
    assert toy('args.negative_prompt="a {curly} thing"').args.negative_prompt == "a {curly} thing"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("${args.nothing}", "names no value: there is no 'nothing'"),
        ("${args.train_data.7}", "names no value"),
        ("x${args.load", "begins a reference and does not end it"),
        ("${args.${args.base}}", "begins a reference and does not end it"),
        ("${args.load}", "refers to itself: args.load -> args.load"),
        ("${args.base}", "refers to itself: args.load -> args.base -> args.load"),
        ("${args}", "refers to itself"),
        ("a ${model} b", "is a section or a list"),
        ("${oc.env:HOME}", "calls the resolver 'oc.env'"),
        ("x ${oc.env:HOME,none} y", "calls the resolver 'oc.env'"),
        ("${oc.decode:'1'}", "calls the resolver 'oc.decode'"),
        ("${ oc.env : HOME}", "calls the resolver"),
        ("${.base}", "names no value"),
    ],
)
def test_references_that_name_no_value(write, value, found):
    text = complaint([TOY, write(f'args:\n  load: "{value}"\n  base: ${{args.load}}\n')])
    assert "args.load (" in text or "args.base (" in text
    assert found in text and "1 problem " in text


def test_the_environment_stays_out_of_the_configuration(write, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    for override in ("args.negative_prompt=${oc.env:SECRET}", "args.negative_prompt='${oc.env:SECRET}'"):
        text = override_complaint(override)
        assert "write the value itself" in text and "s3cr3t" not in text
    kept = toy(r"args.negative_prompt=$SECRET %SECRET% \${oc.env:SECRET}")
    assert kept.args.negative_prompt == "$SECRET %SECRET% ${oc.env:SECRET}"
    assert load_config([write(kept.to_yaml())], mode="inference").digest == kept.digest


def test_references_keep_types_and_follow_each_other(write):
    extra = write(
        "args:\n  seed: ${args.batch_size}\n  batch_size: ${data.params.sizes.1}\n"
        "  negative_prompt: a ${args.seed} ${args.skip_existing} ${args.device}${args.load}\n  skip_existing: false\n"
        "  device: null\ndata:\n  params: {sizes: [1, 2], same: '${data.params.sizes}'}\n"
    )
    config = load_config([TOY, extra], mode="inference")
    assert config.args.seed == 2
    assert config.args.negative_prompt == "a 2 false nullassets/toy/transformer"
    assert config.data["params"]["same"] == [1, 2]


def bomb(line: str, first: str) -> str:
    return "".join([first, *(line.format(new=new, old=old) for old, new in zip("abcdefgh", "bcdefghi", strict=True))])


@pytest.mark.parametrize(
    "text",
    [
        bomb("{new}: &{new} [" + ",".join(["*{old}"] * 9) + "]\n", "a: &a [x,x,x,x,x,x,x,x,x]\n"),
        bomb("{new}: &{new} {{<<: [" + ",".join(["*{old}"] * 9) + "]}}\n", "a: &a {x: 1, y: 2}\n"),
        bomb("{new}: [" + ",".join(["'${{{old}}}'"] * 9) + "]\n", "a: [x,x,x,x,x,x,x,x,x]\n"),
        bomb("{new}: '" + "${{{old}}}" * 12 + "'\n", "a: xxxxxxxx\n"),
        "a: &a0 x\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(100)),
        "".join(f"c{i}: ${{c{i + 1}}}\n" for i in range(100)) + "c100: x\n",
        "args: " + "[" * 3000 + "]" * 3000 + "\n",
        "args: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
        "- " * 3000 + "x\n",
        "args:\n  seed: " + "9" * 5000 + "\n",
        "args:\n  load: !!python/object/apply:os.getcwd []\n",
        "args:\n  load: !!binary aGVsbG8=\n",
        "args:\n  ~: 1\n",
    ],
)
def test_small_files_stay_small(write, text):
    path = write(text)
    start = time.process_time()
    message = complaint([path])
    assert time.process_time() - start < 2 and len(message) < 2000
    assert str(path) in message and "1 problem " in message


def test_a_file_without_an_end():
    assert "larger than 2 MB" in complaint(["/dev/zero"])


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("blurry #1 text, low  quality", "blurry #1 text, low  quality"),
        ("#1 text", "#1 text"),
        (" two  spaces ", " two  spaces "),
        ("line\n\n  line", "line\n\n  line"),
        ("it's 5 o'clock {now}", "it's 5 o'clock {now}"),
        ("x" * 100_000, "x" * 100_000),
        ("2024-01-31", "2024-01-31"),
        ("--- text", "--- text"),
        ("12 #3", "12 #3"),
        ("'no'", "no"),
        ('"a # b"', "a # b"),
        ("", None),
        ("null", None),
    ],
)
def test_text_in_overrides_arrives_as_typed(typed, value):
    assert toy(f"args.negative_prompt={typed}").args.negative_prompt == value


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
        'args.negative_prompt="\\ud800"',
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
    ],
)
def test_values_that_cannot_be_meant(override):
    text = override_complaint(override)
    assert text.startswith("1 problem in") or override == "args=5"
    assert override.partition("=")[0].removesuffix(".0") in text
    for name in ("NoneType", "Error", "Traceback", "None", "True", "False", "object"):
        assert name not in text


@pytest.mark.parametrize(
    "override",
    [
        "args.train_data_weights=[.inf]",
        "args.train_data=['']",
        "args.num_workers=100000",
        "args.save=''",
        "data.params.skip_frms_num=100000",
        "data.params.fps=0",
        "data.params.random_flip=2",
        "data.params.video_size=[64,-64]",
        "deepspeed.gradient_clipping=.nan",
        "deepspeed.optimizer.params.lr=1e20",
        "deepspeed.optimizer.params.betas=[0.9]",
        "deepspeed.optimizer.params.betas=[0.9,1.0]",
        "deepspeed.optimizer.params.betas=[]",
        "deepspeed.optimizer.params.eps=-1",
        "deepspeed.optimizer.params.weight_decay=.nan",
        "deepspeed.zero_optimization.reduce_bucket_size=.inf",
    ],
)
def test_values_of_a_training_that_cannot_be_meant(override):
    text = training_complaint(override)
    assert text.startswith("1 problem in") and override.partition("=")[0] in text


def test_a_section_must_not_be_a_list(write):
    text = complaint([TOY, write("args: [1]")])
    assert "args (" in text and "is [1]" in text


def test_odd_values_of_the_optimizer_warn():
    for override, found in [("lr=0", "nothing is learnt"), ("lr=5", "usual are"), ("eps=0", "NaN")]:
        assert found in training(f"deepspeed.optimizer.params.{override}").warnings[0]
    three = ["deepspeed.optimizer.type=mine.CAME", "deepspeed.optimizer.params={betas: [0.9, 0.99, 0.999]}"]
    assert training(*three).warnings == ()


def test_what_yaml_would_drop_from_an_override_is_refused():
    text = override_complaint("args.negative_prompt='a' # b", "args.sampling_image_size=[64,64] # c", "args.seed=1 # d")
    assert "'# b' would be a comment" in text and "'# c' would be a comment" in text and "is '1 # d'" in text


def test_a_loss_scaler_outside_fp16_has_no_effect_and_is_mentioned_once(write):
    stray = "  loss_scale: 0\n  loss_scale_window: 400\n  hysteresis: 2\n  min_loss_scale: 1\n"
    path = write(f"deepspeed:\n  fp16: {{enabled: false, hysteresis: 3}}\n{stray}")
    config = load_config([TOY, SFT, path], mode="train")
    (warning,) = config.warnings
    names = ("loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale")
    assert "no effect outside deepspeed.fp16" in warning and all(f"deepspeed.{name}" in warning for name in names)
    assert config.deepspeed["fp16"] == {"enabled": False, "hysteresis": 3}
    assert not {*names} & config.deepspeed.keys()
    assert all("loss_scale" not in line for line in load_config([TOY, path], mode="inference").warnings)


def test_augmentation_dropout_has_no_effect():
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
        ("args.rank=128", "model.network_config.params.modules.lora_config.params.r"),
        ("args.num_inference_steps=3", "args.num_steps"),
    ],
)
def test_keys_in_the_wrong_place_are_sent_to_the_right_one(override, place):
    text = training_complaint(override)
    assert "1 problem " in text and f"this belongs to {place}" in text and "did you mean" not in text


def test_everything_is_reported_at_once(write):
    path = write("args:\n  seed: x\n  sed: 1\nmodel:\n  scalefactor: 1\nnonsense: 1\n")
    assert "4 problems" in complaint([TOY, path])


def test_errors_are_input_errors():
    with pytest.raises(InputError) as caught:
        toy("args.seed=x")
    assert caught.value.exit_code == 2


# Training


def test_a_training_run_is_typed_and_complete():
    config = training("args.epochs=2", "args.train_iters=null", "args.train_data=elsewhere")
    assert isinstance(config.args, TrainingArgs) and config.args.mode == "finetune"
    assert config.args.train_data == ("elsewhere",) and config.args.epochs == 2
    assert config.args.load == "assets/toy/transformer", "the keys of sampling hold as well"
    assert config.deepspeed["gradient_accumulation_steps"] == 1
    assert "gradient_accumulation_steps" not in config.merged["deepspeed"], "the digest is that of the files"


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("args.mode=inference", "one of finetune, pretrain"),
        ("args.train_iters=0", "at least 1"),
        ("args.warmup=1.5", "0 to 1"),
        ("args.warmup=-0.1", "0 to 1"),
        ("args.ema_decay=2", "0 to 1"),
        ("args.train_data_weights=[-1]", "at least 0"),
        ("args.train_data=3", "a list, each entry text"),
        ("args.lr_decay_style=linea", "one of linear, cosine, constant, exponential"),
        ("args.lr=1", "deepspeed.optimizer.params.lr"),
        ("args.weight_decay=1", "deepspeed.optimizer.params.weight_decay"),
        ("args.clip_grad=1", "deepspeed.gradient_clipping"),
        ("args.zero_stage=1", "deepspeed.zero_optimization.stage"),
        ("args.gradient_accumulation_steps=1", "deepspeed.gradient_accumulation_steps"),
        ("args.checkpoint_num_layers=2", "args.checkpoint_activations"),
        ("args.train_itres=2", "did you mean 'train_iters'"),
        ("args.load=null", "args.mode=pretrain"),
        ("deepspeed.gradient_clip=1", "did you mean 'gradient_clipping'"),
        ("data.params.fsp=8", "did you mean 'fps'"),
        ("data.params.data_dir=x", "args.train_data"),
        ("data.params.video_size=null", "a list of 2"),
        ("data.target=data_video.SFTDatase", "did you mean 'SFTDataset'"),
    ],
)
def test_wrong_values_in_training(override, cure):
    text = training_complaint(override)
    assert text.startswith("1 problem in")
    assert f"{override.split('=')[0]} (" in text and cure in text and f"command line: {override}" in text


def test_everything_wrong_with_a_training_run_is_reported_at_once(write):
    path = write("args: {save_intervall: 1}\ndata: {}\ndeepspeed: {scheduler: {}, zero_optimization: {stage: 5}}\n")
    text = complaint([TOY, path], mode="train")
    paths = ["args.save_intervall", "args.train_iters", "args.train_data"]
    paths += ["data", "deepspeed.scheduler", "deepspeed.zero_optimization.stage"]
    for name in paths:
        assert f"  - {name} (" in text
    assert "6 problems" in text


def test_a_wrong_value_causes_no_further_problems():
    assert "1 problem " in training_complaint("args.train_iters=many")
    assert "1 problem " in training_complaint("args.train_data={}")


def test_no_data_section():
    text = complaint([TOY], ["args.train_data=x", "args.train_iters=1"], mode="train")
    assert "1 problem " in text and "there is no data section" in text and "configs/sft.yaml" in text


def test_keys_for_sat_without_effect_warn_with_the_reason():
    config = training("args.block_size=10", "args.checkpoint_num_layers=1", "args.distributed_backend=nccl")
    assert len(config.warnings) == 2
    assert "args.block_size has no effect: " in config.warnings[0]
    assert "args.distributed_backend has no effect: the device decides" in config.warnings[1]


def test_keys_of_an_evaluation_that_is_off_warn_in_one_line():
    config = training("args.eval_interval=null", "args.eval_batch_size=2")
    assert config.warnings == ("no effect without args.eval_interval: args.valid_prompts, args.eval_batch_size",)


# Signatures


class _Options:
    def __init__(self, *, size: int = 1) -> None: ...


class _Host:
    IGNORED_PARAMS = {"old": "it is gone"}
    SECTION_TYPES = {"options": _Options}

    def __init__(self, *, options: dict, part: dict | None = None) -> None: ...


def test_mappings_that_a_class_parses_itself():
    merged = Merged()
    check_params(_Host, {"options": {"sise": 2}, "old": 1}, ("x",), merged)
    assert merged.warnings == ["x.old has no effect: it is gone"]
    assert [problem.path for problem in merged.problems] == ["x.options.sise"]
    assert "did you mean 'size'" in merged.problems[0].found


class _Data:
    def __init__(self, *, data_dir: str, size: int) -> None: ...


def test_parameters_from_the_code_are_neither_required_nor_allowed_in_yaml():
    for params, wrong in [
        ({"size": 1}, []),
        ({}, ["data.params.size"]),
        ({"size": 1, "data_dir": "x"}, ["data.params.data_dir"]),
    ]:
        merged = Merged()
        check_params(_Data, params, ("data", "params"), merged)
        assert [problem.path for problem in merged.problems] == wrong


def test_what_is_checked_can_be_built():
    sampler = instantiate_from_config(toy("model.sampler_config.params.num_steps=4").model["sampler_config"])
    assert sampler.num_steps == 4
