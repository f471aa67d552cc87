"""Sampling from a LoRA training folder, without further options."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sgm.inference.main import main
from sgm.models import video_diffusion
from sgm.util import instantiate_from_config
from sgm.weights.adapters import AdapterInfo, is_adapter
from sgm.weights.checkpoint import load_network, save_network
from sgm.weights.files import find_weights, weights_digest

LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, "lora_alpha": 3}}


@pytest.fixture
def sample(tiny_model, tmp_path, capsys):
    """Return a function: overrides → (exit code, latents or None, message)."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def sample(*words: str, base: Path | None = None):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        given = [f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={out}", "args.only_save_latents=true"]
        code = main(["--base", str(base or tiny_model("dit_t2v_2b")), *given, *words])
        files = list(out.glob("*/0/000000.safetensors"))
        said = capsys.readouterr()
        return code, load_file(files[0])["latents"] if files else None, said.out + said.err

    return sample


@pytest.fixture
def lora_yaml(tiny_model, tmp_path) -> Path:
    """The tiny model with its own lora_config."""
    config = yaml.safe_load(tiny_model("dit_t2v_2b").read_text())
    config["model"]["network_config"]["params"]["modules"]["lora_config"] = LORA
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "lora.yaml"


@pytest.fixture
def run_folder(lora_yaml, tmp_path, golden):
    """Return a function that saves adapters (`full`: with their base) as training does, and returns the folder."""

    def make(name: str, *, full: bool = False, fill: float = 0.2, recorded: str | None = None) -> Path:
        base = golden / "dit_t2v_2b" / "transformer"
        network = instantiate_from_config(yaml.safe_load(lora_yaml.read_text())["model"]["network_config"])
        load_network(network, base, generator=torch.Generator().manual_seed(0))
        for key, parameter in network.named_parameters():
            if ".matrix_B." in key:
                torch.nn.init.constant_(parameter, fill)
        digest = weights_digest(find_weights(base))
        info = AdapterInfo(rank=4, alpha=3, layers=(0, 1), base=recorded or str(base), base_digest=digest)
        tensors = {key: value for key, value in network.state_dict().items() if full or is_adapter(key)}
        save_network(tmp_path / name, 10, tensors, patch_size=2, adapters=info)
        return tmp_path / name

    return make


def test_a_run_folder_is_sampled_with_the_configuration_of_the_base(sample, run_folder, lora_yaml):
    code, base, _ = sample()
    assert code == 0
    _, adapted, said = sample(f"args.load={run_folder('run')}")
    assert (adapted - base).abs().max() > 1e-3 and "on the base" in said
    _, full, _ = sample(f"args.load={run_folder('full', full=True)}")
    _, explicit, _ = sample(f"args.load={run_folder('run')}", base=lora_yaml)
    assert torch.equal(adapted, full) and torch.equal(adapted, explicit)


def test_adapters_without_effect_give_the_base_bit_for_bit_and_a_warning(sample, run_folder):
    _, base, _ = sample()
    _, same, said = sample(f"args.load={run_folder('run', fill=0.0)}")
    assert torch.equal(base, same) and "have no effect" in said


def test_the_check_shows_what_the_file_says(sample, run_folder, golden):
    code, latents, said = sample(f"args.load={run_folder('run')}", "--check")
    assert code == 0 and latents is None
    row = next(line for line in said.splitlines() if line.startswith("LoRA"))
    assert row.split(None, 1)[1] == f"rank 4, alpha 3, 2 of 2 layers; trained on {golden / 'dit_t2v_2b/transformer'}"


def test_a_configuration_that_contradicts_the_file_is_refused_with_other_problems(sample, run_folder, lora_yaml):
    key = "model.network_config.params.modules.lora_config.params.lora_alpha"
    code, _, said = sample(
        f"args.load={run_folder('run')}", f"{key}=1", "args.input_file=nowhere.txt", "--check", base=lora_yaml
    )
    assert code == 2 and f"{key} (command line" in said and "trained with 3" in said and "nowhere.txt" in said


def test_another_base_is_refused_and_the_right_one_may_be_named(sample, run_folder, golden, tmp_path):
    folder = run_folder("run")
    other = torch.load(find_weights(golden / "dit_t2v_2b" / "transformer"), weights_only=True)
    other["module"]["model.diffusion_model.time_embed.0.bias"].add_(1)
    torch.save(other, tmp_path / "other.pt")
    code, _, said = sample(f"args.load={folder}", f"args.base={tmp_path / 'other.pt'}", "--check")
    assert code == 2 and "trained on another base" in said and "loading T5" not in said
    moved = run_folder("moved", recorded="no/such/base")
    code, _, said = sample(f"args.load={moved}", "--check")
    assert code == 2 and "'no/such/base'" in said and "args.base=" in said
    code, latents, _ = sample(f"args.load={moved}", f"args.base={golden / 'dit_t2v_2b' / 'transformer'}")
    assert code == 0 and latents is not None
    code, _, said = sample(f"args.base={folder}", "--check")
    assert code == 2 and "holds a whole network" in said


def test_loras_are_sampled_with_their_strength_at_each_step_and_recorded(sample, run_folder, tmp_path, monkeypatch):
    run, factors = run_folder("run"), []
    scale = video_diffusion.scale_adapters
    spy = lambda *given: (factors.append(given[2][:, 0].tolist()), scale(*given))  # noqa: E731
    monkeypatch.setattr(video_diffusion, "scale_adapters", spy)
    entry = f"{{path: {run}, strength: {{0: 0.5, 1: 0.25}}, schedule: [[0, 1], [0.5, 0]]}}"
    code, latents, said = sample(f"args.loras=[{entry}]")
    assert code == 0 and latents is not None and f"LoRA of {find_weights(run)}: rank 4, alpha 3" in said
    assert factors[-2:] == [[0.5, 0.25], [0, 0]], "of both layers in both steps"
    record = json.loads(next(tmp_path.glob("out*/*/0/*.json")).read_text())
    strength = {"0": 0.5, "1": 0.25}
    assert record["loras"] == [{"path": str(run), "strength": strength, "schedule": [[0, 1], [0.5, 0]]}]
    code, _, said = sample(f"args.loras=[{entry}, {{path: {run}}}]", "--check")
    assert code == 0 and "strength 0.25 to 0.5, by layer, of the steps 1 at 0; 0 at 0.5" in said and "LoRA 1" in said
