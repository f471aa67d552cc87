from pathlib import Path

import pytest

from sgm.data.formats.folder import caption_path, list_folder
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


def test_links_are_followed_and_may_form_cycles(tmp_path):
    put(tmp_path / "elsewhere", "a.mp4", "a.txt")
    root = tmp_path / "set"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    assert [row.path for row in list_folder(root)] == [root / "linked" / "a.mp4"]


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
