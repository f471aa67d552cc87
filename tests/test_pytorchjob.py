"""The Kubernetes manifest: its fields, and that its command is one of this project's that passes its checks.

``tests/data/pytorchjob_fields.json`` has names and types of the fields of a PyTorchJob at the places that the manifest
uses, from the definition (CRD) of Kubeflow's training operator 1.9.0; required ones end with an exclamation mark.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgm.config.load import load_config
from sgm.training.main import parse

ROOT = Path(__file__).parents[1]


TYPES = {"string": str, "integer": int, "boolean": bool, "array": list, "object": dict, "int-or-string": (int, str)}


def misfits(value: Any, fields: Any, path: str = "") -> Iterator[str]:
    """Yield the paths at which a value is not what the fields allow."""
    expected = fields if isinstance(fields, str) else "array" if isinstance(fields, list) else "object"
    if not isinstance(value, TYPES[expected]) or (isinstance(value, bool) and expected != "boolean"):
        yield f"{path}: no {expected}"
    elif isinstance(fields, list):
        for number, each in enumerate(value):
            yield from misfits(each, fields[0], f"{path}[{number}]")
    elif isinstance(fields, dict):
        known = {name.removesuffix("!"): each for name, each in fields.items()}
        yield from (f"{path}.{name[:-1]}: missing" for name in fields if name.endswith("!") and name[:-1] not in value)
        for name, each in value.items():
            if name not in known and "*" not in known:
                yield f"{path}.{name}: unknown"
            else:
                yield from misfits(each, known.get(name, known.get("*")), f"{path}.{name}")


@pytest.fixture(scope="module")
def manifest():
    (found,) = yaml.safe_load_all((ROOT / "scripts" / "finetune_pytorchjob.yaml").read_text(encoding="utf-8"))
    return found


def test_its_fields_are_those_of_a_pytorchjob(manifest):
    fields = json.loads((ROOT / "tests" / "data" / "pytorchjob_fields.json").read_text(encoding="utf-8"))
    assert list(misfits(manifest, fields)) == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["elasticPolicy"]["maxRestart"] = wrong["spec"]["elasticPolicy"].pop("maxRestarts")
    pod = wrong["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = "900"
    del pod["containers"][0]["name"]
    pod["volumes"][1]["persistentVolumeClaim"]["claim"] = "x"
    assert [text.rpartition(".")[2] for text in misfits(wrong, fields)] == [
        "maxRestart: unknown",
        "terminationGracePeriodSeconds: no integer",
        "name: missing",
        "claim: unknown",
    ]


@pytest.fixture(scope="module")
def spec(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert manifest["metadata"]["name"]
    return manifest["spec"]


def test_the_replicas_are_those_of_the_elastic_policy(spec):
    (worker,) = spec["pytorchReplicaSpecs"].values()
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert elastic["rdzvBackend"] == "c10d" and elastic["maxRestarts"] == 0
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator sets the variables of this container only"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
    grace = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in env.values())
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


def test_every_mounted_volume_is_there(spec):
    pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


def test_its_command_trains_with_files_and_keys_that_are_there(spec, monkeypatch):
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"] and (ROOT / container["args"][0]).is_file()
    copied = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    (folder,) = {words[-1] for words in copied if container["args"][0] in words}
    assert container["workingDir"] == folder.rstrip("/") and container["image"].startswith("cogvideox:")
    monkeypatch.chdir(ROOT)
    options = parse(container["args"][1:])
    args = load_config(options.base, options.overrides, mode="train").args
    assert args.resume == "auto" and args.async_save
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    shared = places[0]
    assert args.save.startswith(shared) and all(path.startswith(shared) for path in args.train_data)
    assert any(f"{container['workingDir']}/{args.load}".startswith(place) for place in places)
