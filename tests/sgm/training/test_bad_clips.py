"""Bad clips, found before and during training; and data sets of several formats in one run."""

import copy
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import sgm.distributed
import sgm.training.bad_clips
from data_video import SFTDataset
from sgm.config.args import TrainingArgs
from sgm.data.loader import SampleStream
from sgm.data.order import TrainingOrder
from sgm.training.bad_clips import BadClips, usable_data
from sgm.training.inputs.clips import Data, Split
from sgm.util import InputError, RunError

TOY = Path(__file__).parents[3] / "assets" / "toy"


def written(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "bad_clips.json").read_text())


def test_clips_are_written_once_with_their_reason(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(sgm.training.bad_clips.logger, "warning", lambda text, *args: warnings.append(text % args))
    bad = BadClips(tmp_path, 10, 0.5)
    bad.add([("b.mp4", "is empty"), ("a.mp4", "is cut off")])
    bad.add([("b.mp4", "is empty")])
    assert bad.all_gather_and_write() == 2
    assert written(tmp_path) == {"at_start": {}, "in_training": {"a.mp4": "is cut off", "b.mp4": "is empty"}}
    assert list(written(tmp_path)["in_training"]) == ["a.mp4", "b.mp4"]
    assert warnings == [
        "bad clip b.mp4: is empty; another clip takes its place",
        "bad clip a.mp4: is cut off; another clip takes its place",
    ]


def test_nothing_is_written_without_new_bad_clips(tmp_path):
    assert BadClips(tmp_path, 10, 0.5, known={"a.mp4": "known before"}).all_gather_and_write() == 1
    assert not (tmp_path / "bad_clips.json").exists()


def test_a_data_set_without_any_usable_clip_is_refused_by_name():
    left = {"one": ["a.mp4"], "two": []}
    data = SimpleNamespace(train=[*left.values()], valid=[["v.mp4"]], without=lambda _: data)
    args = TrainingArgs(train_data=[*left], save="runs")
    with pytest.raises(InputError, match=r"(?s)no clip of two can be used:.*b.mp4.*is empty"):
        sgm.training.bad_clips.usable(data, args, {"b.mp4": "is empty"})
    left["two"].append("c.mp4")
    assert sgm.training.bad_clips.usable(data, args, {}) is data
    data.without = lambda _: SimpleNamespace(train=data.train, valid=[])
    with pytest.raises(InputError, match="no clip of the validation data can be used"):
        sgm.training.bad_clips.usable(data, args, {"v.mp4": "is empty"})


def test_known_clips_count_and_stay_in_the_file(tmp_path):
    at_start = {"a.mp4": "known before", "validation.mp4": "known before"}
    bad = BadClips(tmp_path, 10, 0.2, at_start=at_start, known={"a.mp4": "known before"})
    bad.add([("b.mp4", "is empty")])
    assert bad.all_gather_and_write() == 2
    assert written(tmp_path) == {"at_start": at_start, "in_training": {"b.mp4": "is empty"}}
    bad.add([("c.mp4", "is empty")])
    with pytest.raises(RunError, match=r"3 of 10 training clips cannot be read, more than args.max_bad_share=0.2"):
        bad.all_gather_and_write()


def test_the_message_lists_ten(tmp_path):
    bad = BadClips(tmp_path, 20, 0.1)
    bad.add([(f"{number:02d}.mp4", "is empty") for number in range(12)])
    with pytest.raises(RunError) as caught:
        bad.all_gather_and_write()
    assert str(caught.value).count("is empty") == 10 and "  00.mp4: is empty\n" in str(caught.value)


def test_bad_clips_of_other_ranks_are_included(tmp_path, monkeypatch):
    monkeypatch.setattr(sgm.distributed, "all_gather_objects", lambda fresh: [fresh, {"other.mp4": "is empty"}])
    bad = BadClips(tmp_path, 10, 0.5)
    bad.add([("own.mp4", "is cut off")])
    assert bad.all_gather_and_write() == 2
    assert list(written(tmp_path)["in_training"]) == ["other.mp4", "own.mp4"]
    bad.add([("other.mp4", "is empty")])
    assert bad.all_gather_and_write() == 2, "it is one clip"


def toy(root, bad=()):
    """A manifest of ten toy clips, some of them not videos."""
    (root / "clips").mkdir(parents=True)
    rows = []
    for number in range(10):
        path = shutil.copy(TOY / f"videos/{number:06d}.mp4", root / f"clips/{number}.mp4")
        if number in bad:
            Path(path).write_text("no video")
        rows.append({"caption": f"clip {number}", "video": f"clips/{number}.mp4"})
    (root / "metadata.json").write_text(json.dumps(rows))
    return SFTDataset(data_dir=root, video_size=(32, 32), max_num_frames=5, skip_frms_num=0)


def usable(dataset, folder, *, resumed=False, **args):
    """Return the training clips, and path → reason of excluded ones."""
    folder.mkdir(exist_ok=True)
    typed = TrainingArgs(train_data=("data",), load="weights", train_iters=1, **({"max_bad_share": 0.2} | args))
    found, bad = usable_data(Data((dataset,), ()), typed, folder, resumed=resumed)
    return found, bad.reasons


@pytest.mark.parametrize(
    ("check_clips", "limit", "opened"), [("all", 1, True), ("none", 99, False), ("auto", 10, True)]
)
def test_clips_are_opened_before_training_as_asked(tmp_path, monkeypatch, check_clips, limit, opened):
    monkeypatch.setattr(sgm.training.bad_clips, "AUTO_CHECK", limit)
    found, left_out = usable(toy(tmp_path / "set", bad=[3]), tmp_path / "run", check_clips=check_clips)
    assert found.num_train == 10 - opened and len(left_out) == opened
    report = json.loads((tmp_path / "run/data_check.json").read_text())
    assert len(report["rows"]) == 10 and report["summary"]["bad"] == opened
    assert (report["rows"][0]["info"] is not None) == opened


def test_large_sets_are_not_opened_and_bad_clips_replaced_later(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sgm.training.bad_clips, "AUTO_CHECK", 9)
    monkeypatch.setattr("sgm.data.clips.check.scan", None)
    with caplog.at_level("INFO"):
        found, left_out = usable(toy(tmp_path / "set", bad=[3]), tmp_path / "run")
    assert "10 clips are not opened before training (args.check_clips=auto)" in caplog.text
    stream = SampleStream(found.train, TrainingOrder([10], seed=0))
    failures = [path for number in range(10) for path, _ in stream[number]["failures"]]
    assert left_out == {} and failures == [found.train[0].paths[3]]


def test_rows_without_a_clip_or_caption_are_found_without_opening(tmp_path):
    dataset = toy(tmp_path / "set")
    (tmp_path / "set/clips/4.mp4").unlink()
    settings = {"video_size": (32, 32), "max_num_frames": 5}
    dataset = SFTDataset(data_dir=tmp_path / "set", **settings)
    found, left_out = usable(dataset, tmp_path / "run", check_clips="none")
    assert found.num_train == 9 and "metadata.json:1 names it" in left_out[dataset.paths[4]]
    with pytest.raises(InputError, match="1 of 10 clips cannot be used"):
        usable(dataset, tmp_path / "run", check_clips="none", max_bad_share=0.0)
    content = json.loads((tmp_path / "set/metadata.json").read_text())
    content[2]["caption"] = " "
    (tmp_path / "set/metadata.json").write_text(json.dumps(content))
    dataset = SFTDataset(data_dir=tmp_path / "set", **settings)
    found, left_out = usable(dataset, tmp_path / "run", check_clips="none")
    assert found.num_train == 8 and "is empty; write one, or set allow_missing_captions" in left_out[dataset.paths[2]]
    (tmp_path / "set/clips/4.mp4").touch()
    with pytest.raises(
        InputError, match="(?s)1 of 10 clips have no usable caption.*set data.params.allow_missing"
    ) as caught:
        dataset = SFTDataset(data_dir=tmp_path / "set", **settings)
        usable(dataset, tmp_path / "refused", check_clips="none", max_bad_share=0.0)
    assert "2.mp4: its caption" in str(caught.value)


def test_validation_clips_are_drawn_from_usable_ones(tmp_path):
    """A bad clip takes no place of a good one, for validation or training; with a cache too."""

    def draw(index, num):
        return list(range(1, num)), [0]

    pool = toy(tmp_path / "set", bad=[0, 3])
    cached = copy.copy(pool)
    cached.fps = 7.0  # stands for a data set that reads from a cache
    data = Split((pool,), (pool,), draw).data().with_cached([cached], None)
    args = TrainingArgs(train_data=("data",), load="weights", train_iters=1, max_bad_share=0.2)
    (tmp_path / "run").mkdir()
    found, _ = usable_data(data, args, tmp_path / "run", resumed=False)
    assert found.valid[0].paths == [pool.paths[1]] and found.valid[0].fps == pool.fps
    assert found.train[0].paths == [pool.paths[i] for i in (2, 4, 5, 6, 7, 8, 9)] and found.train[0].fps == 7.0
    again, _ = usable_data(data, args, tmp_path / "run", resumed=True)
    assert again.train[0].paths == found.train[0].paths and again.valid[0].paths == found.valid[0].paths


def test_a_resumed_run_leaves_out_what_it_left_out_at_its_start(tmp_path):
    dataset, run = toy(tmp_path / "set", bad=[3]), tmp_path / "run"
    found, left_out = usable(dataset, run)
    assert written(run) == {"at_start": left_out, "in_training": {}}
    bad = BadClips(run, 10, 0.5, at_start=left_out, known=left_out)
    bad.add([(dataset.paths[5], "is damaged")])
    bad.all_gather_and_write()
    shutil.copy(dataset.paths[0], dataset.paths[3])  # repaired; the samples of the run must not change
    resumed, known = usable(dataset, run, resumed=True)
    assert resumed.train[0].paths == found.train[0].paths and len(found.train[0]) == 9
    assert known == left_out | {dataset.paths[5]: "is damaged"}


def test_a_former_run_folder_is_resumed_from_its_two_files(tmp_path):
    dataset, run = toy(tmp_path / "set"), tmp_path / "run"
    run.mkdir()
    first, later = ({dataset.paths[i]: reason} for i, reason in ((3, "is not a video"), (5, "is damaged")))
    (run / "excluded_clips.json").write_text(json.dumps(first))
    (run / "quarantine.json").write_text(json.dumps(first | later))
    found, known = usable(dataset, run, resumed=True)
    assert dataset.paths[3] not in found.train[0].paths and dataset.paths[5] in found.train[0].paths
    assert known == first | later
    bad = BadClips(run, 10, 0.5, at_start=first, known=known)
    bad.add([(dataset.paths[7], "is damaged")])
    bad.all_gather_and_write()
    assert written(run) == {"at_start": first, "in_training": later | {dataset.paths[7]: "is damaged"}}


def test_a_bad_clip_whose_name_is_not_utf_8_does_not_end_a_resumed_run(tmp_path):
    bad, reasons = BadClips(tmp_path, 10, 0.5), {"set/" + os.fsdecode(b"\xff.mp4"): "is damaged"}
    bad.add(reasons.items())
    bad.all_gather_and_write()
    assert usable(toy(tmp_path / "set"), tmp_path, resumed=True)[1] == reasons


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold 'at_start' and 'in_training'"),
        ("null", "does not hold 'at_start' and 'in_training'"),
        ('{"at_start": {}}', "does not hold 'at_start' and 'in_training'"),
        ('{"at_start": {}, "in_training": {}, "more": {}}', "does not hold 'at_start' and 'in_training'"),
        ('{"at_start": [], "in_training": {}}', r"'at_start' is \[\]"),
        (None, "[Ii]s a directory"),
    ],
)
def test_a_list_that_cannot_be_read_ends_a_resumed_run(tmp_path, content, said):
    (path := tmp_path / "run/bad_clips.json").parent.mkdir()
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=f"cannot be read: .*{said}.*args.resume=none"):
        usable(toy(tmp_path / "set"), tmp_path / "run", resumed=True)


def test_formats_are_mixed_by_weight(tmp_path):
    folder = SFTDataset(data_dir=TOY, video_size=(32, 32), max_num_frames=5, skip_frms_num=0)
    stream = SampleStream([folder, toy(tmp_path / "set")], TrainingOrder([60, 10], seed=0, weights=[1, 1]))
    chosen = [stream[number]["txt"].startswith("clip ") for number in range(70)]
    assert sum(chosen) == 35
