"""Ctrl-C and SIGTERM while a run is under way."""

from __future__ import annotations

import signal
import threading
from typing import Any

from fnn.train._callback import Run

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signals:
    """The first signal asks the run to stop after its step; the second ends it at once.

    At once means `KeyboardInterrupt` for Ctrl-C and the exit code 143 for SIGTERM. A signal that the process ignores,
    as under nohup, stays ignored. A run inside another run stops that one too. Processes that load data may have got
    the same signal, and their end is no error then. Of several processes that train together one may get it, or each
    after another step: all end after the same step, see `Run.settle`. Outside the main thread, where Python delivers
    no signals, this does nothing.
    """

    def __init__(self, run: Run):
        self.run = run
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in REASONS if signal.getsignal(number) is not signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self._handle) for number in heard}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            if handler is not None:  # set by something that is not Python, which Python cannot set again
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.run.heard is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.run.interrupt(REASONS[signal.Signals(number)])
        child = getattr(signal, "SIGCHLD", None)  # at which torch raises, wherever the program is, if a worker died
        if child is not None and callable(signal.getsignal(child)):
            self.previous[child] = signal.signal(child, signal.SIG_DFL)
        outer = self.previous[number]
        if isinstance(getattr(outer, "__self__", None), Signals):
            outer(number, frame)
