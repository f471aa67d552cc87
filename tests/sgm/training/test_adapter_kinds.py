"""Training adapters that are not LoRA: exact resume, and what is refused."""

import pytest

from sgm.config.load import ConfigError, load_config
from sgm.training.prepare import prepare
from sgm.weights.adapters import kind_of, read_adapter_info
from tests.sgm.training.test_frozen import FULL, LORA, OFFLOAD, equal, losses, weights

SECTION = "model.network_config.params.modules.lora_config"
DORA = [
    f"{SECTION}={{target: sat.model.finetune.lora2.LoraMixin, params: {{r: 4, kind: dora}}}}",
    "model.not_trainable_prefixes=[all]",
]


@pytest.mark.parametrize("settings", [[], ["model.precision=bf16", "args.base_weights=nf4", *OFFLOAD["blocks"]]])
def test_dora_resumes_exactly(job, settings):
    words = [*DORA, "args.lr_decay_iters=4", "deepspeed.optimizer.params.lr=1e-3", *settings]
    whole = job(FULL, "args.train_iters=4", *words, save="whole").folder
    half = job(FULL, "args.train_iters=2", *words).folder
    resumed = job(FULL, "args.train_iters=4", f"args.resume={half}", *words).folder
    assert resumed == half and losses(resumed) == losses(whole) and equal(weights(resumed), weights(whole))
    names = weights(whole)
    assert kind_of(names) == read_adapter_info(whole).kind == "dora"
    before = weights(half / "2")
    changed = [not before[name].equal(tensor) for name, tensor in names.items() if ".magnitude." in name]
    assert len(changed) == 8 and any(changed)
    with pytest.raises(ConfigError, match=r"(?s)params.kind.*was written with lora kind dora, and now it is lora"):
        job(FULL, "args.train_iters=6", f"args.resume={half}", *words, f"{SECTION}.params.kind=lora")


def test_stage_3_is_refused(training_yaml, tmp_path):
    words = [*DORA, f"args.save={tmp_path}", "deepspeed.zero_optimization.stage=3"]
    with pytest.raises(ConfigError, match=r"(?s)params.kind.*is dora, which needs whole rows.*ZeRO stage 3"):
        prepare(load_config(training_yaml(FULL), words, mode="train"))


def test_weights_with_adapters_of_another_kind_are_refused(training_yaml, tmp_path):
    words = [f"{SECTION}.params.kind=dora", f"args.save={tmp_path}"]
    with pytest.raises(ConfigError, match="holds LoRA, and the configuration says kind: dora"):
        prepare(load_config(training_yaml(LORA), words, mode="train"))
