import json
from pathlib import Path

import check_dataset
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]


TOY = str(ROOT / "assets" / "toy")
PARAMS = ("--video_size", "64", "64", "--max_num_frames", "17", "--skip_frms_num", "0")


@pytest.fixture
def data(tmp_path):
    """A folder of two toy clips, and a YAML file with a data section and nothing else."""
    for kind, suffix in (("videos", "mp4"), ("labels", "txt")):
        (tmp_path / kind).mkdir()
        for name in ("000000", "000001"):
            source = ROOT / "assets/toy" / kind / f"{name}.{suffix}"
            (tmp_path / kind / source.name).write_bytes(source.read_bytes())
    params = {"video_size": [64, 64], "fps": 8, "max_num_frames": 17, "skip_frms_num": 0}
    section = {"target": "data_video.SFTDataset", "params": params}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": section}))
    return tmp_path


def test_good_clips_end_with_0_and_a_summary(data, capsys):
    assert check_dataset.main([str(data), *PARAMS]) == 0
    out = capsys.readouterr().out
    assert "000001.mp4" in out
    assert "2 clips: 2 good, 0 bad" in out


def test_several_folders_and_a_report(data, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert check_dataset.main([str(data), TOY, *PARAMS, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["summary"]["clips"] == 62
    assert f"report: {report}" in capsys.readouterr().out


def test_other_formats_spread_and_a_contact_sheet(data, capsys):
    (data / "list.csv").write_text("words,video\none,videos/000000.mp4\ntwo,videos/000001.mp4\n")
    sheet = data / "sheet.png"
    words = [str(data / "list.csv"), *PARAMS, "--caption_column", "words", "--contact_sheet", str(sheet)]
    assert check_dataset.main(words) == 0
    out = capsys.readouterr().out
    assert f"  64x64  2  {'#' * 40}" in out and f"2 clips: {sheet}" in out
    with Image.open(sheet) as picture:
        assert picture.height > 2 * 64


def test_the_data_are_not_replaced(data, capsys):
    """Neither the table of clips nor a clip becomes a report."""
    table = data / "metadata.json"
    table.write_text(json.dumps([{"caption": "one", "video": "videos/000000.mp4"}]))
    Image.new("RGB", (64, 64)).save(data / "videos/still.png")
    (data / "labels/still.txt").write_text("a still")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert check_dataset.main([str(table), *PARAMS, "--json", str(table)]) == 2
    assert "metadata.json exists and was not written by this command" in capsys.readouterr().err
    assert check_dataset.main([str(data), *PARAMS, "--contact_sheet", str(data / "labels/../videos/still.png")]) == 2
    assert "still.png is a clip of the data" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    for _ in range(2):  # its own report is
        assert check_dataset.main([str(data), *PARAMS, "--json", str(data / "report.json")]) == 0


def test_rows_alone(data, capsys, monkeypatch):
    monkeypatch.setattr("sgm.data.clips.check.scan", None)
    (data / "list.csv").write_text("caption,video\none,videos/000000.mp4\ntwo,videos/x.mp4\n")
    assert check_dataset.main([str(data / "list.csv"), *PARAMS, "--rows_only"]) == 1
    out = capsys.readouterr().out
    assert "list.csv:3 names it" in out and "2 clips: 1 good, 1 bad; no clip was opened" in out


def test_bad_clips_end_with_1_and_are_named(data, capsys):
    (data / "videos/broken.mp4").write_text("no video")
    (data / "labels/000000.txt").unlink()
    assert check_dataset.main([str(data), *PARAMS]) == 1
    bad = [line for line in capsys.readouterr().out.splitlines() if "BAD" in line]
    assert ["000000.mp4" in bad[0], "broken.mp4" in bad[1], len(bad)] == [True, True, 2]
    assert "is missing" in bad[0]
    (data / "videos/broken.mp4").unlink()
    assert check_dataset.main([str(data), *PARAMS, "--allow_missing_captions"]) == 0


def test_parameters_come_from_yaml_and_the_command_line_wins(data, capsys):
    base = ["--base", str(ROOT / "configs/toy.yaml"), str(data / "data.yaml")]
    assert check_dataset.main([str(data), *base]) == 0
    assert "17 frames at an effective 8 fps" in capsys.readouterr().out
    assert check_dataset.main([str(data), *base, "--fps", "4", "--decode"]) == 0
    assert "9 frames at an effective 4 fps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", *PARAMS], "'nowhere' does not exist"),
        ([TOY, *PARAMS, "--format", "csv"], "metadata.csv' does not exist"),
        ([TOY], "give --video_size"),
        ([TOY, "--video_size", "64", "64", "--max_num_frames", "16"], "13 or 17"),
        ([TOY, "--base", "nowhere.yaml"], "nowhere.yaml"),
        ([TOY, "--base", str(ROOT / "configs/toy.yaml")], "no section data"),
    ],
)
def test_wrong_input_ends_with_2_and_a_cure(words, said, capsys):
    assert check_dataset.main(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_parameters_are_checked_as_training_checks_them(data, capsys):
    (data / "data.yaml").write_text("data: {target: data_video.SFTDataset, params: {video_size: [64, 64], frames: 17}}")
    assert check_dataset.main([str(data), "--base", str(data / "data.yaml")]) == 2
    assert "data.params.frames: unknown key" in capsys.readouterr().err


class Bare(list):
    def __init__(self, *, data_dir: str, video_size: int):
        super().__init__()


def test_other_data_sets_must_be_able_to_check(data, monkeypatch, capsys):
    monkeypatch.setattr("sgm.util.PROJECT", ("sgm",))
    base = data / "other.yaml"
    base.write_text(f"data: {{target: {__name__}.Bare, params: {{video_size: 1}}}}")
    assert check_dataset.main([str(data), "--base", str(base)]) == 2
    assert "add --trust tests" in capsys.readouterr().err
    assert check_dataset.main([str(data), "--base", str(base), "--trust", "tests"]) == 2
    assert f"{__name__}.Bare cannot check its clips" in capsys.readouterr().err
