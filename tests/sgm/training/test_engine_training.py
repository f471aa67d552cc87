"""Every model family in the training module: losses and gradients of the reference, and two steps of a run."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

from benchmarks.diffusers_peer import network_peer, run_network_peer
from benchmarks.models import NetworkSize, build_network, build_vae, network_section, vae_section
from sgm.config.load import load_config
from sgm.conversion.diffusers.verify import peer_rope
from sgm.conversion.lora import export_lora
from sgm.models.video_diffusion import TrainingInputs
from sgm.training.metrics import read_metrics
from sgm.training.optim.optimizer import make_optimizer
from sgm.training.optim.schedule import LearningRate
from sgm.training.optim.trainable import choose_trainable
from sgm.training.run import train
from sgm.training.step import TrainingModule, start_deepspeed
from sgm.util import instantiate_from_config
from sgm.weights.checkpoint import load_network, save_autoencoder, save_network
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.lazy import compute
from tests.marks import only

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
FAMILIES = ["dit_t2v_2b", "dit_i2v_5b", "dit_t2v_1.5", "dit_t2v_5b_lora"]
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("cogvideox*.yaml"))
# Each kind of positions, of conditions and of trained weights once; the other files combine them.
DIFFERENT = ("cogvideox_2b", "cogvideox_5b_lora", "cogvideox_5b_i2v", "cogvideox1.5_5b_i2v_lora")
SMALL = NetworkSize(
    hidden_size=64,
    num_attention_heads=2,
    num_layers=2,
    time_embed_dim=32,
    latents=(3, 4, 6),
    text_length=6,
    text_hidden_size=24,
)


# Losses of two steps, recorded on a CPU in float32, with the networks of the golden data or, for released models,
# random ones of size `SMALL`. Clips differ slightly between versions of the video codec.
TOLERANCE = 1e-3
LOSSES = {
    "dit_t2v_2b": [1.519668, 1.409706],
    "dit_i2v_5b": [0.649991, 0.642679],
    "dit_t2v_1.5": [0.795061, 0.699462],
    "dit_t2v_5b_lora": [0.521574, 0.684918],
    "cogvideox1.5_5b": [0.548414, 0.643127],
    "cogvideox1.5_5b_i2v": [0.852082, 0.555450],
    "cogvideox1.5_5b_i2v_lora": [1.120240, 0.833207],
    "cogvideox1.5_5b_lora": [0.847154, 0.935493],
    "cogvideox_2b": [1.488011, 1.415313],
    "cogvideox_2b_lora": [1.738233, 1.666492],
    "cogvideox_5b": [0.554453, 0.617548],
    "cogvideox_5b_i2v": [0.845363, 0.553941],
    "cogvideox_5b_i2v_lora": [1.115993, 0.816799],
    "cogvideox_5b_lora": [0.814823, 0.866696],
}


def golden_engine(tiny_model, golden, name, *, checkpoint_activations=False):
    """Return the model of a golden network, with its weights, and the golden tensors."""
    config = load_config([tiny_model(name)], ["args.input_file=none.txt"], mode="inference")
    section = config.engine
    transformer = section["params"]["network_config"]["params"].setdefault("transformer_args", {})
    transformer["checkpoint_activations"] = checkpoint_activations
    engine = instantiate_from_config(section, allocate=False)
    engine.load_weights(str(config.args.load), dtype=torch.float32, device=CPU)
    return engine, config, load_file(golden / name / "io.safetensors")


def golden_inputs(tensors) -> TrainingInputs:
    cond = {"crossattn": tensors["context"]}
    if "concat" in tensors:
        cond["concat"] = tensors["concat"]
    return TrainingInputs(tensors["latents"], cond, tensors["loss.idx"], tensors["loss.noise"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_the_training_module_gives_the_loss_of_the_reference(tiny_model, golden, name, recompute):
    engine, _, tensors = golden_engine(tiny_model, golden, name, checkpoint_activations=recompute)
    losses = TrainingModule(engine)(golden_inputs(tensors))
    assert losses.dtype == torch.float32
    assert (losses - tensors["loss.seed4321"]).abs().max() <= 1e-5
    losses.mean().backward()
    assert all(p.grad is not None for p in engine.network.parameters() if p.requires_grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_get_the_gradient_of_the_reference(tiny_model, golden, recompute):
    engine, config, tensors = golden_engine(tiny_model, golden, "dit_t2v_5b_lora", checkpoint_activations=recompute)
    trained = choose_trainable(engine.network, {**config.model, "not_trainable_prefixes": ["all"]})
    module = TrainingModule(engine)
    module.model.diffusion_model(tensors["latents"], tensors["timesteps"], tensors["context"]).square().sum().backward()
    assert {name for name, p in engine.network.named_parameters() if p.grad is not None} == set(trained.names)
    gradient = engine.network.get_parameter("transformer.layers.0.attention.query_key_value.matrix_A.0").grad
    expected = tensors["grad.matrix_A0"]
    assert (gradient - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_step_follows_the_gradient_of_the_reference(tiny_model, golden, stage):
    """SGD with rate 1: the change of the matrix is the gradient given to the optimizer."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine, config, tensors = golden_engine(tiny_model, golden, "dit_t2v_5b_lora")
    choose_trainable(engine.network, {**config.model, "not_trainable_prefixes": ["all"]})

    def output_energy(_inputs):
        network = engine.model.diffusion_model
        return network(tensors["latents"], tensors["timesteps"], tensors["context"]).square().sum()[None]

    engine.training_losses = output_energy
    module = TrainingModule(engine)
    section = {"type": "torch.optim.SGD", "params": {"lr": 1.0}}
    optimizer = make_optimizer(section, module.named_parameters())
    schedule = LearningRate(optimizer, lambda update: 1.0)
    deepspeed = start_deepspeed(
        module,
        optimizer,
        schedule,
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31 - 1,
        },
    )
    name = "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0"
    parameter = dict(deepspeed.module.named_parameters())[name]

    def value() -> torch.Tensor:
        return (parameter if stage == 0 else safe_get_full_fp32_param(parameter)).detach().clone()

    before = value()
    deepspeed.backward(deepspeed(None).mean())
    deepspeed.step()
    expected = tensors["grad.matrix_A0"]
    assert (before - value() - expected).norm() / expected.norm() <= 1e-4


