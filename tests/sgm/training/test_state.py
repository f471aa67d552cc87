"""Resume points and the lock of a run folder."""

import dataclasses
import errno
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from sgm.config.args import TrainingArgs
from sgm.config.load import ConfigError, digest_of, load_config
from sgm.conversion.trainers.consolidate import convert
from sgm.training.metrics import read_metrics
from sgm.training.run import train
from sgm.training.state import (
    ResumePoint,
    _files_to_look_up,
    changed_settings,
    checkpoint_engine,
    find_resume_point,
    next_start_number,
    numbers_digest,
    remove_other_states,
)
from sgm.training.state_files import _deepspeed_objects, restore_rng, rng_state
from sgm.util import InputError
from sgm.weights.files import PREFIX, WEIGHTS, find_weights, read_tensors
from tests.sgm.training.points import POINT

ROOT = Path(__file__).parents[3]
LORA = "dit_t2v_5b_lora"


def arguments(**values) -> TrainingArgs:
    return TrainingArgs(**({"train_data": ("clips",), "load": "weights", "train_iters": 1} | values))


def saved(run: Path, number: int, *, at: int, **values) -> Path:
    """Make a run folder with a state whose file has a time, in seconds."""
    folder = run / "resume" / str(number)
    folder.mkdir(parents=True)
    content = {name: value for name, value in dataclasses.asdict(POINT).items() if name != "run"}
    (folder / "resume.json").write_text(json.dumps(content | {"iteration": number} | values))
    latest = run / "resume" / "latest"
    latest.write_text(f"{number}\n")
    os.utime(latest, (at, at))
    return run


def test_auto_takes_the_run_that_was_started_last_whatever_its_files_times_are(tmp_path):
    args = arguments(save=str(tmp_path), experiment_name="x", resume="auto")
    assert find_resume_point(args) is None and next_start_number(args) == 1
    saved(tmp_path / "x-01-01-10-00", 50, at=3000, start_number=1)
    newest = saved(tmp_path / "x-01-01-09-00", 7, at=2000, start_number=2)
    saved(tmp_path / "x-01-01-09-00-1", 6, at=4000, start_number=2)  # a copy of an earlier time
    saved(tmp_path / "y-01-01-11-00", 9, at=5000, start_number=3)
    point = find_resume_point(args)
    assert point is not None and (point.run, point.iteration) == (newest, 7)
    assert point.folder == newest / "resume" / "7" and next_start_number(args) == 3
    assert find_resume_point(arguments(save=str(tmp_path), experiment_name="x")) is None


def test_a_state_is_found_before_latest_was_first_written(tmp_path):
    run = saved(tmp_path / "x-01-01-10-00", 5, at=1)
    saved(run, 40, at=1)
    (run / "resume" / "latest").unlink()
    (run / "resume" / "50").mkdir()  # not complete
    point = find_resume_point(arguments(save=str(tmp_path), experiment_name="x", resume="auto"))
    assert point is not None and point.iteration == 40


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"samples": -5}, "'samples' is -5; give"),
        ({"samples": "x"}, "'samples' is 'x'; give a whole number"),
        ({"samples": 0}, "'samples' is 0 after 4 iterations"),
        ({"world_size": 0}, "'world_size' is 0"),
        ({"ema": 1}, "'ema' is 1"),
        ({"files": "abc"}, "'files' is 'abc'"),
        ({"files": ["../../other"]}, "'files' names '../../other'"),
        ({"order": float("nan")}, "'order' is NaN"),
        ({"iteration": 3}, "'iteration' is 3, and the state is that of iteration 4"),
        ({"surprise": 3}, "'surprise' is unknown"),
    ],
)
def test_a_wrong_value_in_the_state_is_named(tmp_path, values, said):
    run = saved(tmp_path / "run", 4, at=1, **values)
    with pytest.raises(InputError, match="the resume state cannot be read") as caught:
        find_resume_point(arguments(resume=str(run)))
    assert said in str(caught.value) and str(run / "resume" / "4" / "resume.json") in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '"text"', "[" * 100_000, '{"iteration": ' + "9" * 5000 + "}"])
