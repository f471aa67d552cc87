from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgm.config.args import SamplingArgs
from sgm.inference.record import clock, content_of, contents
from sgm.util import InputError


def test_times_are_taken_when_the_device_has_finished(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("synchronized"))
    assert clock() <= clock() and len(calls) == 2


def test_contents_name_every_file_that_decides_samples(tmp_path):
    weights, vae, t5, clip = (tmp_path / name for name in ("weights.pt", "vae.pt", "t5", "clip.mp4"))
    t5.mkdir()
    files = {"load": weights, "base": weights, "video": clip, "model.first.params.ckpt_path": vae}
    files["model.emb_models[0].params.model_dir"] = t5 / "model.safetensors"
    for path in files.values():
        path.write_bytes(b"one")
    args = SamplingArgs(load=str(weights), base=str(weights), video=str(clip))
    model = {"first": {"params": {"ckpt_path": str(vae)}}, "emb_models": [{"params": {"model_dir": str(t5)}}]}
    config: Any = SimpleNamespace(args=args, model=model)
    with pytest.raises(InputError, match="none.pt cannot be read .No such file .*needed for sampling"):
        content_of(tmp_path / "none.pt")
    before = contents(config)
    assert set(before) == set(files)
    for key, path in files.items():
        path.write_bytes(key.encode())
        after = contents(config)
        assert {name for name in before if before[name] != after[name]} == {k for k, v in files.items() if v == path}
        before = after
