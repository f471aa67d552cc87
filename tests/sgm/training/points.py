"""A resume point for tests."""

from pathlib import Path

from sgm.training.state import ResumePoint

POINT = ResumePoint(
    run=Path("run"),
    iteration=3,
    samples=12,
    world_size=2,
    zero_stage=0,
    precision="fp32",
    optimizer="AdamW",
    trained=8,
    ema=False,
    base_digest="abc",
    config_digest="def",
    clips="ghi",
    captions="jkl",
    clip_files="mno",
    optimizer_settings={"amsgrad": False, "eps": 1e-8},
    lora_rank=4,
    trained_names="pqr",
)
