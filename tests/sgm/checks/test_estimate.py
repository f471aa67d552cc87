"""The formulas of memory and traffic against tensors that are counted, and what is said by --check."""

import inspect
import json
import re
from dataclasses import replace

import pytest
import torch

from sgm.checks.estimate import Autoencoder, Network, bytes_per_rank
from sgm.checks.estimate_run import mesh_row, parameters, sampling_rows, training_estimate, training_rows
from sgm.checks.sampling import as_table
from sgm.config.load import load_config
from sgm.distributed import Mesh
from sgm.util import without_allocating
from sgm.weights.partition import Shard, take_shard
from tests.processes import ROOT, run
from tests.sgm.checks.live_bytes import BATCH, LATENTS, TEXT, LiveBytes, inputs, make_network, make_vae, saved_bytes
from tools import parallel_table

DOCUMENT = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
KNOWN = Network(
    text=TEXT,
    patches=LATENTS[0] * LATENTS[2] * LATENTS[3] // 4,
    hidden=384,
    layers=2,
    recomputed=0,
    rotary=True,
    adapter_rank=0,
    outputs=4 * LATENTS[1],
    text_size=256,
    width=4,
    ring=False,
    mesh=Mesh(),
)
LORA = {"model": "cogvideox_5b_lora"}


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch):
    """DeepSpeed's ZeRO 3 puts a function in its place, for all networks of the process, that keeps other tensors."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def test_the_formula_stands_in_the_document():
    assert f"```python\n{inspect.getsource(bytes_per_rank)}```" in DOCUMENT


@pytest.mark.parametrize(("stage", "expected"), [(0, 12), (1, 26 / 3), (2, 22 / 3), (3, 16 / 3)])
def test_weights_and_optimizer_in_float32(stage, expected):
    """What tests/sgm/training/zero_costs.py counts on three ranks with a network in float32, half of it trained."""
    assert bytes_per_rank(1, 0.5, 3, stage, ema=True, width=4)[0] == pytest.approx(expected)


@pytest.mark.parametrize("kwargs", [{"hidden": 384}, {"hidden": 512, "layers": 3}, LORA, {"model": "cogvideox_2b"}])
def test_what_is_saved_for_the_backward_pass(kwargs):
    lora = "lora" in kwargs.get("model", "")
    sizes = {name: kwargs.get(name, getattr(KNOWN, name)) for name in ("hidden", "layers")}
    known = replace(KNOWN, **sizes, adapter_rank=16 * lora, rotary=kwargs.get("model") != "cogvideox_2b")
    assert known.saved_bytes(BATCH) == pytest.approx(saved_bytes(make_network(**kwargs), *inputs()), rel=0.05)


@pytest.mark.slow
def test_what_a_network_as_wide_as_the_5b_saves():
    """Two of its blocks, 350 tokens of two samples."""
    found = saved_bytes(make_network(hidden=3072), *inputs())
    assert replace(KNOWN, hidden=3072).saved_bytes(BATCH) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("recomputed", [0, 4])
@pytest.mark.parametrize("model", ["cogvideox_5b", "cogvideox_5b_lora"])
def test_the_most_of_a_forward_and_backward_pass(model, recomputed):
    """Gradients of weights are dropped as they come: they are counted with the weights."""
    network = make_network(model=model, layers=4)
    network.get_mixin("adaln_layer").recomputed_layers = recomputed
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        network(*inputs()).sum().backward()
    known = replace(KNOWN, layers=4, recomputed=recomputed, adapter_rank=16 * ("lora" in model))
    assert 0.9 <= live.peak / known.backward_bytes(BATCH) <= 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["cogvideox_2b", "cogvideox_5b"])
def test_the_most_of_a_forward_pass_alone(model, dtype):
    network = make_network(model=model, dtype=dtype)
    with torch.no_grad(), LiveBytes() as live:
        network(*inputs(dtype))
    known = replace(KNOWN, rotary=model == "cogvideox_5b", width=dtype.itemsize)
    assert 0.9 <= live.peak / known.forward_bytes(BATCH) <= 1.1


# The VAE, of the released channels and on the meta device, which holds no numbers


def released_vae(**kwargs) -> Autoencoder:
    given = {"channels": (128, 256, 256, 512), "blocks": 3, "latent_channels": 16, "parameters": 0, "width": 4}
    return Autoencoder(**given | {"size": (96, 160), "ranks": 1, "encode_chunk": None} | kwargs)


def live_of_vae(method: str, *shape: int, **params) -> int:
    with without_allocating():
        vae = make_vae(channels=128, **params)
    with torch.no_grad(), LiveBytes() as live:
        getattr(vae, method)(torch.empty(shape, device="meta"))
    return live.peak


@pytest.mark.parametrize("latents", [1, 2, 3, 8])
def test_the_most_of_decoding(latents):
    found = live_of_vae("decode", 1, 16, latents, 12, 20)
    assert released_vae().decode_bytes(latents) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(("frames", "chunk"), [(1, None), (17, None), (17, 8)])
def test_the_most_of_encoding(frames, chunk):
    found = live_of_vae("encode", 1, 3, frames, 96, 160, encode_chunk=chunk)
    assert released_vae(encode_chunk=chunk).encode_bytes(frames) == pytest.approx(found, rel=0.05)


# What two ranks that share a sample send, and hold


@pytest.fixture(scope="session")
def counted():
    done = run("tests/sgm/checks/estimate_ranks.py", [], 2)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


SHARED = {
    "Ulysses": replace(KNOWN, mesh=Mesh(sequence=2)),
    "ring": replace(KNOWN, mesh=Mesh(sequence=2), ring=True),
    "layers": replace(KNOWN, mesh=Mesh(tensor=2)),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_ranks_of_a_sample_send(counted, case):
    """Gradients of the norms of queries and keys are summed as well, a few numbers."""
    forward = SHARED[case].traffic(BATCH, trains=False)
    training = replace(SHARED[case], recomputed=2).traffic(BATCH, trains=True)
    assert sum(forward.values()) == pytest.approx(counted[case]["sent"], rel=0.01)
    assert sum(training.values()) == pytest.approx(counted[case]["sent in training"], rel=0.01)


@pytest.mark.parametrize("case", SHARED)
def test_what_ranks_of_a_sample_hold(counted, case):
    assert SHARED[case].saved_bytes(BATCH) == pytest.approx(counted[case]["saved"], rel=0.05)
    assert 0.85 <= counted[case]["forward"] / SHARED[case].forward_bytes(BATCH) <= 1.1


def test_what_the_branches_of_guidance_send(counted):
    sent = replace(KNOWN, mesh=Mesh(cfg=2)).traffic(BATCH, trains=False)
    assert sent == {"guidance": counted["guidance"]["sent"]}


def test_what_ranks_of_a_video_send(counted):
    """Rank zero of two, three chunks: it sends two times to its neighbour; pictures go to it."""
    vae = released_vae(channels=(32, 64, 64, 128), size=(32, 32), ranks=2)
    assert 0.9 <= counted["VAE"]["sent"] / vae.decode_traffic(6, 1) <= 1


@pytest.mark.parametrize("model", ["cogvideox_5b", "cogvideox_5b_lora"])
def test_the_parameters_of_a_rank(model):
    network = make_network(model=model)
    own = {name: take_shard(name, p, Shard(1, 2)).numel() for name, p in network.named_parameters()}
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert parameters(network, 2, trained) == (sum(own.values()), sum(own[name] for name in trained))


# What --check prints

TOY = ["configs/toy.yaml", "configs/toy_inference.yaml"]


def test_without_a_launcher_the_number_of_processes_may_be_given(monkeypatch):
    assert mesh_row(Mesh()) == "1 process"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert mesh_row(Mesh()) == "8 processes, 8 samples at a time"
    mesh = Mesh(sequence=2, cfg=2, context=4)
    shared = "8 processes, 2 samples at a time, each shared by 4 (tokens by 2, guidance by 2, VAE by 4)"
    assert mesh_row(mesh) == shared


def test_the_rows_of_sampling(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    one = sampling_rows(load_config(TOY, mode="inference"), torch.float32)
    overrides = ["args.cfg_parallel_size=2", "args.sequence_parallel_size=2"]
    overrides += ["model.first_stage_config.params.cp_size=4"]
    four = sampling_rows(load_config(TOY, overrides, mode="inference"), torch.float32)
    assert one["ranks"] == "4 processes, 4 samples at a time" and "traffic" not in one
    assert four["traffic"].startswith("estimated for a rank and step: tokens ") and "guidance" in four["traffic"]
    assert four["traffic"].endswith("MB per video")
    assert all(row["memory"].startswith("estimated ") and "text encoder" in row["memory"] for row in (one, four))


def test_a_class_of_ones_own_is_not_estimated():
    config = load_config(TOY, mode="inference")
    config.model["network_config"]["target"] = "mine.Network"
    assert sampling_rows(config, torch.float32)["memory"].startswith("not estimated: model.network_config.target")


def training(*overrides: str, bases=("toy", "toy_sft")):
    return load_config([ROOT / "configs" / f"{base}.yaml" for base in bases], overrides, mode="train")


def test_the_rows_of_training(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = training_rows(training(), torch.float32, ["time_embed.0.weight"])
    assert rows["ranks"] == "2 processes, 2 samples at a time"
    assert rows["traffic"].startswith("estimated for a rank and step: ZeRO ")
    config = training()
    del config.data["params"]["video_size"]
    open_size = training_rows(config, torch.float32, [])
    assert open_size["memory"].startswith("not estimated: data.params")


def test_what_comes_from_caches_takes_no_memory():
    def phases(*overrides, **loaded):
        trained = ["time_embed.0.weight"]
        return training_estimate(training(*overrides), torch.float32, trained, **loaded).phases

    neither, cache = {"vae": False, "text_encoder": False}, "args.text_cache=here"
    assert set(phases()) == {"the network", "the VAE"}
    assert set(phases(cache, **neither)) == {"the network"}
    assert set(phases(cache, vae=False)) == {"the network", "the text encoder"}, "loaded for evaluation, and released"
    without = phases(cache, **neither)["the network"]
    assert phases()["the network"] == without | {
        "VAE": phases()["the network"]["VAE"],
        "text encoder": phases()["the network"]["text encoder"],
    }
    assert without["text encoder"] == 0 < phases()["the network"]["text encoder"]


def test_offloading_moves_memory_to_the_machine(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    zero = "deepspeed.zero_optimization"
    stage3 = f"{zero}.stage=3"
    optimizer = f"{zero}.offload_optimizer.device=cpu"
    both = [optimizer, f"{zero}.offload_param.device=cpu"]
    state = "weights, gradients, optimizer"
    found = [
        training_estimate(training(stage3, *more), torch.bfloat16, ["time_embed.0.weight"])
        for more in ([], [optimizer], both)
    ]
    on_device = [estimate.phases["the network"][state] for estimate in found]
    assert found[0].machine == 0 < found[1].machine < found[2].machine
    assert on_device[0] > on_device[1] > on_device[2] == 0
    assert found[1].machine + on_device[1] == found[2].machine


# The tables of the document


def document_rows(mode: str):
    return [pytest.param(mode, case, id=f"{case[0]} on {case[1]}") for case in parallel_table.ROWS[mode]]


def check_row(mode, case, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is put back
    assert f"{parallel_table.row(mode, *case)}\n" in DOCUMENT


@pytest.mark.parametrize(("mode", "case"), [document_rows("inference")[7], document_rows("train")[9]])
def test_two_rows_of_the_document(mode, case, monkeypatch):
    check_row(mode, case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "case"), [*document_rows("inference"), *document_rows("train")])
def test_the_tables_of_the_document(mode, case, monkeypatch):
    check_row(mode, case, monkeypatch)


def test_the_tables_have_the_rows_of_the_program():
    shown = re.findall(r"^\| ([^|]+) \| (\d+) \| ([^|]*) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", DOCUMENT, re.MULTILINE)
    cases = [case for mode in parallel_table.ROWS for case in parallel_table.ROWS[mode]]
    assert [(model, int(devices)) for model, devices, _ in shown] == [case[:2] for case in cases]


def test_the_rows_of_the_document_are_those_of_check(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parallel_table.config_of("5B", ("parallel/sample_8",), "inference")
    assert as_table(sampling_rows(config, torch.bfloat16)) in DOCUMENT
