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
    batch: Any = None
    """The batch of the last step."""
    examples_per_second: float = 0.0
    stop_reason: str | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps_per_epoch if self.steps_per_epoch else len(self.history.rows)

    def stop(self, reason: str) -> None:
        """End the run after this step; the reason ends up in `history.stopped`."""
        self.stop_reason = self.stop_reason or reason


class Callback:
    """Base of observers of `fit`: override what you need."""

    def start(self, run: Run) -> None:
        """Before the first step."""

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        """Every `log_every` steps, with the metrics of the last step."""

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        """After each epoch, with its row of the history."""

    def end(self, run: Run) -> None:
        """At the end, also after an error."""
