import json
import os
import signal
import subprocess

import decord
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sgm.inference.video import animation, contact_sheet, read_video, to_uint8, write_latents, write_video
from sgm.io import write_json
from sgm.util import RunError


def moving_square(num_frames=9, height=64, width=64, colour=(220, 40, 30)):
    frames = np.full((num_frames, height, width, 3), 200, dtype=np.uint8)
    for t in range(num_frames):
        frames[t, height // 4 : height // 2, 2 * t : 2 * t + width // 4] = colour
    return frames


def read_back(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return np.stack(frames), meta


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


@pytest.mark.parametrize("name", ["run:1/-i 100%03d\n'\udcff.mp4", "concat:a|b.mp4", "x" * 251 + ".mp4"])
def test_any_name_of_a_file_is_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(name, moving_square(2, 16, 16), 8)
    assert os.listdir(os.path.dirname(name) or ".") == [os.path.basename(name)]
    assert read_video(name).shape == (2, 16, 16, 3)


def test_to_uint8_rounds_clamps_and_moves_channels_last():
    video = torch.zeros(2, 3, 4, 6)
    video[:, 0], video[:, 1], video[:, 2] = -1.2, 1.5, 0.004
    frames = to_uint8(video)
    assert frames.shape == (2, 4, 6, 3) and frames.dtype == torch.uint8
    assert frames[0, 0, 0].tolist() == [0, 255, 128]
    every_level = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(every_level / 127.5 - 1)[0, :, :, 0], every_level[0, 0].to(torch.uint8))
    assert to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.uint8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad):
    video = torch.zeros(1, 3, 2, 2)
    video[0, 1, 1, 0] = bad
    with pytest.raises(RunError, match="not finite.*bf16"):
        to_uint8(video)


@pytest.mark.parametrize("size", [(64, 64), (90, 122)])
def test_video_comes_back_in_its_size_rate_and_colours(tmp_path, size):
    frames = moving_square(height=size[0], width=size[1])
    path = tmp_path / "made" / "000000.mp4"
    write_video(path, torch.from_numpy(frames), 8)
    back, meta = read_back(path)
    assert back.shape == frames.shape
    assert meta["fps"] == 8 and meta["codec"] == "h264" and "yuv420p" in meta["pix_fmt"]
    assert psnr(back, frames) > 30
    # Inside the square, away from the edges that chroma subsampling blurs.
    centre = back[4, size[0] * 3 // 8, 8 + size[1] // 8].astype(int)
    assert np.abs(centre - (220, 40, 30)).max() <= 4
    by_decord = decord.VideoReader(str(path)).get_batch(range(len(frames))).asnumpy()
    assert np.abs(by_decord[4, size[0] * 3 // 8, 8 + size[1] // 8].astype(int) - centre).max() <= 4
    assert os.listdir(path.parent) == ["000000.mp4"]


def test_a_lower_crf_is_closer_to_the_original(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    for crf in (4, 40):
        write_video(tmp_path / f"{crf}.mp4", noise, 8, crf=crf)
    assert (tmp_path / "4.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 63, 64, 3), np.uint8),
        np.zeros((2, 64, 63, 3), np.uint8),
        np.zeros((0, 64, 64, 3), np.uint8),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
    ],
)
def test_frames_of_a_wrong_shape_or_type_are_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="expected"):
        write_video(tmp_path / "x.mp4", frames, 8)
    assert os.listdir(tmp_path) == []


def test_ffmpeg_on_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, small_disk):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(RunError, match="x.mp4: the limit of a file here is"), small_disk(1000):
        write_video(path, noise, 8)
    assert os.listdir(tmp_path) == ["x.mp4"] and path.read_bytes() == b"old"


def test_a_failing_ffmpeg_is_quoted(tmp_path, monkeypatch):
    real = subprocess.run

    def without_encoder(command, **settings):
        return real([part.replace("libx264", "no_such_encoder") for part in command], **settings)

    monkeypatch.setattr(subprocess, "run", without_encoder)
    with pytest.raises(RunError, match="no_such_encoder"):
        write_video(tmp_path / "x.mp4", moving_square(), 8)
    assert os.listdir(tmp_path) == []


def test_an_ffmpeg_that_cannot_be_started_is_a_run_error(tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "missing-ffmpeg"))
    with pytest.raises(RunError, match="missing-ffmpeg"):
        write_video(tmp_path / "x.mp4", moving_square(), 8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["latents.safetensors", "latents.pt"])
