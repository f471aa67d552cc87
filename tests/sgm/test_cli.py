"""Which process of several says what went wrong; signals, full disks and missing rights at the command line."""

import argparse
import os
import signal
import time

import pytest

import sgm.distributed
import sgm.inference.main
import sgm.training.main
from sgm import cli
from sgm.conversion.writing import new_folder
from sgm.io import OutputError, WriteError
from sgm.util import InputError, RunError


@pytest.mark.parametrize(
    ("rank", "local_rank", "began", "speaks"),
    [("0", "0", False, True), ("1", "1", False, False), ("8", "0", False, True), ("1", "1", True, True)],
)
def test_wrong_input_is_reported_once_per_machine_and_by_every_rank_after_the_start(
    monkeypatch, capsys, rank, local_rank, began, speaks
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(sgm.distributed, "has_mesh", lambda: began)
    assert cli._report(InputError("no such file"), debug=False, memory_hint="") == 2
    assert ("no such file" in capsys.readouterr().err) == speaks
    assert cli._report(RunError("the disk is full"), debug=False, memory_hint="") == 1
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "written"), [("0", "bash x.sh\nall well\n"), ("1", "")])
def test_findings_that_are_the_same_on_all_ranks_are_written_once(monkeypatch, capsys, rank, written):
    monkeypatch.setenv("RANK", rank)
    cli.write_findings(argparse.Namespace(command="bash x.sh"), "all well")
    assert capsys.readouterr().out == written


@pytest.mark.parametrize("command", [sgm.inference.main, sgm.training.main])
def test_trust_comes_from_the_command_line_and_ends_with_the_command(command, capsys):
    target = "model.sampler_config.target=email.message.Message"
    words = ["--base", "configs/toy.yaml", "args.mode=no_such", target, "--check"]
    for trust in (["--trust", "email", "args.seed=1", "--trust", "json.decoder"], [], ["--trust", "email.parser"]):
        assert command.main([*words, *trust]) == 2
        problem = "is not a sampler" if "email" in trust else "is not trusted"
        assert problem in capsys.readouterr().err
    assert command.main([*words, "--trust", "no_such"]) == 2
    assert "--trust no_such: there is no such package" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["args.negative_prompt=" + "blurry " * 60, "args.load=a\0b", "args.x=" + "/y" * 5000])
def test_overrides_behind_base_may_be_no_names_of_files(word):
    options = sgm.inference.main.parse(["--base", "configs/toy.yaml", word, "--check"])
    assert options.base == ["configs/toy.yaml"] and options.overrides == [word]


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("a.yaml b.yml", "a.yaml b.yml"),
        ("b.yaml --base a.yaml c.yaml", "b.yaml a.yaml c.yaml"),
        ("--base=b.yaml a.yaml", "b.yaml a.yaml"),
        ("--base b.yaml a.yaml b.yaml", "b.yaml a.yaml b.yaml"),
        ("args.input_file=x.yaml a.yaml", "a.yaml"),
    ],
)
def test_yaml_files_are_taken_without_base_in_the_order_typed(words, files):
    options = sgm.inference.main.parse([*words.split(), "--check"])
    assert options.base == files.split() and options.overrides == ["args.input_file=x.yaml"] * ("x.yaml" in words)


@pytest.mark.parametrize("typed", [None, "bash finetune_single_gpu.sh a.yaml --check"])
def test_findings_are_headed_by_the_command_that_was_typed(capsys, monkeypatch, typed):
    monkeypatch.setenv(cli.TYPED, typed or "")
    options = sgm.training.main.parse(["a.yaml", "args.train_data=[my clips]", "--check"])
    cli.write_findings(options, "memory  little")
    assert capsys.readouterr().out.splitlines() == [
        typed or "train_video.py a.yaml 'args.train_data=[my clips]' --check",
        "memory  little",
    ]


def test_options_of_other_trainers_are_sent_to_the_keys(capsys):
    with pytest.raises(SystemExit):
        sgm.training.main.parse(["a.yaml", "--learning_rate", "1e-4", "--data-root=x", "--other"])
    said = capsys.readouterr().err
    assert said.endswith("settings are written as deepspeed.optimizer.params.lr=..., args.train_data=...\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(tmp_path, capsys, request, monkeypatch, number):
    """Message, of one rank, exit code, nothing left; a second signal does not cut the clean-up short."""
    launched = number == signal.SIGTERM
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0")) if launched else ():
        monkeypatch.setenv(name, value)

    def work(options):
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                if number != signal.SIGINT:
                    os.kill(os.getpid(), signal.SIGTERM)

    # Whoever started the tests may have set it to be ignored.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    assert (
        cli.run_command(work, argparse.Namespace(debug=False), interrupted="interrupted; all is well") == 128 + number
    )
    note = "; torchrun ends with a traceback of its own (SignalException), which is no error of the run"
    assert capsys.readouterr().err == f"interrupted; all is well ({number.name}){note * launched}\n"
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) == before


@pytest.mark.parametrize(("options", "output", "said"), [({}, "args.save", "args.save"), ({"out": "x"}, "", "--out")])
@pytest.mark.parametrize(("error", "end"), [(WriteError, ""), (OutputError, ", or choose another folder")])
def test_a_full_disk_names_the_option_of_the_output(capsys, error, end, options, output, said):
    def work(_):
        raise error("could not write x: the disk is full" + end)

    assert cli.run_command(work, argparse.Namespace(debug=False, **options), output=output) == error.exit_code
    assert capsys.readouterr().err.endswith(f"the disk is full, or choose another folder: {said}\n")


def test_a_path_that_no_file_can_have_is_wrong_input(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for path, said in ((tmp_path / ("a" * 5000), "File name too long"), (tmp_path / "loop", "Too many levels")):
        assert cli.run_command(lambda _, path=path: path.stat(), argparse.Namespace(debug=False)) == 2
        assert said in (text := capsys.readouterr().err) and "error: the path /" in text and len(text) < 300


def test_a_missing_right_is_wrong_input(capsys):
    def work(_):
        raise PermissionError(13, "Permission denied", "/proc/1/mem")

    assert cli.run_command(work, argparse.Namespace(debug=False)) == 2
    assert "error: /proc" in (said := capsys.readouterr().err) and "you may not" in said and "Errno" not in said
