"""Ctrl-C and SIGTERM while a run is under way."""

from __future__ import annotations

import signal
import threading
from typing import Any

from fnn.train._callback import Run

REASONS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signals:
    """The first signal asks the run to stop after its step; the second ends it at once.

    At once means `KeyboardInterrupt` for Ctrl-C and the exit code 143 for SIGTERM. Outside the main thread, where
    Python delivers no signals, this does nothing.
    """

    def __init__(self, run: Run):
        self.run = run
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in REASONS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            if handler is not None:  # set by something that is not Python, which Python cannot set again
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.run.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.run.signal = REASONS[signal.Signals(number)]
