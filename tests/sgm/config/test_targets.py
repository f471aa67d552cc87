"""Sections are checked against the signatures of their classes."""

import copy
from typing import Any

import pytest
import yaml

from sgm.checks import planner
from sgm.checks.sampling import check_shapes
from sgm.config.args import SamplingArgs, TrainingArgs
from sgm.config.load import ConfigError, load_config
from sgm.config.targets import accepted_by, check_params
from sgm.config.values import _adapter
from sgm.config.yaml_files import Merged
from sgm.modules.diffusionmodules.sampling import VideoDDIMSampler
from sgm.modules.geometry import Geometry
from sgm.util import PROJECT, Target, get_obj_from_str, instantiate_from_config
from tests.sgm.config.loading import ROOT, TOY, complaint, override_complaint, toy, training_complaint


class OwnSampler(VideoDDIMSampler):
    pass


def targets_in(tree: Any) -> set[str]:
    entries = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    own = {tree["target"]} if isinstance(tree, dict) and isinstance(tree.get("target"), str) else set()
    return own.union(*map(targets_in, entries))


def unbounded(schema: dict[str, Any]) -> bool:
    if schema.get("type") in ("number", "integer"):
        return not {"maximum", "exclusiveMaximum"} & schema.keys()
    inner = [schema["items"]] if isinstance(schema.get("items"), dict) else []
    return any(map(unbounded, [*schema.get("anyOf", ()), *schema.get("prefixItems", ()), *inner]))


def test_every_number_in_yaml_has_bounds():
    """So that one that cannot be meant, such as 1e30, is refused; the network itself passes on the ones below."""
    completed = {"grid", "patch_size", "layer_num", "hidden_size"}
    shipped = set[str]().union(*(targets_in(yaml.safe_load(file.read_text())) for file in ROOT.glob("configs/*.yaml")))
    assert len(shipped) > 15
    for cls in [*map(get_obj_from_str, shipped), SamplingArgs, TrainingArgs]:
        hints = accepted_by(cls).hints if accepted_by(cls) else {}
        schemas = {name: _adapter(hint, repr(hint))[1] for name, hint in hints.items() if name not in completed}
        assert [name for name, schema in schemas.items() if unbounded(schema)] == [], cls


def test_interpolation_is_accepted_on_network_and_mixin():
    network = "model.network_config.params"
    base = ROOT / "configs" / "cogvideox_2b.yaml"
    config = load_config([base], [f"{network}.height_interpolation=2.0"], mode="inference")
    assert config.warnings == ()
    mixin = f"{network}.modules.pos_embed_config.params.height_interpolation"
    assert load_config([base], [f"{mixin}=2.0"], mode="inference").warnings == ()
    with pytest.raises(ConfigError, match="height_interpolaton.*did you mean 'height_interpolation'"):
        load_config([base], [f"{network}.height_interpolaton=2.0"], mode="inference")


def test_interpolation_that_no_mixin_takes_warns():
    network = "model.network_config.params"
    overrides = [f"{network}.height_interpolation=2.0", f"{network}.time_interpolation=null"]
    config = load_config([ROOT / "configs" / "cogvideox_5b.yaml"], overrides, mode="inference")
    assert config.warnings == (f"{network}.height_interpolation has no effect: nothing under modules takes it",)


@pytest.mark.parametrize("value", ["5", "abc", "[1]", "true", ".nan"])
def test_what_is_no_section_in_the_place_of_a_mixin_is_a_problem(value):
    place = "model.network_config.params.modules.pos_embed_config"
    assert f"{place} (command line: {place}={value}): is " in override_complaint(f"{place}={value}")


def test_modules_without_a_class_do_not_hide_the_problem():
    modules = "model.network_config.params.modules"
    for target in ("no.such.Class", "3", "null"):
        overrides = (f"{modules}.pos_embed_config.target={target}", f"{modules}.final_layer_config=null")
        text = override_complaint(*overrides, "model.network_config.params.height_interpolation=2.0")
        assert f"{modules}.pos_embed_config.target" in text


@pytest.mark.parametrize("value", ["0.5", "2"])
def test_numbers_of_other_projects_may_be_fractions(value):
    path = "model.network_config.params.modules.lora_config.params.lora_alpha"
    base = ROOT / "configs" / "cogvideox_2b_lora.yaml"
    assert load_config([base], [f"{path}={value}"], mode="inference").warnings == ()
    assert "give a number" in complaint([base], [f"{path}=much"])


