"""Sampling with weights in eight bits or waiting on the host: the results, the phases, and what is refused."""

import functools
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sgm.inference.main import main
from sgm.models.video_diffusion import SATVideoDiffusionEngine
from sgm.modules import GeneralConditioner
from sgm.weights import read_ahead
from sgm.weights.offload import Offload
from sgm.weights.quantize import num_bytes


@pytest.fixture
def sample(tiny_model, tmp_path, capsys):
    """Return a function: overrides → (exit code, latents or None, message, sidecar or None)."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def sample(*words: str):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        given = [f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={out}", "args.only_save_latents=true"]
        code = main(["--base", str(tiny_model("dit_t2v_2b")), *given, *words])
        files, said = list(out.glob("*/0/000000.*")), capsys.readouterr()
        latents = [load_file(path)["latents"] for path in files if path.suffix == ".safetensors"]
        records = [json.loads(path.read_text()) for path in files if path.suffix == ".json"]
        return code, *(found[0] if found else None for found in (latents, records)), said.out + said.err

    return sample


def test_offloaded_weights_give_the_same_bits(sample):
    _, plain, record, _ = sample()
    for words in (["network_offload=cpu", "text_encoder_offload=cpu"], ["network_offload=blocks"], []):
        code, latents, own, said = sample(*(f"args.{word}" for word in words), "args.text_encoder_offload=blocks")
        assert code == 0 and torch.equal(latents, plain)
        assert own["config_digest"] == record["config_digest"], "results of one setting serve the others"
        assert ("memory to memory on a CPU" in said) == bool(words)


@pytest.mark.thorough
def test_compiling_serves_all_steps_and_both_branches_of_guidance(sample, monkeypatch):
    import torch._dynamo  # lazy: torch's compiler

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _, plain, _, _ = sample()
    code, latents, _, _ = sample("args.compile=true", "args.network_offload=blocks")
    assert code == 0 and F.cosine_similarity(latents.flatten(), plain.flatten(), 0) > 0.99999
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


def test_the_network_is_read_while_the_text_encoder_works(sample, monkeypatch):
    events, was_read = [], threading.Event()
    read, encode, load = (
        read_ahead._read,
        GeneralConditioner.get_unconditional_conditioning,
        SATVideoDiffusionEngine.load_weights,
    )

    def reading(files, stop):
        read(files, stop)
        events.append(f"read {[file.name for file in files]}")
        was_read.set()

    def encoding(*args, **kwargs):
        assert was_read.wait(60), "another thread reads, and was started before"
        events.append("encoded")
        return encode(*args, **kwargs)

    def loading(*args, **kwargs):
        events.append("loading")
        return load(*args, **kwargs)

    monkeypatch.setattr(read_ahead, "_available", lambda: 2**40)
    monkeypatch.setattr(read_ahead, "_read", reading)
    monkeypatch.setattr(GeneralConditioner, "get_unconditional_conditioning", encoding)
    monkeypatch.setattr(SATVideoDiffusionEngine, "load_weights", loading)
    assert sample()[0] == 0
    assert (
        events[0] == "read ['mp_rank_00_model_states.safetensors']" and events[-1] == "loading" and "encoded" in events
    )


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_eight_bits_are_recorded_and_close(sample, storage):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")
    _, plain, record, _ = sample()
    words = [f"args.weights={storage}", f"args.text_encoder_weights={storage}", "args.network_offload=blocks"]
    code, latents, own, said = sample(*words)
    assert code == 0 and F.cosine_similarity(latents.flatten(), plain.flatten(), 0) > 0.999
    assert not torch.equal(latents, plain)
    assert own["weights"] == own["text_encoder_weights"] == storage and "weights" not in record
    assert own["config_digest"] != record["config_digest"]
    assert f"; 10 linear layers in {storage} (" in said and f"T5: 7 linear layers in {storage} (" in said


@pytest.mark.parametrize("offload", ["cpu", "blocks"])
def test_the_network_has_left_before_the_vae_decodes(sample, monkeypatch, offload):
    sizes, decode, enter = [], SATVideoDiffusionEngine.decode_each, Offload.__enter__

    def copies(network):  # bytes of parameters that are no tensor of the host
        return num_bytes([network]) - sum(p.nbytes for p in network.parameters() if id(p) in host)

    def entered(self):
        result = enter(self)
        sizes.append("in")
        return result

    def decoded(engine, *args):
        sizes.append(copies(engine.network))
        return decode(engine, *args)

    host: set[int] = set()
    keep = SATVideoDiffusionEngine.load_weights

    def loaded(engine, *args, **kwargs):
        report = keep(engine, *args, **kwargs)
        host.update(map(id, engine.network.parameters()))
        return report

    monkeypatch.setattr(SATVideoDiffusionEngine, "load_weights", loaded)
    monkeypatch.setattr(SATVideoDiffusionEngine, "decode_each", decoded)
    monkeypatch.setattr(Offload, "__enter__", entered)
    assert sample(f"args.network_offload={offload}", "args.only_save_latents=false")[0] == 0
    assert sizes == ["in", 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["weights=int8", "model_parallel_size=2"],
            "args.weights (command line: args.weights=int8): is int8, and model",
        ),
        (["weights=int4"], "one of int8, fp8"),
        (["network_offload=disk"], "one of none, cpu, blocks"),
    ],
)
def test_what_is_refused(sample, words, said):
    code, latents, _, found = sample(*(f"args.{word}" for word in words))
    assert code == 2 and latents is None and said in found


def test_what_is_not_installed_is_refused_before_anything_is_loaded(sample, monkeypatch):
    monkeypatch.setattr("sgm.weights.quantize._is_installed", lambda package: False)
    code, _, _, said = sample("args.weights=fp8", "--check")
    assert code == 2 and "args.weights (command line: args.weights=fp8)" in said and "[lowmem]" in said


def test_foreign_networks_and_encoders_are_refused(sample, monkeypatch):
    monkeypatch.delattr("dit_video_concat.DiffusionTransformer.blocks")
    code, _, _, said = sample("args.weights=fp8", "--check")
    assert code == 2 and "args.weights" in said and "DiffusionTransformer has no property blocks" in said
