"""sgm.training.inputs.clips: what is looked at before training, and data sets of several formats side by side."""

import json
import shutil
from pathlib import Path

import pytest

import sgm.training.inputs.clips
from data_video import SFTDataset
from sgm.config.args import TrainingArgs
from sgm.data.loader import SampleStream
from sgm.data.order import TrainingOrder
from sgm.training.inputs.clips import Data, usable_data
from sgm.util import InputError

TOY = Path(__file__).parents[4] / "assets" / "toy"


def toy(root, bad=()):
    """A manifest of ten toy clips, some of which are no videos."""
    (root / "clips").mkdir(parents=True)
    rows = []
    for number in range(10):
        path = shutil.copy(TOY / f"videos/{number:06d}.mp4", root / f"clips/{number}.mp4")
        if number in bad:
            Path(path).write_text("no video")
        rows.append({"caption": f"clip {number}", "video": f"clips/{number}.mp4"})
    (root / "metadata.json").write_text(json.dumps(rows))
    return SFTDataset(data_dir=root, video_size=(32, 32), max_num_frames=5, skip_frms_num=0)


def usable(dataset, folder, **args):
    folder.mkdir(exist_ok=True)
    typed = TrainingArgs(train_data=("data",), load="weights", train_iters=1, **({"max_bad_share": 0.2} | args))
    return usable_data(Data((dataset,), ()), typed, folder, resumed=False)


@pytest.mark.parametrize(
    ("check_clips", "limit", "opened"), [("all", 1, True), ("none", 99, False), ("auto", 10, True)]
)
def test_clips_are_opened_before_training_as_asked(tmp_path, monkeypatch, check_clips, limit, opened):
    monkeypatch.setattr(sgm.training.inputs.clips, "AUTO_CHECK", limit)
    found, left_out = usable(toy(tmp_path / "set", bad=[3]), tmp_path / "run", check_clips=check_clips)
    assert found.num_train == 10 - opened and len(left_out) == opened
    report = json.loads((tmp_path / "run/data_check.json").read_text())
    assert len(report["rows"]) == 10 and report["summary"]["bad"] == opened
    assert (report["rows"][0]["info"] is not None) == opened


def test_large_sets_are_not_opened_and_bad_clips_replaced_later(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sgm.training.inputs.clips, "AUTO_CHECK", 9)
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
    with pytest.raises(InputError, match="1 of 10 clips have no usable caption"):
        usable(SFTDataset(data_dir=tmp_path / "set", **settings), tmp_path / "run", check_clips="none")


def test_formats_are_mixed_by_weight(tmp_path):
    folder = SFTDataset(data_dir=TOY, video_size=(32, 32), max_num_frames=5, skip_frms_num=0)
    stream = SampleStream([folder, toy(tmp_path / "set")], TrainingOrder([60, 10], seed=0, weights=[1, 1]))
    chosen = [stream[number]["txt"].startswith("clip ") for number in range(70)]
    assert sum(chosen) == 35