@pytest.mark.parametrize("name", only(["dit_i2v_5b", "dit_t2v_1.5"], FAMILIES))
def test_every_family_takes_two_steps(training_yaml, tmp_path, name):
    config = load_config(training_yaml(name), ["args.train_iters=2", f"args.save={tmp_path}"], mode="train")
    summary = train(config)
    assert summary.iteration == summary.total == 2
    lines = read_metrics(summary.folder / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES[name], rel=TOLERANCE)
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory) -> tuple[dict, Path]:
    """The section and the weights file of a released VAE at small width."""
    torch.manual_seed(0)
    section = vae_section("cogvideox_5b", ch=32, num_res_blocks=1)
    path = tmp_path_factory.mktemp("vae") / "3d-vae.pt"
    return section, save_autoencoder(path, build_vae(section))


def small_training(name, small_vae, t5_folder, clips, tmp_path, *overrides, alpha=1):
    """Return the configuration of a training of a shipped model at reduced width."""
    vae, vae_file = small_vae
    network = network_section(name, SMALL)
    num_frames = network["params"]["num_frames"]
    lora = network["params"]["modules"].get("lora_config")
    if lora is not None:  # adapters need a base
        lora["params"] |= {"r": 4, "lora_alpha": alpha}
        torch.manual_seed(0)
        plain = network_section(name.removesuffix("_lora"), SMALL)
        save_network(tmp_path / "base", 1, build_network(plain), patch_size=plain["params"]["patch_size"])
    vae["params"]["ckpt_path"] = str(vae_file)
    path = tmp_path / "small.yaml"
    changes = {
        "args": {
            "mode": "pretrain" if lora is None else "finetune",
            "load": None if lora is None else str(tmp_path / "base"),
            "train_data": [str(clips)],
            "split": "1,0,0",
            "eval_interval": None,
            "num_workers": 0,
            "train_iters": 2,
            "save": str(tmp_path / "runs"),
            "log_interval": 1,
            "resume": "none",
        },
        "model": {"precision": "fp32", "network_config": network, "first_stage_config": vae},
        "data": {"params": {"video_size": [32, 48], "fps": 8, "max_num_frames": num_frames, "skip_frms_num": 0}},
        "deepspeed": {"train_micro_batch_size_per_gpu": 2},
    }
    path.write_text(yaml.safe_dump(changes))
    embedder = "model.conditioner_config.params.emb_models.0.params"
    text = [f"{embedder}.model_dir={t5_folder}", f"{embedder}.max_length=6"]
    bases = [ROOT / "configs" / f"{name}.yaml", ROOT / "configs" / "sft.yaml", path]
    return load_config(bases, [*text, *overrides], mode="train")


