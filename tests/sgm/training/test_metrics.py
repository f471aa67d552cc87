import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sgm.training.metrics import LossByQuarter, Metrics, draw_curve, read_metrics, smooth
from sgm.util import InputError, RunError


def metrics(folder, **changes) -> Metrics:
    return Metrics(folder, **({"total_iters": 10, "config": {"a": 1}, "experiment": "x"} | changes))


def write(folder, *iterations: int, loss: float = 0.5, **changes) -> None:
    run = metrics(folder, **changes)
    for iteration in iterations:
        run.log(iteration, {"loss": loss, "lr": 1e-4})
    run.close()


def test_a_line_is_written_immediately(tmp_path):
    run = metrics(tmp_path)
    run.log(2, {"loss": 0.25, "lr": 1e-4})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 2, "loss": 0.25, "lr": 1e-4}
    run.close()


def test_every_line_is_strict_json(tmp_path):
    write(tmp_path, 1, loss=float("nan"))
    write(tmp_path, 2, loss=float("inf"), resume_from=1)

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in lines] == [None, None]


def test_resuming_removes_lines_of_repeated_iterations(tmp_path):
    write(tmp_path, 1, 2, 3, 4, loss=1.0)
    write(tmp_path, 3, 4, loss=2.0, resume_from=2)
    assert [(x["iteration"], x["loss"]) for x in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


@pytest.mark.parametrize("torn", ['{"iteration": 3, "lo', '{"iteration": 3}x', "12", '{"loss": 1}', "\0\0\0"])
def test_an_incomplete_line_is_skipped(tmp_path, torn):
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    write(tmp_path, 3, resume_from=2)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_full_disk_is_reported(tmp_path, small_disk):
    run = metrics(tmp_path)
    with small_disk(8), pytest.raises(RunError, match=r"metrics\.jsonl"):
        run.log(1, {"loss": 1.0})
    run.close()


def test_the_bar_shows_the_latest_values(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run = metrics(tmp_path, resume_from=4)
    run.log(6, {"loss": 0.12345, "lr": 1e-4, "memory_gib": 2.0})
    run.log(8, {"validation_loss": 0.2})
    run.close()
    shown = capsys.readouterr().err
    assert "4/10" in shown and "8/10" in shown
    assert "loss=0.1235" in shown and "lr=1.00e-04" in shown and "GiB=2.0" in shown


def test_wandb_is_not_imported_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path, 1)
    with pytest.raises(InputError, match="pip install wandb"):
        metrics(tmp_path, wandb=True)


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path / "run", 1, wandb=True, wandb_project="toys")
    runs = [path for path in (tmp_path / "run" / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len(runs) == 1 and runs[0].name.endswith("-run") and list(runs[0].glob("*.wandb"))


def test_losses_by_quarter_of_the_timesteps():
    quarters = LossByQuarter(torch.device("cpu"))
    assert quarters.values() == {}
    quarters.add(torch.tensor([0, 249, 250, 999]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    quarters.add(torch.tensor([750]), torch.tensor([9.0]))
    assert quarters.values() == {"loss": 5.0, "loss_0_249": 2.0, "loss_250_499": 5.0, "loss_750_999": 8.0}
    quarters.reset()
    assert quarters.values() == {}


def test_summed_losses_keep_no_graph():
    quarters = LossByQuarter(torch.device("cpu"))
    quarters.add(torch.tensor([0]), torch.tensor([1.0], requires_grad=True))
    kept = []
    quarters.reduce(kept.append)
    assert not kept[0].requires_grad


def test_an_infinite_loss_stays_in_its_quarter():
    quarters = LossByQuarter(torch.device("cpu"))
    quarters.add(torch.tensor([0, 500]), torch.tensor([1.0, float("inf")]))
    assert quarters.values() == {"loss": float("inf"), "loss_0_249": 1.0, "loss_500_749": float("inf")}


def test_quarters_are_reduced_over_ranks():
    ranks = [LossByQuarter(torch.device("cpu"), num_idx=10) for _ in range(2)]
    ranks[0].add(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]))
    ranks[1].add(torch.tensor([3, 9]), torch.tensor([3.0, 6.0]))
    other = LossByQuarter(torch.device("cpu"), num_idx=10)
    ranks[1].reduce(lambda totals: setattr(other, "totals", totals.clone()))
    ranks[0].reduce(lambda totals: totals.add_(other.totals))
    assert ranks[0].values() == {"loss": 3.0, "loss_0_2": 1.5, "loss_3_4": 3.0, "loss_8_9": 6.0}
    ranks[0].add(torch.tensor([0]), torch.tensor([3.0]))  # still counts after a reduction
    assert ranks[0].values()["loss"] == 3.0


def test_smoothing_keeps_a_constant_and_follows_its_span():
    assert smooth([2.0] * 50, 10) == pytest.approx([2.0] * 50)
    assert smooth([1.0, 5.0, 3.0], 1) == [1.0, 5.0, 3.0]
    assert smooth([0.0, 3.0], 2) == pytest.approx([0.0, 2.0])
    assert smooth([], 5) == []


def test_the_curve_is_drawn_from_the_file(tmp_path):
    run = metrics(tmp_path)
    for iteration in range(1, 11):
        run.log(iteration, {"loss": 1 / iteration if iteration != 4 else float("nan"), "lr": 1e-4})
    run.close()
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "plain.png")
    run = metrics(tmp_path, resume_from=10)
    run.log(10, {"validation_loss": 0.3})
    run.close()
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    pictures = [np.array(Image.open(tmp_path / name).convert("RGB")) for name in ("plain.png", "curve.png")]
    assert all(min(picture.shape[:2]) >= 500 for picture in pictures)
    orange = [bool((np.abs(picture - np.array([255, 127, 14])).max(-1) < 30).any()) for picture in pictures]
    assert orange == [False, True], "validation losses are orange points"


def test_a_run_without_losses_gives_an_empty_picture(tmp_path):
    write(tmp_path)
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
