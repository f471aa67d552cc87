"""What is recommended for many devices."""

import dataclasses
import json

import pytest
import torch

import sgm.distributed
from sgm.checks.estimate import Estimate
from sgm.checks.mesh import check_mesh, mesh_of
from sgm.checks.meta_run import build
from sgm.checks.planner import ROOM, config_with
from sgm.checks.scaling import recommend
from sgm.checks.scaling.cards import CARDS
from sgm.checks.scaling.recommend import Choice, Planner, Setup, best, scaling_rows
from sgm.checks.scaling.step_time import Prediction
from sgm.config.load import load_config
from sgm.distributed import Mesh
from sgm.training.main import main as train
from sgm.training.optim.trainable import choose_trainable
from sgm.util import InputError

CARD, GIB = CARDS["h100"], 2**30


def predicted(seconds: float, memory: float, samples: int) -> Prediction:
    return Prediction({"products": seconds}, samples, 8, 1e12, 1e15, Estimate({"network": {"all": memory * GIB}}))


def choice(speed: float, *, micro: int = 1, stage: int = 0, ranks: int = 1, fits: bool = True) -> Choice:
    return Choice(Setup(Mesh(sequence=ranks), stage, micro, 1), predicted(1 / speed, 1, 1), fits)


def test_the_fastest_that_fits_or_what_is_simpler_and_as_fast():
    assert best([choice(5, fits=False)]) is None
    assert best([choice(5), choice(9, fits=False), choice(7)]).speed == 7
    assert best([choice(7, micro=4), choice(6.9, micro=2, stage=3), choice(6.8, micro=2, stage=2)]).setup.stage == 2
    assert best([choice(7), choice(5, micro=1)]).speed == 7


@pytest.fixture
def planner():
    def make(*settings, devices=8, card=CARD, **given):
        config = load_config(
            ["configs/toy.yaml", "configs/toy_sft.yaml"], ["args.eval_interval=null", *settings], mode="train"
        )
        trained = choose_trainable(build(config.model["network_config"]), config.model).names
        return Planner(config, torch.float32, trained, card, **given)

    return make


@pytest.fixture
def modelled(monkeypatch):
    """Let memory and speed follow a function of a configuration, and count what is asked."""
    asked = []

    def use(memory, seconds):
        def predict(config, *_, **__):
            args, section = config.args, config.deepspeed
            stage, micro = section["zero_optimization"]["stage"], section["train_micro_batch_size_per_gpu"]
            ranks = args.sequence_parallel_size * args.model_parallel_size
            samples = micro * section["gradient_accumulation_steps"] * sgm.distributed.world_size() // ranks
            asked.append((args.sequence_parallel_size, args.model_parallel_size, stage, micro))
            return predicted(seconds(ranks, stage, micro), memory(ranks, stage, micro), samples)

        monkeypatch.setattr(recommend, "predict", predict)
        return asked

    return use


def test_larger_groups_are_tried_until_they_are_slower(planner, modelled):
    asked = modelled(lambda ranks, stage, micro: 1.0, lambda ranks, stage, micro: micro / ranks + ranks)
    with sgm.distributed.planned(8):
        found = best(planner().choices())
    assert found.setup == Setup(Mesh(), 0, 16, 1), "more is hardly faster"
    assert {(one, two) for one, two, *_ in asked} == {(1, 1), (2, 1)}


def test_tensor_parallel_is_tried_if_nothing_else_fits(planner, modelled):
    with sgm.distributed.planned(8):
        modelled(lambda ranks, stage, micro: 200 / ranks / (1 + stage), lambda *_: 1.0)
        assert best(planner().choices()).setup.mesh.tensor == 1
        modelled(lambda ranks, stage, micro: 1000 / ranks - stage, lambda *_: 1.0)
        found = planner().choices()
    assert best(found) is None and {choice.setup.mesh.tensor for choice in found} == {1, 2, 4}


def test_only_what_optimizer_offload_and_batch_allow_is_tried(planner, modelled):
    asked = modelled(lambda *_: 1.0, lambda ranks, stage, micro: 1.0)
    offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    with sgm.distributed.planned(8):
        planner(offload, stages=(0, 1, 2)).choices()
        assert {stage for _, _, stage, _ in asked} == {1, 2}
        asked.clear()
        found = planner("deepspeed.train_batch_size=16").choices()
    assert {choice.prediction.samples for choice in found} == {16}
    assert {(choice.setup.micro_batch, choice.setup.accumulation) for choice in found} >= {(1, 2), (2, 1)}


def test_the_rows_name_settings_that_the_run_accepts(planner, monkeypatch):
    monkeypatch.setattr(recommend, "MICRO_BATCHES", (1, 2))
    with sgm.distributed.planned(8):
        plan = planner()
        rows = scaling_rows(plan)
        config_with(plan.config, rows["  recommended"].split())
    assert rows["devices"].startswith("8 x H100, 8 in a machine; modelled, not measured")
    assert "samples an iteration" in rows["  batch"] and "samples/s" in rows["  speed"]
    assert rows["  limit"].split()[0] in ("compute", "memory", "network", "data", "saves")


