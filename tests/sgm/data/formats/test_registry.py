"""Every format gives the same clips; malformed data sets are refused with file and line."""

import csv
import io
import json
import re
import shutil
import sys
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_video import SFTDataset
from sgm.data.clips.decode import ClipError
from sgm.data.formats import huggingface
from sgm.data.formats.registry import detect
from sgm.util import InputError
from tests.processes import run

sys.path.insert(0, str(Path(__file__).parent))

import format_files  # noqa: E402


def dataset(path, **more):
    settings = {"video_size": (32, 32), "fps": 8, "max_num_frames": 9, "skip_frms_num": 0} | more
    return SFTDataset(data_dir=path, **settings)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return list(dataset(format_files.folder(tmp_path_factory.mktemp("expected") / "set")))


@pytest.mark.parametrize("name", format_files.FORMATS)
def test_the_same_clips_in_every_format(name, expected, tmp_path):
    clips = dataset(format_files.FORMATS[name](tmp_path / "set"))
    assert len(clips) == 12 and clips.captions == format_files.CAPTIONS
    assert len({*clips.paths}) == 12
    clips = ForkingPickler.loads(ForkingPickler.dumps(clips))
    for sample, wanted in zip(clips, expected, strict=True):
        assert torch.equal(sample["mp4"], wanted["mp4"])
        assert (sample["txt"], sample["num_frames"], sample["fps"]) == (wanted["txt"], wanted["num_frames"], 8.0)
    assert [report.problems for report in clips.check()] == [()] * 12


def put(root: Path, **files: str) -> Path:
    """Write text files; two underscores in a name stand for a dot. Clips a.mp4 to d.mp4 exist, but are empty."""
    for name, content in files.items():
        (root / name.replace("__", ".")).write_text(content)
    for name in "abcd":
        (root / f"{name}.mp4").touch()
    return root


def refusal(path, **more) -> str:
    with pytest.raises(InputError) as caught:
        dataset(path, **more)
    return str(caught.value)


