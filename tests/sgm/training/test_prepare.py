"""Checks before weights are read, and the report of ``--check``."""

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sgm.config.args import TrainingArgs
from sgm.config.load import ConfigError, load_config
from sgm.training.inputs.clips import open_data
from sgm.training.main import main
from sgm.training.prepare import _Checks, _plain, other_batch, prepare, total_iterations
from sgm.training.run import train
from sgm.util import InputError
from tests.sgm.training.points import POINT

ROOT = Path(__file__).parents[3]
LORA, FULL, I2V = "dit_t2v_5b_lora", "dit_t2v_1.5", "dit_i2v_5b"


@pytest.fixture
def plan(training_yaml, tmp_path):
    """Return a function that prepares a run of a tiny network."""

    def make(name, *overrides, for_card=False):
        config = load_config(training_yaml(name), [f"args.save={tmp_path / 'runs'}", *overrides], mode="train")
        return prepare(config, for_card=for_card)

    return make


def test_the_report_of_a_plan(plan, tmp_path):
    found = plan(LORA, "args.train_iters=null", "args.epochs=3", "deepspeed.gradient_accumulation_steps=2")
    assert (found.global_batch, found.total_iters, found.resume) == (4, 6, None)
    rows = dict(line.split("  ", 1) for line in found.report().splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["data"] == "8 training clips, 8 validation clips"
    assert rows["batch"] == "2 clips x 2 steps of accumulation x 1 ranks = 4"
    assert rows["length"] == "6 iterations = 3.0 epochs"
    assert "LoRA of rank 4" in rows["trains"] and rows["precision"].startswith("fp32")
    assert "learning rate 0.001 (linear), ZeRO stage 0" in rows["optimizer"]
    assert not (tmp_path / "runs").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("ranks", "batch", "said"),
    [
        (4, 8, None),
        (2, 4, "an iteration takes 4 samples, and took 8 until iteration 3: .*accumulation_steps=2 keeps it"),
        (8, 16, "took 8 .*deepspeed.train_micro_batch_size_per_gpu=1 and gradient_accumulation_steps=1 keep it"),
        (3, 6, "3 ranks with samples of their own cannot keep it; a number that divides 8 can"),
    ],
)
def test_another_batch_than_before_is_told_with_what_keeps_it(ranks, batch, said):
    for point in (replace(POINT, samples=24), replace(POINT, samples=9, global_batch=8)):
        found = other_batch(point, batch, micro=2, ranks=ranks)
        assert found is None if said is None else re.search(said, found)


def test_epochs_end_with_the_same_samples_whatever_the_batch():
    args = TrainingArgs(train_data=["clips"], save="runs", epochs=2)
    assert total_iterations(args, 10, 4) == 5
    halfway = replace(POINT, iteration=2, samples=8)
    assert total_iterations(args, 10, 4, halfway) == 5
    assert total_iterations(args, 10, 2, halfway) == 2 + 6
    assert total_iterations(args, 10, 2, replace(POINT, iteration=5, samples=20)) == 5


