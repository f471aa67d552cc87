"""The package definition, the pinned versions, the Makefile and the launchers."""

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("sgm", "vae_modules")
LINUX = {"platform_system": "Linux", "platform_machine": "x86_64", "sys_platform": "linux", "python_version": "3.11"}


@pytest.fixture(scope="module")
def definition():
    """The arguments of setup.py for setuptools; nothing is built."""
    given = {}
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    patch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    patch.undo()
    return given


def requirements(definition, *extras) -> dict[str, Requirement]:
    lines = [
        *definition["install_requires"],
        *(line for extra in extras for line in definition["extras_require"][extra]),
    ]
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in parsed}


@cache
def constraints() -> dict[str, list[Requirement]]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins: dict[str, list[Requirement]] = {}
    for line in filter(None, lines):
        assert not line.startswith("-"), f"{line}: options belong on the command line of pip"
        pins.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return pins


# setup.py


def test_every_source_module_is_installed(definition):
    found = {
        str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for p in PACKAGES for path in (ROOT / p).rglob("*.py")
    }
    assert {name for name in definition["packages"] if not name.startswith("cogvideox_sat.")} == found
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"setup"}
    assert set(definition["py_modules"]) == scripts
    assert {"dit_video_concat", "sample_video"} <= scripts


def test_every_folder_of_a_package_has_an_init():
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_markers(definition):
    needed, of_tests = requirements(definition), requirements(definition, "dev")
    decord, triton = of_tests["decord"].marker, needed["triton"].marker
    assert decord.evaluate(LINUX) and triton.evaluate(LINUX) and "decord" not in needed
    assert not decord.evaluate(LINUX | {"platform_machine": "aarch64"})  # no wheel there; only tests need it
    assert not triton.evaluate(LINUX | {"platform_system": "Darwin"})
    assert needed["torch"].marker is None and needed["av"].marker is None


def test_every_requirement_is_a_range(definition):
    open_ended = [
        str(one) for one in requirements(definition, *definition["extras_require"]).values() if not one.specifier
    ]
    assert open_ended == []


