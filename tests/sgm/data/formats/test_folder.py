import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from data_video import SFTDataset
from sgm.data.clips import index
from sgm.data.clips.check import write_report
from sgm.data.formats.folder import caption_path, list_folder
from sgm.data.formats.registry import list_rows
from sgm.util import InputError


def put(root: Path, *names: str, text: str = "a caption") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("clip", "caption"),
    [
        ("videos/a.mp4", "labels/a.txt"),
        ("videos/cats/a.b.mov", "labels/cats/a.b.txt"),
        ("part1/videos/a.mp4", "part1/labels/a.txt"),
        ("videos/videos/a.mp4", "videos/labels/a.txt"),
        ("my_videos/a.mp4", "my_videos/a.txt"),
        ("videos.old/a.mp4", "videos.old/a.txt"),
        ("a.mp4", "a.txt"),
        ("videos.mp4", "videos.txt"),
    ],
)
def test_only_the_last_folder_videos_below_the_root_becomes_labels(clip, caption):
    root = Path("/data/videos/set")
    assert caption_path(root / clip, root) == root / caption


def test_clips_are_found_at_any_depth_and_ordered_by_path(tmp_path):
    clips = ["videos/b.mp4", "videos/a/z.MKV", "videos/a.mp4", "loose.webm"]
    put(tmp_path, *clips, "labels/b.txt", "labels/a/z.txt", "labels/a.txt", "loose.txt")
    put(tmp_path, "videos/._a.mp4", "videos/.hidden/c.mp4", "videos/notes.txt", "videos/still.png")
    rows = list_folder(tmp_path)
    assert [row.path.relative_to(tmp_path).as_posix() for row in rows] == sorted(clips)
    assert {(row.caption, row.problem) for row in rows} == {("a caption", None)}


def test_suffixes_in_capitals(tmp_path):
    put(tmp_path, "IMG_1.MP4", "IMG_1.TXT", "IMG_2.JPG", "IMG_2.TXT", "IMG_3.JPG", "a.mp4", "a.txt", "a.TXT")
    (tmp_path / "a.TXT").write_text("not this one")
    rows = list_folder(tmp_path)
    assert [(row.path.name, row.caption) for row in rows] == [
        (name, "a caption") for name in ("IMG_1.MP4", "IMG_2.JPG", "a.mp4")
    ]


# Whatever a file system allows in a name: bytes without a slash and a zero.
NAMES = [
    b"10:30:00",
    b"file:a",
    b"http:b",
    b"-i",
    b"100%03d",
    b"[a]*?{b}",
    b"subfile,,start,0,end,9,,:c",
    b"concat:d|e",
    b"c:\\clips",
    b"back\\slash",
    b" spaces ",
    b"line\nbreak\r\ttab",
    b"quote'\"`$(g)",
    b"\xff\xfe not UTF-8",
    "日本 \U0001f680 e\u0301".encode(),
    b"\x1b[31mred",
    b"~",
    b"#&;|<>",
    b"x" * 251,
]


