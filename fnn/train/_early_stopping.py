"""`EarlyStopping`: end a run that no longer improves, with the weights it had at its best."""

from __future__ import annotations

import math
from typing import Any

from fnn.train._callback import Callback, Run
from fnn.train._state import TrainState


class EarlyStopping(Callback):
    """Stop when a number of the history has not improved for `patience` rows, and go back to the best state.

    monitor: a column of the history, such as "eval_loss"
    patience: rows without improvement after which the run stops: epochs, or with `fit(eval_every=n)` evaluations
    mode: "min" where lower is better, "max" where higher is
    min_delta: an improvement is a change for the better by more than this
    restore: whether `fit` returns the best state, however the run ends, instead of the last one

    Afterwards `best` is a copy of the best state (`None` before the first row), `best_value` and `best_epoch` say
    which it was. The copy takes the memory of one more state. A number that is not finite is no improvement. A
    checkpoint keeps all of this: a resumed run stops when an undisturbed one would, with the same best state.

    Raises `ValueError` for bad arguments, and for a column that the history does not have, naming those it has.

    Example:
        >>> from fnn import train
        >>> stopping = train.EarlyStopping("eval_accuracy", mode="max", patience=5)
        >>> train_state, history = train.fit(
        ...     step, train_state, batches, epochs=100, eval=evaluate, callbacks=[stopping]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        monitor: str = "eval_loss",
        *,
        patience: int,
        mode: str = "min",
        min_delta: float = 0.0,
        restore: bool = True,
    ):
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience!r}, expected a number of epochs, at least 1")
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping: mode is {mode!r}, expected 'min' or 'max'")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta is {min_delta!r}, expected a number of at least 0")
        self.monitor, self.patience, self.mode = monitor, patience, mode
        self.min_delta, self.returns_best = min_delta, restore
        self._forget()

    def _forget(self) -> None:
        self.best: TrainState | None = None
        self.best_value: float = math.nan
        self.best_epoch: float = 0
        self.waited = 0

    def start(self, run: Run) -> None:
        self._forget()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the best state, its value and epoch, and how many rows have passed since."""
        return {name: getattr(self, name) for name in ("best", "best_value", "best_epoch", "waited")}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.best, self.best_value = saved["best"], saved["best_value"]
        self.best_epoch, self.waited = saved["best_epoch"], saved["waited"]

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        if self.monitor not in row:
            if run.stop_reason is not None:  # a row that was broken off is not evaluated
                return
            raise ValueError(
                f"EarlyStopping: the history has no column {self.monitor!r} to monitor; its columns are {list(row)}"
                + (", and those of eval come with fit(eval=...)" if self.monitor.startswith("eval_") else "")
            )
        value = row[self.monitor]
        gain = self.best_value - value if self.mode == "min" else value - self.best_value
        if math.isfinite(value) and (self.best is None or gain > self.min_delta):
            self.best, self.best_value, self.best_epoch = run.train_state.copy(), value, row["epoch"]
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            what = "finite" if self.best is None else "better"
            than = "" if self.best is None else f" than {self.best_value:.4g}"
            rows = "epochs" if all(row["epoch"] == int(row["epoch"]) for row in run.history.rows) else "evaluations"
            run.stop(f"no {what} {self.monitor}{than} for {self.patience} {rows}")

    def end(self, run: Run) -> None:
        if self.returns_best and self.best is not None:
            run.train_state = self.best.copy()  # a later donating step empties what fit returns, not `best`
