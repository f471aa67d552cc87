"""The tables of growth, at sizes of milliseconds."""

import pytest

from benchmarks import growth
from benchmarks.models import NetworkSize


def rank_alone(ranks, words, **_):
    """Do what the first of the ranks does, without the others."""
    assert ranks == 2 and words[:2] == ["-m", "benchmarks.growth"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "forward_seconds", lambda *size: 7.25 if size == (1, 2, 4, 4) else None)
        assert growth.main(words[2:]) == 0


@pytest.mark.thorough
def test_time_and_data_are_measured_and_drawn(monkeypatch, tmp_path, capsys):
    size = NetworkSize(32, 2, 1, 16, latents=(4, 4, 4), text_length=3, text_hidden_size=8)
    monkeypatch.setattr(growth, "SMALL", size)
    times = {"frames": ((2, 4, 4, 1), (4, 4, 4, 1)), "batch": ((2, 4, 4, 2),), "ranks": ((2, 4, 4, 2),)}
    monkeypatch.setattr(growth, "TIMES", times)
    monkeypatch.setattr("benchmarks.runs.launch", rank_alone)
    monkeypatch.setattr(growth, "memory_points", lambda: iter([growth.Point("ranks", "2", 7, {"sampling": 2.0**31})]))
    assert growth.main(["--rows", "2", "300", "--plot", str(tmp_path / "growth.png")]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line]
    assert rows[2] == ["ranks", "2", "7", "2.0 GiB"]
    assert [row[:3] for row in rows[5:8]] == [["frames", "2", "4"], ["frames", "4", "8"], ["batch", "2", "8"]]
    assert rows[8] == ["ranks", "2", "4", "7.250 s"]
    assert [row[1] for row in rows[11:]] == ["2", "300"] and "index read" in rows[9]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_memory_grows_with_samples_and_falls_with_ranks(monkeypatch):
    monkeypatch.setattr(growth, "AXES", {"batch": (1, 2), "ranks": (2,)})
    planned = []

    def estimate(config, dtype, *_, **__):
        planned.append((config.args.sequence_parallel_size, config.args.sampling_image_size))
        return type("Estimate", (), {"device": {"network": 2.0**30}})

    monkeypatch.setattr(growth, "sampling_estimate", estimate)
    monkeypatch.setattr(growth, "training_estimate", estimate)
    points = list(growth.memory_points())
    assert [(point.axis, point.shown) for point in points] == [("batch", "1"), ("batch", "2"), ("ranks", "2")]
    assert points[1].tokens == 2 * points[0].tokens == 2 * points[2].tokens
    assert planned == [(1, (384, 672))] * 4 + [(2, (384, 672))] * 2
