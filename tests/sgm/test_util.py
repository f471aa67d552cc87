import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sgm.util import (
    InputError,
    Target,
    append_dims,
    default,
    defer_package_init,
    get_obj_from_str,
    instantiate_from_config,
    nearest,
    nearest_path,
    require_packages,
    without_allocating,
    without_compiler,
)


class Accepts:
    IGNORED_PARAMS = {"old": "it was never used"}

    def __init__(self, *, size: int = 1) -> None:
        self.size = size


HERE = f"{__name__}.Accepts"


def test_instantiate_passes_params_and_extras():
    linear = instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 2}}, out_features=3)
    assert linear.weight.shape == (3, 2)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)


def test_ignored_parameters_are_dropped(monkeypatch):
    monkeypatch.setattr("sgm.util.get_obj_from_str", lambda target: Accepts)
    assert instantiate_from_config({"target": HERE, "params": {"old": 1, "size": 2}}).size == 2
    with pytest.raises(InputError, match="unexpected keyword argument 'new'"):
        instantiate_from_config({"target": HERE, "params": {"new": 1}})


def test_what_a_constructor_cannot_build_is_wrong_input():
    for params in ({"in_features": 2, "out_features": "x"}, {"in_features": -1, "out_features": [1]}):
        with pytest.raises(InputError, match="torch.nn.Linear cannot be built with these parameters"):
            instantiate_from_config({"target": "torch.nn.Linear", "params": params})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Linear", "not a dotted path"),
        ("no_such_module.Linear", "'no_such_module', which does not exist"),
        ("torch.nn.Linaer", "did you mean 'Linear'"),
        ("torch.nn.no_such.Linear", "'torch.nn.no_such', which does not exist"),
        ("..a", "not a dotted path"),
    ],
)
def test_targets_that_do_not_exist(target, message):
    with pytest.raises(InputError, match=message):
        get_obj_from_str(target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "is not trusted"),
        ("subprocess.Popen", "is not trusted"),
        ("builtins.exec", "is not trusted"),
        ("torch.load", "--trust torch"),
        ("torch.nnn.Linear", "--trust torch"),
        ("runs_at_import.Thing", "--trust runs_at_import"),
        ("runs_at_import.deeper.Thing", "--trust runs_at_import"),
        ("sgm.io.os", "not a class"),
        ("sgm.io.write_json", "not a class"),
        ("sgm.io.os.system", "does not exist"),
        ("sgm.io.Path", "is defined in 'pathlib"),
        ("torch.nn.modules.module.Tensor", "--trust torch"),
        ("sgm.util.types.FunctionType", "does not exist"),
    ],
)
def test_foreign_code_neither_runs_nor_is_imported(target, message, tmp_path, monkeypatch):
    (tmp_path / "runs_at_import.py").write_text("open(__file__ + '.ran', 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for build in (get_obj_from_str, lambda target: instantiate_from_config({"target": target, "params": {}})):
        with pytest.raises(InputError, match=message):
            build(target)
    assert not (tmp_path / "runs_at_import.py.ran").exists()


def test_the_user_trusts_a_package_and_not_its_namesakes(tmp_path, monkeypatch):
    for name in ("trusted_one", "trusted_one_more"):
        (tmp_path / f"{name}.py").write_text("class Thing: pass\nfrom pathlib import Path\n")
    monkeypatch.syspath_prepend(tmp_path)
    trust = ["trusted_one"]
    assert get_obj_from_str(Target("trusted_one.Thing", trust)).__name__ == "Thing"
    for target in ("trusted_one_more.Thing", "trusted_one.Path"):
        with pytest.raises(InputError, match="is not trusted"):
            get_obj_from_str(Target(target, trust))
    with pytest.raises(InputError, match="--trust trusted_one to the command"):
        get_obj_from_str("trusted_one.Thing")  # nothing of the trust above stays
    for name in ("no_such_package", "no.such", "", "a b"):
        with pytest.raises(InputError, match=f"--trust {name}: there is no such package"):
            require_packages([name])


def test_import_errors_inside_a_module_are_raised(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        get_obj_from_str(Target("needs_more.Thing", ["needs_more"]))


def test_a_section_without_target():
    with pytest.raises(InputError, match="target"):
        instantiate_from_config({"params": {}})


def test_the_nearest_path(tmp_path, monkeypatch):
    (tmp_path / "assets" / "toy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for missing in ("asets/toy", "assets/tou", Path("./assts/toi")):
        assert nearest_path(missing) == "; did you mean 'assets/toy'?"
    assert nearest_path(tmp_path / "assets" / "to") == f"; did you mean '{tmp_path / 'assets' / 'toy'}'?"
    assert nearest_path("assets/toy") == ": it is a folder", "in the place of a file"
    (tmp_path / "assets" / "file").touch()
    assert nearest_path("assets/file") == ": it is a file", "in the place of a folder"
    assert nearest_path("quite/other") == nearest_path("assets/else") == nearest_path("assets/toy/toy") == ""


def test_nearest():
    assert nearest("hidden_sise", ["hidden_size", "layers"]) == "; did you mean 'hidden_size'?"
    assert nearest("xyz", ["hidden_size"]) == ""


def test_append_dims_and_default():
    assert append_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="3 axes"):
        append_dims(torch.zeros(1, 1, 1), 2)
    assert default(None, 3) == 3 and default(0, 3) == 0


def test_without_allocating_overrides_an_explicit_device():
    with without_allocating():
        linear = nn.Linear(10**6, 10**6, device="cpu")
    assert linear.weight.is_meta and linear.weight.shape == (10**6, 10**6)
    assert not torch.zeros(1).is_meta


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_submodules_of_a_deferred_package_leave_its_init_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "deferred_outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "deferred_outer" / "__init__.py").write_text(
        "from deferred_outer.inner import found\nran = found + 1\n"
    )
    (inner / "__init__.py").write_text("found = 41\n")
    (inner / "leaf.py").write_text("value = 7\n")
    for name in ("deferred_outer", "deferred_outer.inner"):
        defer_package_init(name)
    import deferred_outer
    from deferred_outer.inner import leaf

    assert leaf.value == 7 and "ran" not in vars(deferred_outer) and "found" not in vars(deferred_outer.inner)
    assert deferred_outer.ran == 42 and deferred_outer.inner.found == 41
    with pytest.raises(AttributeError):
        _ = deferred_outer.inner.absent
    defer_package_init("deferred_outer")  # it has been imported
    assert deferred_outer.ran == 42
    defer_package_init("deferred_nowhere")


def test_what_is_excluded_from_compiling_runs_without_the_compiler(monkeypatch):
    def double(x):
        return 2 * x

    real = importlib.import_module("torch._dynamo")
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    monkeypatch.delattr(torch, "_dynamo")
    excluded = torch._disable_dynamo(double)
    with without_compiler():
        assert excluded(3) == 6 and sys.modules["torch._dynamo"] is not real
    assert "torch._dynamo" not in sys.modules
    assert not hasattr(double, "__dynamo_disable")  # a later compile asks the compiler again

    with without_compiler():  # anything else loads it
        monkeypatch.setattr("sgm.util.importlib.import_module", {"torch._dynamo": real}.__getitem__)
        assert sys.modules["torch._dynamo"].config is real.config
        assert "torch._dynamo" not in sys.modules
    monkeypatch.undo()
    assert sys.modules["torch._dynamo"] is real


def test_a_loaded_compiler_stays():
    real = importlib.import_module("torch._dynamo")
    with without_compiler():
        assert sys.modules["torch._dynamo"] is real
