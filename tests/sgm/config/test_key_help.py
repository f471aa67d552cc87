"""``--help``: every key is listed and explained, from the same sources as the checks, without heavy imports."""

import ast
import io
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import sgm.inference.main
import sgm.training.main
from sgm import cli
from sgm.config import key_help
from sgm.config.args import SamplingArgs, TrainingArgs, names_of

ROOT = Path(__file__).parents[3]


def shown(main, words, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main.parse(words)
    said = capsys.readouterr()
    assert end.value.code == (2 if said.err else 0)
    return said.out + said.err


def test_the_file_is_what_types_docstrings_and_pages_say():
    spec = spec_from_file_location("key_table", ROOT / "tools/key_table.py")
    assert spec is not None and spec.loader is not None
    table = module_from_spec(spec)
    spec.loader.exec_module(table)
    assert key_help.FILE.read_text(encoding="utf-8") == table.as_json(), "run: python tools/key_table.py --write"


def test_every_key_has_a_text_and_training_lists_more_than_sampling():
    keys = key_help.keys()
    assert [name for name, key in keys.items() if not key.text or not key.default] == []
    assert {f"args.{name}" for name in names_of(TrainingArgs)} == {name for name in keys if name.startswith("args.")}
    sampling, training = (key_help.listed(training=mode).splitlines() for mode in (False, True))
    assert set(sampling) < set(training) and len(training) > 220
    assert {line.partition(" = ")[0].strip() for line in sampling} >= set(names_of(SamplingArgs))
    assert "data.params:" in training and "data.params:" not in sampling


def test_help_imports_nothing_that_takes_time():
    tree = ast.parse(Path(key_help.__file__).read_text(encoding="utf-8"))
    names = {
        n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(tree) if hasattr(n, "names")
    }
    assert {str(name).partition(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--help", "guidance_scale"], "takes: a number from 0 to 1,000 or null\n  default: null"),
        (["--help=args.seed"], "default: 42\n  on the command line: args.seed=VALUE"),
        (["-h", "seed=7", "--check"], "args.seed\n"),
        (["configs/toy.yaml", "--help", "lr"], "deepspeed.optimizer.params.lr"),
        (["--help", "layer_range"], "lora_config.params.layer_range (training)"),
        (["--help", "model.loss_fn_config.params"], "min_snr_value = null: γ, which bounds the weight"),
        (["--help", "deepspeed"], "deepspeed.zero_optimization:\n  stage = 2"),
        (["--help", "guidance_scal"], "there is no key guidance_scal; did you mean args.guidance_scale"),
        (["--help", "learning_rate"], "deepspeed.optimizer.params.lr"),
        (["--help", "zzzzz"], "there is no key zzzzz; --help lists all"),
    ],
)
def test_a_key_is_explained(words, said, capsys):
    assert said in shown(sgm.inference.main, words, capsys)


def test_help_alone_and_before_a_file_lists_the_keys(capsys):
    for words in (["--help"], ["--help", "configs/toy.yaml"], ["-h"]):
        text = shown(sgm.training.main, words, capsys)
        assert "usage: train_video.py" in text and "exit codes: 0 done" in text
        assert "  train_iters = null: iterations of the whole run" in text


def test_lines_fit_a_terminal_and_are_whole_elsewhere(monkeypatch):
    monkeypatch.setattr(key_help.sys.stdout, "isatty", lambda: True, raising=False)
    lines = key_help.listed(training=True).splitlines()
    assert max(map(len, lines)) <= 100 and any(line.endswith("...") for line in lines)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("args.guidance_s", ["args.guidance_scale="]),
        ("--base a.yaml args.guidance_s", ["args.guidance_scale="]),
        ("args.memory=", ["args.memory=auto", "args.memory=null"]),
        ("args.network_offload=b", ["args.network_offload=blocks"]),
        ("args.overw", ["args.overwrite="]),
        ("args.skip_existing=t", ["args.skip_existing=true"]),
        ("args.train_it", []),
        ("--che", ["--check"]),
        ("configs/toy_inf", ["configs/toy_inference.yaml"]),
        ("args.load=configs/toy_inf", ["args.load=configs/toy_inference.yaml"]),
    ],
)
def test_words_are_completed_in_the_shell(typed, expected, monkeypatch):
    """As bash asks, with the whole command line in variables; the shell gets what follows its last break of words."""
    line = f"cogvideox-sample {typed}"
    for name, value in {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_ARGCOMPLETE_COMP_WORDBREAKS", "")
    monkeypatch.setenv("_ARGCOMPLETE_IFS", "\n")
    monkeypatch.chdir(ROOT)
    found, ask = io.StringIO(), cli._complete

    def leave(code):
        raise SystemExit(code)

    def no_descriptor(*_):  # of messages to developers: pytest's in this process
        raise OSError

    monkeypatch.setattr("os.fdopen", no_descriptor)

    def answer(parser, **options):
        ask(parser, **options, output_stream=found, exit_method=leave)

    monkeypatch.setattr(cli, "_complete", answer)
    with pytest.raises(SystemExit):
        sgm.inference.main.parse([])
    assert [word.strip() for word in found.getvalue().split("\n") if word] == expected


def test_a_row_of_several_keys_gives_each_its_default_and_names_of_authors_end_no_sentence():
    known = key_help.keys()
    found = [known[f"deepspeed.optimizer.params.{name}"].default for name in ("betas", "eps", "weight_decay")]
    assert found == ["[0.9, 0.95]", "1e-8", "1e-4"]
    assert key_help._first_sentence("as there (Hang et al. 2023), so. Then more.") == "as there (Hang et al. 2023), so"
