"""Sampling with the training model in memory: the model is unchanged, and ranks stay synchronised."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from sgm.config.load import load_config
from sgm.inference import run as run_module
from sgm.inference.prompts import Prompt
from sgm.inference.run import SamplingRun
from sgm.util import RunError, instantiate_from_config

PROMPTS = [Prompt(index, text) for index, text in enumerate(["a red circle", "a blue square", "a green triangle"])]


@pytest.fixture
def config(tiny_model, tmp_path):
    given = ["args.input_type=cli", "args.only_save_latents=true", "args.device=cpu", f"args.output_dir={tmp_path}"]
    return load_config([tiny_model("dit_t2v_2b")], given, mode="inference")


@pytest.fixture
def engine(config):
    engine = instantiate_from_config(config.engine)
    engine.load_weights(config.args.load, dtype=torch.float32, device=torch.device("cpu"))
    engine.load_first_stage(dtype=torch.float32, device=torch.device("cpu"))
    return engine


@pytest.fixture
def count_passes(engine, monkeypatch):
    """Count the passes of the sampler."""
    passes, sample = [], engine.sample
    monkeypatch.setattr(engine, "sample", lambda *a, **kw: passes.append(len(kw["generators"])) or sample(*a, **kw))
    return passes


def latents(folder: Path) -> dict[str, bytes]:
    return {path.parts[-3]: path.read_bytes() for path in sorted(folder.glob("*/*/000000.safetensors"))}


def on_rank(monkeypatch, rank: int, size: int) -> None:
    monkeypatch.setattr(run_module.sgm.distributed, "data_parallel_rank", lambda: rank)
    monkeypatch.setattr(run_module.sgm.distributed, "data_parallel_size", lambda: size)


def with_args(config, **values):
    return dataclasses.replace(config, args=dataclasses.replace(config.args, **values))


def test_a_model_in_memory_gives_the_samples_of_its_file(config, engine, tmp_path):
    SamplingRun(with_args(config, output_dir=str(tmp_path / "file"))).sample_list(PROMPTS)
    without_file = with_args(config, output_dir=str(tmp_path / "memory"), load=None)
    run = SamplingRun(without_file, engine=engine, digest="of the training")
    run.sample_list(PROMPTS)
    assert latents(tmp_path / "memory") == latents(tmp_path / "file")
    assert len(run.summary.written) == 3
    sidecar = json.loads(run.summary.written[0].with_suffix(".json").read_text())
    assert sidecar["config_digest"] == "of the training" and sidecar["precision"] == "float32"


def test_a_model_in_memory_is_not_modified(config, engine, monkeypatch):
    for owner, name in (
        (engine, "load_weights"),
        (engine, "load_first_stage"),
        (run_module, "instantiate_from_config"),
    ):
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("the model is in memory"))
    (embedder,) = engine.conditioner.embedders
    embedder.offload = "cpu"
    engine.first_stage_model.slicing = engine.first_stage_model.tiling = marker = object()
    engine.network.train()
    parameters = [(parameter, parameter.clone()) for parameter in engine.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run = SamplingRun(with_args(config, vae_tiling=True, text_encoder_offload="release"), engine=engine, digest="x")
    run.sample_list(PROMPTS[:1])
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of training have moved on"
    assert embedder.offload == "cpu" and embedder.is_loaded and engine.network.training
    assert engine.first_stage_model.slicing is engine.first_stage_model.tiling is marker
    assert all(parameter is again for (parameter, _), again in zip(parameters, engine.parameters(), strict=True))
    assert all(torch.equal(parameter, copy) and parameter.grad is None for parameter, copy in parameters)


def test_videos_are_decoded_without_touching_random_numbers(config, engine):
    state = torch.get_rng_state()
    run = SamplingRun(with_args(config, only_save_latents=False), engine=engine, digest="x")
    run.sample_list(PROMPTS[:1])
    assert run.summary.written[0].suffix == ".mp4" and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("num", "size"), [(3, 2), (1, 3), (2, 2)])
def test_ranks_in_step_sample_equally_often(config, engine, count_passes, monkeypatch, tmp_path, num, size):
    counts, written = [], []
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        run = SamplingRun(with_args(config, output_dir=str(tmp_path / "step"), batch_size=2), engine=engine, digest="x")
        run.sample_list(PROMPTS[:num], in_step=True)
        counts.append(len(count_passes))
        count_passes.clear()
        written += run.summary.written
    assert set(counts) == {-(-num // size)}
    assert len(written) == len(set(written)) == 2 * num, "each sample is written once"


def test_in_step_does_not_look_at_what_is_finished(config, engine, count_passes):
    for _ in range(2):
        SamplingRun(config, engine=engine, digest="x").sample_list(PROMPTS[:2], in_step=True)
    assert count_passes == [1, 1, 1, 1]
    SamplingRun(config, engine=engine, digest="x").sample_list(PROMPTS[:2])
    assert len(count_passes) == 4, "out of step, finished samples are skipped"


def test_a_failure_in_step_waits_for_the_last_pass(config, engine, count_passes, monkeypatch):
    def fail(path, latents):
        raise RunError(f"disk full at {path.parts[-3]}")

    monkeypatch.setattr(run_module, "write_latents", fail)
    with pytest.raises(RunError, match="disk full at 0_a_red_circle"):
        SamplingRun(config, engine=engine, digest="x").sample_list(PROMPTS, in_step=True)
    assert len(count_passes) == 3
    with pytest.raises(RunError, match="disk full"):
        SamplingRun(config, engine=engine, digest="x").sample_list(PROMPTS)
    assert len(count_passes) == 4


def test_the_negative_prompt_is_encoded_once(config, engine, monkeypatch):
    (embedder,) = engine.conditioner.embedders
    texts, tokenize = [], embedder.tokenize
    monkeypatch.setattr(embedder, "tokenize", lambda batch: texts.extend(batch) or tokenize(batch))
    SamplingRun(with_args(config, negative_prompt="square"), engine=engine, digest="x").sample_list(PROMPTS)
    assert sorted(texts) == sorted([*(prompt.text for prompt in PROMPTS), "square"])