CSV = "caption,video\n"
INFO = "caption,video,num_frames,fps,height,width\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("csv", CSV + "one,a.mp4\ntwo, with a comma,b.mp4\n", ["metadata.csv:3: has 3 fields, the header 2", "quotes"]),
        ("csv", CSV + '"one\n\n",a.mp4\n"two"x,b.mp4\n', ["metadata.csv:5: is not CSV"]),
        ("csv", CSV + 'one,a.mp4\n"two,b.mp4\nthree,c.mp4\nfour,d.mp4\n', ["metadata.csv:3: is not CSV", "a quote"]),
        ("csv", CSV + '"one\n\none",a.mp4,x\n', ["metadata.csv:2: has 3 fields"]),
        (
            "csv",
            "caption;video\na, b, c;a.mp4\n",
            ["metadata.csv:1: separates its columns by semicolons; write"],
        ),
        ("csv", "caption\tvideo\none\ta.mp4\n", ["metadata.csv:1: separates its columns by tabs; write commas"]),
        ("csv", "caption,caption\none,a.mp4\n", ["metadata.csv:1: names the column 'caption' twice"]),
        ("csv", CSV, ["lists no clips"]),
        ("csv", CSV + '"one\nline",a.mp4\ntwo,/b.mp4\n', ["metadata.csv:4: '/b.mp4' is an absolute path"]),
        ("csv", CSV + "one,c:b.mp4\n", ["metadata.csv:2: 'c:b.mp4' is an absolute path"]),
        ("csv", CSV + "one,a\0.mp4\n", ["metadata.csv:2: names no file"]),
        ("csv", CSV + "one,x/../../b.mp4\n", ["metadata.csv:2: 'x/../../b.mp4' leads out of"]),
        ("csv", CSV + "one,\n", ["metadata.csv:2: names no file"]),
        ("csv", CSV + "one,a.mp4\ntwo,./a.mp4\n", ["metadata.csv:3: has the clip", "metadata.csv:2; keep one"]),
        ("csv", "id,caption,video\n7,one,a.mp4\n7,two,b.mp4\n", ["metadata.csv:3: has the id '7' of ", "csv:2"]),
        ("json", "[\n" + "[" * 100_000 + "]" * 100_000 + "]", ["metadata.json:2: nests lists or objects 100,001 deep"]),
        (
            "json",
            '{"data": [\n{"caption": "' + "[" * 3000 + '", "id": ' + "7" * 5000 + "}]}",
            ["json:2: holds a number of 5,000"],
        ),
        (
            "jsonl",
            '{}\n{"a": ' * 2 + '{"b":' * 99_999 + "1" + "}" * 99_999 + "}\n",
            ["jsonl:3: nests lists or objects 100,000"],
        ),
        (
            "jsonl",
            '{"caption": "one", "video": "a.mp4", "fps": ' + "7" * 4301 + "}",
            ["metadata.jsonl:1: holds a number of 4,301"],
        ),
        (
            "jsonl",
            '{"caption": "one", "video": "a.mp4", "fps": 8, "height": 64, "width": 64, "num_frames": '
            + "7" * 4000
            + "}",
            ["metadata.jsonl:1: says num_frames=77777", "give whole numbers"],
        ),
        ("jsonl", '{"caption": "half \\ud83d", "video": "a.mp4"}', ["jsonl:1: caption holds U+D83D at position 6"]),
        ("jsonl", '{"caption": "a\\u0000b", "video": "a.mp4"}', ["jsonl:1: caption holds U+0000 at position 2"]),
        ("jsonl", '{"caption": "one", "video": "a\\ud83d/b.mp4"}', ["none of the 1 clips"]),
        (
            "jsonl",
            '{"caption": ' + "[" * 400 + "]" * 400 + ', "video": "a.mp4"}',
            ["jsonl:1: caption is [[[", "give text"],
        ),
        ("csv", CSV + "one,/a\n" * 9, ["metadata.csv:6: ", "and 4 more"]),
        ("csv", CSV + "one,x.mp4\ntwo,y.mp4\n", ["none of the 2 clips", "x.mp4'; paths are relative to"]),
        ("csv", "text,clip\none,a.mp4\n", ["no column of videos", "its columns are text, clip", "video_column"]),
        ("csv", INFO + "one,a.mp4,1e300,8,9,9\n", ["csv:2: says num_frames=1e300"]),
        ("csv", INFO + "one,a.mp4,9,8,x,64\n", ["csv:2: says num_frames=9, fps=8"]),
        (
            "csv",
            INFO + "one,a.mp4,9,0,64,64\n",
            ["csv:2: says num_frames=9, fps=0"],
        ),
        ("csv", INFO + "one,a.mp4,9,8,6_4,64\n", ["csv:2: says num_frames=9, fps=8, height=6_4"]),
        (
            "jsonl",
            '{"caption": "one", "video": "a.mp4", "num_frames": true, "fps": 0, "height": 64, "width": 64}',
            ["jsonl:1: says num_frames=true"],
        ),
        ("csv", CSV + f'one,a.mp4\n"{"x" * 200_000}\n', ["csv:3: is not CSV: unexpected end", "end each quoted field"]),
        ("json", '[\n{"caption": "one", "video": "a.mp4"},\n{"caption": "two",, }]', ["metadata.json:3: is not JSON"]),
        ("json", '{"clips": []}', ["metadata.json:1: is not a list"]),
        (
            "json",
            '[\n{"caption": "one", "video": "a.mp4"},\n\n"b.mp4"]',
            ['metadata.json:4: is "b.mp4"; give an object'],
        ),
        (
            "json",
            '{"data": [\n{"caption": "one", "video": "a.mp4"},\n{"caption": "two"}]}',
            ["json:3: has no value for"],
        ),
        (
            "json",
            '{"meta": {"data": [1]},\n"data": [\n{"caption": "one", "video": "a.mp4"},\n{"caption": "two"}]}',
            ["json:4: has no value for"],
        ),
        (
            "json",
            '{"data": [\n{"caption": "one", "video": "a.mp4"},\n7], "name": "data"}',
            ["json:3: is 7; give an object"],
        ),
        (
            "json",
            '{"data":\n[], "data": [\n{"caption": "one", "video": "a.mp4"},\n7], "name": "data"}',
            ["json:2: names the key 'data' twice in an object; remove one"],
        ),
        (
            "json",
            '[{"caption": "{\\"a\\": 1, \\"a\\": 2}", "x": [{"y": 1}, {"y": 2}], "video": "a.mp4"},\n'
            '{"caption": "one",\n"c\\u0061ption" : "two", "video": "b.mp4"}]',
            ["json:3: names the key 'caption' twice"],
        ),
        (
            "jsonl",
            '\n{"caption": "one", "video": "a.mp4", "x": {"y": 1, "y": 2}}\n{"caption": "", "video": "a.mp4"}',
            ["jsonl:2: names the key 'y' twice"],
        ),
        ("json", '[{"caption": 1, "video": "a.mp4"}]', ["metadata.json:1: caption is 1; give text"]),
        ("json", '[{"id": 1.5, "caption": "one", "video": "a.mp4"}]', ["metadata.json:1: id is 1.5; give text"]),
        ("jsonl", '{"caption": "one", "video": "a.mp4"}\n\n{"video": \n[1]', ["jsonl:3: is not JSON", "jsonl:4: is"]),
        ("jsonl", '{"caption": "one", "video": ["a.mp4"]}\n', ["jsonl:1: video is ['a.mp4']; give the path"]),
        ("jsonl", '\n{"id": [1], "caption": "one", "video": "a.mp4"}', ["jsonl:2: id is [1]; give text or a whole"]),
        ("parquet", "text", ["metadata.parquet' is not a Parquet file"]),
    ],
)
def test_malformed_manifests_are_refused_with_file_and_line(name, content, said, tmp_path):
    text = refusal(put(tmp_path, **{f"metadata__{name}": content}))
    assert [part for part in said if part not in text] == [], text


