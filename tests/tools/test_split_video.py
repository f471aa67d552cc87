import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import split_video

from sgm.data.clips.decode import ClipError, read_frames, scan
from sgm.inference.video import write_video

ROOT = Path(__file__).parents[2]


pytest.importorskip("scenedetect", reason="the extra 'scenes' is not installed")
RATE = 20
COLOURS = ((200, 40, 40), (40, 180, 60), (30, 60, 210))


def frames_of(seconds, *, height=48, width=64):
    """Return scenes of one colour each, with a bar whose height tells the frame's number within its scene."""
    parts = []
    for colour, length in zip(COLOURS, seconds, strict=False):
        part = np.empty((round(length * RATE), height, width, 3), dtype=np.uint8)
        part[:] = colour
        for k, picture in enumerate(part):
            picture[: k % height, : width // 4] = 255
        parts.append(part)
    return np.concatenate(parts)


def settings(**changed):
    given = {"fps": None, "size": None, "min_seconds": 1.0, "max_seconds": 2.0, "threshold": 27.0}
    return split_video.Settings(**(given | changed))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video of 1.5, 3 and 0.6 seconds in three colours."""
    path = tmp_path_factory.mktemp("raw") / "film.mp4"
    write_video(path, frames_of((1.5, 3.0, 0.6)), RATE)
    return path


def run(film, out, *words):
    return split_video.main(
        [str(film), "--out", str(out), "--min_seconds", "1", "--max_seconds", "2", *map(str, words)]
    )


def bytes_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_of_sources_are_taken_as_they_are(film, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, long = Path("10:30 100%d\udcff.mp4"), Path("x" * 250 + ".mp4")
    for path in (source, long):
        path.symlink_to(film)
    assert run(source, "cut:1") == 0
    written = sorted(path.name for path in Path("cut:1/videos").iterdir())
    assert written == [f"{source.stem}_{k:04d}.mp4" for k in range(3)]
    lines = [json.loads(line) for line in Path("cut:1/clips.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["video"], line["source"]) for line in lines] == [(f"videos/{name}", str(source)) for name in written]
    capsys.readouterr()
    assert run(long, "cut:2") == 2 and not Path("cut:2").exists()
    assert (
        f"'{long.stem}_0000.mp4' in '{tmp_path}/cut:2' cannot be written to: File name too long"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("length", "least", "most", "pieces", "dropped"),
    [
        (0.9, 1, 2, [], 0.9),
        (1.0, 1, 2, [1.0], 0),
        (2.0, 1, 2, [2.0], 0),
        (2.1, 1, 2, [1.05, 1.05], 0),
        (7.0, 1, 2, [1.75] * 4, 0),
        (2.9, 1.5, 2, [2.0], 0.9),  # equal pieces would be of 1.45
        (7.0, 2, 2, [2.0] * 3, 1.0),
    ],
)
def test_scenes_are_divided_evenly_or_cut_at_the_longest_length(length, least, most, pieces, dropped):
    clips, rest = split_video.divide([(5.0, 5.0 + length)], settings(min_seconds=least, max_seconds=most))
    assert [end - begin for begin, end in clips] == pytest.approx(pieces)
    assert all(begin >= 5 and end <= 5 + length + 1e-9 for begin, end in clips)
    assert rest == pytest.approx(dropped)


def test_no_clip_shows_two_scenes_and_the_manifest_says_where_they_come_from(film, tmp_path, capsys):
    assert run(film, tmp_path) == 0
    assert "3 clips, 3 of them new; 0.6 s too short" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == [f"videos/film_000{k}.mp4" for k in range(3)]
    assert {line["source"] for line in lines} == {str(film)}
    assert [(line["start"], line["end"]) for line in lines] == [(0, 1.5), (1.5, 3.0), (3.0, 4.5)]
    source = read_frames(film, range(102), scan(film)).astype(int)
    for line, first in zip(lines, (0, 30, 60), strict=True):
        scanned = scan(tmp_path / line["video"])
        info = scanned.info
        assert (info.num_frames, info.fps, line["fps"]) == (30, pytest.approx(RATE), RATE)
        clip = read_frames(tmp_path / line["video"], range(30), scanned).astype(int)
        assert np.abs(clip - source[first : first + 30]).mean(axis=(1, 2, 3)).max() < 2


def test_frames_are_chosen_by_time_and_pictures_cover_the_size(film, tmp_path):
    assert run(film, tmp_path, "--fps", 8, "--size", 32, 32) == 0
    clip = tmp_path / "videos/film_0001.mp4"
    info, times, *_ = scanned = scan(clip)
    assert (info.num_frames, info.height, info.width) == (12, 32, 32)
    assert np.diff(times) == pytest.approx(1 / 8)
    # 48x64 covers 32x32 as 32x43, and the bar of 11 columns keeps the 6 that lie within the middle 32.
    is_white = read_frames(clip, range(12), scanned).mean(axis=3) > 180
    assert is_white[..., :4].any() and not is_white[..., 8:].any()
    heights = is_white[..., :3].mean(axis=2).round().sum(axis=1) / 32 * 48
    assert heights == pytest.approx([round(k / 8 * RATE) for k in range(12)], abs=2.5)


def test_a_slow_source_keeps_its_rate_with_a_warning(film, tmp_path, capfd):
    assert run(film, tmp_path, "--fps", 30) == 0
    assert "20 frames per second, below --fps 30" in capfd.readouterr().err
    assert scan(tmp_path / "videos/film_0000.mp4")[0].fps == pytest.approx(RATE)


def test_a_kill_leaves_no_partial_clip_and_the_same_command_continues(film, tmp_path, monkeypatch, capsys):
    assert run(film, tmp_path / "whole") == 0
    written = []

    def killed(path, frames, fps):
        if len(written) == 1:
            (path.parent / ".film_0001.1-0a.mp4").write_bytes(b"half")  # temporary file of atomic_file
            raise KeyboardInterrupt
        written.append(path)
        write_video(path, frames, fps)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(split_video, "write_video", killed)
        assert run(film, out) == 130
    assert [path.name for path in (out / "videos").glob("[!.]*")] == ["film_0000.mp4"]
    assert len((out / "clips.jsonl").read_text().splitlines()) == 1
    before = (out / "videos/film_0000.mp4").stat()
    monkeypatch.setattr(split_video, "find_scenes", None)  # finished scenes are not detected again
    capsys.readouterr()
    assert run(film, out) == 0
    assert "3 clips, 2 of them new" in capsys.readouterr().out
    assert (out / "videos/film_0000.mp4").stat().st_mtime_ns == before.st_mtime_ns
    assert bytes_below(out) == bytes_below(tmp_path / "whole")


def test_a_source_is_read_where_it_is_now(film, tmp_path, monkeypatch, capsys):
    """A cut goes on from another working directory, or after the source has moved."""
    for name in ("raw", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "raw/film.mp4").write_bytes(film.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run("raw/film.mp4", tmp_path / "out") == 0
    (tmp_path / "out/videos/film_0001.mp4").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("../raw/film.mp4", tmp_path / "out") == 0
    assert "3 clips, 1 of them new" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out/clips.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"../raw/film.mp4"}


def test_what_clips_no_longer_tell_is_said_when_they_are_cut(film, tmp_path, monkeypatch, capfd):
    whole = split_video.scan
    monkeypatch.setattr(split_video, "scan", lambda path: whole(path)._replace(hdr=True))
    assert run(film, tmp_path, "--size", 480, 640) == 0
    said = capfd.readouterr().err
    assert "film.mp4 is HDR (PQ or HLG)" in said and "convert it to BT.709 first" in said
    assert "film.mp4 has 48x64 pixels, and is enlarged to 480x640" in said
    monkeypatch.undo()
    assert run(film, tmp_path / "other", "--size", 48, 64) == 0
    said = capfd.readouterr().err
    assert "HDR" not in said and "enlarged" not in said


def test_a_source_that_cannot_be_read_does_not_stop_the_others(film, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:2000])
    picture = tmp_path / "picture.mp4"
    write_video(picture, frames_of((0.05,)), RATE)
    words = [str(path) for path in (broken, picture, film)]
    assert split_video.main([*words, "--out", str(tmp_path / "out"), "--max_seconds", "2"]) == 1
    said = capsys.readouterr()
    assert f"clip {broken}" in said.err and "single frame" in said.err
    assert "film.mp4: 1 clips, 1 of them new; 3.1 s too short" in said.out


def test_one_bad_piece_costs_no_other(film, tmp_path, monkeypatch, capsys):
    whole = split_video.each_frame

    def damaged(path, indices, scanned, **more):
        for index, picture in zip(indices, whole(path, indices, scanned, **more), strict=True):
            yield ClipError(path, "its frame cannot be decoded") if 35 <= index < 40 else picture

    monkeypatch.setattr(split_video, "each_frame", damaged)
    assert run(film, tmp_path) == 1
    said = capsys.readouterr().err
    assert "2 clips are written, 1 cannot be cut" in said and "film_0001.mp4, from 1.50 to 3.00 s: its frame" in said
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["film_0000.mp4", "film_0002.mp4"]
    assert len((tmp_path / "clips.jsonl").read_text().splitlines()) == 2


def test_still_stretches_and_slide_shows_give_whole_clips(tmp_path):
    def cut(frames, times):
        path = tmp_path / "source.mkv"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"crf": "10"})
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for time, picture in zip(times, frames, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        out = tmp_path / f"out{len(frames)}"
        assert run(path, out) == 0
        clips = sorted((out / "videos").iterdir())
        return [scan(clip).info.num_frames for clip in clips], read_frames(clips[1], [0, 8], scan(clips[1]))

    grey = np.broadcast_to(np.arange(80, dtype=np.uint8)[:, None, None, None] * 2, (80, 48, 64, 3))
    counts, _ = cut(grey[:73], [*np.arange(72) / 24, 8.0])  # a screen recording: still from 3 s to 8 s
    assert counts == [39] * 5, "8.04 s at the rate of its moving part"
    counts, shown = cut(grey[::10][:4], np.arange(4) * 2.0)  # a slide show
    assert counts == [16] * 4 and np.abs(shown.astype(int) - 20).max() < 6


def test_sizes_cover_and_odd_sides_become_even():
    info = split_video.VideoInfo(1, 1.0, 1.0, 7, 5)
    assert split_video._sizes(info, None) == ((7, 5), (6, 4))
    assert split_video._sizes(info, (20, 10)) == ((20, 14), (20, 10))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fps", "0"], "--fps is 0"),
        (["--size", "31", "32"], "even numbers"),
        (["--min_seconds", "3"], "--min_seconds is 3 and --max_seconds 2"),
        (["--threshold", "-1"], "--threshold is -1"),
        (["--out", str(Path(__file__))], "cannot be written to"),
    ],
)
def test_wrong_settings_end_with_2(film, tmp_path, words, said, capsys):
    assert run(film, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_share_a_folder_end_with_2(film, tmp_path, capsys):
    def refused(*words):
        assert split_video.main([*map(str, words), "--out", str(out), "--max_seconds", "2"]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    other = tmp_path / "film.mkv"
    other.write_bytes(b"another")
    assert "'nowhere.mp4' does not exist" in refused("nowhere.mp4")
    assert "is not a file" in refused("/dev/null")
    assert "is a folder" in refused(tmp_path)
    assert "clips of the same names" in refused(film, other)
    assert "is given twice" in refused(film, film)
    assert not out.exists()
    assert split_video.main([str(film), "--out", str(out), "--max_seconds", "2"]) == 0
    capsys.readouterr()
    assert "come from another video of this name" in refused(other)
    assert "were cut with --fps None; give the same" in refused(film, "--fps", "8")
    for text in ("{}", "[]", '{"clips": 1}', "{", (out / "cuts/film.json").read_text().replace('"fps"', '"new"', 1)):
        (out / "cuts/film.json").write_text(text)
        assert "film.json is not a plan of this command; remove it" in refused(film)


@pytest.mark.parametrize("there", ["videos/film_0000.mp4", "videos/film_12345.mp4", "labels/film_0001.txt"])
def test_clips_and_captions_without_a_plan_are_not_mixed_with_new_ones(film, tmp_path, there, capsys):
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).write_bytes(b"old")
    assert run(film, tmp_path) == 2
    said = capsys.readouterr().err
    assert there in said and "cuts/film.json says what they show; remove them, or give another --out" in said
    assert bytes_below(tmp_path) == {there: b"old"}
    (tmp_path / there).rename((tmp_path / there).with_name("film_2_0000.mp4"))  # a clip of film_2
    split_video.check_sources([film], settings(), tmp_path)


def test_the_extra_is_named_where_it_is_missing(film, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    assert run(film, tmp_path / "out") == 2
    assert "pip install -e '.[scenes]'" in capsys.readouterr().err
