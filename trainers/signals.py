"""The signals by which a scheduler ends a training: noted when they come, and obeyed where it suits the training."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# what schedulers send before they kill: SLURM SIGTERM, submitit one of the others; Windows has only the first
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
SECONDS_OF_ONE_SIGNAL = 1.0  # the scheduler and a command that is around this one may both send it


class StopSignals:
    """Within its ``with`` the first signal is noted; another one, more than a second later, ends the process at once.

    After the first one Ctrl-C is ignored, since torch interrupts the ranks of a training whose parent has died.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[int, Any] = {}  # those of others, while ours are there

    def __enter__(self) -> "StopSignals":
        if self.can_listen():
            self._process = os.getpid()
            self._handlers = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
            self._handlers |= {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    @staticmethod
    def can_listen() -> bool:
        """Whether this is the main thread, where alone Python allows it."""
        return threading.current_thread() is threading.main_thread()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        in_a_worker = os.getpid() != self._process  # one that was forked meanwhile: as if we weren't there
        if in_a_worker or (self.received is not None and now - self._time > SECONDS_OF_ONE_SIGNAL):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received, self._time = signal.Signals(number), now
            signal.signal(signal.SIGINT, signal.SIG_IGN)
