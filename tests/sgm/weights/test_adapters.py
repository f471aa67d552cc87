import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from sgm.config.load import ConfigError, load_config
from sgm.util import InputError
from sgm.weights.adapters import (
    AdapterInfo,
    adapter_layer,
    describe_adapters,
    find_base,
    is_adapter,
    read_adapter_info,
    scale_numerator,
    with_adapters,
)
from sgm.weights.checkpoint import save_network
from sgm.weights.files import PREFIX, find_weights, weights_digest

BASE = Path(__file__).parents[2] / "data" / "golden" / "dit_t2v_2b" / "transformer"
LORA = "model.network_config.params.modules.lora_config"


def adapters(*layers: int, rank: int = 4) -> dict[str, torch.Tensor]:
    names = [f"transformer.layers.{layer}.attention.dense.matrix_{kind}.0" for layer in layers for kind in "AB"]
    return {name: torch.ones((rank, 64) if "_A" in name else (64, rank)) for name in names}


def info(*layers: int, base: str | Path = BASE, rank: int = 4, alpha: float = 2.0) -> AdapterInfo:
    return AdapterInfo(
        rank=rank, alpha=alpha, layers=layers, base=str(base), base_digest=weights_digest(find_weights(BASE))
    )


def saved(folder: Path, *layers: int, file_format="pt", **values) -> Path:
    """Save adapters with their description; return the file."""
    description = info(*layers, **values)
    return save_network(
        folder,
        1,
        adapters(*layers, rank=description.rank),
        patch_size=2,
        adapters=description,
        file_format=file_format,
    )


def test_adapters_are_known_by_their_names():
    assert adapter_layer("model.diffusion_model.transformer.layers.12.attention.query_key_value.matrix_B.2") == 12
    assert is_adapter("transformer.layers.0.attention.dense.matrix_A.0")
    for name in ("transformer.layers.0.attention.dense.original.weight", "layers.1.matrix_C.0", "matrix_A.0"):
        assert not is_adapter(name)


# --- The entry in the file.


@pytest.mark.parametrize("file_format", ["pt", "safetensors"])
def test_the_description_travels_with_the_file(tmp_path, file_format):
    path = saved(tmp_path, 0, 1, file_format=file_format)
    assert read_adapter_info(tmp_path) == info(0, 1)
    if file_format == "pt":
        entry = torch.load(path, weights_only=True)["lora"]
    else:
        with safe_open(path, framework="pt") as file:
            entry = json.loads(file.metadata()["lora"])
    assert entry.pop("base_digest") == weights_digest(find_weights(BASE))
    assert entry == {
        "rank": 4,
        "alpha": 2.0,
        "layers": [0, 1],
        "base": str(BASE),
        "targets": ["query_key_value", "dense"],
    }


def test_other_checkpoints_say_nothing():
    assert read_adapter_info(BASE) is None


