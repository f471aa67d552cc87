"""Estimates against tensors counted in real runs, and the output of --check."""

import inspect
import json
import re

import pytest
import torch
from torch import nn

from sgm.checks.estimate import (
    bytes_per_rank,
    rank_row,
    sampling_estimate,
    t5_bytes,
    training_estimate,
)
from sgm.checks.measure import decode_usage, encode_usage, network_usage
from sgm.checks.meta_run import LiveBytes, build, usage
from sgm.checks.planner import sampling_rows, training_rows
from sgm.checks.sampling import as_table
from sgm.config.load import load_config
from sgm.distributed import Mesh
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.weights.checkpoint import load_network
from sgm.weights.quantize import num_bytes
from tests.marks import only, thorough
from tests.processes import ROOT, run
from tests.sgm.checks.live_bytes import (
    BATCH,
    LATENTS,
    ProductsOfZeros,
    inputs,
    make_network,
    network_section,
    trained_names,
    vae_section,
)
from tools import parallel_table

DOCUMENT = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
VIDEO = (LATENTS[0], 8 * LATENTS[2], 8 * LATENTS[3])
TOY = ["configs/toy.yaml", "configs/toy_inference.yaml"]
TOY_TRAINING = ["configs/toy.yaml", "configs/toy_sft.yaml"]


def with_model(*overrides, mode="inference", **sections):
    """The toy's configuration with other model sections."""
    config = load_config(TOY if mode == "inference" else TOY_TRAINING, overrides, mode=mode)
    config.model.update(sections)
    return config


def test_the_formula_stands_in_the_document():
    assert f"```python\n{inspect.getsource(bytes_per_rank)}```" in DOCUMENT


def test_settings_of_memory_are_counted(t5_folder):
    def phases(*settings):
        config = with_model(*(f"args.{setting}" for setting in settings))
        return sampling_estimate(config, torch.bfloat16).phases

    plain, waiting = phases(), phases("network_offload=cpu")
    weights = plain["network"]["weights"]
    assert plain["decode"]["weights"] == weights == waiting["network"]["weights"]
    assert waiting["decode"]["weights"] == 0 and waiting["decode"]["VAE"] == plain["decode"]["VAE"] > 0
    blocks = phases("network_offload=blocks", "text_encoder_offload=blocks", "only_save_latents=true")
    passing = blocks["network"]["blocks in use and activations"] - plain["network"]["activations"]
    assert blocks["network"]["weights"] == 0 and 0.3 * weights < passing < 0.5 * weights  # two of six blocks
    assert blocks["text"]["text encoder"] <= plain["text"]["text encoder"]
    # Two branches of 5·4·4 patches of 128 channels, in bfloat16, four times.
    cached = phases("step_cache=first_block")["network"]
    assert cached == {**plain["network"], "step cache": 4 * 2 * 80 * 128 * 2}
    one_branch = phases("guidance_scale=0", "batch_size=2")["network"]
    assert one_branch == plain["network"], "a scale that is no guidance"


@pytest.mark.parametrize("storage", only(["int8"], ["int8", "fp8"]))
def test_weights_in_eight_bits_are_counted(t5_folder, storage):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")
    config = with_model(f"args.weights={storage}", "args.only_save_latents=true")
    network, _ = _loaded_toy(storage)
    assert sampling_estimate(config, torch.bfloat16).phases["network"]["weights"] == num_bytes([network])
    encoder = FrozenT5Embedder(str(t5_folder), max_length=8, dtype="bf16")
    encoder.storage = storage
    encoder(["a"])
    folder = encoder.folder
    total = sum(file.stat().st_size for file in folder.shards) / (torch.float32.itemsize / torch.bfloat16.itemsize)
    found, counted = t5_bytes(folder.config, total, storage), num_bytes(encoder._loaded)
    assert counted < 0.9 * total and abs(found - counted) < 0.1 * total  # tiny: headers of files weigh


