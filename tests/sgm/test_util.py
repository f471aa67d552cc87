import pytest
import torch
from torch import nn

from sgm.util import (
    InputError,
    append_dims,
    default,
    get_obj_from_str,
    instantiate_from_config,
    nearest,
    without_allocating,
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


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Linear", "not a dotted path"),
        ("no_such_module.Linear", "'no_such_module', which does not exist"),
        ("torch.nn.Linaer", "did you mean 'Linear'"),
        ("torch.no_such.Linear", "'torch.no_such', which does not exist"),
    ],
)
def test_targets_that_do_not_exist(target, message):
    with pytest.raises(InputError, match=message):
        get_obj_from_str(target)


def test_import_errors_inside_a_module_are_raised(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        get_obj_from_str("needs_more.Thing")


def test_a_section_without_target():
    with pytest.raises(InputError, match="target"):
        instantiate_from_config({"params": {}})


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