def test_latents_come_back_bit_identical(tmp_path, name):
    latents = torch.randn(5, 4, 3, 2, dtype=torch.float32).bfloat16().transpose(0, 1)
    path = tmp_path / name
    write_latents(path, latents)
    back = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert list(back) == ["latents"] and torch.equal(back["latents"], latents)


@pytest.mark.parametrize("name", ["latents.safetensors", "latents.pt"])
def test_latents_on_a_full_disk_leave_no_file(tmp_path, small_disk, name):
    with pytest.raises(RunError, match="could not write .*it needs 40.0 kB, the limit"), small_disk(1000):
        write_latents(tmp_path / name, torch.zeros(10, 1000))
    assert os.listdir(tmp_path) == []


def test_json_keeps_every_script_and_a_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"prompt": "ein Bär, 熊", "seed": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "ein Bär, 熊", "seed": 1}
    assert "熊" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"prompt": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 1 and os.listdir(tmp_path) == ["x.json"]


def test_contact_sheet_shows_first_and_last_frame_enlarged(tmp_path):
    frames = np.zeros((17, 64, 64, 3), np.uint8)
    frames[0], frames[-1] = (255, 0, 0), (0, 0, 255)
    frames[8] = (0, 255, 0)
    path = tmp_path / "sheet.png"
    contact_sheet([("a red circle moves left", frames), ("", frames[:3, :32, :48])], path, columns=3)
    sheet = np.asarray(Image.open(path))
    first = np.argwhere((sheet == (255, 0, 0)).all(-1))
    assert np.ptp(first[:, 1]) + 1 >= 192 and (sheet == (0, 255, 0)).all(-1).sum() == 192 * 192
    assert (sheet == (0, 0, 255)).all(-1).sum() == 192 * 192
    caption = sheet[: first[0, 0]]
    assert (caption == 0).all(-1).sum() > 50, "the caption is written above the frames"
    assert (sheet == (255, 0, 0)).all(-1).sum() == 192 * 192 + 192 * 288, "a smaller video is enlarged more"


def test_contact_sheet_wraps_a_long_caption_and_reduces_large_frames(tmp_path):
    frames = np.full((2, 480, 720, 3), 90, np.uint8)
    contact_sheet([("word " * 300, frames)], tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width < 2 * 400 and sheet.height < 256 + 100


def test_contact_sheet_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 videos"):
        contact_sheet([], tmp_path / "sheet.png")


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_an_animation_plays_all_videos_and_holds_the_last_frame_of_short_ones(suffix, tmp_path):
    bright, short = np.full((3, 64, 64, 3), 40, np.uint8), np.full((2, 32, 64, 3), 40, np.uint8)
    bright[1:], short[1] = 250, 250
    bright[2] = 120
    path = tmp_path / f"demo.{suffix}"
    animation([("a", bright), ("b", short), ("c", bright)], path, columns=2, fps=8)
    with Image.open(path) as picture:
        assert picture.n_frames == 3
        shades = []
        for index in range(3):
            picture.seek(index)
            pixels = np.asarray(picture.convert("L"), dtype=int)
            assert picture.info["duration"] in (120, 125), "GIF counts in hundredths of a second"
            height, width = pixels.shape
            shades.append([int(pixels[height // 2 - 30, x]) for x in (50, width // 2 + 50)])
    assert np.abs(np.array(shades) - [[40, 40], [250, 250], [120, 250]]).max() < 12
    with pytest.raises(ValueError, match="expected videos"):
        animation([], path, columns=2, fps=8)


def test_a_signal_while_ffmpeg_starts_leaves_neither_it_nor_a_file(tmp_path, monkeypatch):
    class Asked(BaseException):
        pass

    def ask(number, frame):
        raise Asked

    imageio_ffmpeg.get_ffmpeg_exe()  # its first call starts a process as well: one signal is enough
    start, former = subprocess.Popen._execute_child, signal.signal(signal.SIGTERM, ask)

    def start_and_ask(self, *args):
        start(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", start_and_ask)
    before = psutil.Process().children()
    try:
        with pytest.raises(Asked):
            write_video(tmp_path / "clip.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8)
    finally:
        signal.signal(signal.SIGTERM, former)
    alive = [each for each in psutil.Process().children() if each not in before and each.status() != "zombie"]
    assert alive == [] and list(tmp_path.iterdir()) == []
