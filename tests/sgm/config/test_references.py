"""References between keys are followed, placeholders are reported, the environment stays outside."""

import pytest

from sgm.config.load import load_config
from tests.sgm.config.loading import TOY, complaint, override_complaint, toy


def test_references_between_keys(write):
    extra = write("args:\n  output_dir: ${args.load}/videos\n")
    assert load_config([TOY, extra], mode="inference").args.output_dir == "assets/toy/transformer/videos"


@pytest.mark.parametrize(
    "override",
    [
        'args.load="{your CogVideoX-2b-sat path}/transformer"',
        "args.load={your path}",
        'model.conditioner_config.params.emb_models.0.params.model_dir="{your T5 path}"',
    ],
)
def test_placeholders(override):
    text = override_complaint(override)
    assert f"{override.split('=')[0]} (" in text and "still holds a placeholder" in text and "real value" in text


def test_braces_are_legal_in_prompts():
    assert toy('args.negative_prompt="a {curly} thing"').args.negative_prompt == "a {curly} thing"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("${args.nothing}", "names no value: there is no 'nothing'"),
        ("${args.train_data.7}", "names no value"),
        ("x${args.load", "begins a reference and does not end it"),
        ("${args.${args.base}}", "begins a reference and does not end it"),
        ("${args.load}", "refers to itself: args.load -> args.load"),
        ("${args.base}", "refers to itself: args.load -> args.base -> args.load"),
        ("${args}", "refers to itself"),
        ("a ${model} b", "is a section or a list"),
        ("${oc.env:HOME}", "calls the resolver 'oc.env'"),
        ("x ${oc.env:HOME,none} y", "calls the resolver 'oc.env'"),
        ("${oc.decode:'1'}", "calls the resolver 'oc.decode'"),
        ("${ oc.env : HOME}", "calls the resolver"),
        ("${.base}", "names no value"),
    ],
)
def test_references_that_name_no_value(write, value, found):
    text = complaint([TOY, write(f'args:\n  load: "{value}"\n  base: ${{args.load}}\n')])
    assert "args.load (" in text or "args.base (" in text
    assert found in text and "1 problem " in text


def test_the_environment_stays_out_of_the_configuration(write, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    for override in ("args.negative_prompt=${oc.env:SECRET}", "args.negative_prompt='${oc.env:SECRET}'"):
        text = override_complaint(override)
        assert "write the value itself" in text and "s3cr3t" not in text
    kept = toy(r"args.negative_prompt=$SECRET %SECRET% \${oc.env:SECRET}")
    assert kept.args.negative_prompt == "$SECRET %SECRET% ${oc.env:SECRET}"
    assert load_config([write(kept.to_yaml())], mode="inference").digest == kept.digest


def test_references_keep_types_and_follow_each_other(write):
    extra = write(
        "args:\n  seed: ${args.batch_size}\n  batch_size: ${data.params.sizes.1}\n"
        "  negative_prompt: a ${args.seed} ${args.skip_existing} ${args.device}${args.load}\n  skip_existing: false\n"
        "  device: null\ndata:\n  params: {sizes: [1, 2], same: '${data.params.sizes}'}\n"
    )
    config = load_config([TOY, extra], mode="inference")
    assert config.args.seed == 2
    assert config.args.negative_prompt == "a 2 false nullassets/toy/transformer"
    assert config.data["params"]["same"] == [1, 2]
