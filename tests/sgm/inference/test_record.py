import torch

from sgm.inference.record import clock


def test_times_are_taken_when_the_device_has_finished(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: calls.append("synchronized"))
    assert clock() <= clock() and len(calls) == 2
