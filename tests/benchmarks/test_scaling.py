"""The model of step times beside real trainings: cases, calibration and table."""

import json
from dataclasses import replace

import pytest

from benchmarks import scaling
from sgm.checks.scaling.cards import CARDS, card_named


def test_every_case_is_predicted():
    found = {case: scaling.predicted(case, CARDS["h100"]) for case in ("1-clips", "1-zero2", "2-layers", "4-tokens")}
    assert {name for name, each in found.items() if each.seconds["VAE"]} == {"1-clips"}
    assert {name for name, each in found.items() if each.seconds["groups"]} == {"2-layers", "4-tokens"}
    assert [each.samples for each in found.values()] == [4, 4, 4, 8]
    assert all(ranks == int(case[0]) for case, (ranks, _) in scaling.CASES.items())


def test_stage_2_moves_as_many_bytes_in_the_model_as_in_its_calibration():
    card = replace(CARDS["h100"], state_bandwidth=1.0)
    one, two = (scaling.predicted(case, card).seconds["optimizer"] for case in ("1-zero2", "2-zero2"))
    shared = scaling.BYTES_OF_STAGE_2 - 24  # of norm, clipping and update, which two ranks divide
    assert two / one == pytest.approx((24 + shared / 2) / scaling.BYTES_OF_STAGE_2)


def test_the_table_compares_what_is_predicted_and_measured(monkeypatch):
    card = CARDS["h100"]
    step = scaling.predicted("1-zero2", card).step
    monkeypatch.setattr(scaling, "measure", lambda case, cache: (step / 1.5, 9.0))
    line = scaling.rows(["1-zero2"], card)[2]
    assert line.startswith(f"| 1-zero2 | {step:.3f} | {step / 1.5:.3f} | +50% | 9.000 | ")


def test_a_case_is_predicted_with_what_the_machine_did_before_and_after_it(monkeypatch):
    speeds = iter([2e12, 1e12, 3e12, 1e12, 1e12])
    made, used = [], []

    def calibrate(ranks):
        made.append(ranks)
        return replace(CARDS["h100"], peak=next(speeds))

    monkeypatch.setattr(scaling, "calibrate", calibrate)
    monkeypatch.setattr(scaling, "measure", lambda case, cache: (1.0, 1.0))
    real = scaling.predicted
    monkeypatch.setattr(scaling, "predicted", lambda case, card: used.append(card.peak) or real("1-zero2", card))
    scaling.rows(["1-zero0", "1-zero2", "2-zero1"])
    assert used == [1.5e12, 2e12, 1e12] and made == [1, 1, 1, 2, 2]


def test_a_measured_card_is_written_for_check(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "gloo_figures", lambda: {"bandwidth": 1e9, "latency": 1e-4})
    monkeypatch.setattr(scaling, "figures_of_cores", lambda _: [scaling.core_figures() | scaling.deepspeed_figures()])
    monkeypatch.setattr(scaling, "_deepspeed_step", lambda layers, stage: None)
    of_core = [1.0, 1.0, 1.0, 1e-6, 1e4, 1.0]  # the tiny network, the VAE and a clip are last
    seconds = iter([*of_core, 1.0, 2.0, 1.0 + 192e-3, 1.0 + 576e-3, 2.0 + 1.0 + 24e-3])
    monkeypatch.setattr(scaling, "busy_seconds", lambda work: next(seconds))
    assert scaling.main(["--calibrate", str(tmp_path / "own.json")]) == 0
    card = card_named(str(tmp_path / "own.json"))
    assert card.peak == 3 * 2 * 384 * 512 * 2048, "FLOPs of a forward and a backward pass, in a second"
    assert (card.intra_bandwidth, card.overlaps) == (1e9, False) and card.slots >= 1
    assert (card.tensor_seconds, card.gather_seconds) == (pytest.approx(1e-3), pytest.approx(1e-3))
    assert card.state_bandwidth == pytest.approx(80 * 12 * (1024**2 + 1024)), "without what its tensors take"


@pytest.mark.slow
def test_ranks_record_the_seconds_of_their_iterations(tmp_path):
    busy, clock = scaling.measure("2-zero2", tmp_path / "cache")
    assert busy > 0 < clock
    assert set(scaling.gloo_figures()) == {"bandwidth", "latency"}
    assert json.dumps(list(scaling.CASES))
