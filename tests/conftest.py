"""Fixtures: complete tiny models in the released layout, made from the golden weights."""

import contextlib
import gc
import importlib
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers run concurrently; tiny tensors need no threads

import pytest  # noqa: E402
import yaml
from _pytest.logging import LogCaptureFixture, LogCaptureHandler, caplog_handler_key, catching_logs
from xdist.scheduler import LoadFileScheduling

from tests import convolutions
from tests.processes import SHARED_SERVER, forked_env, forked_python, restore_linear

os.fsync = lambda _: None  # no test needs durability, and a training syncs dozens of times
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "data" / "golden"

CAPTIONS = ["a red circle moves left", "a blue square moves right", "a green triangle moves up and down"]

# Files that one worker runs, since they share the session fixture `demo`, or what `sgm.checks.measure` remembers.
DEMO = ("test_docs.py", "test_toy_run.py", "tools/toy/test_quality.py")
MEASURED = (
    "benchmarks/test_memory.py",
    "sgm/checks/test_estimate.py",
    "sgm/checks/test_planner.py",
    "sgm/checks/test_buckets.py",
    "sgm/inference/test_bad_input.py",
)
GROUPS = {file: group for group in (DEMO, MEASURED) for file in group}
# Files that take longest start first, so that both workers end at about the same time.
LONGEST = (
    *DEMO,
    *MEASURED,
    "sgm/training/test_resume.py",
    "sgm/training/test_shared_samples.py",
    "test_launchers.py",
    "sgm/training/test_presets.py",
    "test_shared.py",
    "sgm/training/test_failures.py",
    "sgm/training/test_run.py",
    "sgm/training/test_zero3.py",
    "sgm/conversion/trainers/test_consolidate.py",
    "sgm/training/test_bucket_training.py",
    "tools/toy/test_make_assets.py",
    "sgm/training/test_evaluate.py",
    "sgm/parallel/test_heartbeat.py",
)


class ByFile(LoadFileScheduling):
    """Give each worker whole files, since their fixtures take longest, and whole groups of files."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0].removeprefix("tests/")
        return GROUPS.get(file, (file,))[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Let workers, and the processes that their tests start, be forks of one server, so that imports are done once."""
    given = (str(config.invocation_params.dir / name) for name in config.args)
    os.environ[SHARED_SERVER] = forked_python(*given)
    for spec in specs:
        spec.python = os.environ[SHARED_SERVER]


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses"):
        # It keeps the stderr of its import, which must not be one test's.
        importlib.import_module("dit_video_concat")
        convolutions.install()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(ROOT / "tests").as_posix(), len(order)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # exclude imported objects from garbage collections, which DeepSpeed triggers often


@pytest.fixture(autouse=True)
def trust(monkeypatch):
    """Let targets come from the tests."""
    from sgm.util import PROJECT

    monkeypatch.setattr("sgm.util.PROJECT", (*PROJECT, "tests"))


@pytest.fixture(autouse=True, scope="session")
def no_plots():
    """Leave out the plot of the losses at the end of a training, which takes as long as a tiny one; see `plots`."""
    if "sgm.training.run" in sys.modules:  # in a worker everything is imported
        from tests.train_jobs import leave_out_plots

        leave_out_plots()


@pytest.fixture
def plots(monkeypatch):
    """Let trainings plot their losses."""
    from sgm.training.metrics import draw_curve

    monkeypatch.setattr("sgm.training.run.draw_curve", draw_curve)


@pytest.fixture(autouse=True)
def projects_logger():
    """Restore the logger of the project, which a command that a test calls configures."""
    logger = logging.getLogger("sgm")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[:2]
    if logger.level != before[2]:  # empties a cache of every logger
        logger.setLevel(before[2])


@pytest.fixture
def caplog(request):
    """pytest's fixture of this name, for the tests that ask for it.

    pytest's plugin, which pyproject.toml turns off, visits the loggers of all libraries six times a test.
    """
    handler = LogCaptureHandler()
    request.node.stash[caplog_handler_key] = handler
    fixture = LogCaptureFixture(request.node, _ispytest=True)
    with catching_logs(handler):
        yield fixture
    fixture._finalize()


@pytest.fixture(autouse=True)
def torchs_own_linear():
    yield
    restore_linear()


@pytest.fixture(scope="session")
def small_disk():
    """Return a context manager that limits files written by this process and its children to `num_bytes`.

    Not a limit for the whole test, since pytest itself may write to a larger file between the steps.
    """

    @contextlib.contextmanager
    def limit(num_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """Return a copy of the project tree after ``bash inference.sh``, run in forked processes.

    `outputs/toy` and `outputs/toy_i2v` hold its videos, `messages.txt` its standard error.
    """
    tree = tmp_path_factory.mktemp("demo")
    for path in ROOT.iterdir():
        if path.name not in ("outputs", ".git"):
            (tree / path.name).symlink_to(path)
    env = {name: value for name, value in forked_env().items() if name != "NPROC_PER_NODE"}
    with (tree / "messages.txt").open("w") as messages:
        done = subprocess.run(["bash", "inference.sh"], cwd=tree, env=env, stderr=messages, check=False)
    assert done.returncode == 0, (tree / "messages.txt").read_text()
    return tree


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory) -> Path:
    """A T5 encoder of size 24 with random weights and its own tokenizer."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 20),
        model_prefix=str(folder / "spiece"),
        vocab_size=30,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=30, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder, max_shard_size="8KB")
    return folder


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Return a function: name of a golden network → folder with its weights in safetensors.

    Unpickling tensors takes longer than a step of a training; tests of weights read the files of torch.save.
    """
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")

    def make(name: str) -> Path:
        (file,) = (GOLDEN / name / "transformer").glob("*/mp_rank_00_model_states.pt")
        copy = folder / name / "transformer"
        if not copy.exists():
            (copy / file.parent.name).mkdir(parents=True)
            tensors = torch.load(file, weights_only=True)["module"]
            save_file(tensors, copy / file.parent.name / f"{file.stem}.safetensors")
            (copy / "latest").write_text(file.parent.name)
        return copy

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, t5_folder, tiny_weights):
    """Return a function: name of a golden network → YAML file of a model with it."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    vae = torch.load(GOLDEN / "vae" / "3d-vae.pt", weights_only=True)
    save_file(vae["state_dict"], folder / "3d-vae.safetensors")

    def make(name: str) -> Path:
        path = folder / f"{name}.yaml"
        if path.exists():
            return path
        model = yaml.safe_load((GOLDEN / name / "model.yaml").read_text())["model"]
        model["first_stage_config"] = yaml.safe_load((GOLDEN / "vae" / "first_stage.yaml").read_text())[
            "first_stage_config"
        ]
        model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "3d-vae.safetensors")
        model["conditioner_config"] = {
            "target": "sgm.modules.GeneralConditioner",
            "params": {
                "emb_models": [
                    {
                        "is_trainable": False,
                        "input_key": "txt",
                        "ucg_rate": 0.1,
                        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
                        "params": {"model_dir": str(t5_folder), "max_length": 6},
                    }
                ]
            },
        }
        args = {
            "load": str(tiny_weights(name)),
            "sampling_num_frames": 2 if "1.5" in name else 1,
            "sampling_image_size": [64, 96],
            "num_steps": 2,
            "input_type": "txt",
        }
        path.write_text(yaml.safe_dump({"args": args, "model": model}, sort_keys=False))
        return path

    return make
