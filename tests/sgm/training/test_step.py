import os
import signal
import threading

import pytest
import torch

from sgm.training.step import StepFlags, StopSignals

CPU = torch.device("cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_recorded_and_the_former_handler_restored(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == ""
        os.kill(os.getpid(), number)
        assert signals.received == number.name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == "SIGINT"


def test_a_second_request_to_terminate_changes_nothing():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"


def test_outside_the_main_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_loss_in_any_micro_batch_is_found(bad):
    check = StepFlags(CPU)
    check.add(torch.tensor([1.0, 2.0]))
    check.add(torch.tensor([1.0, bad]))
    check.add(torch.tensor([3.0, 4.0]))
    check.start_all_reduce(stop=False)
    assert check.read() == (True, False, False)


def test_flags_are_reset_after_each_step():
    check = StepFlags(CPU)
    check.add(torch.tensor([float("nan")]))
    check.start_all_reduce(stop=True, save_failed=True)
    assert check.read() == (True, True, True)
    check.add(torch.tensor([1.0]))
    check.start_all_reduce(stop=False)
    assert check.read() == (False, False, False)
