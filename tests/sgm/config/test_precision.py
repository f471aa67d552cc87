from types import SimpleNamespace

import pytest
import torch

from sgm.checks.sampling import cudnn_row
from sgm.config.args import SamplingArgs
from sgm.config.load import ConfigError
from sgm.config.precision import conv3d_fault, resolve_training_precision


def resolve(precision, device="accelerator", *, args=None, **deepspeed):
    model = {} if precision is None else {"precision": precision}
    sections = {name: {"enabled": enabled} for name, enabled in deepspeed.items()}
    config = SimpleNamespace(args=SamplingArgs(**(args or {})), model=model, deepspeed=sections)
    return resolve_training_precision(config, device)


@pytest.mark.parametrize(
    ("precision", "flags", "expected"),
    [
        ("bf16", {}, torch.bfloat16),
        ("fp16", {}, torch.float16),
        ("fp32", {}, torch.float32),
        (None, {}, torch.float32),
        (None, {"bf16": True}, torch.bfloat16),
        ("bf16", {"bf16": True, "fp16": False}, torch.bfloat16),
        ("bf16", {"bf16": None}, torch.bfloat16),
        ("fp32", {"bf16": True}, torch.bfloat16),
        ("fp16", {"bf16": False, "fp16": False}, torch.float32),
        ("bf16", {"bf16": False, "fp16": False}, torch.float32),
        ("bf16", {"args": {"bf16": True}, "bf16": True}, torch.bfloat16),
        ("fp16", {"args": {"fp16": False}}, torch.float32),
    ],
)
def test_training_precision(precision, flags, expected):
    assert resolve(precision, **flags) is expected


@pytest.mark.parametrize(
    ("precision", "flags", "path", "text"),
    [
        ("bf16", {"fp16": True}, "deepspeed.fp16.enabled", "black video"),
        ("fp16", {"bf16": True, "fp16": False}, "deepspeed.bf16.enabled", "remove deepspeed.bf16.enabled"),
        ("fp16", {"args": {"bf16": True}}, "args.bf16", "coarser mantissa"),
        ("bf16", {"args": {"bf16": True}, "bf16": False}, "args.bf16", "but deepspeed.bf16.enabled is false"),
        (None, {"args": {"bf16": True}, "fp16": True}, "deepspeed.fp16.enabled", "keep args.bf16=true only"),
    ],
)
def test_contradicting_precisions_are_refused(precision, flags, path, text):
    with pytest.raises(ConfigError) as caught:
        resolve(precision, **flags)
    assert [problem.path for problem in caught.value.problems] == [path]
    assert text in str(caught.value)


def test_a_cpu_cannot_train_in_fp16():
    with pytest.raises(ConfigError, match="a CPU cannot do\n.*set args.fp16=false"):
        resolve("fp16", "cpu")
    assert resolve("fp16", "cpu", args={"fp16": False}) is torch.float32
    with pytest.raises(ConfigError, match="set deepspeed.fp16.enabled=false"):
        resolve("fp16", "cpu", fp16=True)


@pytest.mark.parametrize(
    ("cudnn", "dtype", "version"),
    [
        (None, torch.bfloat16, None),
        (90701, torch.bfloat16, None),
        (90800, torch.bfloat16, "9.8.0"),
        (91002, torch.bfloat16, "9.10.2"),
        (91002, torch.float16, "9.10.2"),
        (91002, torch.float32, None),
        (91400, torch.bfloat16, "9.14.0"),
        (91500, torch.bfloat16, None),
        (8907, torch.bfloat16, None),
    ],
)
def test_versions_of_cudnn_with_faulty_3d_convolutions_are_named(monkeypatch, cudnn, dtype, version):
    fault = conv3d_fault(cudnn, dtype)
    assert (fault is None) == (version is None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    row = cudnn_row(dtype, torch.device("cuda", 0))
    assert cudnn_row(dtype, torch.device("cpu")) == {}
    if version is not None and dtype is torch.bfloat16:
        assert f"cuDNN {version} " in fault and "9.15 or newer" in row["warning"]