def test_faults_in_parquet_have_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"caption": "one", "video": "a.mp4"}, {"caption": "two", "video": "../b.mp4"}])
    pyarrow.parquet.write_table(table, put(tmp_path) / "metadata.parquet")
    assert "metadata.parquet, row 2: '../b.mp4' leads out of" in refusal(tmp_path)


def test_damage_inside_parquet_is_reported(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"caption": f"caption {number}", "video": f"{number}.mp4"} for number in range(2000)]
    path = put(tmp_path) / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(value ^ 0x5A for value in content[4:2000])
    path.write_bytes(content)
    assert re.search(r"metadata.parquet' is damaged after row 0: .*; copy or write it again", refusal(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("csv", "id,caption,video\n,one,a.mp4\n,two,b.mp4\n7,three,c.mp4\n"),
        ("jsonl", "".join(f'{{"id": null, "caption": "one", "video": "{name}.mp4"}}\n' for name in "abc")),
    ],
)
def test_rows_may_have_no_id(name, content, tmp_path):
    assert len(dataset(put(tmp_path, **{f"metadata__{name}": content}))) == 3


def test_cells_of_any_length(tmp_path):
    before = csv.field_size_limit()
    (row,) = dataset(put(tmp_path, metadata__csv=f"caption,more,video\none,{'x' * 200_000},a.mp4\n")).rows
    assert row.caption == "one" and csv.field_size_limit() == before


def odd_table():
    """A table whose columns, but for the first three, cannot be values of Python."""
    import pyarrow

    return pyarrow.table(
        {
            "caption": ["one", "two"],
            "video": ["a.mp4", "b.mp4"],
            "id": [1, 2],
            "length": pyarrow.array([2**60, 1], pyarrow.duration("ms")),
            "zone": pyarrow.array([0, 1], pyarrow.timestamp("s", tz="Not/AZone")),
            "day": pyarrow.array([2**60, 1], pyarrow.timestamp("ms")),
        }
    )


