import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.config.load import ConfigError, load_config
from sgm.inference.prepare import _read_prompts, prepare
from sgm.inference.prompts import (
    Prompt,
    assign_to_rank,
    check_images,
    image_size,
    load_image,
    output_folder_name,
    read_prompts,
    read_prompts_cli,
)
from sgm.util import InputError

ROOT = Path(__file__).parents[3]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def save_image(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


def test_one_prompt_a_line_and_blank_lines_skipped(tmp_path):
    file = write(tmp_path / "p.txt", "\ufeff a red ball \r\n\n   \nübung 日本\n")
    assert read_prompts(file, image2video=False) == [Prompt(0, "a red ball"), Prompt(1, "übung 日本")]


def test_image_is_found_from_working_directory_then_from_prompt_file(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for path in (here / "a.png", there / "a.png", there / "b.png"):
        path.touch()
    monkeypatch.chdir(here)
    file = write(there / "p.txt", f"one @@ a.png\ntwo@@b.png\nthree@@nowhere.png\nfour@@{there / 'a.png'}\n")
    images = [prompt.image for prompt in read_prompts(file, image2video=True)]
    assert [str(image) for image in images] == ["a.png", str(there / "b.png"), "nowhere.png", str(there / "a.png")]
    assert read_prompts(file, image2video=True)[0].text == "one"


def test_lines_of_the_wrong_form_are_reported_together_with_line_numbers(tmp_path):
    file = write(tmp_path / "p.txt", "good\n\nbad@@a.png\nworse@@b.png\n")
    with pytest.raises(InputError, match=r"(?s)p\.txt:3: 'bad@@a\.png'.*image2video: true.*p\.txt:4: 'worse"):
        read_prompts(file, image2video=False)
    file = write(tmp_path / "q.txt", "good@@a.png\nno image\n@@b.png\nc@@\nd@@e@@f.png\n")
    with pytest.raises(InputError) as error:
        read_prompts(file, image2video=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all(f"q.txt:{number}: " in line for number, line in zip((2, 3, 4, 5), lines, strict=True))


def test_only_line_ends_end_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("one\u2028two\x85\x0cthree\r\nfour\rfive\n".encode())
    prompts = read_prompts(tmp_path / "p.txt", image2video=False)
    assert [prompt.text for prompt in prompts] == ["one\u2028two\x85\x0cthree", "four", "five"]


def test_what_cannot_be_a_path_is_reported_with_its_line(tmp_path):
    swapped = f"a.png@@{'a red ball rolls over the wet grass, ' * 20}"
    lines = ["a@@b.png", swapped, "prompt@@~nosuchuser/a.png"]
    file = write(tmp_path / "p.txt", "\n".join(lines))
    with pytest.raises(InputError) as error:
        read_prompts(file, image2video=True)
    problems = str(error.value).splitlines()
    assert [problem.split(":")[1] for problem in problems] == ["2", "3"]
    assert all("the order is prompt@@image" in problem for problem in problems)
    assert "too long" in problems[0] and len(problems[0]) < 300


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_empty_prompt_file(tmp_path, text):
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(write(tmp_path / "p.txt", text), image2video=False)


def test_unreadable_prompt_files(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.txt.*No such file"):
        read_prompts(tmp_path / "nothing.txt", image2video=False)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path, image2video=False)
    (tmp_path / "latin.txt").write_bytes("fünf".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt' is not UTF-8 text \(byte 1\)"):
        read_prompts(tmp_path / "latin.txt", image2video=False)


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (Path("/dev/zero"), "device"), (tmp_path, "folder")):
        with pytest.raises(InputError, match=f"cannot be read: it is a {kind}, not a file"):
            read_prompts(path, image2video=False)


def test_a_file_that_is_no_text_is_refused_and_control_characters_are_mentioned(tmp_path, caplog):
    (tmp_path / "p.txt").write_bytes("red\nball\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"(?s)p\.txt:1: .*U\+0000 at position 2.*p\.txt:2: "):
        read_prompts(tmp_path / "p.txt", image2video=False)
    with caplog.at_level(logging.WARNING, logger="sgm"):
        read_prompts(write(tmp_path / "p.txt", "a\tball\n\n\x1b[31mred \x1b\x07\n"), image2video=False)
    assert caplog.messages == [f"{tmp_path}/p.txt:3: holds control characters, which text encoders drop: \\x1b, \\x07"]


def answers(*lines):
    """Answer with `lines`, then end the input."""
    lines = iter(lines)

    def ask(question):
        assert "nglish prompt" in question
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return ask


@pytest.mark.parametrize("end", [["", "c"], ["exit", "c"], []])
def test_cli_ends(end):
    prompts = list(read_prompts_cli(False, input=answers("a", " b ", *end)))
    assert prompts == [Prompt(0, "a"), Prompt(1, "b")]


def test_cli_reports_a_bad_line_and_continues(tmp_path, caplog):
    image = save_image(tmp_path / "a.png", np.zeros((4, 4, 3)))
    ask = answers("no image", f"a@@{tmp_path}/b.png", f"a@@{image}")
    with caplog.at_level(logging.ERROR, logger="sgm"):
        assert list(read_prompts_cli(True, input=ask)) == [Prompt(0, "a", image)]
    assert "'no image' is not of the form prompt@@image" in caplog.messages[0]
    assert "b.png' does not exist" in caplog.messages[1]


def test_cli_reports_what_is_not_utf8_and_continues(caplog):
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    lines = iter(["a \udcff ball", broken, "b"])

    def ask(_):
        line = next(lines, "")
        if isinstance(line, Exception):
            raise line
        return line

    with caplog.at_level(logging.ERROR, logger="sgm"):
        assert list(read_prompts_cli(False, input=ask)) == [Prompt(0, "b")]
    assert len(caplog.messages) == 2 and all("UTF-8" in message for message in caplog.messages)


def test_cli_reports_what_cannot_be_a_path(caplog):
    ask = answers("a.png@@" + "a red ball " * 30, "a@@~nosuchuser/a.png")
    with caplog.at_level(logging.ERROR, logger="sgm"):
        assert list(read_prompts_cli(True, input=ask)) == []
    assert len(caplog.messages) == 2 and all("order is prompt@@image" in message for message in caplog.messages)


def test_cli_reports_what_the_check_refuses(caplog):
    def check(prompt):
        if prompt.text == "bad":
            raise InputError("no word is known")
        return prompt

    assert list(read_prompts_cli(False, input=answers("bad", "good"), ready=check)) == [Prompt(0, "good")]
    assert caplog.messages == ["no word is known"]


def test_cli_asks_through_builtin_input(monkeypatch):
    monkeypatch.setattr("builtins.input", answers("a"))
    assert list(read_prompts_cli(False)) == [Prompt(0, "a")]


def test_check_images_reports_all_bad_ones(tmp_path):
    good = save_image(tmp_path / "good.png", np.zeros((64, 64, 3)))
    garbage = write(tmp_path / "garbage.png", "no image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    truncated = save_image(tmp_path / "truncated.png", noise)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    check_images([Prompt(0, "a"), Prompt(1, "b", good)])
    with pytest.raises(InputError) as error:
        check_images(
            [
                Prompt(0, "a", garbage),
                Prompt(1, "b", good),
                Prompt(2, "c", truncated),
                Prompt(3, "d", tmp_path / "missing.png"),
                Prompt(4, "e", garbage),
                Prompt(5, "f", tmp_path),
            ]
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "garbage.png" in lines[0] and "prompt 0, 4" in lines[0] and "no known image format" in lines[0]
    assert "truncated.png' cannot be decoded" in lines[1]
    assert "missing.png' does not exist" in lines[2]
    assert "cannot be decoded" in lines[3]


def test_image_of_the_right_size_is_kept_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3))
    image = load_image(save_image(tmp_path / "a.png", pixels), (6, 10))
    assert image.shape == (3, 6, 10) and image.dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_image_is_scaled_to_cover_and_centre_cropped(tmp_path):
    # Thirds along the width: red, green, blue. A square of the middle third is green only.
    pixels = np.zeros((30, 90, 3))
    for i in range(3):
        pixels[:, 30 * i : 30 * (i + 1), i] = 255
    wide, tall = save_image(tmp_path / "w.png", pixels), save_image(tmp_path / "t.png", pixels.transpose(1, 0, 2))
    for path, size in ((wide, (60, 60)), (tall, (60, 60)), (wide, (15, 15)), (tall, (16, 16))):
        image = load_image(path, size)
        assert image.shape == (3, *size)
        middle = image[:, 3:-3, 3:-3]
        torch.testing.assert_close(middle[1], torch.ones_like(middle[1]), atol=0.05, rtol=0)
        torch.testing.assert_close(middle[[0, 2]], -torch.ones_like(middle[[0, 2]]), atol=0.05, rtol=0)


def test_scaling_does_not_alias_nor_leave_the_range(tmp_path):
    noise = 255 * np.random.default_rng(0).integers(0, 2, (64, 64, 3))
    assert load_image(save_image(tmp_path / "a.png", noise), (64, 64)).std() > 0.95
    assert load_image(tmp_path / "a.png", (16, 16)).std() < 0.25
    edge = np.zeros((16, 16, 3))
    edge[:, 8:] = 255
    image = load_image(save_image(tmp_path / "b.png", edge), (64, 64))
    assert image.min() == -1 and image.max() == 1


def test_any_image_shape_gives_the_size(tmp_path):
    for h, w in ((1, 1), (7, 333), (101, 99), (480, 721)):
        path = save_image(tmp_path / f"{h}x{w}.png", np.full((h, w, 3), 255))
        image = load_image(path, (48, 72))
        assert image.shape == (3, 48, 72) and torch.allclose(image, torch.ones(()), atol=1e-5)


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.png")
        assert load_image(tmp_path / f"{mode}.png", (8, 8)).shape == (3, 8, 8)


def ramp(dtype):
    return np.linspace(0, 65535, 256).round().astype(dtype).reshape(16, 16)


@pytest.mark.parametrize(("name", "dtype"), [("a.png", np.uint16), ("b.tif", np.uint16), ("c.tif", np.int32)])
def test_grey_of_16_bits_is_scaled(tmp_path, name, dtype):
    Image.fromarray(ramp(dtype)).save(tmp_path / name)
    image = load_image(tmp_path / name, (16, 16))
    expected = torch.from_numpy(ramp(np.int64)) / 32767.5 - 1
    torch.testing.assert_close(image, expected.float().expand(3, -1, -1), atol=0.005, rtol=0)


@pytest.mark.parametrize("pixels", [ramp(np.float32), ramp(np.int32) * 2, ramp(np.int32) - 1])
def test_grey_of_unknown_range_is_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="a.tif' cannot be decoded: its pixels are grey values of 32 bits"):
        check_images([Prompt(0, "a", tmp_path / "a.tif")])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize(("orientation", "size"), [(None, (10, 20)), (3, (10, 20)), (6, (20, 10)), (8, (20, 10))])
def test_exif_orientation_is_applied(tmp_path, name, orientation, size):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif)
    assert image_size(tmp_path / name) == size


def test_the_size_comes_from_the_header(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:1000])
    assert image_size(file) == (64, 48)
    with pytest.raises(InputError, match="cannot be decoded"):
        load_image(file, (64, 48))
    with pytest.raises(InputError, match="no known image format"):
        image_size(write(tmp_path / "b.jpg", "no image"))


def test_load_image_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "a.png", (8, 8))


