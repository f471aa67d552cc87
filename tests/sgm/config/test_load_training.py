"""Configurations of training runs."""

import re

import pytest

from sgm.config.load import ConfigError, TrainingArgs, load_config
from tests.sgm.config.loading import ROOT, SFT, TOY, complaint, training, training_complaint

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


@pytest.mark.parametrize(
    "override",
    [
        "args.train_data_weights=[.inf]",
        "args.train_data=['']",
        "args.num_workers=100000",
        "args.train_iters=100000000000000000000",
        "deepspeed.train_micro_batch_size_per_gpu=100000",
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
        "deepspeed.zero_optimization.reduce_bucket_size=1e30",
        "deepspeed.zero_optimization.allgather_bucket_size=999999999999",
        "args.train_data_weights=[1e30]",
        "args.eval_iters=999999999999",
        "args.peak_tflops=1e-30",
        "data.params.fps=1e-30",
    ],
)
def test_values_of_a_training_that_cannot_be_meant(override):
    text = training_complaint(override)
    assert text.startswith("1 problem in") and override.partition("=")[0] in text


@pytest.mark.parametrize("override", ["r=1e30", "lora_alpha=1e30", "lora_alpha=1e-30", "lora_dropout=2", "factor=-5"])
def test_values_of_adapters_that_cannot_be_meant(override):
    given = f"model.network_config.params.modules.lora_config.params.{override}"
    with pytest.raises(ConfigError, match=re.escape(given.partition("=")[0])):
        load_config([ROOT / "configs" / "toy_lora.yaml", SFT], [given], mode="train")


def test_odd_values_warn():
    optimizer, embedder = "deepspeed.optimizer.params", "model.conditioner_config.params.emb_models.0"
    for override, found in [
        (f"{optimizer}.lr=0", "nothing is learnt"),
        (f"{optimizer}.lr=5", "usual are"),
        (f"{optimizer}.lr=1e-30", "usual are"),
        (f"{optimizer}.eps=0", "NaN"),
        (f"{optimizer}.eps=1", "larger than most gradients"),
        ("model.scale_factor=1e-30", "released models"),
        (f"{embedder}.ucg_rate=1", "every caption is dropped"),
        ("args.warmup=1", "a share"),
        ("model.loss_fn_config.params.sigma_sampler_config.params.group_num=2", "no effect without uniform_sampling"),
    ]:
        assert found in training(override).warnings[0]
    (warning,) = load_config(
        [ROOT / "configs" / "toy_i2v.yaml", SFT], ["model.noised_image_dropout=1"], mode="train"
    ).warnings
    assert "every image is dropped" in warning
    three = ["deepspeed.optimizer.type=mine.CAME", "deepspeed.optimizer.params={betas: [0.9, 0.99, 0.999]}"]
    assert training(*three).warnings == ()


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
        ("args.warmup=-0.1", "of at least 0"),
        ("args.ema_decay=2", "0 to 1"),
        ("args.train_data_weights=[-1]", "at least 0"),
        ("args.train_data=3", "a list, each entry text"),
        ("args.lr_decay_style=linea", "one of linear, cosine, cosine_with_restarts, polynomial"),
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
        ("data.params.store=x", "args.remote_cache"),
        ("data.params.video_size=null", "a list of 2"),
        ("data.target=data_video.SFTDatase", "did you mean 'SFTDataset'"),
    ],
)
def test_wrong_values_in_training(override, cure):
    text = training_complaint(override)
    assert text.startswith("1 problem in")
    assert f"{override.split('=')[0]} (" in text and cure in text and f"command line: {override}" in text


@pytest.mark.parametrize(
    ("style", "ratio", "said"),
    [
        ("linear", 0.2, "lr_decay_style linear does not use it"),
        ("exponential", 0, "nothing would be trained"),
    ],
)
def test_a_share_of_the_rate_that_has_no_effect_or_trains_nothing(style, ratio, said):
    text = training_complaint(f"args.lr_decay_style={style}", f"args.lr_decay_ratio={ratio}")
    assert "args.lr_decay_ratio (" in text and said in text


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


def test_a_run_keeps_the_one_precision_that_was_taken(tmp_path):
    for name in ("fp16", "bf16"):
        (tmp_path / f"{name}.yaml").write_text(f"args: {{{name}: true}}\n")
    config = load_config([TOY, SFT, tmp_path / "fp16.yaml", tmp_path / "bf16.yaml"], [], mode="train")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config([tmp_path / "config.yaml"], [], mode="train")
    assert (again.args.fp16, again.args.bf16) == (config.args.fp16, config.args.bf16) == (None, True)
