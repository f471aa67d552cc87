import json

import numpy as np
import pytest
from PIL import Image

from sgm.data.buckets.config import parse_buckets
from sgm.data.clips import check as check_module
from sgm.data.clips.check import (
    RowReport,
    bad_share,
    check_rows,
    histograms,
    summarize,
    summary_text,
    table,
    write_report,
)
from sgm.data.rows import Row, VideoInfo
from sgm.inference.video import write_video


def clip(path, num_frames=17, fps=8, size=(64, 96)):
    write_video(path, np.zeros((num_frames, *size, 3), np.uint8), fps)
    return path


def check(*rows, **more):
    settings = {"video_size": (64, 64), "fps": 8, "max_num_frames": 17} | more
    return check_rows(rows, **settings)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A good clip, a slow, a short, a small one, one of an absurd rate, one without a caption, and no clip at all."""
    folder = tmp_path_factory.mktemp("clips")
    made = [
        Row(clip(folder / "good.mp4"), "a caption"),
        Row(clip(folder / "slow.mp4", fps=5), "a caption"),
        Row(clip(folder / "short.mp4", num_frames=9), "a caption"),
        Row(clip(folder / "small.mp4", size=(32, 32)), "a caption"),
        Row(clip(folder / "absurd.mp4", num_frames=100, fps=1000), "a caption"),
        Row(clip(folder / "unnamed.mp4"), "", "its caption is missing"),
        Row(folder / "text.mp4", "a caption"),
    ]
    made[-1].path.write_text("no video")
    return made


def test_reports_hold_problems_and_notes(rows):
    good, slow, short, small, absurd, unnamed, text = check(*rows)
    assert (good.problems, good.notes, good.num_frames, good.effective_fps) == ((), (), 17, 8)
    assert good.info is not None and (good.info.height, good.info.width, good.info.num_frames) == (64, 96, 17)
    assert slow.problems == () and "slower than 8 fps" in slow.notes[0] and slow.effective_fps < 6
    assert short.problems == () and short.notes == ("short: the last of 9 frames is repeated",)
    assert small.notes == ("enlarged",)
    assert "1000 frames per second" in absurd.problems[0] and absurd.info is not None
    assert unnamed.problems == ("its caption is missing",) and unnamed.info is not None
    assert "not a video" in text.problems[0] and text.info is None
    assert bad_share([good, slow, absurd, text]) == 0.5


def test_with_buckets_each_clip_is_checked_against_its_own(rows):
    buckets = parse_buckets(["17x64x96", "9x64x64", "5x32x32"])
    good, slow, short, small, absurd, _, text = check(*rows, buckets=buckets)
    assert good.notes == short.notes == () and short.num_frames == 9
    assert small.notes == ("enlarged",) and "slower" in slow.notes[0]
    assert "1000 frames per second" in absurd.problems[0] and "not a video" in text.problems[0]
    found = check(*rows, buckets=parse_buckets({"144p": {9: [0.5, 1]}}))
    assert found[0].notes == ("fits no bucket: left out",) and found[0].num_frames == 0


def test_columns_of_a_manifest_are_checked_against_the_clip(tmp_path):
    path, picture = clip(tmp_path / "a.mp4"), tmp_path / "a.png"
    Image.new("RGB", (96, 64)).save(picture)

    def stated(file, *info, **more):
        return check(Row(file, "a caption", info=VideoInfo(*info)), **more)[0]

    assert stated(path, 17, 8.07, 2.1, 64, 96).notes == () and stated(picture, 1, 25.0, 0.04, 64, 96).problems == ()
    wrong = stated(path, 81, 8.1, 10.0, 96, 64)
    said = "its columns say num_frames=81 where it has 17, height=96 where it has 64, width=64 where it has 96, fps=8.1"
    assert wrong.problems == () and said in wrong.notes[0]
    assert said in stated(path, 81, 8.1, 10.0, 96, 64, buckets=parse_buckets(["17x64x96"])).problems[0]
    assert stated(path, 17, 8.0, 2.125, 64, 96, buckets=parse_buckets(["17x64x96"])).problems == ()


def test_too_short_to_skip_is_a_problem(rows):
    assert "leaves none" in check(rows[2], skip=(5, 5))[0].problems[0]


def test_hdr_and_interlaced_clips_are_noted(tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4")
    scanned = check_module.scan(path)
    monkeypatch.setattr(check_module, "scan", lambda path: scanned._replace(hdr=True))
    monkeypatch.setattr(check_module, "decode_all", lambda path, scanned: scanned._replace(interlaced=True))
    (said,) = check(Row(path, "a caption"))[0].notes
    assert said.startswith("HDR (PQ or HLG): it is read without tone mapping")
    assert check(Row(path, "a caption"), decode=True)[0].notes == ("interlaced: it is deinterlaced", said)


def test_damage_inside_is_found_when_everything_is_decoded(tmp_path):
    path = clip(tmp_path / "damaged.mp4", num_frames=60)
    content = bytearray(path.read_bytes())
    start = len(content) * 3 // 4
    content[start : start + 200] = bytes(value ^ 0x5A for value in content[start : start + 200])
    path.write_bytes(content)
    row = Row(path, "a caption")
    assert check(row)[0].problems == ()
    assert len(check(row, decode=True)[0].problems) == 1


def test_summary_counts_good_clips_only(rows):
    reports = check(*rows)
    found = summarize(reports)
    assert (found["clips"], found["bad"], found["noted"]) == (7, 3, 3)
    assert found["fps"] == [5, 8]
    assert found["sizes"] == {"64x96": 3, "32x32": 1}
    assert "7 clips: 4 good, 3 bad" in summary_text(reports)
    assert summary_text([reports[-1]]) == "1 clips: 0 good, 1 bad"
    assert bad_share([]) == 0


def test_histograms_of_sizes_durations_and_rates():
    def report(seconds, fps, height):
        return RowReport("a", "", VideoInfo(int(seconds * fps), fps, seconds, height, 64))

    same, few = ([report(2, 8, 64)] * 3, [report(2, 8, 64)] * 2 + [report(9.5, 30, 32), RowReport("b", "", None)])
    assert histograms(same).split("\n\n")[0] == f"size (height x width)\n  64x64  3  {'#' * 40}"
    size, seconds, fps = histograms(few).split("\n\n")
    assert size.splitlines()[2] == f"  32x64  1  {'#' * 20}"
    assert seconds.splitlines()[1:] == [
        f"   2 to 3  2  {'#' * 40}",
        *(f"   {low} to {low + 1}  0" for low in range(3, 9)),
        f"  9 to 10  1  {'#' * 20}",
    ]
    assert [line.split()[:2] for line in fps.splitlines()[1:]] == [["8", "2"], ["30", "1"]]
    many = histograms([report(2, fps, fps) for fps in range(1, 31)])
    size, _, fps = many.split("\n\n")
    assert size.splitlines()[-1].split()[:2] == ["others", "20"] and fps.splitlines()[1].split()[:3] == ["0", "to", "5"]
    assert histograms([RowReport("a", "")]) == ""


def test_the_table_has_a_line_for_each_clip(rows):
    header, *lines = table(check(*rows)).splitlines()
    assert header.split() == ["frames", "fps", "seconds", "size", "taken", "clip"]
    assert len(lines) == len(rows)
    assert all(str(row.path) in line for row, line in zip(rows, lines, strict=True))
    assert ["BAD: " in line for line in lines] == [False] * 4 + [True] * 3
    assert lines[0].split()[:5] == ["17", "8", "2.12", "64x96", "17"]
    odd = RowReport("a\nb\t.mp4", "", problems=("its caption c\nd is missing",))
    assert table([odd]).splitlines()[1].endswith(r"a\nb\t.mp4  BAD: its caption c\nd is missing"), (
        "one line for any name"
    )


def test_the_report_is_json(rows, tmp_path):
    reports = check(*rows)
    write_report(tmp_path / "new" / "report.json", reports)
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["summary"]["bad"] == 3
    assert [row["path"] for row in content["rows"]] == [str(row.path) for row in rows]
    assert content["rows"][0]["info"]["num_frames"] == 17
    assert content["rows"][-1]["problems"] == list(reports[-1].problems)
