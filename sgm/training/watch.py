"""What stops a run early: signals, losses that are not finite, steps that are skipped in a row."""

import signal
import threading
from types import FrameType
from typing import Any

import torch

import sgm.distributed
from sgm.log import get_logger

logger = get_logger(__name__)


class StopSignals:
    """Context in which SIGTERM and SIGINT ask the run to stop after the step; a second SIGINT interrupts at once.

    Attributes:
        received: name of the signal that asked, empty if none did.
    """

    def __init__(self) -> None:
        self.received = ""
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        logger.warning("%s: finishing this step, then saving; interrupt again to stop at once", self.received)


class StepFlags:
    """What all ranks must know before the optimizer steps: is a loss not finite, is one of them asked to stop.

    The answer travels to the host while the backward pass runs, so that reading it leaves no gap in the device's work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flags = torch.zeros(2, device=device)
        self._host = torch.zeros(2, pin_memory=device.type != "cpu")
        self._event = torch.Event(device) if device.type != "cpu" else None

    def add(self, losses: torch.Tensor) -> None:
        """Take the losses (B,) of a micro step."""
        bad = (~torch.isfinite(losses.detach())).any().float()
        self._flags[0] = torch.maximum(self._flags[0], bad)

    def share(self, *, stop: bool) -> None:
        """Begin to exchange the flags; called by all ranks before the last backward pass of a step."""
        self._flags[1] = float(stop)
        sgm.distributed.all_reduce_(self._flags, largest=True)
        self._host.copy_(self._flags, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[bool, bool]:
        """Return (a loss is not finite, a rank is asked to stop), and start over."""
        if self._event is not None:
            self._event.synchronize()
        bad, stop = self._host.bool().tolist()
        self._flags.zero_()
        return bad, stop