def test_a_state_that_is_no_mapping_of_values_is_refused(tmp_path, content):
    run = saved(tmp_path / "run", 4, at=1)
    (run / "resume" / "4" / "resume.json").write_text(content)
    with pytest.raises(InputError, match="the resume state cannot be read"):
        find_resume_point(arguments(resume=str(run)))


def test_a_name_may_contain_pattern_characters(tmp_path):
    saved(tmp_path / "ab-01-01-10-00", 1, at=1000)
    assert find_resume_point(arguments(save=str(tmp_path), experiment_name="a*", resume="auto")) is None
    run = saved(tmp_path / "a[1]-01-01-10-00", 2, at=1000)
    point = find_resume_point(arguments(save=str(tmp_path), experiment_name="a[1]", resume="auto"))
    assert point is not None and point.run == run


def test_auto_ignores_experiments_with_a_common_prefix(tmp_path):
    own = saved(tmp_path / "toy-01-01-10-00-1", 1, at=1000)
    saved(tmp_path / "toy-lora-01-01-10-00", 2, at=2000)
    point = find_resume_point(arguments(save=str(tmp_path), experiment_name="toy", resume="auto"))
    assert point is not None and point.run == own


def test_a_path_selects_any_run(tmp_path):
    run = saved(tmp_path / "anything", 4, at=1000)
    point = find_resume_point(arguments(resume=str(run)))
    assert point is not None and point.run == run


@pytest.mark.parametrize("content", ["", "next", "8", "../4", "-4"])
def test_a_broken_latest_file_is_reported(tmp_path, content):
    run = saved(tmp_path / "run", 4, at=1000)
    (run / "resume" / "latest").write_text(content)
    with pytest.raises(InputError, match="the resume state cannot be read"):
        find_resume_point(arguments(resume=str(run)))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"zero_stage": 2}, "deepspeed.zero_optimization.stage"),
        ({"precision": "bf16"}, "model.precision"),
        ({"optimizer": "SGD"}, "deepspeed.optimizer.type"),
        ({"trained": 9}, "model.network_config.params.modules.lora_config.params"),
        ({"trained_names": "other"}, "model.network_config.params.modules.lora_config.params"),
        ({"ema": True}, "args.ema_decay"),
        ({"base_digest": None}, "args.load"),
        ({"lora_rank": 8, "trained": 9}, "model.network_config.params.modules.lora_config.params.r"),
        ({"optimizer_settings": {"amsgrad": True}}, "deepspeed.optimizer.params.amsgrad"),
    ],
)
def test_a_setting_that_does_not_fit_the_state_is_named(change, key):
    with pytest.raises(ConfigError) as caught:
        POINT.check(dataclasses.replace(POINT, **change))
    (problem,) = caught.value.problems
    assert problem.path == key and "args.resume=none" in str(caught.value)


def test_what_is_trained_without_adapters_is_said_by_prefixes():
    point = dataclasses.replace(POINT, lora_rank=None)
    for change in ({"trained": 9}, {"trained_names": "other"}, {"trained": 9, "trained_names": "other"}):
        with pytest.raises(ConfigError) as caught:
            point.check(dataclasses.replace(point, **change))
        (problem,) = caught.value.problems
        assert problem.path == "model.not_trainable_prefixes"


@pytest.mark.parametrize(("kind", "decays", "fits"), [(None, 0.1, False), (None, 0, True), ("lora", 0.1, True)])
def test_prodigy_does_not_begin_to_decay_weights_at_a_resume(kind, decays, fits):
    """Its state has another number of groups then, where biases and norms are trained."""
    given = {"optimizer": "prodigyopt.Prodigy", "lora_kind": kind}
    points = [
        dataclasses.replace(POINT, **given, optimizer_settings={"weight_decay": value, "eps": 1e-8})
        for value in (0, decays)
    ]
    with (
        nullcontext()
        if fits
        else pytest.raises(ConfigError, match=r"optimizer\.params\.weight_decay.*and now it is 0.1")
    ):
        points[0].check(points[1])


