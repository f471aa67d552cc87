"""Growth of memory and descriptors is found; the commands are those of the toy."""

import os
import signal
import time

import pytest
import soak
from soak import Reading

from sgm.util import RunError


def readings(memory, files=lambda _: 50):
    return [Reading(second, memory(second), files(second)) for second in range(40)]


@pytest.mark.parametrize(
    ("found", "flat"),
    [
        (readings(lambda second: 800 if second > 5 else 100), True),
        (readings(lambda second: 800 + 3 * second), False),
        (readings(lambda _: 800, lambda second: 50 + second // 4), False),
    ],
)
def test_growth_is_found_after_the_start(found, flat):
    line, is_flat = soak.verdict("training", found)
    assert is_flat is flat and ("GROWS" in line) is not flat


def test_too_few_readings_are_no_result():
    with pytest.raises(RunError, match="give more --minutes"):
        soak.verdict("training", readings(lambda _: 800)[:3])


def test_memory_and_descriptors_of_a_session_are_read():
    own = soak.read(os.getsid(0), time.monotonic())
    with open(os.devnull), open(os.devnull):
        more = soak.read(os.getsid(0), time.monotonic())
    assert own is not None and more is not None and own.megabytes > 10 and own.descriptors > 2
    assert soak.read(2**22 + 1, time.monotonic()) is None


def test_a_command_that_does_not_end_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "STOP_SECONDS", 0.1)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the command inherits
    try:
        with pytest.raises(RunError, match="^-c still runs 0.1 s after SIGTERM"):
            soak.watch(["-c", "import time; time.sleep(60)"], 0, tmp_path / "log")
    finally:
        signal.signal(signal.SIGTERM, before)
