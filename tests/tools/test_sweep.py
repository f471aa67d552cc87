"""Sweeps: which runs there are, that they are computed once, stopped early, compared; the processes are simulated."""

import json
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sweep
import yaml

from sgm.config.references import escaped
from sgm.config.yaml_files import override_value
from sgm.inference.video import write_video
from tests.processes import forked_python

ROOT = Path(__file__).parents[2]


LR, RANK = "deepspeed.optimizer.params.lr", "model.network_config.params.modules.lora_config.params.r"
BASE = ["--base", "configs/toy_lora.yaml", "configs/toy_sft.yaml", "args.train_iters=4", "args.eval_interval=null"]
BASE.append("args.valid_prompts=null")


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """Replace processes: a training writes metrics at once, a sampling one video. Return what was started."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic))
    started = []

    class Process:
        codes, losses, polls = {}, {}, 0

        def __init__(self, words, **given):
            self.name, self.given, self.signals, self.waits = None, given, [], 1
            values = {key: override_value(value) for key, value in (w.split("=", 1) for w in words if "=" in w)}
            values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
            started.append(self)
            self.values, self.script = values, next(Path(w).name for w in words if w.endswith("_video.py"))
            if self.script == "train_video.py":
                folder = Path(values["args.save"]) / "run-01-01-00-00"
                folder.mkdir(parents=True, exist_ok=True)
                self.name = folder.parents[1].name
                losses = self.losses.get(self.name, [float(values[LR])] * 4)
                lines = [
                    {"iteration": k + 1, "loss": loss, "loss_0_249": loss / 2, "step_seconds": 2.0, "memory_gib": k}
                    for k, loss in enumerate(losses)
                ]
                (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            else:
                folder = Path(values["args.output_dir"]) / "0_a/0"
                write_video(folder / "000000.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
                (folder / "000000.json").write_text(json.dumps({"prompt": "a", "image": None, "seed": 42}))

        def poll(self):
            self.waits -= 1
            return None if self.waits >= 0 and not self.signals else self.codes.get(self.name, 0)

        def send_signal(self, number):
            self.signals.append(number)

        def wait(self):
            return 0

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=Process, DEVNULL=None, STDOUT=None))
    return started, Process


def run(tmp_path, *words):
    return sweep.main([*BASE, "--out", str(tmp_path / "out"), *words])


def grid(*rates):
    return ["--grid", f"{LR}={','.join(rates)}"]


def test_all_combinations_are_trained_once_and_compared(trainings, tmp_path, capsys):
    started, _ = trainings
    (tmp_path / "p.txt").write_text("a\n")
    words = [*grid("0.2", "0.1"), "--grid", "…lora_config.params.r=8,16", "--prompts", str(tmp_path / "p.txt")]
    assert run(tmp_path, *words, "--list") == 0 and not started
    assert run(tmp_path, *words) == 0
    assert [(p.values[LR], p.values[RANK]) for p in started[::2]] == [
        (rate, rank) for rate in ("0.2", "0.1") for rank in ("8", "16")
    ]
    names = [f"lr={rate},r={rank}" for rate in ("0.2", "0.1") for rank in ("8", "16")]
    assert [p.name for p in started[::2]] == names
    sampled = started[1].values
    assert sampled["args.load"].endswith("lr=0.2,r=8/runs/run-01-01-00-00") and sampled["args.seed"] == "42"
    assert {p.values["args.input_file"] for p in started[1::2]} == {str(tmp_path / "p.txt")}
    said = capsys.readouterr().out
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in (*names[2:], *names[:2])]
    assert lines[0] == "| run | state | iteration | loss | loss_0_249 | s/step | minutes | GiB |"
    assert lines[2].startswith("| lr=0.1,r=8 | done | 4 | 0.1 | 0.05 | 2 | ") and "table.md" in said
    assert (tmp_path / "out/contact_sheet.png").is_file() and "train_video.py" in (
        tmp_path / "out" / names[0] / "log.txt"
    ).read_text()
    started.clear()
    assert run(tmp_path, *words) == 0 and not started, "all of them are done"
    assert run(tmp_path, *words, "args.seed=1") == 2
    assert "was trained with another configuration" in capsys.readouterr().err


def test_what_failed_or_was_cut_off_is_tried_again(trainings, tmp_path, capsys):
    started, process = trainings
    process.codes["lr=0.2"] = 1
    process.losses["lr=0.3"] = [1.0, 1.0]  # ended by a signal: exit code 0, two of four iterations
    assert run(tmp_path, *grid("0.1", "0.2", "0.3")) == 1
    assert "2 of 3 runs failed" in capsys.readouterr().err
    process.codes.clear()
    process.losses.clear()
    started.clear()
    assert run(tmp_path, *grid("0.1", "0.2", "0.3")) == 0
    assert [p.name for p in started] == ["lr=0.2", "lr=0.3"]
    assert all(p.values["args.resume"] == "auto" for p in started)


def test_bad_runs_are_stopped_if_asked(trainings, tmp_path):
    started, process = trainings
    process.losses = {"lr=0.1": [1.0] * 4, "lr=0.2": [1.2, 1.2], "lr=0.3": [1.04, 1.04, 1.04, 1.04]}
    assert run(tmp_path, *grid("0.1", "0.2", "0.3"), "--stop_above", "5", "--stop_after", "0.5") == 0
    assert [bool(p.signals) for p in started] == [False, True, False]
    states = {json.loads(path.read_text())["state"] for path in (tmp_path / "out").glob("*/sweep.json")}
    assert states == {"done", "stopped"}
    started.clear()
    assert run(tmp_path, *grid("0.1", "0.2", "0.3")) == 0 and not started, "a stopped run stays as it is"


def test_an_interrupted_sweep_ends_its_processes(trainings, tmp_path, monkeypatch):
    started, _ = trainings

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.time, "sleep", interrupt)
    assert run(tmp_path, *grid("0.1", "0.2")) == 130
    assert [len(p.signals) for p in started] == [1]
    assert json.loads((tmp_path / "out/lr=0.1/sweep.json").read_text())["state"] == "waiting"


def test_a_second_sweep_in_the_same_folder_is_refused(trainings, tmp_path, capsys):
    started, process = trainings
    words, codes = grid("0.1", "0.2"), []
    begin = process.__init__

    def twice(*given, **more):
        begin(*given, **more)
        if not codes:
            codes.append(None)
            codes.append(run(tmp_path, *words))

    process.__init__ = twice
    assert run(tmp_path, *words) == 0 and codes[1] == 2 and len(started) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert run(tmp_path, *words, "--list") == 0


def test_runs_share_devices(trainings, tmp_path):
    started, _ = trainings
    assert run(tmp_path, *grid("0.1", "0.2", "0.3"), "--devices", "4", "7", "args.seed=7") == 0
    assert {p.values["args.seed"] for p in started} == {"7"}
    assert [p.given["env"]["CUDA_VISIBLE_DEVICES"] for p in started] == ["4", "7", "4"]


def test_a_list_of_overrides_is_read(trainings, tmp_path):
    started, _ = trainings
    runs = [{"args": {"lr_decay_style": "constant"}, LR: 0.5}, {LR: 0.25, "args.sampling_image_size": [32, 32]}]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(runs))
    assert run(tmp_path, "--runs", str(tmp_path / "runs.yaml")) == 0
    assert [p.name for p in started] == ["lr_decay_style=constant,lr=0.5", "sampling_image_size=32_32,lr=0.25"]
    assert started[1].values["args.sampling_image_size"] == "[32, 32]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is nothing to compare"),
        (["--grid", LR], "not of the form key=value"),
        (["--grid", f"{LR}=1e-3,,1e-4"], "not of the form key=value"),
        (["--grid", f"{LR}=1e-3,1e-3"], "names a value twice"),
        (["--grid", "lr_decay=1,2"], "is no key of the files; did you mean"),
        (["--grid", "hidden_size_heads=1"], "is no key of the files"),
        (["--grid", "target=a,b"], "is the end of several keys"),
        (["--grid", "args.seed=1,2", "--grid", "seed=3"], "given by two"),
        (["--grid", "args.seed=1,no"], "args.seed"),
        (["--grid", "args.save=a,b"], "args.save is set by the sweep"),
        (["--grid", "experiment_name=a,b"], "args.experiment_name is set by the sweep"),
        (["--grid", "args.seed=1", "--nproc_per_node", "0"], "--nproc_per_node is 0"),
        (["--grid", "args.seed=1", "--prompts", "nowhere.txt"], "nowhere.txt is no file"),
        (["--grid", "args.seed=1", "--devices", "cuda"], "--devices names cuda"),
        (["--runs", "configs/toy.yaml"], "is no list of overrides"),
        (["--grid", "deepspeed.optimizer.params.foo=1,2"], "foo"),
    ],
)
def test_wrong_input_ends_with_2_before_a_run_begins(words, said, trainings, tmp_path, capsys):
    assert run(tmp_path, *words) == 2
    assert said in capsys.readouterr().err and not trainings[0]


def test_values_are_split_outside_of_brackets():
    assert sweep.split_values("[64,64],[32, 32]") == ["[64,64]", "[32, 32]"]
    assert sweep.split_values("'a,b',c") == ["'a,b'", "c"]
    assert sweep.split_values("don't,won't") == ["don't", "won't"]
    assert sweep.split_values("""[a, "b,]"],{c: 'd,'}""") == ['[a, "b,]"]', "{c: 'd,'}"]


def test_names_of_folders_are_short_enough_in_every_script():
    names = sweep.names_of([{"args.experiment_name": "猫" * 100 + end} for end in "ab"])
    assert len({*names}) == 2 and all(len(name.encode()) <= sweep.MAX_NAME + 2 for name in names)


def test_text_of_a_list_stays_text(tmp_path):
    (tmp_path / "runs.yaml").write_text("- {args.experiment_name: 'true', args.start: off, args.end: a.png}\n")
    (run,) = sweep.read_runs(tmp_path / "runs.yaml")
    assert run == {"args.experiment_name": '"true"', "args.start": "false", "args.end": "a.png"}


def test_prompts_that_are_given_later_are_sampled(trainings, tmp_path):
    started, _ = trainings
    assert run(tmp_path, *grid("0.1")) == 0 and len(started) == 1
    (tmp_path / "p: #1 ${x}.txt").write_text("a\n")
    words = [*grid("0.1"), "--prompts", str(tmp_path / "p: #1 ${x}.txt")]
    assert run(tmp_path, *words) == 0 and [p.script for p in started[1:]] == ["train_video.py", "sample_video.py"]
    assert (tmp_path / "out/contact_sheet.png").is_file()
    assert started[2].values["args.input_file"] == escaped(str(tmp_path / "p: #1 ${x}.txt"))
    assert run(tmp_path, *words) == 0 and len(started) == 3
    (tmp_path / "p: #1 ${x}.txt").write_text("a\nb\n")
    assert run(tmp_path, *words) == 0 and [p.script for p in started[3:]] == ["train_video.py", "sample_video.py"]
    assert run(tmp_path, *words) == 0 and len(started) == 5
    assert run(tmp_path, *grid("0.1")) == 0 and len(started) == 5, "without prompts there is nothing to sample"


def test_the_documented_sweeps_are_right(trainings, tmp_path):
    text = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("python tools/sweep.py")]
    assert len(lines) >= 2
    for line in lines:
        assert sweep.main([*shlex.split(line)[2:], "--out", str(tmp_path), "--list"]) == 0


@pytest.mark.slow
def test_a_real_sweep_trains_and_samples(tmp_path, monkeypatch):
    """Two runs of two steps of the toy, at a time, in forked processes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "PYTHON", forked_python())
    (tmp_path / "p.txt").write_text("a red circle moves left\n")
    words = [*BASE, "args.train_iters=2", "args.num_workers=0", "args.num_steps=1", *grid("1e-3", "1e-2")]
    words += ["--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "p.txt"), "--devices", "0", "1"]
    assert sweep.main(words) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["state"] for one in rows] == ["done", "done"] and rows[0]["iteration"] == 2
    assert len([*(tmp_path / "out").rglob("000000.mp4")]) == 2 and (tmp_path / "out/contact_sheet.png").is_file()


def test_what_training_would_refuse_is_refused_before_anything_is_trained(trainings, tmp_path, capsys):
    base = [
        "--base",
        "configs/toy_lora.yaml",
        "configs/toy_sft.yaml",
        "args.train_iters=4",
        "--out",
        str(tmp_path / "s"),
    ]
    rank = "model.network_config.params.modules.lora_config.params.r"
    for grid, said in ((f"{rank}=4,0", "r is 0"), ("args.train_data=assets/toy,nowhere", "'nowhere' does not exist")):
        for more in ([], ["--list"]):
            assert sweep.main([*base, "--grid", grid, *more]) == 2
            assert said in capsys.readouterr().err
    assert not trainings[0] and not (tmp_path / "s").exists()


def test_the_reason_of_a_failed_run_is_told_in_full(tmp_path):
    run = sweep.Run("r=0", tmp_path, [])
    (tmp_path / "log.txt").write_text("start\nerror: 1 problem:\n  - args.seed: is -1\n      -> give 0\n\nthe end\n")
    assert sweep._last_words(run) == "error: 1 problem: - args.seed: is -1 -> give 0"