def _loaded_toy(storage):
    section = with_model().model["network_config"]
    return (network := build(section)), load_network(
        network, ROOT / "assets/toy/transformer", dtype=torch.bfloat16, storage=storage
    )


@pytest.mark.parametrize(("stage", "expected"), [(0, 14), (1, 28 / 3), (2, 8), (3, 16 / 3)])
def test_weights_and_optimizer_in_float32(stage, expected):
    """Counts of tests/sgm/training/zero_costs.py on three ranks, for a half-trained float32 network."""
    assert bytes_per_rank(1, 0.5, 3, stage, ema=True, width=4)[0] == pytest.approx(expected)


def test_live_bytes_are_those_of_storages():
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[10:].view(3, 30)
        (view.double() + 1).sum()
        del view
        second = first.half()
    assert live.live == first.nbytes + second.nbytes
    assert live.peak == 400 + 2 * 90 * 8


def test_of_equal_calls_one_is_run_and_all_are_counted():
    """The third call is counted as the second one was, on top of what is live then."""
    peaks, kept, runs = [], [], []

    def work(x):
        runs.append(len(x))
        kept.extend([torch.zeros(10)] * (len(runs) == 1))  # the first call leaves more behind than its result
        return x.double() + 1

    for function in (None, lambda x: x.shape):
        runs.clear(), kept.clear()
        with LiveBytes() as live:
            run = work if function is None else live.once(work, function)
            results = [run(torch.zeros(size)) for size in (100, 100, 100, 50)]
        peaks.append((live.peak, live.live, [made.dtype for made in results]))
        assert runs == ([100, 100, 100, 50] if function is None else [100, 100, 50])
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("model", "dtype", "layers", "recomputed", "keeps"),
    [
        thorough("cogvideox_5b", torch.bfloat16, 4, 4, False),
        ("cogvideox_5b_lora", torch.bfloat16, 4, 4, True),
        thorough("cogvideox_5b_lora", torch.bfloat16, 4, 0, False),
        thorough("cogvideox_5b_lora", torch.float32, 9, 3, False),
        ("cogvideox_2b", torch.float32, 6, 0, False),
    ],
)
def test_the_peak_of_training(model, dtype, layers, recomputed, keeps):
    """All layers in real memory; the estimate measures two and three, or four and five if some are not recomputed."""
    network = make_network(model=model, layers=layers, dtype=dtype)
    network.get_mixin("adaln_layer").recomputed_layers = recomputed
    if keeps:
        network.keep_attention()
    with LiveBytes() as live, ProductsOfZeros():
        network(*inputs(dtype)).float().square().mean().backward()
    section = network_section(model=model, layers=layers)
    options = (f"args.checkpoint_activations={recomputed or 'false'}", f"args.keep_attention={keeps}")
    config = with_model(*options, mode="train", network_config=section)
    found = network_usage(config, VIDEO, BATCH, dtype, trained=trained_names(network))
    assert found.peak == pytest.approx(live.peak, rel=0.05)
    assert found.weights == sum(p.numel() for p in network.parameters())
    assert found.trained == sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.thorough