def test_every_prompt_goes_to_one_rank():
    prompts = [Prompt(i, str(i)) for i in range(7)]
    shares = [assign_to_rank(prompts, rank, 3) for rank in range(3)]
    assert [[prompt.index for prompt in share] for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert assign_to_rank(prompts, 0, 1) == prompts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red ball", "3_a_red_ball"),
        ('a/b\\c:d*e?f"g<h>i|j', "3_abcdefghij"),
        ("dots at the end...", "3_dots_at_the_end"),
        ("tab\tnew\nline\x00\x1b", "3_tab_new_line"),
        ("../../etc", "3_....etc"),
        ("???", "3"),
        ("日本", "3_日本"),
        ("e\u0301", "3_\u00e9"),
        ("x" * 500, "3_" + "x" * 120),
        ("bad \udcff surrogate", "3_bad__surrogate"),
    ],
)
def test_output_folder_name(text, name, tmp_path):
    assert output_folder_name(3, text) == name
    (tmp_path / name).mkdir()


def test_output_folder_name_fits_in_bytes(tmp_path):
    for text in ("日" * 300, "😀" * 300):
        name = output_folder_name(12, text)
        assert 190 < len(name.encode()) < 220
        (tmp_path / name).mkdir()


def given(model: str, *overrides: str) -> list[Prompt] | None:
    return prepare(load_config([ROOT / "configs" / f"{model}.yaml"], overrides, mode="inference")).prompts