def test_unknown_parameters_are_found_at_any_depth():
    network = "model.network_config.params"
    text = override_complaint(
        f"{network}.hidden_sise=3",
        f"{network}.modules.adaln_layer_config.params.qkln=true",
        "model.sampler_config.params.guider_config.params.scael=1",
        "model.conditioner_config.params.emb_models.0.params.maxlength=3",
        "model.conditioner_config.params.emb_models.0.ucgrate=3",
        "model.scalefactor=1",
    )
    assert "6 problems" in text
    for path, known in [
        (f"{network}.hidden_sise", "hidden_size"),
        (f"{network}.modules.adaln_layer_config.params.qkln", "qk_ln"),
        ("model.sampler_config.params.guider_config.params.scael", "scale"),
        ("model.conditioner_config.params.emb_models.0.params.maxlength", "max_length"),
        ("model.conditioner_config.params.emb_models.0.ucgrate", "ucg_rate"),
        ("model.scalefactor", "scale_factor"),
    ]:
        line = next(line for line in text.splitlines() if line.startswith(f"  - {path} "))
        assert f"did you mean '{known}'?" in line


def test_unknown_targets_name_the_nearest():
    path = "model.sampler_config.target"
    text = override_complaint(f"{path}=sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSample")
    assert f"{path} (" in text and "did you mean 'VPSDEDPMPP2MSampler'" in text
    assert "does not exist" in override_complaint(f"{path}=nowhere.Sampler")
    assert "dotted path" in override_complaint(f"{path}=Sampler")
    assert "dotted path" in override_complaint(f"{path}=5")


@pytest.mark.parametrize(
    ("section", "target", "why"),
    [
        ("sampler_config", "torch.nn.Identity", "is not a sampler: it does not take a call(denoise,"),
        ("sampler_config", "sgm.modules.diffusionmodules.sampling.VideoSampler", "only a base class"),
        ("sampler_config", "sgm.modules.diffusionmodules.guiders.VanillaCFG", "is not a sampler: it cannot be called"),
        ("sampler_config", "torch.zeros", "--trust torch"),
        ("sampler_config.params.guider_config", "torch.nn.Identity", "not a guider: it has no prepare_inputs("),
        ("network_config", "torch.optim.SGD", "not a network: it is not a torch.nn.Module"),
        ("network_config", "torch.nn.Identity", "not a network: it does not take a call(x, timesteps, context)"),
        ("network_config.params.modules.pos_embed_config", "pathlib.Path", "is not trusted"),
        ("denoiser_config", "torch.nn.Linear", "not a denoiser"),
        ("denoiser_config.params.scaling_config", "torch.nn.Identity", "not a scaling"),
        ("first_stage_config", "torch.nn.Identity", "not a VAE: it has no decode(latents)"),
        ("conditioner_config.params.emb_models.0", "subprocess.Popen", "is not trusted"),
        ("conditioner_config.params.emb_models.0", "sgm.io.atomic_file", "not a class"),
        ("loss_fn_config", "torch.nn.MSELoss", "not a loss"),
    ],
)
def test_a_section_takes_a_class_of_its_kind(section, target, why):
    path = f"model.{section}.target"
    text = override_complaint(f"{path}={target}")
    assert "1 problem " in text and f"{path} (" in text and why in text


@pytest.mark.parametrize("target", ["os.getcwd", "pathlib.Path", "torch.nn.Identity", "sgm.data.loader.SampleStream"])
def test_the_data_section_takes_a_data_set(target):
    text = training_complaint(f"data.target={target}")
    assert "1 problem " in text and "data.target (" in text


def test_a_class_of_ones_own_needs_trust_from_the_command_line(monkeypatch):
    target = f"model.sampler_config.target={__name__}.OwnSampler"
    assert toy(target).warnings == ()
    monkeypatch.setattr("sgm.util.PROJECT", PROJECT)
    assert "add --trust tests to the command" in override_complaint(target, "args.trust=[tests]")
    trusted = load_config([TOY], [target], mode="inference", trust=["tests"])
    assert type(instantiate_from_config(trusted.model["sampler_config"])).__name__ == "OwnSampler"
    copied = copy.deepcopy(trusted.model["sampler_config"]["target"])
    assert copied.trust == ("tests",) and type(yaml.safe_load(trusted.to_yaml())["model"]) is dict
    assert type(planner.config_with(trusted, ["args.seed=2"]).model["sampler_config"]["target"]) is Target


def test_a_section_without_target(write):
    path = write("model:\n  loss_fn_config: null\n  sampler_config: {params: {}}\n")
    base = write(TOY.read_text().split("  sampler_config:")[0], "base.yaml")
    text = complaint([base, path])
    assert "model.sampler_config" in text and "has no 'target:'" in text and "write target:" in text


def test_an_overlay_of_adapters_for_a_model_without_any():
    """configs/lora/dora.yaml changes a part of the lora_config that files ending with _lora have."""
    text = complaint([TOY, ROOT / "configs" / "lora" / "dora.yaml"])
    assert "modules.lora_config (" in text and "has no 'target:'" in text and "that ends with _lora" in text