def test_names_are_files_and_never_urls(tmp_path, monkeypatch):
    names = [os.fsdecode(name) for name in NAMES]
    for folder in ("take:1/videos", "take:1/labels"):
        (tmp_path / folder).mkdir(parents=True)
    for name in names:
        shutil.copy("assets/toy/videos/000000.mp4", tmp_path / "take:1/videos" / f"{name}.mp4")
        (tmp_path / f"take:1/labels/{name}.txt").write_text("a caption")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "KEPT_FROM", 1)
    clips = SFTDataset(data_dir="take:1", video_size=(16, 16), max_num_frames=1, skip_frms_num=0)
    reports = clips.check()
    assert {Path(report.path).stem: report.problems for report in reports} == {name: () for name in names}
    assert len({sample["mp4"].sum().item() for sample in clips}) == 1
    assert len({*clips.cache_keys().values()}) == len(names)
    write_report("run:1/report.json", reports)
    rows = json.loads(Path("run:1/report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["path"] for row in rows] == clips.paths, "what is not UTF-8 comes back as it is on disk"
    read = []
    monkeypatch.setattr(index, "probe", read.append)
    assert len(clips.clip_infos()) == len(names) and read == [], "the index knows every name"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists_name_any_file(kind, tmp_path, monkeypatch):
    names = [f"{os.fsdecode(name)}.mp4" for name in NAMES if b"\xff" not in name]
    for name in names:
        (tmp_path / name).touch()
    rows = [{"caption": f"caption {k}", "video": name} for k, name in enumerate(names)]
    with (tmp_path / f"metadata.{kind}").open("w", newline="", encoding="utf-8") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["caption", "video"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.chdir(tmp_path)
    found = list_rows(".")
    assert [(row.path.name, row.problem) for row in found] == [(name, None) for name in names]


def test_links_are_followed_and_may_form_cycles(tmp_path):
    put(tmp_path / "elsewhere", "a.mp4", "a.txt")
    root = tmp_path / "set"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert [row.path for row in list_folder(root)] == [root / "linked" / "a.mp4"]


def test_a_link_that_leads_nowhere_is_a_problem_of_its_row(tmp_path):
    put(tmp_path, "videos/a.mp4", "labels/a.txt", "labels/b.txt")
    (tmp_path / "videos/b.mp4").symlink_to("moved.mp4")
    assert [row.problem and row.problem[:28] for row in list_folder(tmp_path)] == [None, "is a link that leads nowhere"]
    (tmp_path / "list.csv").write_text("caption,video\none,videos/a.mp4\ntwo,videos/b.mp4\n")
    for data in (tmp_path, tmp_path / "list.csv"):
        clips = SFTDataset(data_dir=data, video_size=(32, 32))
        assert [Path(path).name for path in clips.cache_keys()] == ["a.mp4"], "precomputing leaves it out as well"
    assert "does not exist" in str(clips.rows[1].problem)


def test_masks_may_have_suffixes_in_capitals(tmp_path):
    row = list_folder(put(tmp_path, "videos/a.mp4", "labels/a.txt", "mask/a.PNG"))[0]
    assert row.mask == tmp_path / "mask/a.PNG"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a.mp4", "captions.csv", "b.TSV"], "b.TSV, captions.csv is not read"),
        (["a.mp4", "a.txt", "captions.csv"], None),
        (["a.mp4", "sub/captions.csv", "notes.md"], None),
    ],
)
def test_without_captions_tables_that_are_not_read_are_named(files, said, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="sgm"):
        list_folder(put(tmp_path, *files))
    assert [said in record.getMessage() for record in caplog.records] == [True] * (said is not None)


def test_lines_of_a_caption_are_joined(tmp_path):
    put(tmp_path, "videos/a.mp4")
    put(tmp_path, "labels/a.txt", text="\ufeff  a red circle \n\n moves\tleft\r\n")
    assert list_folder(tmp_path)[0].caption == "a red circle moves left"


def test_missing_and_empty_captions_are_problems_unless_allowed(tmp_path):
    put(tmp_path, "videos/empty.mp4", "videos/missing.mp4")
    put(tmp_path, "labels/empty.txt", text=" \n ")
    empty, missing = list_folder(tmp_path)
    assert f"{tmp_path / 'labels/empty.txt'} is empty" in str(empty.problem)
    assert f"{tmp_path / 'labels/missing.txt'} is missing" in str(missing.problem)
    allowed = list_folder(tmp_path, allow_missing_captions=True)
    assert [(row.caption, row.problem) for row in allowed] == [("", None)] * 2


def test_other_encodings_are_problems_even_then(tmp_path):
    put(tmp_path, "videos/a.mp4", "labels/a.txt")
    (tmp_path / "labels/a.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    for allowed in (False, True):
        assert "not UTF-8 text (byte 6)" in str(list_folder(tmp_path, allow_missing_captions=allowed)[0].problem)
    (tmp_path / "labels/a.txt").write_bytes("a red ball".encode("utf-16-le"))
    assert "holds U+0000 at position 2" in str(list_folder(tmp_path)[0].problem)


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (
            ["videos/a.mp4", "labels/a.txt", "videos/b.gif", "labels/b.txt", "labels/c/d.TXT"],
            "labels/b.txt, labels/c/d",
        ),
        (["a.mp4", "a.txt", "b.m2ts", "b.txt", "notes.txt", "prompts.txt"], "b.txt"),
        (["part/videos/a.mp4", "part/labels/a.txt", "part/labels/b.txt"], "part/labels/b.txt"),
        (["a.mp4", "labels/a.txt"], "labels/a.txt"),
        (["videos/a.mp4", "videos/a.png", "labels/a.txt", "videos/b.png", "labels/b.txt", "videos/c.png"], None),
        (["a.mp4", "a.txt", "a.TXT", "a.json", "b.JPG", "b.TXT", "videos/c.mp4", "mask/c.txt", "labels/c.txt"], None),
    ],
)
def test_captions_without_a_clip_are_named(files, left_out, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="sgm"):
        list_folder(put(tmp_path, *files))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (left_out is not None)
    assert all(f"no clip that is read: {left_out}" in text for text in texts)


def test_wrong_folders_are_refused_with_a_cure(tmp_path):
    with pytest.raises(InputError, match="does not exist; give a folder"):
        list_folder(tmp_path / "nowhere")
    file = put(tmp_path, "file.txt") / "file.txt"
    with pytest.raises(InputError, match="is a file"):
        list_folder(file)
    with pytest.raises(InputError, match="holds no clips .*put them into"):
        list_folder(tmp_path)
    put(tmp_path, "videos/a.mp4", "labels/a.txt")
    with pytest.raises(InputError, match=f"is the videos folder itself; give the one above: '{tmp_path}'"):
        list_folder(tmp_path / "videos")
