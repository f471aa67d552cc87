"""Training adapters that are not LoRA: exact resume, memory, and what is refused."""

import re

import pytest
import torch

from sgm.checks.measure import network_usage
from sgm.checks.meta_run import build
from sgm.checks.sampling import dry_run
from sgm.config.load import ConfigError, load_config
from sgm.training.optim.trainable import choose_trainable
from sgm.training.prepare import prepare
from sgm.weights.adapters import TITLES, kind_of, read_adapter_info, with_adapters
from sgm.weights.files import PREFIX
from sgm.weights.lora.names import GROUPS, groups_of
from tests.marks import thorough
from tests.sgm.checks.live_bytes import BATCH, LATENTS, network_section
from tests.sgm.training.test_frozen import FULL, LORA, OFFLOAD, TOY, VIDEO, equal, losses, weights

SECTION = "model.network_config.params.modules.lora_config"


def adapters(kind):
    """Return words for training such adapters of a network without any."""
    params = f"{{target: sat.model.finetune.lora2.LoraMixin, params: {{r: 4, kind: {kind}}}}}"
    return [f"{SECTION}={params}", "model.not_trainable_prefixes=[all]"]


@pytest.mark.parametrize(
    ("kind", "num", "settings"),
    [
        pytest.param("dora", 8, [], marks=pytest.mark.slow),
        ("dora", 8, ["model.precision=bf16", "args.base_weights=nf4", *OFFLOAD["blocks"]]),
        thorough("lokr", 16, ["deepspeed.zero_optimization.stage=2"]),
    ],
)
def test_a_run_resumes_exactly(job, tiny_model, kind, num, settings):
    words = [*adapters(kind), "args.lr_decay_iters=4", "deepspeed.optimizer.params.lr=1e-3", *settings]
    whole = job(FULL, "args.train_iters=4", *words, save="whole").folder
    half = job(FULL, "args.train_iters=2", *words).folder
    resumed = job(FULL, "args.train_iters=4", f"args.resume={half}", *words).folder
    assert resumed == half and losses(resumed) == losses(whole) and equal(weights(resumed), weights(whole))
    names = weights(whole)
    assert kind_of(names) == read_adapter_info(whole).kind == kind
    sampling = load_config([tiny_model(FULL)], [f"args.load={whole}", "args.prompt=x"], mode="inference")
    assert re.search(rf"^{TITLES[kind]} +rank", dry_run(with_adapters(sampling)), re.MULTILINE)
    before = weights(half / "2")
    changed = [not before[name].equal(t) for name, t in names.items() if ".magnitude." in name or ".lokr_" in name]
    assert len(changed) == num and any(changed)
    with pytest.raises(ConfigError, match=rf"(?s)params.kind.*was written with lora kind {kind}, and now it is lora"):
        job(FULL, "args.train_iters=6", f"args.resume={half}", *words, f"{SECTION}.params.kind=lora")


def test_stage_3_is_refused(training_yaml, tmp_path):
    words = [*adapters("dora"), f"args.save={tmp_path}", "deepspeed.zero_optimization.stage=3"]
    with pytest.raises(ConfigError, match=r"(?s)params.kind.*is dora, which needs whole rows.*ZeRO stage 3"):
        prepare(load_config(training_yaml(FULL), words, mode="train"))


def test_weights_with_adapters_of_another_kind_are_refused(training_yaml, tmp_path):
    words = [f"{SECTION}.params.kind=dora", f"args.save={tmp_path}"]
    with pytest.raises(ConfigError, match="holds LoRA, and the configuration says kind: dora"):
        prepare(load_config(training_yaml(LORA), words, mode="train"))


def test_memory_counts_magnitudes_and_what_their_gradients_keep():
    """Six layers of a width, on meta tensors."""
    found = {}
    for kind in ("lora", "dora", "lokr"):
        section = network_section(model="cogvideox_5b_lora", layers=6)
        section["params"]["modules"]["lora_config"]["params"]["kind"] = kind
        names = frozenset(choose_trainable(build(section), {"lora_train": True}).names)
        config = load_config(TOY, mode="train")
        config.model["network_config"] = section
        found[kind] = network_usage(config, VIDEO, BATCH, torch.bfloat16, trained=names)
        width = section["params"]["hidden_size"]
    lora, dora, lokr = found["lora"], found["dora"], found["lokr"]
    assert lokr.trained == 6 * 4 * (16 * 16 + 24 * 24), "384 is 16·24: w1, and w2 that is whole with r 16"
    assert dora.trained - lora.trained == 6 * 4 * width
    tokens = BATCH * (16 + LATENTS[0] * LATENTS[2] * LATENTS[3] // 4)
    assert dora.peak - lora.peak >= 6 * 4 * width * tokens, "the outputs of the projections, at least a byte each"


@pytest.mark.thorough
def test_a_run_with_all_targets_resumes_exactly(job):
    """Of rank 4, scaled by alpha / √r: the file records the numerator of alpha / r, alpha·√r."""
    params = "{r: 4, lora_alpha: 2, rank_stabilized: true, targets: [attention, ff, adaln, patch, text]}"
    words = [f"{SECTION}={{target: sat.model.finetune.lora2.LoraMixin, params: {params}}}"]
    words += ["model.not_trainable_prefixes=[all]", "args.lr_decay_iters=4", "deepspeed.optimizer.params.lr=1e-3"]
    whole = job(FULL, "args.train_iters=2", *words, save="whole").folder
    half = job(FULL, "args.train_iters=1", *words).folder
    resumed = job(FULL, "args.train_iters=2", f"args.resume={half}", *words).folder
    assert resumed == half and losses(resumed) == losses(whole) and equal(weights(resumed), weights(whole))
    info, before, after = read_adapter_info(whole), weights(half / "1"), weights(whole)
    assert info.alpha == 4 and info.groups == groups_of(name.removeprefix(PREFIX) for name in after) == tuple(GROUPS)
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items() if ".matrix_B." in name)
    with pytest.raises(ConfigError, match="was written with trained 17504, and now it is 4096"):
        job(FULL, "args.train_iters=3", f"args.resume={half}", *words, f"{SECTION}.params.targets=[attention]")
