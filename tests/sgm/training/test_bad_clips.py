import json

import pytest

import sgm.distributed
import sgm.training.bad_clips
from sgm.training.bad_clips import BadClips
from sgm.util import RunError


def test_clips_are_written_down_once_with_their_reason(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(sgm.training.bad_clips.logger, "warning", lambda text, *args: warnings.append(text % args))
    quarantine = BadClips(tmp_path, 10, 0.5)
    quarantine.add([("b.mp4", "is empty"), ("a.mp4", "is cut off")])
    quarantine.add([("b.mp4", "is empty")])
    assert quarantine.all_gather_and_write() == 2
    assert json.loads((tmp_path / "quarantine.json").read_text()) == {"a.mp4": "is cut off", "b.mp4": "is empty"}
    assert warnings == [
        "quarantined b.mp4: is empty; another clip takes its place",
        "quarantined a.mp4: is cut off; another clip takes its place",
    ]


def test_nothing_is_written_without_news(tmp_path):
    assert BadClips(tmp_path, 10, 0.5, {"a.mp4": "known before"}).all_gather_and_write() == 1
    assert not (tmp_path / "quarantine.json").exists()


def test_known_clips_count_and_stay_in_the_file(tmp_path):
    quarantine = BadClips(tmp_path, 10, 0.2, {"a.mp4": "known before"})
    quarantine.add([("b.mp4", "is empty")])
    assert quarantine.all_gather_and_write() == 2
    assert list(json.loads((tmp_path / "quarantine.json").read_text())) == ["a.mp4", "b.mp4"]
    quarantine.add([("c.mp4", "is empty")])
    with pytest.raises(RunError, match=r"3 of 10 training clips cannot be read, more than args.max_bad_share=0.2"):
        quarantine.all_gather_and_write()


def test_the_message_lists_ten(tmp_path):
    quarantine = BadClips(tmp_path, 20, 0.1)
    quarantine.add([(f"{number:02d}.mp4", "is empty") for number in range(12)])
    with pytest.raises(RunError) as caught:
        quarantine.all_gather_and_write()
    assert str(caught.value).count("is empty") == 10 and "  00.mp4: is empty\n" in str(caught.value)


def test_what_other_ranks_found_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(sgm.distributed, "all_gather_objects", lambda fresh: [fresh, {"other.mp4": "is empty"}])
    quarantine = BadClips(tmp_path, 10, 0.5)
    quarantine.add([("own.mp4", "is cut off")])
    assert quarantine.all_gather_and_write() == 2
    assert list(json.loads((tmp_path / "quarantine.json").read_text())) == ["other.mp4", "own.mp4"]
    quarantine.add([("other.mp4", "is empty")])
    assert quarantine.all_gather_and_write() == 2, "it is one clip"
