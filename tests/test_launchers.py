"""The launchers and the contact sheet tool, run like by a user.

`test_finetuning_the_toy_as_documented` starts a real Python. Elsewhere the processes are forks, or stubs that print
their arguments.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from sgm.inference.video import write_video
from sgm.io import write_json
from tests.marks import thorough
from tests.processes import forked_env, forked_python

ROOT = Path(__file__).parents[1]
UNSET = {"NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RUN_ID"}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project's folder; Python is forked unless `environment` names another."""
    env = {name: value for name, value in forked_env().items() if name not in UNSET} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture
def recorder(tmp_path) -> str:
    """Return the path of a ``python`` that prints its arguments, except with ``--check``."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\n[[ "$*" == *--check* ]] || echo "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue square; touch $(pwd)/x\n")
    return path


def test_inference_sh_merges_yaml_files_and_passes_the_rest(tiny_model, prompts, tmp_path):
    second = tmp_path / "more.yaml"
    second.write_text("args:\n  num_steps: 1\n")
    words = [f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'out'}", "--seed", "3"]
    done = run("bash", "inference.sh", str(tiny_model("dit_t2v_2b")), str(second), *words)
    assert done.returncode == 0, done.stderr
    assert "2 written, 0 skipped" in done.stderr
    assert len(list((tmp_path / "out").glob("*/0/000000.mp4"))) == 2

    sheet = tmp_path / "sheet.png"
    done = run("python", "tools/contact_sheet.py", str(tmp_path / "out"), "--out", str(sheet))
    assert done.stdout.splitlines()[-1] == f"contact sheet: {sheet}"
    assert iio.imread(sheet).shape[0] > 2 * 192  # a row each


def test_inference_sh_starts_several_processes(tiny_model, prompts, tmp_path):
    words = [f"args.input_file={prompts}", f"args.output_dir={tmp_path / 'out'}", "args.only_save_latents=true"]
    words += ["args.cfg_parallel_size=2"]  # illegal on one process, so the check must use both
    done = run("bash", "inference.sh", str(tiny_model("dit_t2v_2b")), *words, NPROC_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/0/000000.safetensors"))) == 2


@pytest.mark.parametrize("processes", ["1", "2"])
def test_inference_sh_hands_on_the_exit_code(processes):
    done = run("bash", "inference.sh", "configs/no_such.yaml", NPROC_PER_NODE=processes)
    assert done.returncode == 2 and "no_such.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_inference_sh_samples_the_toy_unless_a_file_is_named(recorder):
    """Without arguments from text and from images (see `demo`), with arguments only from text."""
    toy = "sample_video.py --base configs/toy.yaml configs/toy_inference.yaml"
    assert (
        run("bash", "inference.sh", "args.seed=7", "--debug", PYTHON=recorder).stdout == f"{toy} args.seed=7 --debug\n"
    )
    both = f"{toy}\n{toy.replace('toy.yaml', 'toy_i2v.yaml')} args.output_dir=outputs/toy_i2v\n"
    assert run("bash", "inference.sh", PYTHON=recorder).stdout == both
    words = ["a.yaml", "args.x='b c'", "--trust", "mine", "d.yml"]
    passed = f"{toy[:22]} a.yaml d.yml args.x='b c' --trust mine\n"
    assert run("bash", "inference.sh", *words, PYTHON=recorder).stdout == passed
    assert run("bash", "inference.sh", "--help").stdout.count("usage:") == 1


LAUNCHERS = ["finetune_single_gpu.sh", "finetune_multi_gpus.sh", "inference.sh"]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_files_are_told_from_values_and_found_with_and_without_base(recorder, script):
    words = ["--base", "a.yaml", "args.x=list.yaml", "--base=b.yml", "runs/lr=1/c.yaml", "args.y=a b"]
    done = run("bash", script, *words, PYTHON=recorder, NPROC_PER_NODE="1")
    assert done.stdout.endswith(".py --base a.yaml b.yml runs/lr=1/c.yaml args.x=list.yaml args.y=a b\n")
    done = run("bash", script, "args.x=list.yaml", PYTHON=recorder, NPROC_PER_NODE="1")
    assert ".py --base configs/toy" in done.stdout and done.stdout.endswith(".yaml args.x=list.yaml\n")


@pytest.mark.parametrize("value", ["0", "08", "2.5", "-1", "two", "gpu", "2 3"])
@pytest.mark.parametrize("script", LAUNCHERS[1:])
def test_what_is_no_number_of_processes_starts_nothing(recorder, script, value):
    """Bash would go on after an error in its arithmetic, without the check."""
    done = run("bash", script, "--check", PYTHON=recorder, NPROC_PER_NODE=value)
    assert (done.returncode, done.stdout) == (2, "") and f"NPROC_PER_NODE is '{value}'" in done.stderr


@pytest.mark.parametrize("value", ["0", "1:", "two", "0:2"])
def test_what_is_no_number_of_machines_starts_nothing(recorder, value):
    done = run("bash", "finetune_multi_gpus.sh", PYTHON=recorder, NPROC_PER_NODE="2", NNODES=value, MASTER_ADDR="node0")
    assert (done.returncode, done.stdout) == (2, "") and f"NNODES is '{value}'" in done.stderr


@pytest.mark.parametrize("word", ["--check", "--help"])
def test_sampling_is_checked_by_one_process(tmp_path, word):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "${WORLD_SIZE:-none} $*"\n')
    python.chmod(0o755)
    done = run("bash", "inference.sh", "a.yaml", word, PYTHON=str(python), NPROC_PER_NODE="4")
    assert done.stdout == f"4 sample_video.py --base a.yaml {word} --check\n"


def test_contact_sheet_of_nothing(tmp_path):
    done = run("python", "tools/contact_sheet.py", str(tmp_path), "--out", str(tmp_path / "sheet.png"))
    assert done.returncode == 2 and str(tmp_path) in done.stderr and not (tmp_path / "sheet.png").exists()


def finished(folder: Path, prompts: list[str], *, value: int) -> Path:
    """Write results of a sampling run: grey clips of different brightness."""
    for number, prompt in enumerate(prompts):
        video = folder / f"{number}_x" / "0" / "000000.mp4"
        write_video(video, np.full((9, 64, 64, 3), value, dtype=np.uint8), 8)
        write_json(video.with_suffix(".json"), {"prompt": prompt, "image": None, "seed": 1})
    return folder


def test_contact_sheet_of_runs_beside_each_other(tmp_path):
    first, second = (finished(tmp_path / n, ["a", "b"], value=v) for n, v in (("before", 40), ("after", 200)))
    out = tmp_path / "sheet.png"
    words = ["tools/contact_sheet.py", str(first), str(second), "--columns", "2", "--out", str(out)]
    assert run("python", *words).returncode == 0
    below = iio.imread(out)
    done = run("python", *words, "--beside")
    assert done.returncode == 0, done.stderr
    sheet = iio.imread(out).astype(int)
    assert sheet.shape[0] == below.shape[0] // 2 and sheet.shape[1] > 2 * below.shape[1]
    row = sheet[sheet.shape[0] // 4, :, 0]  # the middle of the first row's pictures
    dark, light = np.flatnonzero(abs(row - 40) < 8), np.flatnonzero(abs(row - 200) < 8)
    assert len(dark) == len(light) == 2 * 192 and dark.max() + 192 < light.min()


def test_contact_sheet_puts_no_different_prompts_beside_each_other(tmp_path):
    first, second = finished(tmp_path / "x", ["a"], value=40), finished(tmp_path / "y", ["b"], value=40)
    words = [str(first), str(second), "--beside", "--out", str(tmp_path / "sheet.png")]
    done = run("python", "tools/contact_sheet.py", *words)
    assert done.returncode == 2 and "prompts, seeds or sizes differ" in done.stderr


# Training

SHORT = ["args.train_iters=2", "args.eval_interval=null", "args.valid_prompts=null", "args.num_workers=0"]
SHORT += ["deepspeed.train_micro_batch_size_per_gpu=1", "args.log_interval=1"]


@pytest.mark.parametrize(
    ("script", "ranks", "forked"),
    [
        ("finetune_single_gpu.sh", 1, True),
        thorough("finetune_single_gpu.sh", 1, False),
        ("finetune_multi_gpus.sh", 2, True),
    ],
)
def test_finetuning_the_toy_as_documented(script, ranks, forked, tmp_path):
    """Defaults: the toy's LoRA without a file, two processes without a number and an accelerator."""
    python = forked_python() if forked else sys.executable
    done = run("bash", script, *SHORT, f"args.save={tmp_path}", PYTHON=python)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert (folder / "latest").read_text() == "2\n" and (folder / "2" / "mp_rank_00_model_states.pt").is_file()
    assert len(list((folder / "resume" / "2").glob("rng_*.pt"))) == ranks
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [ranks, 2 * ranks]
    assert f"sample from it with args.load={folder}" in done.stderr

    if ranks == 1:
        words = ["configs/toy_lora.yaml", "configs/toy_inference.yaml", f"args.load={folder}", "--check"]
        assert run("bash", "inference.sh", *words).returncode == 0