def test_the_learning_rate_grows_with_the_ranks_on_request(plan, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    rates = []
    for more in ([], ["args.scale_lr=true"], ["args.scale_lr=true", "args.sequence_parallel_size=2"]):
        found = plan(LORA, *more)
        rates.append(found.config.deepspeed["optimizer"]["params"]["lr"])
        assert rates[-1] == found.optimizer_settings["lr"] and f"rate {rates[-1]:g} (linear" in found.rows["optimizer"]
    assert rates == pytest.approx([1e-3, 4e-3, 2e-3])


def test_captions_without_a_known_word_are_bad_clips(training_yaml, tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    (tmp_path / "a.txt").write_text("a red circle", encoding="utf-8")
    (tmp_path / "b.txt").write_text("一个红色的圆", encoding="utf-8")
    for allowed in ("false", "true"):
        words = [f"args.train_data=[{tmp_path}]", f"args.allow_unknown_text={allowed}"]
        data = open_data(load_config(training_yaml(LORA), words, mode="train"))
        known, unknown = data.train[0].row_reports()
        assert known.problems == () and not unknown.uncaptioned
        said = "".join(unknown.problems)
        assert said.startswith("the tokenizer knows no word of '一个红色的圆'" if allowed == "false" else "")
        assert bool(said) == (allowed == "false")


def test_more_clips_in_an_iteration_than_there_are_warn(plan, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sgm"), "propagate", True)
    plan(LORA, "deepspeed.train_micro_batch_size_per_gpu=9")
    assert "an iteration takes 9 clips, and there are 8: each is repeated" in caplog.text


def test_a_warmup_that_the_run_ends_within_warns(plan, caplog, monkeypatch):
    """Of all clips, whose number the epochs count."""
    monkeypatch.setattr(logging.getLogger("sgm"), "propagate", True)
    plan(LORA, "args.train_iters=null", "args.epochs=1", "args.warmup=5")
    assert "args.warmup is 5: 5 iterations, and the run has 4: none has more than 80%" in caplog.text


def test_epochs_are_rounded_up_to_whole_steps(plan):
    assert (
        plan(LORA, "args.train_iters=null", "args.epochs=1", "deepspeed.train_micro_batch_size_per_gpu=3").total_iters
        == 3
    )


@pytest.mark.parametrize(
    ("name", "overrides", "path", "message"),
    [
        (LORA, ["args.load=nowhere"], "args.load", "nowhere"),
        (LORA, ["args.train_data=[nowhere]"], "args.train_data", "nowhere"),
        (LORA, ["model.not_trainable_prefixes=[]"], "model.", "beside the LoRA adapters"),
        (LORA, ["args.mode=pretrain", "args.load=null"], "args.load", "adapts a trained network"),
        (LORA, ["model.loss_fn_config=null"], "model.loss_fn_config", "to train"),
        (LORA, ["model.conditioner_config=null"], "model.conditioner_config", "captions"),
        (FULL, ["model.first_stage_config=null"], "model.first_stage_config", "encode"),
        (FULL, ["model.latent_input=true"], "model.latent_input", "gives videos"),
        (I2V, ["model.latent_input=true"], "model.latent_input", "first frame"),
        (FULL, ["deepspeed.optimizer.type=AdamWW"], "deepspeed.optimizer", "did you mean 'AdamW'"),
        (
            FULL,
            ["deepspeed.optimizer={type: prodigyopt.Prodigy}", "args.lr_decay_style=constant", "args.scale_lr=true"],
            "args.scale_lr",
            "finds its rate",
        ),
        (
            FULL,
            ["deepspeed.optimizer={type: schedulefree.AdamWScheduleFree}", "args.lr_decay_style=cosine"],
            "args.lr_decay_style",
            "averages its rate over the run",
        ),
        (FULL, ["args.checkpoint_activations=9"], "args.checkpoint_activations", "is 9, and the network has . blocks"),
        (FULL, ["args.keep_attention=true", "args.checkpoint_activations=false"], "args.keep_attention", "recompute"),
        (FULL, ["args.save=configs/toy.yaml/runs"], "args.save", "cannot be written to"),
        (FULL, [f"args.experiment_name={'x' * 250}"], "args.save", "File name too long"),
        (FULL, ["deepspeed.train_batch_size=3"], "deepspeed.train_batch_size", "is 3"),
        (FULL, ["args.resume=nowhere"], "args.resume", "holds no resume/latest"),
        (FULL, ["data.params.max_num_frames=6"], "data.params.max_num_frames", "nearest legal"),
        (FULL, ["deepspeed.fp16.enabled=true", "model.precision=fp16"], "fp16", "a CPU cannot do"),
        (FULL, ["args.device=cpu"], "args.device", "for sampling: training takes the device that it sees"),
        (FULL, ["args.attention=sage"], "args.attention", "sage"),
        (FULL, ["args.eval_interval=1", "args.num_steps=100000"], "args", "100000"),
        (FULL, ["args.step_cache=teacache", "args.eval_interval=1"], "args.step_cache", "fitted for the released"),
        (
            FULL,
            ["args.step_cache=first_block", "args.eval_interval=1", "deepspeed.zero_optimization.stage=3"],
            "args.step_cache",
            "gathers the weights of a block on all ranks at once",
        ),
        (
            FULL,
            ["args.mode=pretrain", "args.load=null", "model.network_config.params.transformer_args.skip_init=true"],
            "skip_init",
            "start from what is in memory",
        ),
        (FULL, ["args.eval_interval=1", "args.valid_data=null"], "args.eval_interval", "nothing to evaluate on"),
        (
            FULL,
            ["args.only_save_latents=true", "model.first_stage_config.params.ckpt_path=nowhere.pt"],
            "model.first_stage_config.params.ckpt_path",
            "there is no file 'nowhere.pt'",
        ),
    ],
)
def test_a_wrong_value_is_reported_with_its_key(plan, name, overrides, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(name, *overrides)
    assert any(problem.path.startswith(path) or path in problem.path for problem in caught.value.problems)


def test_an_offload_that_has_no_effect_warns(plan, caplog, monkeypatch):
    """Neither encoder is loaded if caches have all that they would encode."""
    monkeypatch.setattr("sgm.training.prepare.reasons_to_load", lambda *_: {"vae": "", "text_encoder": ""})
    plan(LORA, "args.network_offload=cpu")
    assert "args.network_offload=cpu has no effect: neither VAE nor T5 is loaded" in caplog.text


def test_a_network_without_a_method_that_a_setting_needs_is_named(training_yaml, tmp_path):
    overrides = [f"args.save={tmp_path}", "args.offload_activations=true"]
    checks = _Checks(load_config(training_yaml(FULL), overrides, mode="train"), for_card=False)
    with pytest.raises(ConfigError, match="args.offload_activations.* Linear has no method offload_activations"):
        checks._check_activations(torch.nn.Linear(1, 1))


def test_settings_of_an_optimizer_are_described_in_json():
    found = _plain((torch.tensor(0.5), 2, None, float("inf"), torch.float32))
    assert found == [0.5, 2, None, "inf", "torch.float32"] and json.dumps(found)


def test_the_precision_of_a_card_is_planned_for_on_a_cpu(plan):
    found = plan(FULL, "deepspeed.fp16.enabled=true", "model.precision=fp16", for_card=True)
    assert found.dtype is torch.float16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["args.valid_prompts=no_such_file.txt"], "no_such_file"),
        (["args.valid_prompts=['a red circle@@no_such_image.png']"], "no_such_image"),
    ],
)
def test_validation_prompts_are_read_before_training(plan, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan(I2V, "args.eval_interval=1", *overrides)


@pytest.mark.parametrize("params", ["{lr: 0.001, betta: 1}", "{lr: 0.001, betas: [2, 3]}"])
def test_parameters_of_the_optimizer_are_checked_before_weights_are_read(plan, params):
    with pytest.raises(ConfigError, match=r"deepspeed\.optimizer"):
        plan(FULL, "deepspeed.optimizer.type=AdamW", f"deepspeed.optimizer.params={params}")


def test_all_problems_are_reported_together(plan):
    overrides = ["args.load=nowhere", "args.train_data=[nothing]", "deepspeed.optimizer.type=torch.optim.Nothing"]
    with pytest.raises(ConfigError) as caught:
        plan(LORA, *overrides)
    assert {"args.load", "args.train_data", "deepspeed.optimizer"} <= {p.path for p in caught.value.problems}


def test_groups_that_do_not_divide_the_ranks_are_told_before_the_first_step(plan, monkeypatch):
    path = "model.loss_fn_config.params.sigma_sampler_config.params"
    spread = [f"{path}.uniform_sampling=true", f"{path}.group_num=3"]
    plan(LORA, *spread)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"group_num \(.*group_num 3 on 4 ranks.*set group_num to a divisor"):
        plan(LORA, *spread)


def test_missing_wandb_is_reported_before_a_run_folder_is_made(training_yaml, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = [
        "--base",
        *training_yaml(LORA),
        f"args.save={tmp_path / 'runs'}",
        "args.wandb=true",
        "args.train_iters=1",
    ]
    assert main(command) == 2
    assert not (tmp_path / "runs").exists()


def test_the_check_prints_the_report_and_writes_nothing(training_yaml, tmp_path, capsys):
    assert main(["--base", *training_yaml(LORA), f"args.save={tmp_path / 'runs'}", "--check"]) == 0
    assert "LoRA of rank 4" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_exits_with_two(training_yaml, tmp_path, capsys):
    assert main(["--base", *training_yaml(LORA), f"args.save={tmp_path / 'runs'}", "args.load=nowhere"]) == 2
    assert "args.load" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_missing_folder_of_validation_clips_is_named_by_its_key(plan):
    with pytest.raises(
        ConfigError, match=r"args.valid_data \(command line: args.valid_data=nowhere\): data folder 'no"
    ):
        plan(LORA, "args.valid_data=nowhere")


def test_a_resumed_run_is_named(plan, training_yaml, tmp_path, caplog):
    overrides = [f"args.save={tmp_path / 'runs'}", "args.train_iters=4", "args.exit_interval=1"]
    folder = train(load_config(training_yaml(LORA), overrides, mode="train")).folder
    found = plan(LORA, "args.train_iters=4", "args.resume=auto")
    assert found.resume is not None and found.resume.run == Path(folder)
    assert f"{folder}, from iteration 1" in found.report()
    assert plan(LORA, "args.train_iters=4", "args.resume=auto", "args.experiment_name=other").resume is None
    assert "an iteration takes" not in caplog.text
    plan(LORA, "args.train_iters=4", "args.resume=auto", "deepspeed.train_micro_batch_size_per_gpu=1")
    assert "an iteration takes 1 samples, and took 2 until iteration 1" in caplog.text


def test_a_check_refuses_the_resume_that_a_start_refuses_and_names_what_changed(training_yaml, tmp_path, caplog):
    overrides = [f"args.save={tmp_path / 'runs'}", "args.train_iters=2", "args.exit_interval=1"]
    train(load_config(training_yaml(LORA), overrides, mode="train"))

    def check(*more):
        config = load_config(training_yaml(LORA), [*overrides, "args.resume=auto", *more], mode="train")
        return prepare(config, check_clips=True)

    params = "model.network_config.params.modules.lora_config.params"
    for setting, said in (
        ("deepspeed.zero_optimization.stage=1", r"written with zero stage 0, and now it is 1"),
        (f"{params}.rank_stabilized=true", r"lora alpha .* \(.*rank_stabilized was not given and is true"),
        ("args.ema_decay=0.9", r"args.ema_decay \(command line: args.ema_decay=0.9\): the state in"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(setting)
    caplog.clear()
    assert check("args.seed=5").resume is not None and "args.seed was" in caplog.text


@pytest.mark.parametrize("file", ["rng_00.pt", "mp_rank_00_model_states.pt"])
def test_a_state_without_its_random_generators_is_resumed_on_request(training_yaml, tmp_path, file):
    overrides = [f"args.save={tmp_path / 'runs'}", "args.train_iters=2", "args.exit_interval=1"]
    run = train(load_config(training_yaml(LORA), overrides, mode="train")).folder
    (run / "resume" / "1" / file).unlink()
    again = [*overrides, "args.resume=auto", "args.exit_interval=null"]
    with pytest.raises(InputError, match=f"lacks {file}; ") as error:
        train(load_config(training_yaml(LORA), again, mode="train"))
    assert ("args.no_load_rng=true" in str(error.value)) == (file == "rng_00.pt")
    if file == "rng_00.pt":
        config = load_config(training_yaml(LORA), [*again, "args.no_load_rng=true"], mode="train")
        assert train(config).iteration == 2


def test_a_fresh_process_checks_an_optimizer_that_imports_the_compiler():
    program = (
        "from sgm.config.load import load_config; from sgm.training.prepare import prepare; prepare(load_config("
        "['configs/toy_lora.yaml', 'configs/toy_sft.yaml', 'configs/optimizer/adamw_8bit.yaml'], mode='train'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_adapters_of_a_resumed_run_keep_their_alpha(training_yaml, tmp_path):
    section = "model.network_config.params.modules.lora_config.params"
    overrides = [f"args.save={tmp_path / 'runs'}", "args.train_iters=4", "args.exit_interval=1"]
    train(load_config(training_yaml(LORA), [*overrides, f"{section}.lora_alpha=8"], mode="train"))
    shipped = tmp_path / "cogvideox_tiny_lora.yaml"  # as the shipped files, whose alpha is for new adapters
    params = {"network_config": {"params": {"modules": {"lora_config": {"params": {"lora_alpha": 64}}}}}}
    shipped.write_text(yaml.safe_dump({"model": params}))
    config = load_config([*training_yaml(LORA), shipped], [*overrides, "args.resume=auto"], mode="train")
    found = prepare(config)
    modules = found.config.model["network_config"]["params"]["modules"]
    assert modules["lora_config"]["params"]["lora_alpha"] == 8 and "alpha 8" in found.report()
