import contextlib

import pytest
import torch
from torch import nn

import sgm.modules
from sgm.modules.encoders.modules import GeneralConditioner
from sgm.util import InputError, instantiate_from_config


class Ramp(nn.Module):
    """Embeds a text as (4, dim) filled with its length plus one, and counts its calls."""

    def __init__(self, dim: int = 3):
        super().__init__()
        self.dim = dim
        self.seen: list[list[str]] = []

    def forward(self, texts):
        self.seen.append(list(texts))
        return torch.tensor([len(text) + 1.0 for text in texts])[:, None, None].expand(-1, 4, self.dim).clone()


class Foreign(Ramp):
    """A custom encoder with the optional hooks and a log of their calls."""

    def __init__(self, folder: str = "somewhere"):
        super().__init__()
        self.folder, self.calls = folder, []

    def forward(self, texts):
        self.calls.append("encode")
        return super().forward(texts)

    def check(self):
        raise InputError(f"the folder {self.folder} is empty")

    def release(self):
        self.calls.append("release")


class KeepingForeign(Foreign):
    """An encoder that offloads itself."""

    @contextlib.contextmanager
    def keep_loaded(self):
        self.calls.append("keep")
        yield
        self.calls.append("let go")


class Flat(nn.Module):
    def forward(self, texts):
        return torch.zeros(len(texts), 4)


def conditioner(**entry):
    return GeneralConditioner([{"input_key": "txt", "target": f"{__name__}.Ramp"} | entry])


def t5_entry(folder, **params):
    return {
        "is_trainable": False,
        "input_key": "txt",
        "ucg_rate": 0.1,
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(folder), "max_length": 12} | params,
    }


def test_released_yaml_section(t5_dir):
    config = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [t5_entry(t5_dir)]}}
    model = instantiate_from_config(config)
    assert isinstance(model, sgm.modules.GeneralConditioner)
    model.check()
    cond = model({"txt": ["a red ball", "a blue ball"]})
    assert set(cond) == {"crossattn"} and cond["crossattn"].shape == (2, 12, 32)
    assert not model.state_dict()


def test_empty_list_of_embedders():
    model = GeneralConditioner([])
    assert model({"txt": ["a"]}) == {}
    assert model.get_unconditional_conditioning({"txt": ["a"]}) == ({}, {})
    model.check()


def test_embeddings_are_joined_along_the_hidden_axis():
    model = GeneralConditioner(
        [
            {"input_key": "txt", "target": f"{__name__}.Ramp"},
            {"input_keys": ["other"], "target": f"{__name__}.Ramp", "params": {"dim": 2}},
        ]
    )
    crossattn = model({"txt": ["a"], "other": ["abc"]})["crossattn"]
    assert crossattn[0, 0].tolist() == [2, 2, 2, 4, 4]
    zeroed = model({"txt": ["a"], "other": ["abc"]}, force_zero=["other"])["crossattn"]
    assert zeroed[0, 0].tolist() == [2, 2, 2, 0, 0]


def test_nothing_is_dropped_without_a_generator():
    model = conditioner(ucg_rate=1.0)
    assert model.training
    assert (model({"txt": ["a"] * 8})["crossattn"] == 2).all()


def test_dropout_is_per_sample_at_the_given_rate():
    model = conditioner(ucg_rate=0.3)
    crossattn = model({"txt": ["a"] * 4000}, generator=torch.Generator().manual_seed(0))["crossattn"]
    dropped = (crossattn == 0).all(dim=(1, 2))
    assert (crossattn[~dropped] == 2).all()
    assert abs(dropped.float().mean().item() - 0.3) < 0.03


def test_dropout_follows_its_generator_alone():
    model = conditioner(ucg_rate=0.5)
    batch = {"txt": ["a"] * 64}
    torch.manual_seed(1)
    first = model(batch, generator=torch.Generator().manual_seed(5))["crossattn"]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = model(batch, generator=torch.Generator().manual_seed(5))["crossattn"]
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, model(batch, generator=torch.Generator().manual_seed(6))["crossattn"])


def test_dropped_nan_becomes_zero():
    model = conditioner(ucg_rate=1.0)
    model.embedders[0].forward = lambda texts: torch.full((len(texts), 4, 3), torch.nan)
    assert (model({"txt": ["a"]}, generator=torch.Generator())["crossattn"] == 0).all()


def test_legacy_value_is_encoded_for_dropped_samples():
    model = conditioner(ucg_rate=0.5, legacy_ucg_value="none")
    values = model({"txt": ["a"] * 64}, generator=torch.Generator().manual_seed(0))["crossattn"][:, 0, 0]
    assert set(values.tolist()) == {2.0, 5.0}


def test_unconditional_is_zero_without_negative_prompt():
    model = conditioner(ucg_rate=1.0)
    for batch_uc in (None, {}, {"txt": ["", " "]}):
        cond, uncond = model.get_unconditional_conditioning({"txt": ["a", "bc"]}, batch_uc)
        assert cond["crossattn"][:, 0, 0].tolist() == [2, 3]
        assert uncond["crossattn"].shape == (2, 4, 3) and (uncond["crossattn"] == 0).all()
    assert len(model.embedders[0].seen) == 3


