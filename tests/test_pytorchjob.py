"""The Kubernetes manifest: its fields, and that its command is one of this project's that passes its checks."""

from pathlib import Path

import pytest
import yaml

from sgm.config.load import load_config
from sgm.training.main import parse

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spec():
    text = (ROOT / "scripts" / "finetune_pytorchjob.yaml").read_text(encoding="utf-8")
    (manifest,) = yaml.safe_load_all(text)
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
    monkeypatch.chdir(ROOT)
    options = parse(container["args"][1:])
    args = load_config(options.base, options.overrides, mode="train").args
    assert args.resume == "auto" and args.async_save
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    shared = places[0]
    assert args.save.startswith(shared) and all(path.startswith(shared) for path in args.train_data)
    assert any(f"{container['workingDir']}/{args.load}".startswith(place) for place in places)