def test_layers_are_divided_only_if_the_optimizer_allows_it(planner):
    with sgm.distributed.planned(8):
        assert {mesh.tensor for mesh in planner(divides=False).meshes()} == {1} < {m.tensor for m in planner().meshes()}


def test_the_settings_replace_a_divided_vae_that_is_not_loaded(planner, modelled):
    modelled(lambda *_: 1.0, lambda ranks, stage, micro: ranks * micro)
    given = ["args.sequence_parallel_size=2", "model.first_stage_config.params.cp_size=2"]
    with sgm.distributed.planned(8):
        plan = planner(*given, vae=False, text_encoder=False)
        words = scaling_rows(plan)["  recommended"].split()
        assert words[0] == "args.sequence_parallel_size=1" and not check_mesh(config_with(plan.config, words))
        assert mesh_of(config_with(plan.config, words)).ranks == 1


@pytest.mark.parametrize(
    ("of_stage_3", "starts"),
    [(100, "args.text_encoder_offload=cpu args.sequence_parallel_size=1 "), (10, "args.sequence_parallel_size=1 ")],
)
def test_what_makes_the_run_fit_is_recommended_unless_a_stage_is_enough(planner, monkeypatch, of_stage_3, starts):
    def predict(config, *_, **__):
        stage, micro = (
            config.deepspeed["zero_optimization"]["stage"],
            config.deepspeed["train_micro_batch_size_per_gpu"],
        )
        waits = config.args.text_encoder_offload == "cpu"
        memory = (10 if waits else of_stage_3 if stage == 3 else 100) * micro
        return predicted(1.2 if waits else 1.0, memory, micro * 8)

    monkeypatch.setattr(recommend, "predict", predict)
    monkeypatch.setattr(recommend, "MICRO_BATCHES", (1,))
    with sgm.distributed.planned(8):
        plan = planner()
        rows = scaling_rows(plan)
        config_with(plan.config, rows["  recommended"].split())
    assert rows["  recommended"].startswith(starts) and "does not fit" in rows["  as it is"]


def test_what_does_not_fit_is_said(planner, modelled):
    modelled(lambda ranks, stage, micro: 900 - ranks - stage, lambda *_: 1.0)
    with sgm.distributed.planned(8):
        rows = scaling_rows(planner())
    assert "which does not fit into 72.0 GiB" in rows["  the smallest"] and "encode clips" in rows["  the smallest"]
    assert "does not fit" in rows["  as it is"] and "  recommended" not in rows
    assert "args.sequence_parallel_size" in rows["  the smallest"] and ROOM * CARD.memory == 72


def test_clips_of_unknown_size_have_no_recommendation(planner):
    plan = planner()
    del plan.config.data["params"]["video_size"]
    assert scaling_rows(plan)["  recommended"] == "nothing: data.params do not say how large clips are"


def test_recomputation_and_step_caches_are_chosen_as_in_training(planner):
    with sgm.distributed.planned(8):
        assert planner("args.checkpoint_activations=auto").own() is not None
        assert 3 not in planner("args.step_cache=first_block").stages


# The command line

TOY = ["--base", "configs/toy.yaml", "configs/toy_sft.yaml"]


def test_check_plans_for_devices_that_are_not_there(capsys, tmp_path, monkeypatch):
    card = tmp_path / "own.json"
    card.write_text(json.dumps({**dataclasses.asdict(CARD), "name": "Own", "per_node": 4}))
    words = ["--check", "--devices", "8", "--card", str(card), f"args.save={tmp_path}", "args.eval_interval=null"]
    assert train([*TOY, *words]) == 0
    found = capsys.readouterr().out
    assert "ranks          8 processes" in found and "8 x Own, 4 in a machine; modelled, not measured" in found
    assert "\n  recommended" in found and sgm.distributed.world_size() == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--check", "--devices", "many"], "--devices 'many' is no number of devices; give 1 to 99999"),
        (["--check", "--devices", "0"], "is no number of devices"),
        (["--devices", "8"], "--devices only plans: give --check as well"),
        (["--card", "h100"], "--card only plans: give --check as well"),
    ],
)
def test_wrong_words_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        train([*TOY, *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", "12"], "--devices 12: 8 of H100 are in a machine; give 8, 16 or at most 8"),
        (["--devices", "8", "--card", "large"], "--card large: there is no such card"),
    ],
)
def test_impossible_devices_are_refused(words, said, capsys):
    assert train([*TOY, "--check", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_optimizer_of_whole_matrices_keeps_layers_whole(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recommend, "MICRO_BATCHES", (1,))
    words = ["deepspeed.optimizer.type=Muon", f"args.save={tmp_path}", "args.eval_interval=null"]
    small = ["--check", "--devices", "2", "--card", "0.01gb"]  # nothing fits, so that all meshes are tried
    assert train([*TOY, *words, *small]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("  the smallest") and "model_parallel_size=1 " in row for row in rows)


def test_planning_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="--devices plans in one process"), sgm.distributed.planned(8):
        pass
