"""Training at timesteps that are drawn by their loss: the same on all ranks, and after a kill."""

import json

import pytest
import torch

from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling, LossMoments
from sgm.training.run import TrainingRun
from sgm.training.state import FOLDER
from sgm.util import RunError
from sgm.weights.files import find_weights, read_tensors
from tests.processes import only_run, train_all

LORA = "dit_t2v_5b_lora"
BY_LOSS = "model.loss_fn_config.params.sigma_sampler_config.params.distribution=loss"
SOON = {"NUM_RANGES": 2, "ENOUGH": 2, "HORIZON": 6}  # for runs of few samples
BATCH = ["deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.gradient_accumulation_steps=2"]


@pytest.fixture
def soon(monkeypatch):
    for name, value in SOON.items():
        monkeypatch.setattr(LossMoments, name, value)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def state(run):
    folder = run / FOLDER
    return json.loads((folder / (folder / "latest").read_text().strip() / "resume.json").read_text())["timesteps"]


def test_a_killed_run_draws_on_as_if_it_had_not_been(job, soon, monkeypatch):
    given = [BY_LOSS, *BATCH, "args.train_iters=5", "args.save_interval=2"]
    straight = job(LORA, *given, save="straight").folder
    step = TrainingRun._step

    def killed(run, *args):
        if run.iteration == 3:  # one after the last save: what the sampler has seen since is lost
            raise RunError("killed")
        return step(run, *args)

    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(TrainingRun, "_step", killed)
        job(LORA, *given)
    resumed = job(LORA, *given, "args.resume=auto").folder
    assert losses(resumed) == losses(straight)
    one, two = (read_tensors(find_weights(run)) for run in (straight, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert state(resumed) == state(straight) and sum(state(straight)["counts"]) == 20
    moments = LossMoments(1000)
    moments.load_state(state(straight))
    assert moments.shares()[0] != pytest.approx(0.5, abs=0.01), "by their losses, no longer all alike"


def test_a_sample_counts_by_the_inverse_of_how_often_it_is_drawn(job, soon, monkeypatch):
    """A weight of 3 gives three times the gradient, and the loss that is written is a weighted mean."""
    lines = []
    for weight in (1.0, 3.0):
        monkeypatch.setattr(DiscreteSampling, "weights", lambda _, idx, w=weight: torch.full((len(idx),), w))
        run = job(LORA, BY_LOSS, "args.train_iters=1", save=f"{weight:g}").folder
        lines.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert lines[1]["grad_norm"] == pytest.approx(3 * lines[0]["grad_norm"], rel=1e-4)
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)


@pytest.mark.thorough
def test_all_ranks_draw_by_the_losses_of_all(training_yaml, tmp_path):
    """A rank that knew its own losses alone would draw other timesteps than a run on one rank."""
    for world in (1, 2):
        words = [BY_LOSS, "args.train_iters=5", f"deepspeed.train_micro_batch_size_per_gpu={4 // world}"]
        save = tmp_path / str(world)
        content = {"bases": training_yaml(LORA), "overrides": [*words, f"args.save={save}"], "moments": SOON}
        train_all([content], tmp_path, world)
    one, two = (only_run(tmp_path / str(world)) for world in (1, 2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert state(two)["counts"] == state(one)["counts"] and sum(state(one)["counts"]) == 20
    assert state(two)["means"] == pytest.approx(state(one)["means"], rel=1e-4)
