"""Reading clips, caches and a checkpoint is measured, at sizes of milliseconds."""

import gc
import json

import pytest

from benchmarks import data, loading

SMALL = 24, 48, 86, 16, 12  # frames, height, width, frames per second, GOP


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(data, "SOURCES", {"small": SMALL})
    monkeypatch.setattr(data, "TARGET", (9, 48, 64))
    for module in (data, loading):
        monkeypatch.setattr(module, "SIDE", 8)


def test_clips_are_read_by_three_readers_and_caches_in_two_sizes(capsys):
    pytest.importorskip("decord", reason="decord is not installed")
    for table in ("clips", "cache"):
        assert data.main(["--only", table, "--clips", "1", "--samples", "3", "--rounds", "1"]) == 0
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[2:5]] == [
        ["small", name] for name in ("ours", "decord, resized as ours", "as diffusers reads")
    ]
    assert float(rows[2][5]) == 1 and all(float(row[2]) > 0 for row in rows[2:5])
    assert [row[0] for row in rows[7:]] == ["9x48x64", "17x256x384"] and all(float(row[2]) > 0 for row in rows[7:])


def test_the_readers_take_the_same_frames_in_the_same_size(tmp_path, monkeypatch):
    pytest.importorskip("decord", reason="decord is not installed")
    data.make_clips(tmp_path / "clips", 1, SMALL[:3], *SMALL[3:])
    ours, decoded, stretched = (read(0) for read in data.readers(tmp_path / "clips", data.TARGET).values())
    assert ours.shape == decoded.shape == stretched.shape == (9, 3, 48, 64)
    assert (ours - decoded).abs().max() < 0.1 < (ours - stretched).abs().max()
    monkeypatch.setattr(data, "as_samples", lambda pictures, size: stretched)
    with pytest.raises(AssertionError, match="gives other frames"):
        data.readers(tmp_path / "clips", data.TARGET)


def test_a_checkpoint_is_loaded_and_its_memory_watched(tmp_path, monkeypatch, capsys):
    data.write_checkpoint(tmp_path / "w.safetensors", 3)
    data.load_and_report(tmp_path / "w.safetensors", 3)
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found.keys() == {"seconds", "own", "all"}
    gc.collect()  # what is freed meanwhile would count against the block
    with data.HostMemory() as memory:
        block = bytearray(b"1") * 2**26
    assert memory.all >= memory.own >= 32 * 2**20 and len(block) == 2**26