@pytest.mark.parametrize(
    "name", [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED]
)
def test_every_shipped_model_takes_two_steps_at_reduced_width(name, small_vae, t5_folder, clips, tmp_path):
    summary = train(small_training(name, small_vae, t5_folder, clips, tmp_path))
    losses = [line["loss"] for line in read_metrics(summary.folder / "metrics.jsonl")]
    assert losses == pytest.approx(LOSSES[name], rel=TOLERANCE)


@pytest.mark.parametrize(
    "name", [pytest.param("cogvideox1.5_5b_lora", marks=pytest.mark.slow), "cogvideox1.5_5b_i2v_lora"]
)
def test_a_lora_with_temporal_patches_resumes_and_loads_in_diffusers(name, small_vae, t5_folder, clips, tmp_path):
    def run(*more):
        changes = ["args.lr_decay_style=constant", "args.auto_warmup_iters=0", "args.warmup=0", *more]
        changes.append("deepspeed.optimizer.params.lr=0.05")
        return train(small_training(name, small_vae, t5_folder, clips, tmp_path, *changes, alpha=2)).folder

    straight = run("args.experiment_name=straight", "args.train_iters=3")
    begun = run("args.experiment_name=begun")
    resumed = run("args.experiment_name=begun", f"args.resume={begun}", "args.train_iters=3")
    ours, theirs = (read_tensors(find_weights(folder)) for folder in (straight, resumed))
    assert all(torch.equal(compute(ours[key]), compute(theirs[key])) for key in ours)

    export_lora(straight, tmp_path / "out")
    section = network_section(name, SMALL)
    section["params"]["modules"]["lora_config"]["params"] = {"r": 4, "lora_alpha": 2}
    network = build_network(section)
    load_network(network, straight)
    plain = build_network(network_section(name.removesuffix("_lora"), SMALL))
    load_network(plain, tmp_path / "base")
    peer = network_peer(plain)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=peer, scheduler=None)
    generator = torch.Generator().manual_seed(1)
    frames, height, width = SMALL.latents
    x = torch.randn(1, frames + frames % 2, network.in_channels, height, width, generator=generator)
    context = torch.randn(1, SMALL.text_length, SMALL.text_hidden_size, generator=generator)
    ofs = torch.full((1,), 2.0) if "i2v" in name else None
    with torch.no_grad():
        expected = network(x, torch.tensor([500]), context, **({} if ofs is None else {"ofs": ofs}))
        rope = peer_rope(peer, x)
        before = run_network_peer(pipe.transformer, x, torch.tensor([500]), context, ofs=ofs, rope=rope)
        pipe.load_lora_weights(str(tmp_path / "out"))
        after = run_network_peer(pipe.transformer, x, torch.tensor([500]), context, ofs=ofs, rope=rope)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)
    assert (before - expected).abs().max() > 1e-3