@pytest.mark.thorough
def test_a_prompt_of_the_command_line_replaces_those_of_the_file(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    image = "assets/toy/images/red_square.png"
    out = f"args.output_dir={tmp_path}"
    overrides = ["args.prompt=a red circle moves left", "args.input_file=no_such.txt", out]
    assert given("toy", *overrides) == [Prompt(0, "a red circle moves left")]
    assert given("toy", *overrides, "args.input_type=cli") == [Prompt(0, "a red circle moves left")]
    assert given("toy_i2v", *overrides, f"args.image={image}") == [Prompt(0, "a red circle moves left", Path(image))]
    for model, more, said in (
        ("toy_i2v", [], "args.prompt:1: "),
        ("toy", [f"args.image={image}"], "image"),
        ("toy_i2v", ["args.image=no_such.png"], "no_such.png"),
    ):
        with pytest.raises(ConfigError) as caught:
            given(model, *overrides, *more)
        (problem,) = caught.value.problems
        assert problem.path == "args.prompt" and said in problem.found


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("toy_i2v", [], "needs an image: give args.image=<file> too"),
        ("toy", ["args.image=x.png"], "this is a text-to-video model; remove args.image, or use an image"),
    ],
)
def test_a_prompt_and_image_that_do_not_fit_the_model_are_told_by_their_keys(model, given, said):
    bases = [ROOT / f"configs/{model}.yaml", ROOT / "configs/toy_inference.yaml"]
    with pytest.raises(InputError, match=said):
        _read_prompts(load_config(bases, ["args.prompt=a red circle", *given], mode="inference"))
