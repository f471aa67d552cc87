"""docs/modules.md against the code: every target builds, its parameters are listed, and none is missing."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml

from sgm.util import get_obj_from_str, instantiate_from_config, without_allocating

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
DIFFUSION = "sgm.modules.diffusionmodules"


def documented() -> dict[str, list[str]]:
    """Target → parameters, from the rows of the page."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (?:`([\w ]+)`|none) \|$", PAGE, flags=re.MULTILINE)
    files = {path.stem for path in (ROOT / "sgm" / "modules" / "diffusionmodules").glob("*.py")}
    full = [name if name.partition(".")[0] not in files else f"{DIFFUSION}.{name}" for name, _ in rows]
    return {name: params.split() for name, (_, params) in zip(full, rows, strict=True)}


TARGETS = documented()


def sections(value):
    if isinstance(value, dict):
        if "target" in value:
            yield value
        value = list(value.values())
    for entry in value if isinstance(value, list) else []:
        yield from sections(entry)


@pytest.fixture(scope="module")
def named() -> dict[str, list[dict]]:
    """Target → its sections in the shipped configurations and on the page."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
    texts += re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    found: dict[str, list[dict]] = {f"{DIFFUSION}.guiders.IdentityGuider": [{}]}
    for text in texts:
        for section in sections(yaml.safe_load(text)):
            found.setdefault(section["target"], []).append(section.get("params") or {})
    return found


def classes_of(folder: str) -> set[str]:
    """Public concrete classes for YAML: with a keyword constructor, or callable without constructor."""
    return {
        f"{module.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}.{node.name}"
        for module in (ROOT / folder).rglob("*.py")
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.decorator_list
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_parameters_are_those_of_the_constructor(target):
    assert TARGETS[target] == list(inspect.signature(get_obj_from_str(target)).parameters)


@pytest.mark.parametrize("target", [name for name in TARGETS if not name.endswith("Mixin")])
def test_every_target_builds(target, named):
    with without_allocating():
        # A file that is merged over another may name the class alone.
        made = instantiate_from_config({"target": target, "params": max(named[target], key=len)})
    assert type(made) is get_obj_from_str(target)


@pytest.mark.parametrize("mixin", [name for name in TARGETS if name.endswith("Mixin")])
def test_every_mixin_builds_in_a_network(mixin, named):
    network = "dit_video_concat.DiffusionTransformer"
    params = next(params for params in named[network] if mixin in str(params["modules"]))
    with without_allocating():
        made = instantiate_from_config({"target": network, "params": params})
    assert get_obj_from_str(mixin) in {type(each) for each in made.mixins.values()}


def test_no_target_is_left_out(named):
    own = {name for name in named if name.startswith(("sgm.modules.", "dit_video_concat.", "vae_modules."))}
    assert own <= TARGETS.keys()
    inner = {"discretizer.LevelTable", "guiders.Guider", "sampling.VideoSampler", "sigma_sampling.LossMoments"}
    inner.add("wrappers.OpenAIWrapper")
    others = {f"{DIFFUSION}.{name}" for name in inner}
    assert classes_of("sgm/modules/diffusionmodules") - others <= TARGETS.keys()
