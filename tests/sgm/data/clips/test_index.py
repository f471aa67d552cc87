"""sgm.data.clips.index: clips are read once, and again when they change."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from sgm.data.clips import index
from sgm.data.clips.index import clip_infos, index_path
from sgm.data.formats.registry import list_rows
from sgm.data.rows import Row, VideoInfo

TOY = Path(__file__).parents[4] / "assets" / "toy" / "videos"
INFO = VideoInfo(17, 8.0, 2.125, 64, 64)


@pytest.fixture(autouse=True)
def reading(monkeypatch, tmp_path):
    """Write small indices too, and record which clips are read."""
    read, probe = [], index.probe
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    monkeypatch.setattr(index, "probe", lambda file: read.append(Path(str(file)).name) or probe(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(TOY / "000000.mp4", tmp_path / "data" / f"{name}.mp4")
    return tmp_path / "data"


def rows(folder):
    return [Row(folder / f"{name}.mp4", name) for name in "abc"]


def test_clips_are_read_once(folder, reading):
    assert clip_infos(rows(folder), folder) == [INFO] * 3 and sorted(reading) == ["a.mp4", "b.mp4", "c.mp4"]
    reading.clear()
    assert clip_infos(rows(folder), folder) == [INFO] * 3 and reading == []
    moved = folder.rename(folder.with_name("moved"))
    assert clip_infos(rows(moved), moved) == [INFO] * 3 and reading == [], "names are relative"
    os.utime(moved / "b.mp4", ns=(1, 1))
    assert clip_infos(rows(moved), moved) == [INFO] * 3 and reading == ["b.mp4"]
    content = json.loads((moved / index.NAME).read_text())
    content["c.mp4"][0] -= 1  # of an earlier reader, which measured otherwise
    (moved / index.NAME).write_text(json.dumps(content))
    assert clip_infos(rows(moved), moved) == [INFO] * 3 and reading == ["b.mp4", "c.mp4"]


def test_clips_with_columns_or_problems_are_not_read(folder, reading):
    said = VideoInfo(5, 8.0, 0.625, 32, 32)
    mixed = [Row(folder / "a.mp4", "", info=said), Row(folder / "b.mp4", "", "is bad"), *rows(folder)[2:]]
    assert clip_infos(mixed, folder) == [said, "is bad", INFO] and reading == ["c.mp4"]


def test_bad_clips_are_read_again_each_time(folder, reading):
    (folder / "b.mp4").write_text("no video")
    for _ in range(2):
        first, second, third = clip_infos(rows(folder), folder)
        assert (first, third) == (INFO, INFO) and "not a video" in str(second)
    assert reading.count("b.mp4") == 2 and len(reading) == 4


def test_a_folder_that_is_read_only_has_its_index_in_the_cache(folder, reading, monkeypatch, tmp_path):
    clip_infos(rows(folder)[:1], folder)
    monkeypatch.setattr(index.os, "access", lambda *_: False)
    before = (folder / index.NAME).read_bytes()
    assert tmp_path / "cache" in index_path(folder).parents
    for _ in range(2):
        assert clip_infos(rows(folder), folder) == [INFO] * 3
    assert len(reading) == 3 and (folder / index.NAME).read_bytes() == before, "both are read, one is written"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert clip_infos(rows(folder), folder) == [INFO] * 3, "then nothing is kept"


def test_clips_in_a_table_are_cached_until_its_files_change(tmp_path, reading):
    from datasets import Dataset, Features, Value, Video, disable_progress_bars

    disable_progress_bars()
    folder, content = tmp_path / "set", (TOY / "000000.mp4").read_bytes()
    cells = [{"video": {"bytes": content, "path": f"{name}.mp4"}, "caption": name} for name in "abc"]
    features = Features({"caption": Value("string"), "video": Video(decode=False)})
    Dataset.from_list(cells, features=features).save_to_disk(str(folder))
    listed = list_rows(folder)
    for _ in range(3):
        assert clip_infos(listed, folder) == [INFO] * 3
    assert len(reading) == 3, "the index lies in the folder"
    with next(folder.glob("*.arrow")).open("r+b") as file:
        file.write(file.read(1))  # the folder does not change by that
    os.utime(next(folder.glob("*.arrow")), ns=(1, 2**62))
    clip_infos(listed, folder)
    assert len(reading) == 6


@pytest.mark.parametrize("content", ["no JSON", json.dumps({"a.mp4": [1]}), "[1]", '{"a.mp4": 5}', '{"a.mp4": null}'])
def test_a_damaged_index_is_rewritten(folder, reading, content):
    (folder / index.NAME).write_text(content)
    assert clip_infos(rows(folder), folder) == [INFO] * 3
    reading.clear()
    assert clip_infos(rows(folder), folder) == [INFO] * 3 and reading == []


@pytest.mark.parametrize("place", range(3, 8))
@pytest.mark.parametrize("value", ["17", None, -1, True, math.nan, [17]])
def test_an_entry_that_is_no_metadata_is_read_again(folder, reading, place, value):
    clip_infos(rows(folder), folder)
    entries = json.loads((folder / index.NAME).read_text())
    entries["a.mp4"][place] = value
    (folder / index.NAME).write_text(json.dumps(entries))
    reading.clear()
    assert clip_infos(rows(folder), folder) == [INFO] * 3 and reading == ["a.mp4"]


def test_small_data_sets_write_no_index(folder, monkeypatch):
    monkeypatch.setattr(index, "KEPT_FROM", 4)
    clip_infos(rows(folder), folder)
    assert not (folder / index.NAME).exists()
