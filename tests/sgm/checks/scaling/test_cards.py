"""Cards by name, size and file; bandwidth and latency of rings in machines and between them."""

import dataclasses
import json

import pytest

from sgm.checks.scaling.cards import CARDS, card_named
from sgm.util import InputError

PLAIN = dataclasses.replace(
    CARDS["h100"], intra_bandwidth=100.0, inter_bandwidth=20.0, intra_latency=0.001, inter_latency=0.01, per_node=8
)


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth", "latency"),
    [
        (8, 1, 100, 0.008),
        (4, 2, 100, 0.004),
        (16, 1, 100, 0.034),  # eight networks of 20 cross; 14 hops within, 2 between
        (16, 2, 80, 0.052),  # four of them
        (16, 8, 20, 0.16),  # one rank in each machine
    ],
)
def test_rings_cross_machines_on_the_networks_of_their_ranks(size, stride, bandwidth, latency):
    assert PLAIN.bandwidth(size, stride) == bandwidth
    assert PLAIN.latency(size, stride) == pytest.approx(latency)


def test_ranks_that_share_cores_take_longer():
    assert PLAIN.sharing(64) == 1
    shared = dataclasses.replace(PLAIN, slots=2)
    assert [shared.sharing(ranks) for ranks in (1, 2, 4, 16)] == [1, 1, 2, 4], "of a machine"


def test_a_card_is_a_name_a_size_or_a_file(tmp_path):
    assert card_named(None) == card_named("H100") == CARDS["h100"]
    assert (card_named(24.0).memory, card_named(24.0).peak) == (24, CARDS["h100"].peak)
    assert "24 GiB" in card_named(24.0).name
    path = tmp_path / "own.json"
    values = {**dataclasses.asdict(PLAIN), "name": "own", "slots": 3}
    path.write_text(json.dumps(values))
    assert card_named(str(path)) == dataclasses.replace(PLAIN, name="own", slots=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"products": 1.5}, "products: Input should be less than or equal to 1"),
        ({"disk": 1}, "disk: Unexpected keyword argument"),
        ({"memory": None}, "memory: Input should be a valid number"),
    ],
)
def test_wrong_values_of_a_file_are_named(change, said, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**dataclasses.asdict(PLAIN), **change}))
    with pytest.raises(InputError, match=said):
        card_named(str(path))


def test_an_unknown_card_is_refused(tmp_path):
    with pytest.raises(InputError, match="--card large: there is no such card; give a size such as 24gb, h100"):
        card_named("large")
    with pytest.raises(InputError, match="cannot be read"):
        card_named(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="Invalid JSON"):
        card_named(str(tmp_path / "bad.json"))
