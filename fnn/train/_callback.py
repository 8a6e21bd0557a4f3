"""What `fit` tells its observers."""

from __future__ import annotations

import dataclasses
from typing import Any

from fnn.train._history import History
from fnn.train._state import TrainState
from fnn.train._step import Step


@dataclasses.dataclass
class Run:
    """A run in progress: what callbacks read, and where they ask it to stop."""

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
        """End the run after this step; the reason ends up in `history.stopped`."""
        self.ended = self.ended or reason


class Callback:
    """Base of observers of `fit`: override what you need."""

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