def test_states_that_do_not_name_what_is_trained_go_on():
    dataclasses.replace(POINT, trained_names=None).check(POINT)


@pytest.mark.parametrize("name", ["keep_last", "keep_best", "save_interval", "eval_interval", "async_save"])
def test_what_does_not_change_the_weights_may_change_without_a_warning(training_yaml, name):
    values = {"keep_best": "true", "async_save": "true", "eval_interval": "2"}
    configs = [
        load_config(training_yaml(LORA), more, mode="train") for more in ([], [f"args.{name}={values.get(name, 3)}"])
    ]
    digests = [numbers_digest(config) for config in configs]
    assert digests[0] == digests[1]


def test_settings_that_changed_are_named(caplog, training_yaml, tmp_path):
    begun = ["args.seed=7", "args.keep_last=2", "data.params.fps=4"]
    (tmp_path / "config.yaml").write_text(load_config(training_yaml(LORA), begun, mode="train").to_yaml())
    more = ["args.ema_decay=0.5", "deepspeed.optimizer.params.lr=2e-3", "args.keep_last=3", "data.params.fps=4"]
    point, config = dataclasses.replace(POINT, run=tmp_path), load_config(training_yaml(LORA), more, mode="train")
    with caplog.at_level("WARNING"):
        point.check(dataclasses.replace(point, config_digest="other"), config)
    said = [
        "args.seed was 7 and is not given",
        "deepspeed.optimizer.params.lr was 0.001 and is 0.002",
        "args.ema_decay was not given and is 0.5",
    ]
    assert f"with which {tmp_path} began: {'; '.join(said)}\n" in caplog.text
    (tmp_path / "config.yaml").unlink()
    assert changed_settings(tmp_path, config) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clips": "other", "captions": "other"}, "the training clips differ"),
        ({"captions": "other"}, "the captions are not those at the start of"),
        ({"clip_files": "other"}, "the files of the training clips are not those at the start of"),
        ({"config_digest": "other"}, "the configuration differs"),
        ({"optimizer_settings": {"amsgrad": False, "eps": 1.0}}, None),
    ],
)
def test_other_clips_and_captions_give_a_warning(caplog, tmp_path, change, said):
    point = dataclasses.replace(POINT, run=tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / f"{WEIGHTS}.pt").touch()
    with caplog.at_level("WARNING"):
        point.check(dataclasses.replace(point, **change))
    assert [said in message for message in caplog.messages] == ([] if said is None else [True])