def write_odd_parquet(root: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(odd_table(), root / "metadata.parquet")


def write_odd_huggingface(root: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(datasets.table.InMemoryTable(odd_table())).save_to_disk(str(root))


@pytest.mark.parametrize("write", [write_odd_parquet, write_odd_huggingface])
def test_only_the_columns_in_use_are_read(write, tmp_path):
    huggingface._table.cache_clear()
    write(put(tmp_path))
    assert [(row.path.name, row.caption) for row in dataset(tmp_path).rows] == [("a.mp4", "one"), ("b.mp4", "two")]
    for column in ("length", "zone", "day"):
        said = refusal(tmp_path, caption_column=column)
        assert re.search(rf"the column '{column}' of '{tmp_path}.* holds (duration|timestamp).*; .*text", said)


def test_faults_in_line_lists(tmp_path):
    root = put(tmp_path, prompts__txt="one\ntwo\nthree\n\n", videos__txt="a.mp4\nb.mp4\n")
    text = refusal(root)
    assert "prompts.txt has 3 lines, videos.txt has 2 lines" in text and "prompts.txt:3 has no partner" in text
    put(root, videos__txt="a.mp4\n\nc.mp4")
    assert "videos.txt:2: names no file" in refusal(root)
    put(root, videos__txt="a.mp4\n../b.mp4\na.mp4")
    text = refusal(root)
    assert "videos.txt:2: '../b.mp4' leads out of" in text and "videos.txt:3: has the clip" in text
    (root / "prompts.txt").write_bytes("zwei\nfünf".encode("latin-1"))
    assert "prompts.txt:2: is not UTF-8 text (byte 6)" in refusal(root)
    put(root, videos__txt="a.mp4\nb.mp4", images__txt="a.png\n../b.png", prompts__txt="one\ntwo")
    assert "images.txt:2: '../b.png' leads out of" in refusal(root), "each list has its own lines"
    (root / "prompts.txt").unlink()
    assert "has no list of captions (prompts.txt" in refusal(root, format="lines")


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_empty_lines_belong_to_clips_up_to_the_last_one(end, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    put(
        tmp_path, prompts__txt=f"one\n\nthree\n{end}", images__txt=f"a.png\n\n{end}", videos__txt=f"a.mp4\nb.mp4\n{end}"
    )
    assert "prompts.txt has 3 lines, videos.txt has 2 lines" in refusal(tmp_path)
    put(tmp_path, prompts__txt=f"one\n\n{end}")
    clips = dataset(tmp_path, allow_missing_captions=True)
    assert clips.captions == ["one", ""] and [row.image and row.image.name for row in clips.rows] == ["a.png", None]
    empty = dataset(tmp_path).row_reports()[1]
    assert empty.uncaptioned and f"its caption, {tmp_path}/prompts.txt:2, is empty" in empty.problems[0]
    put(tmp_path, prompts__txt="one")
    assert "prompts.txt has 1 lines, videos.txt has 2 lines" in refusal(tmp_path)


def test_a_list_of_pictures_is_one_of_clips(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (row,) = dataset(put(tmp_path, prompts__txt="one", images__txt="a.png")).rows
    assert (row.path.name, row.image, row.problem) == ("a.png", None, None), "not the first frame of itself"


def test_what_cannot_be_read_or_is_named_and_missing_is_told(tmp_path):
    put(tmp_path, prompts__txt="one", videos__txt="a.mp4", controls__txt="x.mp4")
    (row,) = dataset(tmp_path, control=True).rows
    assert row.problem == f"its control {tmp_path}/x.mp4 does not exist; {tmp_path}/controls.txt:1 names it"
    (tmp_path / "prompts.txt").unlink()
    (tmp_path / "prompts.txt").mkdir()
    assert f"'{tmp_path}/prompts.txt' cannot be read: it is a folder, not a file" in refusal(
        tmp_path, format="lines", caption_column="prompts.txt"
    )


def test_archives_are_opened_twice_to_list_them(tmp_path, monkeypatch):
    root, opened = format_files.archives(tmp_path, as_json=True), []
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened.append(path.name) or open(path, *mode))
    assert dataset(root).captions == format_files.CAPTIONS and opened == 2 * ["000.tar", "001.tar"]


def test_faults_in_archives(tmp_path):
    root = format_files.archives(tmp_path)
    whole = (root / "001.tar").read_bytes()
    (root / "001.tar").write_bytes(whole[:2000])  # inside of the first clip; the end is padding
    assert f"{root}/001.tar: is cut or damaged near byte 4,608 (unexpected end of data)" in refusal(root)
    (root / "001.tar").write_bytes(b"no tar file")
    assert f"{root}/001.tar: is not a tar file, or a damaged one" in refusal(root)
    (root / "001.tar").unlink()
    with tarfile.open(root / "000.tar", "a") as archive:
        archive.add(format_files.CLIPS[0], "000003.mp4")
        archive.add(format_files.CLIPS[0], "../000099.mp4")
        archive.add(format_files.CLIPS[0], "000005.mkv")
    text = refusal(root)
    assert "000.tar, 000003.mp4: comes twice" in text and "'../000099.mp4' leads out of" in text
    with tarfile.open(root / "000.tar", "w") as archive:
        archive.add(format_files.CLIPS[0], "5.mkv")
        archive.add(format_files.CLIPS[0], "5.mp4")
        archive.add(put(root, text="no JSON") / "text", "5.json")
    text = refusal(root)
    assert "000.tar, 5: holds 2 videos" in text and "000.tar/5.json: is not a JSON object" in text


def archive_of(path: Path, **files: str | bytes) -> Path:
    """Write an archive; two underscores in a name stand for a dot."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("__", "."))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode() if isinstance(content, str) else content))
    return path


@pytest.mark.parametrize(
    ("files", "more", "captions"),
    [
        (["take 1__5x__mp4", "take 1__5x__txt"], {}, {"take 1.5x.mp4": "take 1__5x__txt"}),
        (["a__1__mp4", "a__1__txt", "a__2__mkv", "a__2__TXT"], {}, {"a.1.mp4": "a__1__txt", "a.2.mkv": "a__2__TXT"}),
        (["a__mp4", "a__txt", "a__2__mp4", "a__2__txt"], {}, {"a.mp4": "a__txt", "a.2.mp4": "a__2__txt"}),
        (["IMG__MP4", "IMG__TXT"], {}, {"IMG.MP4": "IMG__TXT"}),
        (["d__1/x__v2__1__MOV", "d__1/x__v2__1__Txt"], {}, {"d.1/x.v2.1.MOV": "d__1/x__v2__1__Txt"}),
        (["C:1__mp4", "C:1__txt"], {}, {"C:1.mp4": "C:1__txt"}),
        (["1__txt", "1__left__mp4", "1__right__mp4"], {"video_column": "left.mp4"}, {"1.left.mp4": "1__txt"}),
        (["1__mp4", "1__txt", "1__b__xml", "__hidden__mp4"], {}, {"1.mp4": "1__txt"}),
        (["1__mp4", "1__txt", "1__b__mp4", "1__b__txt"], {"video_column": "mp4"}, {"1.mp4": "1__txt"}),
        (
            ["1__small__mp4", "1__long__txt"],
            {"video_column": "small.mp4", "caption_column": "long.txt"},
            {"1.small.mp4": "1__long__txt"},
        ),
    ],
)
def test_names_and_suffixes_in_archives(files, more, captions, tmp_path):
    path = archive_of(tmp_path / "a.TAR", **{name: name for name in files})
    rows = dataset(path, **more).rows
    assert {str(row.path).removeprefix(f"{path}/"): row.caption for row in rows} == captions
    assert [row.problem for row in rows] == [None] * len(rows) and detect(tmp_path) == "webdataset"


def test_a_member_without_its_caption_is_named_whole(tmp_path):
    (row,) = dataset(archive_of(tmp_path / "a.tar", **{"take 1__5x__mp4": "", "take 1__5x__xml": ""})).rows
    assert row.problem is not None and "a.tar, take 1.5x, is empty" in row.problem
    path = archive_of(tmp_path / "a.tar", **{"1__mp4": "", "1__json": "[" * 100_000})
    assert "1.json: is not a JSON object: line 1: nests lists or objects 100,000 deep" in refusal(path)
    text = refusal(archive_of(tmp_path / "a.tar", **{"1__mp4": "", "1__json": "[1]", "2__mp4": "", "2__txt": b"a\xff"}))
    assert "1.json: is not a JSON object: [1]; give one with the caption" in text
    assert "2.txt: is not UTF-8 text (byte 1)" in text


@pytest.mark.parametrize("suffix", ["tar.gz", "TGZ", "tar.zst"])
def test_compressed_archives_are_refused_with_a_cure(suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes(b"\x1f\x8b\x08 and so on")
    said = f"'{tmp_path}' holds compressed archives ('a.{suffix}'), whose files cannot be read by offset; decompress"
    assert said in refusal(tmp_path)
    assert f"a.{suffix}: is compressed (gzip), and its files are read by offset; decompress it" in refusal(
        tmp_path / f"a.{suffix}"
    )
    format_files.pairs(tmp_path / "more")
    assert len(dataset(tmp_path)) == 12, "beside what was unpacked"


def test_faults_of_huggingface_folders(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"caption": "one", "video": "a.mp4"}, {"caption": "two", "video": "/b.mp4"}])
    rows.save_to_disk(str(tmp_path / "one"))
    assert "one, row 2: '/b.mp4' is an absolute path" in refusal(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "splits"))
    assert f"the splits test, train; give one: '{tmp_path}/splits/test'" in refusal(tmp_path / "splits")
    for content in ("{}", "[" * 100_000, "[]", '{"_data_files": []}'):
        (tmp_path / "one/state.json").write_text(content)
        huggingface._table.cache_clear()
        text = refusal(tmp_path / "one")
        assert "cannot be read by datasets.load_from_disk" in text and "index out of range" not in text


def test_missing_clips_and_captions_are_problems_of_rows(tmp_path):
    root = put(tmp_path, metadata__csv=CSV + "one,a.mp4\ntwo,x.mp4\n ,b.mp4\n")
    good, missing, silent = dataset(root).row_reports()
    assert good.problems == ()
    assert missing.problems == (f"does not exist; {root}/metadata.csv:3 names it",) and not missing.uncaptioned
    assert f"its caption, {root}/metadata.csv:4, is empty" in silent.problems[0] and silent.uncaptioned
    with pytest.raises(ClipError, match="does not exist"):
        dataset(root)[1]
    assert dataset(root, allow_missing_captions=True).row_reports()[2].problems == ()


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ("start,end", "columns start, end of parts are"),
        ("Start_Time,fps", "column Start_Time of parts is"),
        ("frame_idx,timestamp", "columns frame_idx, timestamp of parts are"),
        ("ending,restart", None),
    ],
)
def test_columns_of_parts_of_clips_are_named_as_not_read(tmp_path, caplog, columns, named):
    root = put(tmp_path, metadata__csv=f"caption,video,{columns}\none,a.mp4,1,2\n")
    with caplog.at_level("WARNING", logger="sgm"):
        assert len(dataset(root)) == 1
    assert [named in record.getMessage() for record in caplog.records] == [True] * (named is not None)
    caplog.clear()
    (root / "metadata.csv").write_text(f"caption,video,{columns}\none,a.mp4,1,2\ntwo,a.mp4,3,4\n")
    assert "keep one of them" in refusal(root)
    assert len(caplog.records) == (named is not None), "this warning tells why a file comes twice"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"format": "cvs"}, "format is 'cvs'; give one of .*did you mean 'csv'"),
        ({"format": "jsonl"}, "metadata.jsonl' does not exist"),
        ({"caption_column": "captoin"}, r"no column 'captoin' \(data.params.caption_column\).*did you mean 'caption'"),
        ({"format": "folder", "caption_column": "x"}, "which has no columns"),
        ({"path": "metadata.cvs"}, "metadata.cvs' does not exist.*metadata.csv"),
        (
            {"path": "metadata.csv", "format": "lines"},
            "metadata.csv' is a file; data.params.format=lines needs a folder",
        ),
        ({"path": "s3://bucket/a.tar", "format": "csv"}, "a URL names tar files; remove data.params.format=csv"),
        ({"format": "webdataset"}, r"holds no archives \(\*.tar\)"),
        ({"path": "empty.csv"}, "empty.csv' lists no clips"),
        ({"path": "empty.tar"}, r"empty.tar' holds no samples; a sample is a video and a caption"),
    ],
)
def test_wrong_formats_and_columns(tmp_path, more, said):
    put(tmp_path, metadata__csv=CSV + "one,a.mp4", empty__csv=CSV)
    archive_of(tmp_path / "empty.tar.part").rename(tmp_path / "empty.tar") if "path" in more else None
    path = more.pop("path", "")
    assert re.search(said, refusal(path if "://" in path else tmp_path / path, **more))


def test_formats_are_detected(tmp_path):
    root = put(tmp_path, metadata__csv=CSV + "one,a.mp4", metadata__jsonl="{}")
    assert "metadata.{csv,jsonl}; set data.params.format" in refusal(root)
    assert len(dataset(root, format="csv")) == 1
    assert "is no manifest" in refusal(put(root, notes__md="") / "notes.md")
    (root / "videos").mkdir()
    (root / "labels").mkdir()
    assert detect(root) == "folder", "as before there were other formats"
    assert detect(format_files.TOY) == "folder"


def test_extras_are_named(tmp_path, monkeypatch):
    put(tmp_path, metadata__parquet="", state__json="")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'pyarrow'" in refusal(tmp_path, format="parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    huggingface._table.cache_clear()
    assert "pip install 'datasets'" in refusal(tmp_path, format="huggingface")


def test_other_columns_and_pictures(tmp_path):
    red, blue = (Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
    red.save(tmp_path / "red.png")
    blue.save(tmp_path / "blue.webp", lossless=True)
    shutil.copy(format_files.CLIPS[0], tmp_path / "clip.mp4")
    put(tmp_path, my__csv="words,file,start\na clip,clip.mp4,blue.webp\na picture,red.png,\n")
    clips = dataset(tmp_path / "my.csv", caption_column="words", image_column="start", skip_frms_num=3)
    moving, still = clips
    assert moving["image"].shape == (3, 32, 32) and moving["image"][2].min() > 0.99 > -0.99 > moving["image"][0].max()
    assert still["image"] is None and still["num_frames"] == 1
    assert still["mp4"].shape == (9, 3, 32, 32) and still["mp4"][:, 0].min() > 0.99
    assert [report.problems for report in clips.check(decode=True)] == [(), ()]
    (tmp_path / "blue.webp").write_text("no picture")
    assert "its image" in clips.check()[0].problems[0]
    with pytest.raises(ClipError, match=r"clip.mp4: its image .*blue.webp is not a picture"):
        clips[0]
    (tmp_path / "blue.webp").unlink()
    clips = dataset(tmp_path / "my.csv", caption_column="words", image_column="start")
    assert "blue.webp does not exist" in clips.row_reports()[0].problems[0]


def test_pictures_of_folders(tmp_path):
    for name in ("videos", "labels"):
        (tmp_path / name).mkdir()
    shutil.copy(format_files.CLIPS[0], tmp_path / "videos/clip.mp4")
    for name in ("clip.png", "still.jpg", "unnamed.jpg"):
        Image.new("RGB", (64, 48)).save(tmp_path / "videos" / name)
    for name in ("clip", "still"):
        (tmp_path / f"labels/{name}.txt").write_text(name)
    clips = dataset(tmp_path, max_num_frames=1)
    assert [Path(path).name for path in clips.paths] == ["clip.mp4", "still.jpg"]
    assert clips[1]["mp4"].shape == (1, 3, 32, 32)


def many_rows_csv(root: Path, count: int) -> None:
    """A manifest whose clips are links to one file."""
    (root / "clips").mkdir()
    shutil.copy(format_files.CLIPS[0], root / "one.mp4")
    for number in range(count):
        (root / f"clips/{number}.mp4").symlink_to("../one.mp4")
    rows = (f'"caption {number}, {"long " * 30}",clips/{number}.mp4\n' for number in range(count))
    (root / "metadata.csv").write_text(CSV + "".join(rows))


def many_rows_webdataset(root: Path, count: int, shard: int = 10_000) -> None:
    """Archives of pictures (clips of one frame)."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(picture, "png")
    for first in range(0, count, shard):
        with tarfile.open(root / f"{first:06d}.tar", "w") as archive:
            for number in range(first, first + shard):
                caption = f"caption {number}, {'long ' * 30}".encode()
                for suffix, content in (("png", picture.getvalue()), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


@pytest.mark.slow
@pytest.mark.parametrize("write", [many_rows_csv, many_rows_webdataset])
def test_a_hundred_thousand_rows(write, tmp_path):
    root, runs = tmp_path / "set", tmp_path / "runs"
    root.mkdir()
    runs.mkdir()
    write(root, 100_000)
    done = run("tests/sgm/data/many_rows.py", [str(root), str(runs)])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["batch"], found["exit"]) == (100_000, [4, 17, 3, 64, 64], 0)
    assert found["bytes"] < 500e6, found
    print(write.__name__, found)  # with times, for pytest -s