def test_missing_parameters(write):
    config = yaml.safe_load(TOY.read_text())
    del config["model"]["denoiser_config"]
    del config["model"]["network_config"]["params"]["hidden_size"]
    text = complaint([write(yaml.safe_dump(config))])
    assert "model.denoiser_config" in text and "add 'denoiser_config:'" in text
    assert "model.network_config.params.hidden_size" in text and "DiffusionTransformer needs it" in text


def test_values_of_the_wrong_type():
    text = override_complaint("model.network_config.params.hidden_size=big", "model.noised_image_input=5")
    assert "hidden_size" in text and "give a whole number" in text
    assert "model.noised_image_input" in text and "give true or false" in text


def test_parameters_that_are_no_mapping():
    text = override_complaint("model.sampler_config.params=[1]", "model.denoiser_config.params=5")
    assert "sampler_config.params" in text and "is [1]" in text and "is 5" in text
    assert text.count("write the parameters as indented keys") == 2
    path = "model.denoiser_config.params.discretization_config.params"
    assert all("write the parameters" in override_complaint(f"{path}={value}") for value in ("''", "0", "false", "[]"))


def test_a_class_whose_package_is_missing(monkeypatch):
    def missing(target):
        if target.endswith("VideoDDIMSampler"):
            raise ImportError("No module named 'scipy'")
        return get_obj_from_str(target)

    monkeypatch.setattr("sgm.config.targets.get_obj_from_str", missing)
    text = override_complaint("model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler")
    assert "sampler_config.target" in text and "VideoDDIMSampler' failed: No module named 'scipy'" in text
    assert "install the missing package" in text


class _Unresolved:
    """Annotated with a name that is imported for type checkers alone."""

    def __init__(self, size: "OnlyForTypeCheckers") -> None: ...  # noqa: F821


def test_classes_that_do_not_say_what_they_take_take_anything():
    merged = Merged({}, {})
    check_params(dict, {"a": 1}, ("model", "part", "params"), merged)
    check_params(_Unresolved, {"size": "x"}, ("model", "part", "params"), merged)
    assert merged.problems == []
    check_params(_Unresolved, {"sice": "x"}, ("model", "part", "params"), merged)
    assert "did you mean 'size'" in merged.problems[0].found


class _Options:
    def __init__(self, *, size: int = 1) -> None: ...


class _Host:
    IGNORED_PARAMS = {"old": "it is gone"}
    SECTION_TYPES = {"options": _Options}

    def __init__(self, *, options: dict, part: dict | None = None) -> None: ...


def test_mappings_that_a_class_parses_itself():
    merged = Merged()
    check_params(_Host, {"options": {"sise": 2}, "old": 1}, ("x",), merged)
    assert merged.warnings == ["x.old has no effect: it is gone"]
    assert [problem.path for problem in merged.problems] == ["x.options.sise"]
    assert "did you mean 'size'" in merged.problems[0].found


class _Data:
    def __init__(self, *, data_dir: str, size: int) -> None: ...


def test_parameters_from_the_code_are_neither_required_nor_allowed_in_yaml():
    for params, wrong in [
        ({"size": 1}, []),
        ({}, ["data.params.size"]),
        ({"size": 1, "data_dir": "x"}, ["data.params.data_dir"]),
    ]:
        merged = Merged()
        check_params(_Data, params, ("data", "params"), merged)
        assert [problem.path for problem in merged.problems] == wrong


def test_what_is_checked_can_be_built():
    sampler = instantiate_from_config(toy("model.sampler_config.params.num_steps=4").model["sampler_config"])
    assert sampler.num_steps == 4


LENGTH = "model.network_config.params.modules.pos_embed_config.params.text_length"
ENCODER = "model.conditioner_config.params.emb_models.0.params.max_length"


def test_the_length_of_texts_is_given_once(tmp_path):
    """By the network or by the encoder, with one digest; two numbers are compared by the checks."""
    text = (ROOT / "configs" / "toy.yaml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines(keepends=True) if "text_length" in line)
    model_dir = next(line for line in text.splitlines(keepends=True) if "model_dir" in line)
    both = text.replace(model_dir, f"{model_dir}            max_length: 16\n")
    digests = []
    for number, content in enumerate((text, both, both.replace(line, ""))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content, encoding="utf-8")
        config = load_config([path], mode="inference")
        digests.append(config.digest)
        assert config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] == 16
    assert len({*digests}) == 1
    config = load_config([tmp_path / "0.yaml"], [f"{LENGTH}=12"], mode="inference")
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    assert config.model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] == 12
    assert check_shapes(config, geometry) == [] and config.origins[ENCODER] == f"command line: {LENGTH}=12"
    config = load_config([tmp_path / "1.yaml"], [f"{LENGTH}=12"], mode="inference")
    assert [problem.path for problem in check_shapes(config, geometry)] == [ENCODER]
