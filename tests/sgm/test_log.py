"""Text of others on a terminal: file names, captions, prompts."""

import argparse
import io
import sys

import pytest
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sgm import cli
from sgm.log import bar, configure_logging, every_rank_warns, get_logger, printable, printable_output, warn_once
from sgm.util import InputError

HOSTILE = "\x1b]0;title\x07 \x1b[2J \x9b31m \r \u202egpj \udcff.mp4"
SHOWN = "\\x1b]0;title\\x07 \\x1b[2J \\x9b31m \\r \\u202egpj \\udcff.mp4"


def test_control_characters_are_escaped_and_text_stays():
    assert printable(HOSTILE) == SHOWN
    for text in ("a red ball\n\tü 日本\u3000語 👩\u200d🚀 n\u0303", ""):
        assert printable(text) == text


@pytest.mark.parametrize("debug", [False, True])
def test_a_command_shows_no_escape_sequences(capsys, debug):
    def work(_):
        sys.stdout.write(f"{HOSTILE}\n")
        get_logger("sgm.clips").warning("%s", HOSTILE)
        with logging_redirect_tqdm(loggers=[get_logger()]):
            get_logger().error("\r%s", HOSTILE)
        raise InputError(f"clip {HOSTILE}") from ValueError(HOSTILE)

    assert cli.run_command(work, argparse.Namespace(debug=debug)) == 2
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n" and err.count(SHOWN) == (5 if debug else 3)
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & {*out, *err}
    assert not hasattr(sys.stdout, "_stream"), "the streams are restored"


@pytest.mark.parametrize(("rank", "said"), [("0", ["once", "of a rank", "every"]), ("1", ["every"])])
def test_of_several_ranks_one_speaks_until_they_have_started(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)
    configure_logging()
    get_logger().warning("once")
    get_logger().info("of a rank")
    every_rank_warns()
    get_logger().warning("every")
    warn_once(get_logger(), ["once"] * (rank != "0"))
    assert capsys.readouterr().err.split("\n")[:-1] == said


def test_progress_bars_still_redraw_themselves(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with printable_output(), tqdm(total=2, desc=HOSTILE) as upper, tqdm(total=2, desc="steps") as lower:
        for bar in (upper, lower, upper, lower):
            bar.update()
    shown = terminal.getvalue()
    assert "\r" in shown and "\x1b[A" in shown and SHOWN in shown
    assert not {"\x07", "\x9b", "\u202e"} & {*shown} and "\x1b[2J" not in shown


def test_what_the_encoding_of_a_stream_lacks_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    with printable_output():
        sys.stdout.writelines(["ü 日", "\n"])
        sys.stdout.flush()
    assert written.getvalue() == b"\\xfc \\u65e5\n"


def test_without_a_terminal_a_bar_is_a_line_each_minute(monkeypatch, capsys):
    times = iter([0, 20, 40, 60, 80, 119, 121, 140])
    configure_logging()
    assert [*bar(range(7), "steps", clock=lambda: next(times))] == [*range(7)]
    assert capsys.readouterr().err == "steps: 3 of 7, about 0:01:20 left\nsteps: 6 of 7, about 0:00:20 left\n"
    times = iter([0, 3600])
    with bar(what="clips", total=4, clock=lambda: next(times)) as shown:
        shown.update(2)
    assert capsys.readouterr().err == "clips: 2 of 4, about 1:00:00 left\n"
    monkeypatch.setenv("RANK", "1")
    assert [*bar(range(2), clock=lambda: 0)] == [0, 1] and capsys.readouterr().err == ""
