"""What `fit` tells its observers."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from fnn import _ranks
from fnn.train._history import History
from fnn.train._state import TrainState
from fnn.train._step import Step
from fnn.train._together import any_of

_PATIENCE = 5.0
"""Seconds after which a signal is to have taken effect; launchers leave a run half a minute to save itself."""


@dataclasses.dataclass
class Run:
    """A run in progress: what callbacks read, and where they ask it to stop.

    Where there are several processes, `ended` and `signal` are the same on all of them: they change in `settle` only.
    """

    step_fn: Step
    train_state: TrainState
    history: History
    step: int
    """Steps done since step 0 of the run, resumed or not."""
    total_steps: int | None
    steps_per_epoch: int | None
    started_at: int = 0
    """The step that this process started from: 0, or where it went on."""
    epochs_done: int = 0
    """Where the loader has no length: how often it has come to its end."""
    epoch_began: int = 0
    """Where the loader has no length: the step count at which it was last begun."""
    batch: Any = None
    """The batch of the last step, or of the one under way."""
    examples_per_second: float = 0.0
    skipped: int = 0
    """Steps so far whose loss or update was not finite, and which therefore changed nothing but the step count."""
    ended: str | None = None
    """Why a callback, or an error, ended the run."""
    signal: str | None = None
    """The signal that broke the run off: "interrupted" or "terminated"."""
    asked: str | None = None
    """Why a callback of this process has asked the run to end."""
    heard: str | None = None
    """The signal that this process got."""
    slow: bool = False
    """Whether so much time passes from one reading of the metrics to the next that signals are settled in between."""
    settled_at: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps_per_epoch if self.steps_per_epoch else self.epochs_done

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends after this step, if it does."""
        return self.ended or self.signal

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the last step is done, or a callback has ended the run."""
        return self.ended is not None or (self.total_steps is not None and self.step >= self.total_steps)

    def stop(self, reason: str) -> None:
        """End the run after this step; the reason ends up in `history.stopped`.

        One of several processes is enough: they all end at the next reading of the metrics, after the same step.
        """
        self.asked = self.asked or reason
        if _ranks.count() == 1:
            self.ended = self.ended or reason

    def interrupt(self, reason: str) -> None:
        """As `stop`, for a signal that came to this process."""
        self.heard = reason
        if _ranks.count() == 1:
            self.signal = reason

    def settle(self, *, reading: bool = True) -> None:
        """Make what one process asks for what all do; every process has to call this, after the same step.

        reading: False between two readings of the metrics, where only signals count: a callback that stops the run
            does so after the same step each time that the run is repeated
        """
        if _ranks.count() == 1:
            return
        slow = time.monotonic() - self.settled_at > _PATIENCE
        heard, asked, slow = any_of(self.heard is not None, reading and self.asked is not None, slow)
        if reading:
            self.slow, self.settled_at = slow, time.monotonic()
        if heard or asked:
            wishes = _ranks.gather("fit", (self.heard, self.asked if asked else None))
            self.signal = self.signal or next((heard for heard, _ in wishes if heard), None)
            self.ended = self.ended or next((asked for _, asked in wishes if asked), None)


class Callback:
    """Base of observers of `fit`: override what you need.

    Of several processes each has its own, and `row` and `metrics` are the same on all of them.
    """

    main_only = False
    """Whether rank 0 alone has it: True for what prints or writes files, and never waits for the other processes."""

    def start(self, run: Run) -> None:
        """Before the first step."""

    def step(self, run: Run) -> None:
        """After each step. Reading a number of the device here makes every step wait for it."""

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Every `log_every` steps, with the metrics of the last step."""

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        """After each row of the history: an epoch, or `eval_every` steps."""

    def end(self, run: Run) -> None:
        """At the end, also after an error."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of this callback: tensors, `TrainState`s, and values that JSON can hold, by name."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back what `state` gave, after `start`, in a run that goes on from a checkpoint."""
