"""Training adapters on frozen weights that are stored in fewer bits, or wait in host memory."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sgm.training.build
import sgm.weights.offload
from sgm.checks.frozen import base_storage
from sgm.checks.measure import network_usage
from sgm.checks.meta_run import build
from sgm.config.load import ConfigError, load_config
from sgm.conversion.lora import FILE
from sgm.training.inputs.precompute import plan_jobs, run_jobs
from sgm.training.metrics import read_metrics
from sgm.training.optim.trainable import choose_trainable
from sgm.training.prepare import prepare
from sgm.training.run import train
from sgm.weights.files import find_weights, read_tensors
from sgm.weights.offload import Offload, without_frozen
from sgm.weights.quantize import LOSS_ON_TOY, StoredLinear, store
from tests.marks import only, thorough
from tests.processes import ROOT
from tests.sgm.checks.live_bytes import BATCH, LATENTS, network_section
from tools import export_sat_lora_weight, merge_lora_weight

TOY = ["configs/toy_lora.yaml", "configs/toy_sft.yaml"]
VIDEO = (LATENTS[0], 8 * LATENTS[2], 8 * LATENTS[3])
LORA, FULL = "dit_t2v_5b_lora", "dit_t2v_1.5"
QLORA = "model.network_config.params.modules.lora_config.params.qlora=true"
STORED = ("int8", "fp8", "nf4")
OFFLOAD = {
    "cpu": ["args.network_offload=cpu"],
    "blocks": ["args.network_offload=blocks", "args.checkpoint_activations=true"],
}


def losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(tensor) for name, tensor in read_tensors(find_weights(folder)).items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# One layer


@pytest.mark.parametrize("storage", STORED)
def test_a_gradient_passes_and_no_second_copy_of_the_weight_waits_for_it(storage):
    layer = nn.Linear(1024, 256).bfloat16()
    store(layer, storage)
    x, kept = torch.randn(3, 1024).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), out), "as in sampling"
    assert [type(tensor) for tensor in kept] == [type(layer.weight)] and type(layer.weight) is not nn.Parameter
    out.float().sum().backward()
    weight = layer.weight.dequantize()
    assert torch.equal(x.grad, torch.ones(3, 256).bfloat16() @ weight)


def test_four_bits_take_a_quarter_and_stay_close():
    layer = nn.Linear(512, 512).bfloat16()
    before = layer.weight.detach().clone()
    store(layer, "nf4")
    inner = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
    assert sum(part.nbytes for part in inner) <= 0.29 * before.nbytes
    assert torch.cosine_similarity(layer.weight.dequantize().float().flatten(), before.float().flatten(), 0) > 0.99
    moved = nn.Linear(512, 512).bfloat16()
    moved.weight = nn.Parameter(layer.weight.to("cpu"), requires_grad=False)
    assert torch.equal(moved.weight.dequantize(), layer.weight.dequantize())


# Runs


@pytest.mark.parametrize("storage", only(["int8"], STORED))
def test_adapters_learn_beside_weights_in_fewer_bits(job, kept_run, log, remembered, golden, tmp_path, storage):
    plain = kept_run(LORA, "args.train_iters=2")
    summary = job(LORA, "args.train_iters=2", f"args.base_weights={storage}")
    assert len(remembered) == 5 * 2, "five in each block"
    assert all(torch.equal(layer.weight.dequantize(), old) for layer, old in remembered.items()), "not a bit is trained"
    assert losses(summary.folder) == pytest.approx(losses(plain), rel=0.02) and losses(summary.folder) != losses(plain)
    assert weights(summary.folder).keys() == weights(plain).keys(), "adapters alone, in their own precision"
    assert {t.dtype for t in weights(summary.folder).values()} == {t.dtype for t in weights(plain).values()}
    assert f"linear layers in {storage}" in log.text and f"LoRA is {LOSS_ON_TOY[storage]}, see" in log.text
    for tool, word in ((merge_lora_weight, "--output_path"), (export_sat_lora_weight, "--lora_save_directory")):
        assert tool.main(["--sat_pt_path", str(summary.folder), word, str(tmp_path / tool.__name__)]) == 0
    base, merged = weights(golden / LORA / "transformer"), weights(tmp_path / merge_lora_weight.__name__)
    matrices, name = weights(summary.folder), "model.diffusion_model.transformer.layers.1.attention.dense"
    scale = torch.load(find_weights(summary.folder), weights_only=True)["lora"]["alpha"] / 4
    delta = scale * matrices[f"{name}.matrix_B.0"] @ matrices[f"{name}.matrix_A.0"]
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.original.weight"] + delta, rtol=0, atol=1e-6)
    assert all(torch.equal(merged[name], base[name]) for name in merged if "attention" not in name), "the original base"
    exported = load_file(tmp_path / export_sat_lora_weight.__name__ / FILE)
    assert sum(t.numel() for t in exported.values()) == sum(t.numel() for t in matrices.values())


@pytest.mark.slow
def test_the_toy_learns_on_stored_weights_nearly_as_on_its_own(tmp_path, monkeypatch):
    """The mean loss of 60 steps: of a toy that has learned, the error of the stored weights is a share of the loss."""
    monkeypatch.chdir(ROOT)
    words = ["args.train_iters=60", "args.log_interval=5", "args.save_interval=1000", "args.eval_interval=null"]
    config = load_config(TOY, words, mode="train")
    run_jobs(plan_jobs(config, ("text", "latents")), tmp_path / "cache")
    words += [f"args.{name}={tmp_path / 'cache'}" for name in ("latent_cache", "text_cache")]
    curves = {}
    for storage in ("bf16", *STORED):
        own = [f"args.save={tmp_path / storage}", f"args.base_weights={storage}"]
        curves[storage] = losses(train(load_config(TOY, [*words, *own], mode="train")).folder)
    more = {storage: [a / b - 1 for a, b in zip(curves[storage], curves["bf16"], strict=True)] for storage in STORED}
    whole = {storage: sum(curves[storage]) / sum(curves["bf16"]) - 1 for storage in STORED}
    assert len(curves["bf16"]) == 12 and max(map(abs, more["int8"])) < 0.01 and abs(whole["int8"]) < 0.005
    assert max(map(abs, more["fp8"])) < 0.02 and abs(whole["fp8"]) < 0.01
    assert 0 < whole["nf4"] < 0.35 and more["nf4"][-1] < more["nf4"][0] / 2, "adapters make up for some of it"


def test_the_page_has_the_figures_that_the_log_says():
    for page in ("docs/memory.md", "docs/zh/memory.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"\n| `{storage}` | {figure} | " in text for storage, figure in LOSS_ON_TOY.items())


@pytest.fixture
def remembered(monkeypatch) -> dict[nn.Module, torch.Tensor]:
    """The stored layers of the blocks, and their weights before training."""
    found = {}

    def remember(network, *args):
        layers = (layer for block in network.blocks for part in block for layer in part.modules())
        found.update({layer: layer.weight.dequantize().clone() for layer in layers if type(layer) is StoredLinear})
        return choose(network, *args)

    choose = sgm.training.build.choose_trainable
    monkeypatch.setattr("sgm.training.build.choose_trainable", remember)
    return found


@pytest.mark.parametrize("how", OFFLOAD)
def test_weights_that_wait_in_host_memory_change_no_bit(job, kept_run, how):
    plain = kept_run(LORA, "args.train_iters=2")
    away = job(LORA, "args.train_iters=2", *OFFLOAD[how]).folder
    assert losses(away) == losses(plain) and equal(weights(away), weights(plain))


@pytest.mark.parametrize(("cached", "copies"), [(True, (1 + 2) + (1 + 2)), thorough(False, (2 + 1 + 2) + (2 + 1 + 2))])
def test_a_network_leaves_only_while_something_else_runs(job, training_yaml, tmp_path, monkeypatch, cached, copies):
    """Twice two steps and an evaluation, of one batch and two videos.

    From caches the network comes for the first step after each evaluation, and for each video, whose decoding it leaves
    for; without, for each step and each batch as well.
    """
    words = ["args.eval_interval=2", "args.train_iters=4", "args.sampling_num_frames=2", "args.num_steps=2"]
    words += ["args.network_offload=cpu", "args.eval_iters=1", "args.eval_batch_size=2"]
    if cached:
        jobs = plan_jobs(load_config(training_yaml(LORA), mode="train"), ("text", "latents"))
        run_jobs(jobs, tmp_path / "cache")
        words += [f"args.{name}={tmp_path / 'cache'}" for name in ("latent_cache", "text_cache")]
    found = []

    def start(waiting):
        if waiting._places and not waiting._copies:
            found.append(waiting)
        begin(waiting)

    begin = sgm.weights.offload._Waiting.start
    monkeypatch.setattr(sgm.weights.offload._Waiting, "start", start)
    assert len(job(LORA, *words).samples) == 2 * 2
    assert len(found) == copies


@pytest.mark.parametrize("storage", only(["nf4"], STORED))
def test_a_run_on_stored_weights_resumes_exactly(job, storage):
    offload = OFFLOAD["blocks" if storage == "int8" else "cpu"]
    settings = (f"args.base_weights={storage}", "args.lr_decay_iters=2", *offload)
    whole = job(LORA, "args.train_iters=2", *settings).folder
    half = job(LORA, "args.train_iters=1", *settings).folder
    resumed = job(LORA, "args.train_iters=2", f"args.resume={half}", *settings).folder
    assert resumed == half and losses(resumed) == losses(whole) and equal(weights(resumed), weights(whole))


def test_a_run_on_stored_weights_is_evaluated_and_sampled_as_others_are(job):
    words = ["args.eval_interval=2", "args.sampling_num_frames=2", "args.only_log_video_latents=true"]
    words += ["args.num_steps=2", "args.train_iters=2"]
    summary = job(LORA, *words, "args.base_weights=int8", *OFFLOAD["blocks"])
    assert summary.samples and "validation_loss" in read_metrics(summary.folder / "metrics.jsonl")[-1]
    assert not any("original" in name for name in weights(summary.folder)), "the base is read from its own file"


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_shards_the_adapters_beside_stored_weights(job, stage):
    words = ["model.precision=bf16", f"deepspeed.zero_optimization.stage={stage}", "args.base_weights=int8"]
    folder = job(LORA, "args.train_iters=2", *words, *OFFLOAD["blocks"]).folder
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}


def test_the_switch_of_sat_stores_in_four_bits(training_yaml, tmp_path):
    for words, storage in (([QLORA], "nf4"), ([QLORA, "args.base_weights=bf16"], None), ([], None)):
        config = load_config(training_yaml(LORA), [f"args.save={tmp_path}", *words], mode="train")
        assert base_storage(config) == storage == prepare(config).base_storage


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        (FULL, ["args.base_weights=int8"], "which is for frozen weights, and this run trains them"),
        (FULL, ["args.network_offload=cpu"], "which is for frozen weights, and this run trains them"),
        (LORA, ["args.base_weights=nf4", "deepspeed.zero_optimization.stage=3"], "ZeRO stage 3 shards frozen weights"),
        (LORA, ["args.base_weights=fp8", "args.save_full=true"], "tools/merge_lora_weight.py writes adapters and the"),
        (LORA, [QLORA, "args.mode=pretrain", "args.load=null"], "there are no weights to store"),
        (LORA, ["args.network_offload=blocks", "args.checkpoint_activations=false"], "set args.checkpoint_activations"),
        (LORA, ["args.network_offload=blocks", "args.checkpoint_activations=1"], "not all blocks are recomputed"),
        (LORA, ["args.network_offload=blocks", "args.checkpoint_activations=auto"], "not all blocks are recomputed"),
        (LORA, [*OFFLOAD["blocks"], "args.compile=true"], "a compiled block is bound to its weights"),
        (LORA, ["args.weights=int8"], "set args.base_weights=int8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(training_yaml, tmp_path, name, words, said):
    with pytest.raises(ConfigError, match=said):
        prepare(load_config(training_yaml(name), [f"args.save={tmp_path}", *words], mode="train"))


@pytest.mark.parametrize("storage", STORED)
def test_a_missing_package_is_named(training_yaml, tmp_path, monkeypatch, storage):
    monkeypatch.setattr("sgm.weights.quantize._is_installed", lambda package: False)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'cogvideox-sat\[lowmem\]'"):
        prepare(
            load_config(training_yaml(LORA), [f"args.save={tmp_path}", f"args.base_weights={storage}"], mode="train")
        )


# Blocks in a backward pass


def test_blocks_come_in_the_order_of_both_passes():
    blocks = [[nn.Linear(2, 2).requires_grad_(False)] for _ in range(4)]
    offload = Offload(
        nn.ModuleList(part for block in blocks for part in block), torch.device("cpu"), blocks, backward=True
    )
    here = []
    for index in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1):
        with offload.block(index):
            here.append([number for number, waiting in enumerate(offload._blocks) if waiting._copies])
    assert here == [[0, 1], [1, 2], [2, 3], [3], [2, 3], [1, 2], [0, 1], [0], [0, 1], [1, 2]]


def test_a_step_holds_two_blocks_at_most():
    """Six layers of a released width, on meta tensors."""
    section = network_section(model="cogvideox_5b_lora", layers=6)
    network = build(section)
    names = frozenset(choose_trainable(network, {"lora_train": True}).names)
    own = [
        sum(p.numel() for part in block for p in part.parameters() if not p.requires_grad) for block in network.blocks
    ]
    rest = sum(p.numel() for p in network.parameters() if not p.requires_grad) - sum(own)

    def peak(*words):
        config = load_config(TOY, ["args.checkpoint_activations=true", *words], mode="train")
        config.model["network_config"] = section
        return network_usage(config, VIDEO, BATCH, torch.bfloat16, trained=names).peak

    assert peak("args.network_offload=blocks") - peak() <= 2 * (2 * max(own) + rest)


def _frozen(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)


def test_without_frozen_leaves_the_trained_parameters():
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    names = [name for name, _ in module.named_parameters()]
    with pytest.raises(KeyError), without_frozen(module):
        assert [name for name, _ in module.named_parameters()] == ["1.weight", "1.bias"]
        raise KeyError
    assert [name for name, _ in module.named_parameters()] == names
