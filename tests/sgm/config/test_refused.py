"""The table of refused keys: every entry has an effect, through YAML and through `instantiate_from_config`."""

import inspect
from pathlib import Path

import pytest

from sgm.config.load import ConfigError, load_config
from sgm.config.refused import REFUSED, Refused, refused_by
from sgm.util import InputError, get_obj_from_str, without_ineffective

ROOT = Path(__file__).parents[3]
SECTIONS = ("args", "data", "deepspeed", "model")
OF_SECTIONS = {place for place in REFUSED if place.partition(".")[0] in SECTIONS}
OF_CLASSES = sorted(REFUSED.keys() - OF_SECTIONS)
SAMPLER = "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"


def refusal(*overrides: str, mode="inference") -> str:
    bases = [ROOT / "configs" / f"{name}.yaml" for name in ("toy", "toy_sft")]
    with pytest.raises(ConfigError) as caught:
        load_config(bases, overrides, mode=mode)
    return str(caught.value)


@pytest.mark.parametrize("target", OF_CLASSES)
def test_refused_keys_are_no_constructor_parameters(target):
    cls = get_obj_from_str(target)
    assert refused_by(cls) == REFUSED[target]
    if not target.startswith("sat."):
        assert not REFUSED[target].keys() & inspect.signature(cls).parameters.keys()


@pytest.mark.parametrize("target", [*OF_CLASSES, SAMPLER])
def test_accepted_values_are_dropped_and_others_refused(target):
    cls = get_obj_from_str(target)
    for name, entry in refused_by(cls).items():
        assert without_ineffective(cls, {name: entry.only, "other": 1}) == {"other": 1}
        assert without_ineffective(cls, {name: None}) == {}
        with pytest.raises(InputError, match=f"{cls.__name__}: {name} is 'x', but .*; remove it"):
            without_ineffective(cls, {name: "x"})


@pytest.mark.parametrize(
    "override",
    [
        "model.sampler_config.params.fixed_frames=1",
        "model.loss_fn_config.params.fixed_frames=1",
        "model.first_stage_config.params.decoder_config.params.pad_mode=zeros",
        "model.first_stage_config.params.encoder_config.params.attn_resolutions=[16]",
        "model.network_config.params.transformer_args.hidden_dropout=0.1",
        "model.network_config.params.transformer_args.checkpoint_num_layers=2",
        "model.conditioner_config.params.emb_models.0.is_trainable=true",
        "model.conditioner_config.params.emb_models.0.params.freeze=false",
    ],
)
def test_the_place_in_the_model_is_named(override):
    text = refusal(override)
    assert "1 problem in" in text and f"{override.partition('=')[0]} (command line: {override}): is " in text


@pytest.mark.parametrize("place", sorted(OF_SECTIONS - {"model.conditioner_config.params.emb_models"}))
def test_every_key_of_a_section_is_refused_with_its_cure(place):
    text = refusal(*(f"{place}.{name}=2" for name in REFUSED[place]), mode="train")
    for name, entry in REFUSED[place].items():
        assert f"  - {place}.{name} (" in text and entry.cure in text


def test_zero_is_not_false():
    entry = Refused("why", "cure", only=False)
    assert entry.misfit(False) is None and entry.misfit(None) is None
    assert entry.misfit(0) == ("is 0, but why", "cure")