@pytest.mark.parametrize("script", ["finetune_single_gpu.sh", "finetune_multi_gpus.sh"])
def test_finetuning_with_a_mistake_is_one_message(script, tmp_path):
    mistake = tmp_path / "more.yaml"
    mistake.write_text("args:\n  train_itres: 2\n")
    done = run("bash", script, "configs/toy_lora.yaml", "configs/toy_sft.yaml", str(mistake), f"args.save={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("train_itres") == done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr and "ChildFailed" not in done.stderr


@pytest.mark.parametrize("script", ["finetune_single_gpu.sh", "finetune_multi_gpus.sh", "inference.sh"])
def test_findings_are_headed_by_what_a_shell_takes_again(script, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$COGVIDEOX_COMMAND"\n')
    python.chmod(0o755)
    words = ["--check", "args.train_data=[my clips]", "args.valid_prompts=[it's $HOME]"]
    for given in ([], words):
        first = run("bash", script, *given, PYTHON=str(python), NPROC_PER_NODE="1").stdout.splitlines()[0]
        assert shlex.split(first) == ["bash", script, *given]


@pytest.mark.parametrize(
    "script", [pytest.param("finetune_single_gpu.sh", marks=pytest.mark.slow), "finetune_multi_gpus.sh"]
)
def test_finetuning_can_be_checked_alone(script, tmp_path):
    done = run("bash", script, "--check", f"args.save={tmp_path / 'runs'}")
    assert done.returncode == 0 and done.stdout.count("LoRA of rank 16") == 1
    assert done.stdout.startswith(f"bash {script} --check args.save=")
    assert not (tmp_path / "runs").exists()


def test_several_machines_are_named(recorder):
    given = {"PYTHON": recorder, "NPROC_PER_NODE": "4"}
    one = run("bash", "finetune_multi_gpus.sh", "a.yaml", "args.seed=1", **given)
    launcher = "-m torch.distributed.run --nproc_per_node 4 --max_restarts 0"
    assert one.stdout == f"{launcher} --standalone train_video.py --base a.yaml args.seed=1\n"
    again = run("bash", "finetune_multi_gpus.sh", **given, MAX_RESTARTS="3")
    assert " --max_restarts 3 --standalone " in again.stdout
    missing = run("bash", "finetune_multi_gpus.sh", **given, NNODES="2", NODE_RANK="1")
    assert missing.returncode != 0 and "MASTER_ADDR" in missing.stderr
    two = run("bash", "finetune_multi_gpus.sh", **given, NNODES="2", NODE_RANK="1", MASTER_ADDR="node0")
    where = "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 29500"
    assert two.stdout.startswith(f"{launcher} {where} train_video.py --base configs/toy_lora.yaml")
    some = run("bash", "finetune_multi_gpus.sh", **given, NNODES="1:4", MAX_RESTARTS="3", MASTER_ADDR="node0")
    where = "--nnodes 1:4 --rdzv_id cogvideox --rdzv_backend c10d --rdzv_endpoint node0:29500 train_video.py"
    assert f" --max_restarts 3 {where} " in some.stdout


@pytest.mark.parametrize(
    ("words", "nodes", "launched"),
    [
        (["--check"], "1", False),
        (["--check"], "2", True),
        (["--check"], "1:4", True),
        (["--check", "--devices", "64"], "2", False),
        (["--check", "--devices=64"], "2", False),
        (["--help"], "2", False),
    ],
)
def test_a_check_of_several_machines_starts_their_ranks(tmp_path, words, nodes, launched):
    """The stub prints where it is: one process checks, torchrun compares ranks."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "${WORLD_SIZE:-none} $*"\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "NPROC_PER_NODE": "4", "NODE_RANK": "0", "MASTER_ADDR": "node0", "NNODES": nodes}
    (line,) = run("bash", "finetune_multi_gpus.sh", "a.yaml", *words, **given).stdout.splitlines()
    assert line.endswith(f"train_video.py --base a.yaml {' '.join(words)}{' --check' * (not launched)}")
    assert line.startswith("none -m torch.distributed.run " if launched else f"{4 * int(nodes[0])} train_video.py")