@pytest.mark.parametrize("entry", [{"rank": 4, "scale": 2}, 7])
def test_an_entry_of_another_kind_is_refused(tmp_path, entry):
    torch.save({"module": adapters(0), "lora": entry}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: its entry 'lora' .*expected \['alpha', 'base', 'base_digest'"):
        read_adapter_info(tmp_path / "x.pt")


# --- The base.


def test_a_whole_network_has_no_base():
    assert find_base(find_weights(BASE)) is None
    with pytest.raises(InputError, match="holds a whole network.*remove args.base=elsewhere"):
        find_base(find_weights(BASE), "elsewhere")


def test_a_base_is_looked_up_here_then_above_the_file(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    shutil.copytree(BASE, tmp_path / "project" / "weights" / "base")
    path = saved(tmp_path / "project" / "ckpts" / "run", 0, base="weights/base")
    expected = tmp_path / "project" / "weights" / "base" / "1000" / "mp_rank_00_model_states.pt"
    monkeypatch.chdir(tmp_path)
    assert find_base(path) == expected
    monkeypatch.chdir(tmp_path / "project")
    assert find_base(path) == expected.relative_to(tmp_path / "project")
    assert find_base(path, BASE) == find_weights(BASE)


def test_a_base_that_is_gone_is_named_with_the_cure(tmp_path):
    path = saved(tmp_path, 0, base="no/such/folder")
    with pytest.raises(InputError, match="'no/such/folder', which is neither in the current folder.*args.base="):
        find_base(path)


def test_another_base_is_refused_with_both_digests(tmp_path):
    path = saved(tmp_path / "run", 0)
    other = torch.load(find_weights(BASE), weights_only=True)
    other["module"]["model.diffusion_model.time_embed.0.bias"].add_(1)
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="trained on another base than .*other.pt.*args.base=") as caught:
        find_base(path, tmp_path / "other.pt")
    for file in (find_weights(BASE), tmp_path / "other.pt"):
        assert weights_digest(file)[:12] in str(caught.value)


def test_adapters_are_no_base(tmp_path):
    path, other = saved(tmp_path / "a", 0), saved(tmp_path / "b", 0)
    with pytest.raises(InputError, match="holds adapters alone; give their base"):
        find_base(path, other)


def test_adapters_without_a_description_need_the_base_named(tmp_path):
    torch.save({"module": adapters(0)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="does not say what they were trained on; give that checkpoint with args.base"):
        find_base(tmp_path / "x.pt")
    assert find_base(tmp_path / "x.pt", BASE) == find_weights(BASE)


# --- Configurations.


@pytest.fixture
def load(tiny_model, tmp_path):
    """Return a function: overrides → configuration of a tiny model of two layers, and with LoRA parameters if given."""

    def load(*overrides: str, lora: dict | None = None):
        merged = yaml.safe_load(tiny_model("dit_t2v_2b").read_text())
        if lora is not None:
            section = {"target": "sat.model.finetune.lora2.LoraMixin", "params": lora}
            merged["model"]["network_config"]["params"]["modules"]["lora_config"] = section
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(merged))
        given = [f"args.input_file={tmp_path / 'prompts.txt'}", *overrides]
        return load_config([tmp_path / "model.yaml"], given, mode="inference")

    return load


def lora_of(config) -> dict | None:
    section = config.model["network_config"]["params"]["modules"].get("lora_config")
    return section and section["params"]


def test_a_configuration_without_lora_gets_that_of_the_file(load, tmp_path):
    saved(tmp_path / "run", 0, 1)
    before = load(f"args.load={tmp_path / 'run'}")
    config = with_adapters(before)
    assert lora_of(config) == {"r": 4, "lora_alpha": 2.0} and lora_of(before) is None
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config([tmp_path / "again.yaml"], mode="inference").model == config.model
    saved(tmp_path / "part", 1)
    assert lora_of(with_adapters(load(f"args.load={tmp_path / 'part'}")))["layer_range"] == [1]


def test_other_weights_change_nothing(load, tmp_path):
    for override in (f"args.load={BASE}", "args.load=null", f"args.load={tmp_path / 'nowhere'}"):
        config = load(override)
        assert with_adapters(config) is config


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 2}, {"r": 4, "lora_alpha": 2, "layer_range": [1, 0]}])
def test_a_configuration_that_agrees_is_left_alone(load, tmp_path, lora):
    saved(tmp_path / "run", 0, 1)
    config = load(f"args.load={tmp_path / 'run'}", lora=lora)
    assert with_adapters(config) is config


@pytest.mark.parametrize(
    ("lora", "key", "parts"),
    [
        ({"r": 8, "lora_alpha": 2}, "r", ["is 8", "trained with 4", "params.r=4"]),
        ({"r": 4}, "lora_alpha", ["is 1", "trained with 2.0", "params.lora_alpha=2.0"]),
        ({"r": 4, "lora_alpha": 2, "layer_range": [0]}, "layer_range", ["is [0]", "with [0, 1]", "layer_range=[0,1]"]),
    ],
)
def test_a_configuration_that_differs_is_refused_with_both_values(load, tmp_path, lora, key, parts):
    saved(tmp_path / "run", 0, 1)
    with pytest.raises(ConfigError) as caught:
        with_adapters(load(f"args.load={tmp_path / 'run'}", lora=lora))
    (problem,) = caught.value.problems
    assert problem.path == f"{LORA}.params.{key}" and "model.yaml" in problem.source
    assert all(part in str(problem) for part in [*parts, "or remove the lora_config"])


