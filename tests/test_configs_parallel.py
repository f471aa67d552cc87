"""The files of configs/parallel: they load with every model, and are legal for the number of processes they state."""

import re
from pathlib import Path

import pytest

from sgm.checks.mesh import check_mesh, mesh_of
from sgm.checks.sampling_plan import check_sampling
from sgm.config.load import load_config
from sgm.modules.geometry import Geometry
from tests.processes import ROOT
from tests.test_configs_shipped import MODELS

PRESETS = {path.stem: path for path in sorted((ROOT / "configs" / "parallel").glob("*.yaml"))}
SAMPLING = [name for name in PRESETS if name.startswith("sample_")]
TRAINING = [name for name in PRESETS if name.startswith("train_")]


def load(model: str, preset: str):
    mode = "inference" if preset in SAMPLING else "train"
    own = f"{'toy_' if model.startswith('toy') else ''}{'inference' if preset in SAMPLING else 'sft'}"
    # The model without a fixed size needs a clip size.
    size = ["data.params.video_size=[768,1360]"] if model.startswith("cogvideox1.5_5b_i2v") and own == "sft" else []
    files = [ROOT / "configs" / f"{name}.yaml" for name in (model, own, f"parallel/{preset}")]
    return load_config(files, size, mode=mode)


def patches_of(config) -> int:
    geometry = Geometry.from_network(config.model["network_config"]["params"])
    if config.mode == "inference":
        plan = check_sampling(config.args, geometry)
        return geometry.num_patches(plan.latents, plan.size or geometry.nearest_size(768, 1360))
    params = config.data["params"]
    return geometry.num_patches((params["max_num_frames"] - 1) // 4 + 1, params["video_size"])


def test_the_files_are_those_of_the_document():
    document = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    assert len(SAMPLING) + len(TRAINING) == len(PRESETS) >= 5
    assert [name for name in PRESETS if f"{name}.yaml" not in document] == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_fits_every_model(model, preset, monkeypatch):
    config = load(model, preset)
    assert config.warnings == ()
    ranks = int(preset.rpartition("_")[2])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    mesh = mesh_of(config)
    assert mesh.network == mesh.context == ranks
    assert check_mesh(config, num_patches=patches_of(config)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_in_a_file_is_right(preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    ((processes, script, files),) = re.findall(
        r"^#   NPROC_PER_NODE=(\d+) bash (\S+) (.*)$", PRESETS[preset].read_text(), flags=re.MULTILINE
    )
    bases = files.split()
    assert Path(script).is_file() and bases[-1] == f"configs/parallel/{preset}.yaml"
    config = load_config(bases, mode="inference" if preset in SAMPLING else "train")
    assert config.warnings == ()
    assert int(processes) % mesh_of(config).ranks == 0