def test_every_import_is_declared(definition):
    """Imported packages must be declared, not rely on dependencies of others."""
    # Imported only for args.wandb, for weights in fewer bits, for the page, to measure videos, and for data afar.
    declared = requirements(definition).keys() | {"wandb", "torchao", "bitsandbytes", "gradio", "pandas", "starlette"}
    declared |= requirements(definition, "evaluate").keys() | requirements(definition, "remote").keys()
    distributions = packages_distributions()
    undeclared = {}
    for path in [*(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")), ROOT / "dit_video_concat.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, *PACKAGES}:
                if (
                    name != "dit_video_concat"
                    and not {canonicalize_name(d) for d in distributions.get(name, [name])} & declared
                ):
                    undeclared[name] = str(path.relative_to(ROOT))
    assert undeclared == {}


def test_license():
    assert "Apache License" in (ROOT / "LICENSE").read_text()


# constraints.txt


def test_constraints_are_exact_and_unique():
    for name, pins in constraints().items():
        assert len(pins) == 1 or all(pin.marker for pin in pins), f"{name} is pinned twice"
        for pin in pins:
            assert [part.operator for part in pin.specifier] == ["=="], f"{pin} is not exact"
            assert not pin.url and not pin.extras


@pytest.mark.parametrize("extras", [(), ("dev", "diffusers", "scenes", "wandb", "web", "evaluate")])
def test_constraints_pin_what_make_installs(definition, extras):
    missing = [name for name in requirements(definition, *extras) if name not in constraints()]
    assert missing == []


def test_constraints_satisfy_the_ranges(definition):
    outside = []
    for name, wanted in requirements(definition, *definition["extras_require"]).items():
        for pin in constraints().get(name, []):
            version = next(iter(pin.specifier)).version
            outside += [] if wanted.specifier.contains(version) else [f"{pin} is not {wanted.specifier}"]
    assert outside == []


# Makefile and launchers


def recipes() -> dict[str, str]:
    text = (ROOT / "Makefile").read_text()
    found = re.findall(r"^([^\s:=#]+):(?!=)[^\n]*\n((?:\t[^\n]*\n?)*)", text, flags=re.MULTILINE)
    return {target: recipe for target, recipe in found}


def test_targets():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony is not None
    assert {"demo", "web", "test", "lint", "bench"} <= set(phony[1].split())
    assert set(phony[1].split()) <= recipes().keys()
    assert next(iter(target for target in recipes() if not target.startswith("."))) == "demo"


def test_what_the_targets_do():
    rules = recipes()
    assert "inference.sh" in rules["demo"]
    steps = re.findall(r"tools/(\w+)\.py|(\w+)\.sh|(sample_video)\.py", rules["demo"])
    names = ["".join(step) for step in steps]
    assert names.count("sample_video") == 2 and names.count("contact_sheet") == 2
    assert re.findall(r'SAY\) "(\d) of 4: ', rules["demo"]) == [*"1234"], "each step is announced"
    assert rules["demo"].count("\tbeside outputs/") == rules["demo"].count("; joined\n") == 2, "both codes count"
    commands = [line for line in rules["demo"].splitlines() if not line.startswith(("\t\t", "\t$(SAY)"))]
    assert all(line.startswith("\t@") for line in commands), "and its command is not echoed"
    assert "outputs" not in rules["clean"].split(), "which holds the results of every sampling run"
    exported = names.index("export_sat_lora_weight")
    assert names[exported + 1 : exported + 3] == ["convert_weight_sat2hf", "load_cogvideox_lora"]
    assert "-m pytest" in rules["test"] and "-m benchmarks" in rules["bench"]
    assert all(word in rules["lint"] for word in ("ruff check", "ruff format --check", "pyright"))
    (pip,) = re.findall(r"^INSTALL := (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert " install " in pip and "-c constraints.txt" in pip
    installing = [line for rule in rules.values() for line in rule.splitlines() if "$(INSTALL)" in line]
    assert len(installing) == 4 and not any(" install " in rule for rule in rules.values())
    assert all("$(COMPILE)" in rule for rule in rules.values() if "$(INSTALL)" in rule), "pip compiles nothing"
    assert sum("--no-deps $(WEB)" in line for line in installing) == 2
    assert "tools/web.py" in rules["web"]


def test_everything_of_the_page_is_pinned(definition):
    """It is installed without resolving; the installed gradio says what it needs."""
    listed = re.search(r"^WEB := (.*?[^\\])\n", (ROOT / "Makefile").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    names = {canonicalize_name(name) for name in listed[1].replace("\\", "").split()}
    assert names <= constraints().keys()
    needed = {canonicalize_name(Requirement(line).name) for line in requires("gradio") or () if "extra" not in line}
    python_313 = {"audioop-lts"}
    assert needed - names - constraints().keys() - python_313 == set()


def test_the_image_holds_the_page():
    texts = {file: (ROOT / file).read_text() for file in ("Makefile", "Dockerfile")}
    lists = {
        "Makefile": re.search(r"^WEB := (.*?[^\\])\n", texts["Makefile"], flags=re.MULTILINE | re.DOTALL),
        "Dockerfile": re.search(r'^ARG WEB="(.*?)"', texts["Dockerfile"], flags=re.MULTILINE | re.DOTALL),
    }
    names = {file: found[1].replace("\\", "").split() for file, found in lists.items() if found}
    assert names["Makefile"] == names["Dockerfile"]


ENGINE = next(filter(shutil.which, ("docker", "podman")), None)


@pytest.mark.slow
@pytest.mark.skipif(ENGINE is None, reason="there is no container engine: docker or podman")
def test_the_image_is_built_and_samples(tmp_path):
    assert ENGINE is not None
    tmp_path.chmod(0o777)  # the image's user is another
    subprocess.run([ENGINE, "build", "--tag", "cogvideox-test", str(ROOT)], check=True)
    run = [ENGINE, "run", "--rm", "--volume", f"{tmp_path}:/data", "cogvideox-test"]
    configs = ["--base", "configs/toy.yaml", "configs/toy_inference.yaml"]
    subprocess.run([*run, "cogvideox-sample", *configs, "args.num_steps=2", "args.output_dir=videos"], check=True)
    assert len(list(tmp_path.glob("videos/*/0/000000.mp4"))) == 6
    shown = subprocess.run([*run, "cogvideox-web", "--configs", "nowhere"], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and "there is no folder" in shown.stderr, "gradio is there"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("target", ["demo", "web", "test", "test-all", "lint", "bench"])
def test_make_knows_every_step(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


INTERPRETER = "tests/interpreter.sh"


@pytest.mark.parametrize(
    "script", ["inference.sh", "finetune_single_gpu.sh", "finetune_multi_gpus.sh", ".ci/run", INTERPRETER]
)
def test_launchers_stop_at_the_first_failure(script):
    path = ROOT / script
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_ci_runs_what_a_user_runs():
    text = (ROOT / ".ci" / "run").read_text()
    assert "make lint" in text and "make test" in text


def test_git_leaves_results_and_weights_alone():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    assert {".venv", "outputs", "checkpoints", "__pycache__", "*.egg-info"} <= ignored