def test_negative_prompt_is_encoded_where_it_is_not_empty():
    model = conditioner()
    _, uncond = model.get_unconditional_conditioning({"txt": ["a", "b", "c"]}, {"txt": ["ugly", "", "bad"]})
    assert uncond["crossattn"][:, 0, 0].tolist() == [5, 0, 4]


def test_forced_zero_wins_over_a_negative_prompt():
    _, uncond = conditioner().get_unconditional_conditioning({"txt": ["a"]}, {"txt": ["ugly"]}, ["txt"])
    assert (uncond["crossattn"] == 0).all()


def test_legacy_value_is_the_unconditional_text():
    _, uncond = conditioner(legacy_ucg_value="none").get_unconditional_conditioning({"txt": ["a"]})
    assert (uncond["crossattn"] == 5).all()


def test_both_branches_cost_one_load(t5_dir, monkeypatch):
    from sgm.modules.encoders.t5_folder import T5Folder

    loads = []
    original = T5Folder.load
    monkeypatch.setattr(T5Folder, "load", lambda self, dtype: loads.append(dtype) or original(self, dtype))
    model = GeneralConditioner([t5_entry(t5_dir, offload="release")])
    model.get_unconditional_conditioning({"txt": ["a red ball"]}, {"txt": ["a blue ball"]})
    assert len(loads) == 1 and not model.embedders[0].is_loaded
    with model.keep_loaded():
        model({"txt": ["a red ball"]})
        model({"txt": ["a red ball"]})
    assert len(loads) == 2
    assert not model.embedders[0].is_loaded


def test_release_drops_the_weights(t5_dir):
    model = GeneralConditioner([t5_entry(t5_dir)])
    model({"txt": ["a"]})
    assert model.embedders[0].is_loaded
    model.release()
    assert not model.embedders[0].is_loaded


def test_check_reports_every_embedder(tmp_path):
    model = GeneralConditioner([t5_entry(tmp_path / "one"), t5_entry(tmp_path / "two")])
    with pytest.raises(InputError, match=r"(?s)one' does not exist.*two' does not exist"):
        model.check()


def test_foreign_encoders_are_checked():
    own = {"input_key": "txt", "target": f"{__name__}.Foreign"}
    model = GeneralConditioner([own | {"params": {"folder": name}} for name in ("one", "two")])
    with pytest.raises(InputError, match=r"(?s)folder one is empty.*folder two is empty"):
        model.check()


@pytest.mark.parametrize(("offload", "released"), [("release", ["release"]), ("cpu", []), (None, [])])
def test_foreign_encoders_are_released_after_the_outermost_block(offload, released):
    model = conditioner(target=f"{__name__}.Foreign")
    embedder = model.embedders[0]
    if offload:
        embedder.offload = offload
    with model.keep_loaded():
        model({"txt": ["a"]})
        model.get_unconditional_conditioning({"txt": ["a"]})
        assert embedder.calls == ["encode"] * 2
    assert embedder.calls == ["encode"] * 2 + released
    model({"txt": ["a"]})
    assert embedder.calls[2 + len(released) :] == ["encode", *released]
    model.release()
    assert embedder.calls[-1] == "release"


def test_foreign_encoders_with_keep_loaded_offload_themselves():
    model = conditioner(target=f"{__name__}.KeepingForeign")
    model.embedders[0].offload = "release"
    model({"txt": ["a"]})
    assert model.embedders[0].calls == ["keep", "encode", "let go"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"ucg_rate": 1.5}, "ucg_rate: 1.5 is not a probability"),
        ({"ucg_rates": 0.1}, "unknown key 'ucg_rates'; did you mean 'ucg_rate'"),
        ({"input_keys": ["txt"]}, "either input_key or input_keys"),
        ({"input_key": 3}, r"input keys: \[3\]; list at least one"),
        ({"legacy_ucg_value": 0.5}, "legacy_ucg_value: 0.5 is no text; quote it"),
        ({"params": {"dims": 2}}, "dims"),
    ],
)
def test_bad_entries_are_refused(entry, message):
    with pytest.raises(InputError, match=message):
        conditioner(**entry)


def test_input_keys_are_a_list():
    with pytest.raises(InputError, match="input keys: 'txt'; list at least one"):
        GeneralConditioner([{"input_keys": "txt", "target": f"{__name__}.Ramp", "params": {"dim": 2}}])


def test_entry_without_target_is_refused():
    with pytest.raises(InputError, match="target"):
        GeneralConditioner([{"input_key": "txt"}])


def test_bad_batches_are_refused():
    model = conditioner()
    with pytest.raises(InputError, match="no 'txt'.*caption"):
        model({"caption": ["a"]})
    with pytest.raises(InputError, match="'tx'.*did you mean 'txt'"):
        model({"txt": ["a"]}, force_zero=["tx"])
    with pytest.raises(InputError, match="2 negative prompts for 1 prompts"):
        model.get_unconditional_conditioning({"txt": ["a"]}, {"txt": ["a", "b"]})
    with pytest.raises(InputError, match=r"\(1, 4\).*expected \(B, L, D\)"):
        GeneralConditioner([{"input_key": "txt", "target": f"{__name__}.Flat"}])({"txt": ["a"]})
