import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import tqdm.std
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.contrib.logging import logging_redirect_tqdm

from sgm.log import configure_logging, get_logger
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


VALUES = {
    "loss": 0.12345,
    "lr": 1e-4,
    "grad_norm": 0.5,
    "step_seconds": 12.5,
    "samples_per_second": 0.25,
    "memory_gib": 71.5,
}


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_the_bar_shows_what_a_terminal_has_room_for_and_messages_start_lines(tmp_path, monkeypatch, columns):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda _: (columns, 24))
    configure_logging()
    with logging_redirect_tqdm(loggers=[get_logger()]):
        run = metrics(tmp_path, total_iters=10_000, resume_from=4000)
        run.log(6000, VALUES)
        run.log(6000, {"validation_loss": 0.2, "validation_loss_0_249": 0.3})
        run.log(7000, VALUES)
        run.close()
    shown = re.split(r"[\r\n]+", terminal.getvalue())
    assert max(map(len, shown)) <= max(columns, 90)
    assert "validation after iteration 6000: loss 0.2000 (timesteps 0-249 0.3000)" in shown
    bar = next(line for line in reversed(shown) if "7000/10000" in line)
    assert bar.startswith("training 7000/10000 |") and len(bar) <= columns
    needed = ", ETA 00:00, lr 1.00e-04, grad 0.5, 0.25 samples/s" if columns == 200 else ", ETA 00:00"
    assert bar.rstrip().endswith("|, loss 0.1235, 12.5 s/step" + (columns > 60) * f", 71.5 GiB{needed}")


def test_without_a_terminal_every_line_of_metrics_is_a_line_of_text(tmp_path, log):
    run = metrics(tmp_path)
    run.log(2, VALUES)
    run.log(2, {"validation_loss": 0.2})
    run.log(10, {"lr": 0.0})
    run.close()
    assert [record.getMessage() for record in log.records] == [
        "iteration 2 of 10: loss 0.1235, 12.5 s/step, 71.5 GiB, ETA 00:00, lr 1.00e-04, grad 0.5, 0.25 samples/s",
        "validation after iteration 2: loss 0.2000",
        "iteration 10 of 10: ETA 00:00, lr 0.00e+00",
    ]


def test_between_lines_of_metrics_one_each_minute_says_where_the_run_is(tmp_path, log):
    now = [0.0]
    run = metrics(tmp_path, clock=lambda: now[0])
    for iteration in range(1, 6):
        now[0] = 30.0 * iteration
        if iteration == 3:
            run.log(iteration, {"loss": 1.0})
        else:
            run.step_done(iteration)
    run.close()
    assert [record.getMessage() for record in log.records] == [
        "iteration 2 of 10: ETA 04:00",
        "iteration 3 of 10: loss 1.0000, ETA 03:30",
        "iteration 5 of 10: ETA 02:30",
    ]


def test_wandb_is_not_imported_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    write(tmp_path, 1)
    with pytest.raises(InputError, match="pip install wandb"):
        metrics(tmp_path, wandb=True)


@pytest.mark.slow  # seconds; the test before it shows what is logged
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


def test_weights_undo_how_often_quarters_and_timesteps_were_drawn():
    quarters = LossByQuarter(torch.device("cpu"))
    # Of two equally long parts of the first quarter and of the second quarter, one is drawn twice.
    quarters.add(torch.tensor([0, 1, 249, 250]), torch.tensor([1.0, 3.0, 6.0, 5.0]), torch.tensor([0.5, 0.5, 1.0, 2.0]))
    assert quarters.values() == {"loss": 4.5, "loss_0_249": 4.0, "loss_250_499": 5.0}


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


def test_the_curve_shows_training_and_validation_by_quarter_smoothed_apart(tmp_path, monkeypatch):
    run = metrics(tmp_path)
    losses = [1 / i if i != 4 else float("nan") for i in range(1, 11)]
    for iteration, loss in enumerate(losses, start=1):
        run.log(iteration, {"loss": loss, "lr": 1e-4, "loss_750_999": 2.0, "loss_0_249": 3.0})
    run.log(10, {"validation_loss": 0.3, "validation_loss_0_249": 0.7})
    run.close()
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or Path(path).touch())
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == ["loss", "timesteps 0 to 249", "timesteps 750 to 999", ""]
    finite = [loss for loss in losses if loss == loss]
    whole, low, high, _ = ([list(line.get_ydata()) for line in axis.lines] for axis in axes)
    assert whole == [finite, smooth(finite, 0.9), [0.3], [0.3]]
    assert low == [[3.0] * 10, pytest.approx([3.0] * 10), [0.7], [0.7]] and len(high) == 2
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
        "training, smoothed",
        "validation, smoothed",
    ]


def test_a_run_without_losses_gives_an_empty_picture(tmp_path):
    write(tmp_path)
    draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