def test_of_several_ranks_one_says_what_differs(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("WARNING"):
        dataclasses.replace(POINT, run=tmp_path).check(dataclasses.replace(POINT, clips="other", config_digest="other"))
    assert caplog.messages == []


def test_weights_that_are_gone_are_said(caplog, tmp_path):
    point = dataclasses.replace(POINT, run=tmp_path)
    with caplog.at_level("WARNING"):
        point.check(point)
    assert f"the weights of iteration 3 were removed from {tmp_path};" in caplog.text
    with pytest.raises(InputError, match="has all 3 iterations, but its weights were removed: .*3 is missing or empty"):
        point.require_weights()


@pytest.mark.parametrize(
    ("stage", "change", "same"),
    [
        (0, {"world_size": 1}, True),
        (2, {"world_size": 1}, False),
        (2, {"order": 1.0}, False),
        (0, {"tensor": 2}, False),
        (3, {}, True),
    ],
)
def test_a_state_is_divided_again_where_ranks_hold_other_parts(stage, change, same):
    point = dataclasses.replace(POINT, zero_stage=stage, order=0.0)
    now = dataclasses.replace(point, **change)
    point.check(now)
    assert point.is_divided_like(now) is same


def start(training_yaml, folder: Path, *overrides):
    return train(load_config(training_yaml(LORA), [f"args.save={folder}", *overrides], mode="train"))


def test_an_old_state_that_cannot_be_removed_does_not_end_the_run(monkeypatch, tmp_path):
    """On NFS, the folder of a file that is open elsewhere."""
    for name in ("1", "2", "3"):
        (tmp_path / "resume" / name).mkdir(parents=True)
    rmdir = os.rmdir

    def busy(path, **options) -> None:
        if str(path).endswith("1"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    remove_other_states(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["1", "3"]


def test_incomplete_files_of_a_killed_run_are_removed(training_yaml, tmp_path):
    run = start(training_yaml, tmp_path, "args.train_iters=2", "args.exit_interval=1").folder
    left = [run / "1" / ".mp_rank_00_model_states.1-ab.pt", run / "2" / ".mp_rank_00_model_states.1-ab.pt"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    start(training_yaml, tmp_path, "args.train_iters=2", "args.resume=auto")
    assert not any(path.exists() for path in left)


def test_weights_newer_than_the_state_are_replaced(training_yaml, tmp_path):
    """A kill between writing weights and state: the weights are replaced, and count for args.keep_last."""
    run = start(training_yaml, tmp_path, "args.train_iters=3", "args.exit_interval=1").folder
    (run / "2").mkdir()
    torch.save({"module": {"model.diffusion_model.x": torch.zeros(1)}}, run / "2" / "mp_rank_00_model_states.pt")
    start(training_yaml, tmp_path, "args.train_iters=3", "args.resume=auto", "args.save_interval=1", "args.keep_last=2")
    assert sorted(path.name for path in run.iterdir() if path.name.isdigit()) == ["2", "3"]
    assert read_tensors(find_weights(run / "2")).keys() == read_tensors(find_weights(run)).keys()


def test_ranks_look_up_their_own_files_and_a_share_of_the_others(monkeypatch):
    names = [f"zero_pp_rank_{rank}_mp_rank_{shard:02d}_optim_states.pt" for rank in range(2) for shard in range(2)]
    names += [f"mp_rank_{shard:02d}_model_states.pt" for shard in range(2)]
    point = dataclasses.replace(POINT, files=(*names, *(f"rng_{rank:02d}.pt" for rank in range(4))), tensor=2)
    for world in (1, 2, 4, 16):
        looked_up = []
        for rank in range(world):
            monkeypatch.setattr("sgm.distributed.rank", lambda rank=rank: rank)
            looked_up.append(set(_files_to_look_up(point, dataclasses.replace(point, world_size=world))))
            own = {f"rng_{rank:02d}.pt", f"mp_rank_{rank % 2:02d}_model_states.pt"}
            assert own & {*point.files} <= looked_up[-1] and looked_up[-1]
        assert set().union(*looked_up) == {*point.files}
        assert max(map(len, looked_up)) <= 10 // world + 4


def make_old(run: Path, *kept: str) -> None:
    """Take from a state what earlier versions did not write: fields of ``resume.json`` but `kept`, and paddings."""
    path = run / "resume" / "1" / "resume.json"
    newer = {field.name for field in dataclasses.fields(ResumePoint) if field.default is not dataclasses.MISSING}
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in newer - {*kept}}
    del content["digest"]
    path.write_text(json.dumps(content))
    for part in path.parent.glob("*_optim_states.pt"):
        with _deepspeed_objects():
            state = torch.load(part, weights_only=True)
        state["optimizer_state_dict"].pop("param_alignment_paddings", None)
        torch.save(state, part)


def test_old_states_go_on_also_in_another_order(training_yaml, tmp_path):
    stage = ["deepspeed.zero_optimization.stage=2", "args.train_iters=2"]
    first = start(training_yaml, tmp_path, *stage, "args.exit_interval=1").folder
    straight = shutil.copytree(first, tmp_path / "copy" / first.name)
    make_old(straight)
    make_old(first, "order")
    start(training_yaml, straight.parent, *stage, "args.resume=auto")
    start(training_yaml, tmp_path, *stage, "args.resume=auto", "deepspeed.zero_optimization.round_robin_gradients=true")
    found, expected = (read_tensors(find_weights(run)) for run in (first, straight))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_flips_in_a_state_are_found(training_yaml, tmp_path):
    """In each of its files."""
    stage = ["deepspeed.zero_optimization.stage=1", "args.train_iters=2"]
    run = start(training_yaml, tmp_path, *stage, "args.exit_interval=1").folder
    folder = run / "resume" / "1"
    assert {path.suffix for path in folder.iterdir()} == {".pt", ".json"}
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        flipped = bytearray(good)
        place = good.index(b'"samples": ') + 11 if path.suffix == ".json" else len(good) * 3 // 5
        flipped[place] ^= 0x01
        path.write_bytes(flipped)
        other = "zero_pp" in path.name  # also where another division of the state is read
        order = [f"deepspeed.zero_optimization.round_robin_gradients={str(other).lower()}"]
        with pytest.raises(InputError, match=rf"resume state cannot be.*{path.name}.*changed after"):
            start(training_yaml, tmp_path, *stage, *order, f"args.resume={run}")
        path.write_bytes(good)


@pytest.mark.parametrize("wrong", ["nan", "int"])
def test_weights_of_a_state_that_are_no_weights_are_named(tmp_path, wrong):
    good = torch.ones(3)
    bad = good / 0 if wrong == "nan" else good.long()
    message = "not finite" if wrong == "nan" else r"integers \(int64\)"
    for name, content in (
        ("module-x", {"module": {"module-x": bad}}),
        (r"fp32_groups\[1\]", {"optimizer_state_dict": {"single_partition_of_fp32_groups": [good, bad]}}),
        (r"fp32_flat_groups\[0\]", {"optimizer_state_dict": {"fp32_flat_groups": [[good, bad]]}}),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError, match=rf"{name} .*{message}.*args.resume=none"):
            checkpoint_engine().load(str(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("x.pt", content) for content in ([1], torch.ones(2), "x", None, {"module": [1]}, {"module": {"a": 3}})),
        ("x.pt", {"optimizer_state_dict": "x"}),
        ("x.pt", {"optimizer_state_dict": {"fp32_flat_groups": 3}}),
        ("x.pt", {"optimizer": {"fp32_groups_flat": [[torch.ones(1)], {"a": 1}]}}),
        ("mp_rank_00_model_states.pt", {"torch": torch.ones(1)}),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", {"module": {"a": torch.ones(1)}}),
    ],
)
def test_a_file_of_the_wrong_content_is_named(tmp_path, name, content):
    torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=rf"state cannot be used: .*{name}.*(something else|is no).*resume=none"):
        checkpoint_engine().load(str(tmp_path / name))


@pytest.mark.parametrize(
    "change",
    [
        {"torch": None},
        {"torch": torch.ones(3)},
        {"torch": torch.zeros(5, dtype=torch.uint8)},
        {"python": None},
        {"python": (3, (1, 2), None)},
        {"python": (3, (-1,) * 625, None)},
    ],
)
def test_states_of_random_generators_are_checked(tmp_path, change):
    torch.save(rng_state() | change, tmp_path / "rng_00.pt")
    with pytest.raises(InputError, match=r"cannot be used: .*rng_00.pt does not hold the states of this .*resume=none"):
        restore_rng(tmp_path / "rng_00.pt")
    torch.save({"module": {"a": torch.ones(1)}}, tmp_path / "rng_00.pt")
    with pytest.raises(InputError, match=r"rng_00.pt does not hold the states of this"):
        restore_rng(tmp_path / "rng_00.pt")
    state = rng_state()
    torch.save(state, tmp_path / "rng_00.pt")
    torch.rand(1)
    restore_rng(tmp_path / "rng_00.pt")
    assert torch.equal(torch.get_rng_state(), state["torch"])


def test_a_pickle_in_a_state_is_refused_without_advice_to_load_it(tmp_path):
    torch.save({"torch": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"pathlib.*args.resume=none") as caught:
        checkpoint_engine().load(str(tmp_path / "x.pt"))
    assert not any(word in str(caught.value) for word in ("weights_only", "safe_globals", "allowlist", "script"))


def test_removed_weights_are_told_and_written_again(training_yaml, tmp_path, caplog):
    run = start(training_yaml, tmp_path, "args.train_iters=2", "args.exit_interval=1").folder
    shutil.rmtree(run / "1")
    with caplog.at_level("WARNING"):
        start(training_yaml, tmp_path, "args.train_iters=2", f"args.resume={run}")
    assert "the weights of iteration 1 were removed" in caplog.text
    trained = read_tensors(find_weights(run))
    trained = {name: tensor.clone() for name, tensor in trained.items()}
    shutil.rmtree(run / "2")
    with pytest.raises(InputError, match=r"but its weights were removed.*convert_weight_deepspeed2hf") as error:
        start(training_yaml, tmp_path, "args.train_iters=2", f"args.resume={run}")
    folder = str(error.value).partition("--checkpoint_path ")[2].partition(" ")[0]
    convert(folder, tmp_path / "again", to="sat")
    again = read_tensors(find_weights(tmp_path / "again"))
    assert again.keys() == trained.keys() and all(torch.equal(again[name], trained[name]) for name in trained)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_settings_of_the_optimizer_changed_at_a_resume_take_effect(training_yaml, tmp_path, stage):
    """As in an optimizer that had them from the start, except for what the first iteration did."""
    common = [f"deepspeed.zero_optimization.stage={stage}", "args.train_iters=2", "args.lr_decay_style=constant"]
    params = "deepspeed.optimizer.params"
    run = start(training_yaml, tmp_path, *common, "args.exit_interval=1").folder
    again = [*common, f"args.resume={run}", "args.exit_interval=null"]
    changes = [f"{params}.weight_decay=0.5", f"{params}.eps=0.1", f"{params}.betas=[0.5,0.6]"]
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    results = []
    for more in ([], changes):
        shutil.rmtree(run)
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        results.append(read_tensors(find_weights(start(training_yaml, tmp_path, *again, *more).folder)))
        saved = json.loads((run / "resume" / "2" / "resume.json").read_text())
        assert saved["optimizer_settings"]["eps"] == (0.1 if more else 1e-8) and saved["start_number"] == 2
        assert saved["trained_names"] == digest_of(sorted(name.removeprefix(PREFIX) for name in results[-1]))
        assert set(saved["files"]) == {path.name for path in (run / "resume" / "2").iterdir()} - {"resume.json"}
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_run_that_died_before_it_saved_begins_again_in_its_folder(training_yaml, tmp_path):
    dead = tmp_path / "train-01-01-10-00"
    dead.mkdir()
    (dead / ".lock").write_text("1\n")
    (dead / "metrics.jsonl").write_text("half")
    done = tmp_path / "train-01-01-09-00"  # its state was deleted to save space
    (done / "5").mkdir(parents=True)
    (done / "latest").write_text("5\n")
    (done / ".lock").touch()
    summary = start(training_yaml, tmp_path, "args.train_iters=1", "args.resume=auto", "args.experiment_name=train")
    assert summary.folder == dead and len(read_metrics(dead / "metrics.jsonl")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [done.name, dead.name] and (done / "5").is_dir()


def test_a_damaged_run_does_not_keep_a_new_one_from_starting(training_yaml, tmp_path):
    run = start(training_yaml, tmp_path, "args.train_iters=1").folder
    (run / "resume" / "1" / "resume.json").write_text("{")
    with pytest.raises(InputError, match=r"resume\.json.*args\.resume=none"):
        start(training_yaml, tmp_path, "args.train_iters=1", "args.resume=auto")
    assert start(training_yaml, tmp_path, "args.train_iters=1", "args.resume=none").folder != run


def test_the_zero_stage_of_a_state_is_a_number():
    """Python 3.11.2, which Debian 12 has, pickles the enumeration by `getattr`, so that no state could be read."""
    files = {}
    content = {"optimizer_state_dict": {"zero_stage": ZeroStageEnum.weights, "other": 1}, "more": 2}
    checkpoint_engine(files.__setitem__).save(content, "state.pt")
    assert files == {Path("state.pt"): {"optimizer_state_dict": {"zero_stage": 3, "other": 1}, "more": 2}}
    assert type(files[Path("state.pt")]["optimizer_state_dict"]["zero_stage"]) is int
