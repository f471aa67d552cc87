"""Weights that wait on the host: bit-equal results, at most two blocks on the device, and the order of copies."""

import contextlib
import itertools

import pytest
import torch
from torch import nn

from benchmarks.models import NetworkSize, build_network, network_section
from sgm.checks.meta_run import LiveBytes
from sgm.weights.offload import Offload, pinned_pieces
from sgm.weights.quantize import linear_layers, num_bytes, store

CPU, META = torch.device("cpu"), torch.device("meta")
SIZE = NetworkSize(128, 4, 4, 64, latents=(2, 4, 6), text_length=3, text_hidden_size=8)
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}


def on_device(module: nn.Module, host: set[int]) -> set[str]:
    """Return the names of the parameters that are not those of the host."""
    return {name for name, parameter in module.named_parameters() if id(parameter) not in host}


@pytest.mark.parametrize("storage", [None, "int8", "fp8"])
def test_blocks_pass_through_the_device(storage):
    """The copies are on the CPU here, and counted as on any device."""
    if storage:
        pytest.importorskip("torchao", reason="torchao is not installed: pip install .[lowmem]")
    section = network_section("cogvideox_5b", SIZE)
    section["params"]["modules"]["lora_config"] = LORA
    network = build_network(section).requires_grad_(False)
    for layer in linear_layers(module for block in network.blocks for module in block) if storage else ():
        store(layer, storage)
    x, context = torch.randn(2, 2, 16, 4, 6), torch.randn(2, 3, 8)

    @torch.no_grad()
    def run():
        return network(x, torch.tensor([500, 20]), context)

    with LiveBytes() as resident:
        expected = run()
    block, size = num_bytes(network.blocks[0]), num_bytes([network])
    offload = Offload(network, CPU, network.blocks)
    host = {id(parameter) for parameter in network.parameters()}
    seen = []

    @contextlib.contextmanager
    def watched(index):
        with offload.block(index):
            seen.append(on_device(network, host))
            yield

    network.use_blocks_within(watched)
    with LiveBytes() as counted, offload:
        assert torch.equal(run(), expected) and torch.equal(run(), expected)
    own = {
        name
        for name in dict(network.named_parameters())
        if "layers.2." in name or "_list.2." in name or "adaLN_modulations.2." in name
    }
    rest = seen[0] & seen[1]
    assert seen[2] - rest == own and len(own) == 26 and len(rest) == 17  # norms of q and k, adaLN and adapters too
    assert counted.peak - resident.peak < size - 4 * block + 2.1 * block
    assert on_device(network, host) == set() and counted.live < 0.1 * block, "everything has left"


def test_tied_weights_stay_tied_and_everything_leaves_after_an_error():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).requires_grad_(False)
    module["b"].weight = shared = module["a"].weight
    offload = Offload(module, CPU)
    with pytest.raises(RuntimeError, match="out of memory"), offload:
        assert module["a"].weight is module["b"].weight is not shared
        raise RuntimeError("out of memory")
    assert module["a"].weight is module["b"].weight is shared


def test_copies_overlap_and_are_waited_for(monkeypatch):
    """The meta device stands for an accelerator, and its streams write down what is asked of them."""
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            said.append(f"on {self.name}")

        def __exit__(self, *_):
            said.append("end")

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return f"the event of {self.name}"

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

    pinned = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: META)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: Stream("compute"))
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("copies"))
    monkeypatch.setattr(
        "sgm.weights.offload._pinned_memory", lambda size: pinned.append(size) or torch.empty(size, dtype=torch.uint8)
    )
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)).requires_grad_(False)
    before = [block.weight.clone() for block in blocks]
    offload = Offload(blocks, META, [[block] for block in blocks])
    assert pinned == 3 * [512] and all(map(torch.equal, before, (block.weight for block in blocks)))
    copy = ["copies waits for compute", "on copies", "end"]
    wait = ["compute waits for the event of copies"]
    with offload.block(0):
        assert said == copy + wait + copy, "the next block is on its way before this one computes"
        assert [block.weight.device.type for block in blocks] == ["meta", "cpu", "cpu"]
    said.clear()
    with offload.block(1):
        assert said == wait + copy
    said.clear()
    offload.__exit__()
    assert said == wait, "memory of a copy on its way is not given to others"


@pytest.mark.parametrize(
    ("sizes", "pieces"),
    [
        ([], []),
        ([1], [256]),
        ([2**20, 3 * 2**20] * 2, [2**23]),  # tensor by tensor 10 MiB
        ([2**25] * 4 + [80 * 2**20] * 3, [2**28, 2**27]),  # a block of T5: 384 MiB for 368, and not 512
        ([5 * 2**28] * 2, [2**31, 2**31]),
    ],
)
def test_pinned_memory_is_filled_with_pieces_that_are_powers_of_two(sizes, pieces):
    found, places = pinned_pieces(sizes)
    assert found == pieces
    spans = sorted((piece, start, start + size) for (piece, start), size in zip(places, sizes, strict=True))
    assert all(end <= found[piece] for piece, _, end in spans)
    assert all(one[0] < two[0] or one[2] <= two[1] for one, two in itertools.pairwise(spans))