@pytest.mark.parametrize("override", [False, True])
def test_the_alpha_of_a_shipped_file_is_for_new_adapters(tmp_path, override):
    """Adapters keep the alpha that they record, or 1 if they record none; the command line still decides."""
    shipped = Path("configs/cogvideox_5b_lora.yaml")
    saved(tmp_path / "run", 0, 1)
    bare = tmp_path / "bare" / "1000"
    bare.mkdir(parents=True)
    matrix = torch.zeros(4, 8)
    torch.save(
        {"module": {f"{PREFIX}transformer.layers.0.attention.dense.matrix_A.0": matrix}},
        bare / "mp_rank_00_model_states.pt",
    )
    (bare.parent / "latest").write_text("1000")
    change = [f"{LORA}.params.lora_alpha=32"] if override else []
    config = load_config([shipped], [f"args.load={bare.parent}", "args.input_file=none.txt", *change], mode="inference")
    assert lora_of(with_adapters(config))["lora_alpha"] == (32 if override else 1)
    config = load_config(
        [shipped],
        [f"args.load={tmp_path / 'run'}", f"{LORA}.params.r=4", *change, "args.input_file=none.txt"],
        mode="inference",
    )
    with pytest.raises(ConfigError) as caught:  # its layers differ too
        with_adapters(config)
    assert ("lora_alpha" in str(caught.value)) == override


def test_the_alpha_of_rslora_is_the_one_that_was_typed(tmp_path):
    """Files record the numerator of the scale, alpha times the root of the rank."""
    numerator = 32 * 4**0.5
    saved(tmp_path / "run", 0, 1, alpha=numerator)
    words = [f"args.load={tmp_path / 'run'}", "args.input_file=none.txt", f"{LORA}.params.r=4"]
    words += [f"{LORA}.params.rank_stabilized=true", f"{LORA}.params.layer_range=[0,1]"]
    config = load_config([Path("configs/cogvideox_5b_lora.yaml")], words, mode="inference")
    params = lora_of(with_adapters(config))
    assert (params["lora_alpha"], scale_numerator(params)) == (32, numerator)
    typed = [*words, f"{LORA}.params.lora_alpha=8"]
    with pytest.raises(ConfigError, match=r"is 8, but the adapters .* were trained with 32.0\n.*lora_alpha=32.0"):
        with_adapters(load_config([Path("configs/cogvideox_5b_lora.yaml")], typed, mode="inference"))


def test_training_describes_its_adapters(load):
    assert describe_adapters(load(f"args.load={BASE}")) is None
    config = load(f"args.load={BASE}", lora={"r": 4, "lora_alpha": 2, "layer_range": [1]})
    assert describe_adapters(config) == info(1)
    assert describe_adapters(load(f"args.load={BASE}", lora={"r": 4})) == info(0, 1, alpha=1)
    with pytest.raises(InputError, match="args.load is null"):
        describe_adapters(load("args.load=null", lora={"r": 4}))


def test_training_that_continues_adapters_keeps_their_base(load, tmp_path):
    saved(tmp_path / "run", 0, 1)
    config = load(f"args.load={tmp_path / 'run'}", lora={"r": 4, "lora_alpha": 2})
    assert describe_adapters(config) == info(0, 1)
    moved = dataclasses.replace(config, args=dataclasses.replace(config.args, base=str(BASE / "1000")))
    assert describe_adapters(moved) == info(0, 1, base=BASE / "1000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "many"}, "has rank='many'"),
        ({"rank": 0}, "has rank 0 and alpha"),
        ({"alpha": float("nan")}, "has rank 4 and alpha nan, expected numbers"),
        ({"layers": [0, "x"]}, r"has layers\.1='x'"),
        ({"base": 3}, "has base=3"),
    ],
)
def test_a_description_with_other_values_is_refused(change, message):
    entry = AdapterInfo(rank=4, alpha=2.0, layers=(0, 1), base="b", base_digest="0").to_entry()
    assert AdapterInfo.from_entry(entry, Path("x")).layers == (0, 1)
    with pytest.raises(InputError, match=rf"x: its entry 'lora' {message}.*save the adapters anew"):
        AdapterInfo.from_entry(entry | change, Path("x"))
