"""Cards and the machines that they are in, as far as the time of a step depends on them.

Figures of the cards named here are assumptions: peaks, memory and links from data sheets, and shares of them that
kernels and collectives are taken to attain. docs/scaling.md states them. Others come from a JSON file, measured or not.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from sgm.util import InputError

# Dense FLOP/s in 16 bits by the name that the driver gives, from the data sheets; the first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, each of which is a device
}

_Positive = Annotated[float, Field(gt=0, lt=1e21)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Seconds = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1, le=1_000_000)]


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Card:
    """A card, its machine and its network. Bytes, seconds and FLOPs; bandwidths are those of one direction.

    Attributes:
        name: for reports.
        memory: GiB.
        peak: FLOP/s of dense products in 16 bits.
        products: share of the peak that matrix products attain.
        attention: share that attention attains.
        convolutions: share that the VAE's convolutions attain.
        memory_bandwidth: that kernels which only read and write attain.
        state_bandwidth: that those attain which update weights, gradients and optimizer state; null: the same. On a
            CPU activations stay in its caches, and state does not.
        kernel_seconds: of the host for each kernel, if the device waits for them.
        tensor_seconds: of the host for each trained tensor that ZeRO reduces, likewise.
        gather_seconds: of the host for each tensor that stage 3 gathers for a pass, likewise.
        per_node: cards in a machine.
        intra_bandwidth: of a card to the others in its machine.
        intra_latency: of a message there.
        inter_bandwidth: of a card to other machines.
        inter_latency: of a message there.
        host_bandwidth: between a card and the memory of its machine.
        disk_bandwidth: at which a rank writes a save.
        shared_bandwidth: at which all ranks together write saves.
        cores: for each card, to decode clips.
        clip_pixels: pixels of clips that a core decodes, scales and crops in a second.
        overlaps: whether collectives run beside kernels where DeepSpeed and the ring start them in time.
        slots: ranks of a machine that compute at the same time, if more of them share its cores; null: all.
    """

    name: str
    memory: _Positive
    peak: _Positive
    products: _Share
    attention: _Share
    convolutions: _Share
    memory_bandwidth: _Positive
    state_bandwidth: _Positive | None = None
    kernel_seconds: _Seconds = 0.0
    tensor_seconds: _Seconds = 0.0
    gather_seconds: _Seconds = 0.0
    per_node: _Count = 8
    intra_bandwidth: _Positive
    intra_latency: _Seconds
    inter_bandwidth: _Positive
    inter_latency: _Seconds
    host_bandwidth: _Positive
    disk_bandwidth: _Positive
    shared_bandwidth: _Positive
    cores: _Positive
    clip_pixels: _Positive
    overlaps: bool = True
    slots: _Count | None = None

    def sharing(self, ranks: int) -> float:
        """Return how much longer all work takes if `ranks` ranks share the cores of a machine."""
        return max(1.0, min(ranks, self.per_node) / self.slots) if self.slots else 1.0

    def bandwidth(self, size: int, stride: int = 1) -> float:
        """Return the bytes per second that a rank of a ring of `size` ranks sends, `stride` apart.

        Rings of a group cross between machines on the networks of all its ranks there.
        """
        if size * stride <= self.per_node:
            return self.intra_bandwidth
        return min(self.intra_bandwidth, max(self.per_node // stride, 1) * self.inter_bandwidth)

    def latency(self, size: int, stride: int = 1) -> float:
        """Return the seconds in which a message passes around a ring of `size` ranks, `stride` apart."""
        here = max(min(size, self.per_node // stride), 1)
        nodes = -(-size // here)
        crossings = nodes if nodes > 1 else 0
        return (size - crossings) * self.intra_latency + crossings * self.inter_latency


_HOPPER: dict[str, Any] = {
    "products": 0.6,
    "attention": 0.35,
    "convolutions": 0.3,
    "intra_bandwidth": 0.8 * 450e9,  # NVLink 4, 18 links
    "intra_latency": 3e-6,
    "inter_bandwidth": 0.8 * 50e9,  # a port of 400 Gb/s for each card
    "inter_latency": 8e-6,
    "host_bandwidth": 0.8 * 63e9,  # PCIe 5, 16 lanes
    "disk_bandwidth": 1e9,
    "shared_bandwidth": 20e9,
    "cores": 12,
    "clip_pixels": 23e6,  # measured on a core of a server: docs/benchmarks.md, reading clips
}
_AMPERE: dict[str, Any] = {
    **_HOPPER,
    "attention": 0.55,
    "convolutions": 0.45,
    "intra_bandwidth": 0.8 * 300e9,  # NVLink 3, 12 links
    "inter_bandwidth": 0.8 * 25e9,
    "host_bandwidth": 0.8 * 32e9,
}
CARDS: Mapping[str, Card] = {
    "h100": Card(name="H100", memory=80, peak=PEAKS["H100"], memory_bandwidth=0.8 * 3.35e12, **_HOPPER),
    "h200": Card(name="H200", memory=141, peak=PEAKS["H200"], memory_bandwidth=0.8 * 4.8e12, **_HOPPER),
    "a100": Card(name="A100", memory=80, peak=PEAKS["A100"], memory_bandwidth=0.8 * 2.04e12, **_AMPERE),
}
DEFAULT = "h100"


def card_named(given: str | float | None) -> Card:
    """Return the card of ``--card``.

    Args:
        given: a name in `CARDS`, a JSON file, or the GiB of a card that is otherwise the default one; None: that.

    Raises:
        InputError: there is no such card, or its file has wrong values.
    """
    if given is None:
        return CARDS[DEFAULT]
    if isinstance(given, int | float):
        known = CARDS[DEFAULT]
        return replace(known, name=f"card of {given:g} GiB that is otherwise an {known.name}", memory=given)
    if (found := CARDS.get(given.lower())) is not None:
        return found
    if not given.endswith(".json"):
        names = ", ".join(CARDS)
        raise InputError(f"--card {given}: there is no such card; give a size such as 24gb, {names}, or a JSON file")
    return read_card(Path(given))


def read_card(path: Path) -> Card:
    """Read a card from a JSON file with the fields of `Card`.

    Raises:
        InputError: the file is missing, or has wrong values.
    """
    try:
        return TypeAdapter(Card).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InputError(f"--card {path}: {found}; docs/scaling.md has the keys") from error
    except (OSError, ValueError) as error:
        raise InputError(f"--card {path}: cannot be read: {error}") from error
