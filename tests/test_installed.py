"""The wheel: what it holds, its commands, and that it works outside of the checkout."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import setuptools

import sgm.project
from sgm import cli
from sgm.config.load import load_config
from sgm.config.yaml_files import ConfigError
from sgm.inference.prompts import parse_prompts
from sgm.project import shipped, started_as
from sgm.web.choices import find_models
from sgm.web.trainings import Training

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distribution():
    """The distribution as setup.py describes it; nothing is built."""
    made = []
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(setuptools, "setup", lambda **keywords: made.append(setuptools.Distribution(keywords)))
    exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    yield made[0]
    patch.undo()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of an installed wheel, seen from an empty working directory."""
    folder = tmp_path / "site" / "cogvideox_sat"
    folder.mkdir(parents=True)
    for name in ("configs", "assets", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sgm.project, "PACKAGED", folder)
    return folder


def test_the_wheel_holds_code_configurations_and_toy(distribution):
    build = distribution.get_command_obj("build_py")
    distribution.script_name = str(ROOT / "setup.py")
    build.ensure_finalized()
    held = {os.path.normpath(file) for _, _, file in build.find_all_modules()}
    held |= {os.path.normpath(f"{source}/{name}") for _, source, _, names in build.data_files for name in names}
    wanted = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("sgm/**/*.py"), *ROOT.glob("vae_modules/*.py")]
    wanted += [path for name in ("configs", "assets") for path in (ROOT / name).rglob("[!.]*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in wanted if "__pycache__" not in path.parts} - {"setup.py"} <= held
    assert {"configs/toy.yaml", "assets/toy/vae/3d-vae.pt", "sgm/config/keys.json", "tools/web.py"} <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs", "tools/toy"))]


def test_every_tool_is_a_command(distribution):
    scripts = dict(line.split(" = ") for line in distribution.entry_points["console_scripts"])
    assert {"cogvideox-sample", "cogvideox-train", "cogvideox-web", "cogvideox-prepare-dataset"} <= scripts.keys()
    for name, place in scripts.items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module.removeprefix("cogvideox_sat.")), function)), name
    documented = set(re.findall(r"cogvideox-[\w-]+", (ROOT / "docs/installing.md").read_text(encoding="utf-8")))
    assert scripts.keys() <= documented | {"cogvideox-sat"}, "list each in docs/installing.md"


def test_no_tool_imports_another():
    """A command of a wheel finds its own module in `cogvideox_sat.tools`, and no other one by its bare name."""
    files = [*ROOT.glob("tools/*.py")]
    for file in files:
        nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        assert not names & {each.stem for each in files}, file.name


def test_the_versions_of_python_agree(distribution):
    named = {line.rpartition(" ")[2] for line in distribution.metadata.classifiers if "Python :: 3." in line}
    assert named == {"3.11", "3.12"} and str(distribution.python_requires) in ("<3.13,>=3.11", ">=3.11,<3.13")


def test_installed_files_are_found_from_anywhere(installed):
    toy = ["configs/toy_i2v.yaml", "configs/toy_inference.yaml"]
    config = load_config(toy, ["args.output_dir=assets/toy", "args.prompt=assets"], mode="inference")
    assert config.args.load == str(installed / "assets/toy/transformer_i2v")
    assert config.model["first_stage_config"]["params"]["ckpt_path"] == str(installed / "assets/toy/vae/3d-vae.pt")
    assert (config.args.output_dir, config.args.prompt) == ("assets/toy", "assets"), "nothing is written there"
    image = "assets/toy/images/red_square.png"
    assert parse_prompts([f"a@@{image}"], image2video=True, source="")[0].image == installed / image
    Path("configs").mkdir()
    Path("configs/toy_inference.yaml").write_text("args:\n  seed: 3\n")
    assert load_config(toy, mode="inference").args.seed == 3, "the working directory comes first"


@pytest.mark.parametrize("path", ["configs/none.yaml", "tools/web.py", "assets/../tools", "/configs", "configsx", "a"])
def test_other_paths_stay(path, installed):
    assert shipped(path) == path


def test_a_checkout_installs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/toy.yaml") == "configs/toy.yaml"
    assert started_as("train_video.py") == ["python", "train_video.py"]


def test_commands_of_an_installed_wheel(installed):
    """Words of tools are found too, but those of outputs are not; texts name the commands that exist."""
    parser = cli.tool_parser("")
    parser.add_argument("file")
    parser.add_argument("--out")
    options = parser.parse_args(["assets/toy", "--out", "assets/toy_land"])
    assert (options.file, options.out) == (str(installed / "assets/toy"), "assets/toy_land")
    given = cli.parse(["configs/toy.yaml"], prog="train_video.py", description="", examples=(), check="")
    assert given.command == "cogvideox-train configs/toy.yaml" and given.base == ["configs/toy.yaml"]
    models = find_models(Path(shipped("configs/")))
    assert models["toy"].ready and not models["cogvideox_5b"].ready
    assert Training(models["toy"], Path("a"), Path("b")).command.startswith("cogvideox-train --base ")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(["configs/toi.yaml"], mode="inference")


def test_the_dockerfile():
    """It takes all that a wheel is made of, pinned versions, no secret, and a user without rights."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE) for word in line.split()]
    assert {"sgm", "vae_modules", "tools", "configs", "assets", *(p.name for p in ROOT.glob("*.py"))} <= {*copied}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    context = (ROOT / ".dockerignore").read_text().split()
    left_out = [name for name in copied if not any(fnmatch(name, line[1:]) for line in context if line[0] == "!")]
    assert context[0] == "*" and left_out == []
    extras = re.search(r"^ARG EXTRAS=(.*)$", text, flags=re.MULTILINE)
    assert extras and all(f'"{name}": [' in (ROOT / "setup.py").read_text() for name in extras[1].split(","))
    assert "--constraint /source/constraints.txt" in text
    assert re.findall(r"^USER (\d+)$", text, flags=re.MULTILINE) == ["10001"]
    assert not re.search(r"(?i)token|password|secret|_key", text)
    hadolint = Path(sys.executable).with_name("hadolint")
    if hadolint.exists():  # make lint runs it where it is not
        done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_wheel_samples_the_toy_from_an_empty_folder(tmp_path):
    """Built, installed into a folder of its own without dependencies, and run by its command."""
    names = [*(path.name for path in ROOT.glob("*.py")), "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("sgm", "vae_modules", "tools", "configs", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip, site = [sys.executable, "-m", "pip", "--quiet"], tmp_path / "site"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "wheel"), str(tmp_path)]
    subprocess.run(build, check=True)
    wheel = next((tmp_path / "wheel").glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (tmp_path / "empty").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    words = ["--base", "configs/toy.yaml", "configs/toy_inference.yaml", "args.num_steps=2", "args.prompt=a red circle"]
    command = [str(site / "bin/cogvideox-sample"), *words]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "empty/outputs/toy").rglob("*.mp4")]) == 1
    assert str(site / "cogvideox_sat") in next((tmp_path / "empty").rglob("000000.json")).read_text()