@pytest.mark.parametrize("recomputed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_activations_in_host_memory_take_none_of_the_device(recomputed):
    section, found = network_section(model="cogvideox_5b_lora", layers=6), {}
    names = frozenset(name for name, _ in build(section).named_parameters() if ".matrix_" in name)
    for offloads in (False, True):
        options = (f"args.checkpoint_activations={recomputed}", f"args.offload_activations={offloads}")
        config = with_model(*options, mode="train", network_config=section)
        found[offloads] = network_usage(config, (13, 256, 384), 1, torch.bfloat16, trained=names)
    assert found[False].host == 0 < found[True].host
    # All that differs from block to block is in host memory.
    config = with_model(*options, mode="train", network_config=network_section(model="cogvideox_5b_lora", layers=7))
    deeper = network_usage(config, (13, 256, 384), 1, torch.bfloat16, trained=names)
    assert deeper.peak - found[True].peak < 0.05 * (deeper.host - found[True].host)


@pytest.mark.parametrize(
    ("model", "dtype"), [thorough("cogvideox_2b", torch.float32), ("cogvideox_5b", torch.bfloat16)]
)
def test_the_peak_of_a_forward_pass(model, dtype):
    network = make_network(model=model, layers=5, dtype=dtype)
    with torch.no_grad(), LiveBytes() as live, ProductsOfZeros():
        network(*inputs(dtype))
    config = with_model(network_config=network_section(model=model, layers=5))
    assert network_usage(config, VIDEO, BATCH, dtype).peak == pytest.approx(live.peak, rel=0.05)


def test_layers_that_differ_are_measured_one_by_one():
    """Adapters on the last two of six layers: a shorter network has none."""
    section = network_section(model="cogvideox_5b_lora", layers=6)
    section["params"]["modules"]["lora_config"]["params"]["layer_range"] = [4, 5]
    names = frozenset(name for name, _ in build(section).named_parameters() if ".matrix_" in name)
    found = network_usage(with_model(network_config=section), VIDEO, BATCH, torch.float32, trained=names)
    assert found.trained == 2 * 2 * 4 * 16 * 384


class Widening(nn.Linear):
    """A module that computes in float32 and copies transposed tensors."""

    def forward(self, x):
        return super().forward(x.float().mT.contiguous().mT.to(x.dtype))


def test_copies_of_another_dtype_and_of_another_layout_are_counted():
    x = torch.empty(64, 1000, dtype=torch.bfloat16, device="meta")
    found = usage(Widening(1000, 1), lambda module: module(torch.empty_like(x)), torch.bfloat16, Mesh())
    assert found.peak == x.nbytes + 2 * 2 * x.nbytes


class Projecting(nn.Linear):
    """Multiplies rows with one weight, twice: a product and a view of it, and the same again in place of the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = super().forward(x)
        second = torch.empty_like(first)
        torch.addcmul(first, first, super().forward(x), out=second)
        return torch.addcmul(first, second, second, out=second.add_(1))


def test_a_call_like_an_earlier_one_takes_as_much_memory():
    x = torch.empty(2, 8, 1000, dtype=torch.bfloat16, device="meta")
    for _ in range(2):  # the second run meets known calls alone
        found = usage(Projecting(1000, 500, bias=False), lambda module: module(x), torch.bfloat16, Mesh())
        assert (found.peak, found.result) == (3 * x.nbytes // 2, x.nbytes // 2)


# The VAE with the released channels, on the meta device


def live_of_vae(method: str, *shape: int, section, **attributes) -> int:
    vae = build(section).bfloat16()
    for name, value in attributes.items():
        setattr(vae, name, value)
    with torch.no_grad(), LiveBytes() as live:
        getattr(vae, method)(torch.empty(shape, device="meta", dtype=torch.bfloat16))
    return live.peak


@pytest.mark.parametrize("latents", only([8], [1, 8]))
def test_the_peak_of_decoding(latents):
    section = vae_section(channels=128)
    found = live_of_vae("decode", 1, 16, latents, 12, 20, section=section)
    config = with_model(first_stage_config=section)
    config.model["network_config"]["params"]["out_channels"] = 16
    assert decode_usage(config, (1, latents, 96, 160), torch.bfloat16).peak == pytest.approx(found, rel=0.05)


@pytest.mark.slow  # the count that it is compared with takes all tiles
def test_the_peak_of_decoding_in_tiles():
    """One tile of each shape is run, and one of the equal chunks of each."""
    section = vae_section(channels=32)
    config = with_model("args.vae_tiling=true", first_stage_config=section)
    config.model["network_config"]["params"]["out_channels"] = 16
    vae = build(section).bfloat16()
    vae.enable_tiling()
    with torch.no_grad(), LiveBytes() as live:
        vae.decode(torch.empty(1, 16, 3, 96, 90, device="meta", dtype=torch.bfloat16))
    assert decode_usage(config, (1, 3, 768, 720), torch.bfloat16).peak == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize(("frames", "chunk"), [(17, None), (17, 8)])
def test_the_peak_of_encoding(frames, chunk):
    section = vae_section(channels=128, encode_chunk=chunk)
    found = live_of_vae("encode_moments", 1, 3, frames, 96, 160, section=section)
    config = with_model(first_stage_config=section)
    assert encode_usage(config, (frames, 96, 160), torch.bfloat16).peak == pytest.approx(found, rel=0.05)


# Traffic and memory of two ranks per sample


@pytest.fixture(scope="session")
def counted():
    done = run("tests/sgm/checks/estimate_ranks.py", [], 2)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


SHARED = {
    "Ulysses": ["args.sequence_parallel_size=2", "args.sequence_attention=ulysses"],
    "ring": ["args.sequence_parallel_size=2", "args.sequence_attention=ring"],
    "layers": ["args.model_parallel_size=2"],
}


@pytest.mark.parametrize("case", SHARED)
def test_what_ranks_of_a_sample_send_and_hold(counted, case):
    section = network_section(layers=3)
    names = trained_names(make_network(layers=3))
    forward = network_usage(with_model(*SHARED[case], network_config=section), VIDEO, BATCH, torch.float32)
    config = with_model(*SHARED[case], "args.checkpoint_activations=true", mode="train", network_config=section)
    training = network_usage(config, VIDEO, BATCH, torch.float32, trained=names)
    assert sum(forward.sent.values()) == pytest.approx(counted[case]["sent"], rel=0.01)
    assert sum(training.sent.values()) == pytest.approx(counted[case]["sent in training"], rel=0.01)
    assert forward.peak == pytest.approx(counted[case]["forward"], rel=0.05)
    assert training.peak == pytest.approx(counted[case]["training"], rel=0.05)


def test_what_the_branches_of_guidance_send(counted):
    config = with_model("args.cfg_parallel_size=2", network_config=network_section())
    assert network_usage(config, VIDEO, 2 * BATCH, torch.float32).sent == {"guidance": counted["guidance"]["sent"]}


def test_what_ranks_of_a_video_send(counted):
    """Rank zero of two, three chunks: it sends two times to its neighbour; pictures go to it."""
    config = with_model(first_stage_config=vae_section(cp_size=2))
    config.model["network_config"]["params"]["out_channels"] = 16
    assert decode_usage(config, (1, 6, 32, 32), torch.float32).sent == {"VAE": counted["VAE"]["sent"]}


# Output of --check


def test_without_a_launcher_the_number_of_processes_may_be_given(monkeypatch):
    assert rank_row(Mesh()) == "1 process"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_row(Mesh()) == "8 processes, 8 samples at a time"
    mesh = Mesh(sequence=2, cfg=2, context=4)
    shared = "8 processes, 2 samples at a time, each shared by 4 (tokens by 2, guidance by 2, VAE by 4)"
    assert rank_row(mesh) == shared


def test_the_rows_of_sampling(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    one = sampling_rows(load_config(TOY, mode="inference"), torch.float32)
    overrides = ["args.cfg_parallel_size=2", "args.sequence_parallel_size=2"]
    overrides += ["model.first_stage_config.params.cp_size=4"]
    four = sampling_rows(load_config(TOY, overrides, mode="inference"), torch.float32)
    assert one["ranks"] == "4 processes, 4 samples at a time" and "traffic" not in one
    assert four["traffic"].startswith("estimated for a rank and step: tokens ") and "guidance" in four["traffic"]
    assert four["traffic"].endswith("MB per video")
    assert all(row["memory"].startswith("estimated ") and "text encoder" in row["  text"] for row in (one, four))
    assert [name for name in one if name.startswith(" ")] == ["  text", "  network", "  decode"]


class OwnVAE(nn.Conv3d):
    """A VAE of another class: nothing but `decode`."""

    def __init__(self, **_):
        super().__init__(4, 3, 1)

    def decode(self, latents):
        return self(latents).repeat_interleave(8, 3).repeat_interleave(8, 4)


class WithoutFakes(OwnVAE):
    """Reads a tensor value, which meta tensors do not have."""

    def decode(self, latents):
        return super().decode(latents * latents.max().item())


def test_another_class_is_estimated_if_it_runs_on_meta_tensors():
    config = load_config(TOY, mode="inference")
    channels = config.model["network_config"]["params"]["out_channels"]
    config.model["first_stage_config"] = {"target": f"{__name__}.OwnVAE"}
    OwnVAE.__init__ = lambda self, **_: nn.Conv3d.__init__(self, channels, 3, 1)
    assert sampling_rows(config, torch.float32)["memory"].startswith("estimated ")
    config.model["first_stage_config"] = {"target": f"{__name__}.WithoutFakes"}
    reason = "not estimated: RuntimeError on meta tensors: Tensor.item() cannot be called on meta tensors"
    assert sampling_rows(config, torch.float32)["memory"] == reason


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
    assert set(phases()) == {"text", "encode", "network", "optimizer", "validation"}
    assert set(phases(cache, **neither)) == {"network", "optimizer", "validation"}
    evaluated = phases(cache, **neither)
    assert evaluated["validation"]["VAE"] == phases()["validation"]["VAE"] > 0 == evaluated["network"].get("VAE", 0)
    assert phases(cache, "args.only_log_video_latents=true", **neither)["validation"]["VAE"] == 0
    first, clips = phases(vae="first frames"), phases()
    assert first.keys() == clips.keys() and 0 < first["encode"]["activations"] < clips["encode"]["activations"] / 2
    assert set(phases(cache, vae=False)) == {"text", "network", "optimizer", "validation"}, (
        "loaded for evaluation, and released"
    )
    without = phases(cache, **neither)["network"]
    assert phases()["network"] == without | {
        "VAE": phases()["network"]["VAE"],
        "text encoder": phases()["network"]["text encoder"],
    }
    assert without["text encoder"] == 0 < phases()["network"]["text encoder"]


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
    on_device = [estimate.phases["network"][state] for estimate in found]
    host = [estimate.host["optimizer"] for estimate in found]
    assert host[0] == 0 < host[1] < host[2]
    assert on_device[0] > on_device[1] > on_device[2] == 0
    assert host[1] + on_device[1] == host[2]


# The tables of the document


def document_rows(mode: str):
    return [pytest.param(mode, case, id=f"{case[0]} on {case[1]}") for case in parallel_table.ROWS[mode]]


def check_row(mode, case, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is put back
    assert f"{parallel_table.row(mode, *case)}\n" in DOCUMENT


@pytest.mark.parametrize(("mode", "case"), [document_rows("inference")[7], document_rows("train")[5]])
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


def test_an_image_to_video_run_holds_the_vae_while_it_encodes_and_decodes():
    config = load_config([f"configs/{name}.yaml" for name in ("toy_i2v", "toy_inference")], mode="inference")
    phases = sampling_estimate(config, torch.float32).phases
    assert phases["encode"]["VAE"] == phases["decode"]["VAE"] == phases["network"]["VAE"] > 2**20


def test_scores_of_attention_are_counted_where_no_kernel_hides_them():
    def activations(*settings):
        config = with_model("args.only_save_latents=true", *settings)
        return sampling_estimate(config, torch.bfloat16).phases["network"]["activations"]

    fused, flash, plain = (activations(*given) for given in ((), ("args.attention=flash",), ("args.attention=math",)))
    assert fused == flash < plain / 2


def test_the_network_takes_a_window_at_once_however_long_the_clip():
    def activations(*settings):
        config = with_model(*(f"args.{setting}" for setting in (*settings, "only_save_latents=true")))
        return sampling_estimate(config, torch.bfloat16).phases["network"]["activations"]

    windows = [activations("time_window=5", f"sampling_num_frames={num}") for num in (9, 17)]
    assert windows[0] == windows[1] == activations("sampling_num_frames=5")
    assert activations("time_scaling=riflex", "sampling_num_frames=9") > 1.5 * windows[0]
