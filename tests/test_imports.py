"""What commands import, in a fresh process, since the others have imported everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Steps that each import more than the one before, and the packages that none of them until then may import.
STEPS = {
    "help": (["main(['--help'])"], {"torch", "pydantic", "omegaconf", "deepspeed", "sat"}),
    "text encoder": (
        ["from sgm.modules import GeneralConditioner"],
        {"transformers", "sentencepiece", "sat", "deepspeed"},
    ),
    "a deepspeed section in sampling": (
        ["from sgm.config.load import load_config", "load_config(['configs/deepspeed/zero3.yaml'], mode='inference')"],
        {"deepspeed"},
    ),
    "an optimizer of SAT": (
        ["from sgm.training.optim.optimizer import *", "resolve_optimizer('sat.ops.FusedEmaAdam')"],
        {"sat"},
    ),
    "check": (
        ["main(['--base', 'configs/toy.yaml', 'configs/toy_inference.yaml', '--check'])"],
        {"transformers", "datasets", "wandb", "deepspeed", "diffusers", "torch._dynamo", "bitsandbytes"},
    ),
    "check of a training": (
        [
            "from sgm.training.main import main as train",
            "train(['--base', 'configs/toy_lora.yaml', 'configs/toy_sft.yaml', '--check'])",
        ],
        {"tensorboard", "matplotlib", "transformers", "wandb", "diffusers", "torch._dynamo", "kornia"},
    ),
}
PROGRAM = """
import contextlib, json, sys
from sgm.inference.main import main
found = {}
for name, (lines, heavy) in json.loads(sys.argv[1]).items():
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for line in lines:
                exec(line)
        end = None
    except (SystemExit, Exception) as error:
        end = repr(error)
    found[name] = (end, [package for package in heavy if package in sys.modules])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    steps = json.dumps({name: (lines, sorted(heavy)) for name, (lines, heavy) in STEPS.items()})
    done = subprocess.run([sys.executable, "-c", PROGRAM, steps], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_imports_no_more_than_it_needs(found, name):
    end, heavy = found[name]
    assert heavy == []
    if name == "a deepspeed section in sampling":
        assert "there is no model section" in end
    else:
        assert end == {"help": "SystemExit(0)"}.get(name)
