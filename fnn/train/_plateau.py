"""`ReduceOnPlateau`: a learning rate that falls when a number of the history no longer improves."""

from __future__ import annotations

import math
from typing import Any, Literal

from fnn import optim
from fnn.train._callback import Callback, Run
from fnn.train._rates import constant_rates


class ReduceOnPlateau(Callback):
    """Multiply the learning rate by `factor` when a number of the history has stopped to improve.

    Row for row what `torch.optim.lr_scheduler.ReduceLROnPlateau` does. `optim.reduce_on_plateau` judges the training
    loss inside the step; this judges what only an evaluation knows. The rate is changed in the optimizer's state, so
    the compiled step stays as it is; where there are several rates, as in `optim.by_label`, all fall.

    monitor: a column of the history, such as "eval_loss"
    mode: "min" where lower is better, "max" where higher is
    factor: below 1
    patience: how many rows without improvement are borne; the next one lowers the rate
    threshold: what counts as improvement: a value below `best * (1 - threshold)` with `threshold_mode` "rel", below
        `best - threshold` with "abs" (mode "max": above, with the opposite sign)
    threshold_mode: "rel" or "abs"
    cooldown: how many rows to ignore after the rate fell
    min_lr: the rate falls no further
    eps: a change of the rate that is no larger than this is left out

    A number that is not finite is no improvement. Raises `ValueError` for bad arguments, for an optimizer without a
    constant learning rate, and for a column that the history does not have, naming those it has.

    Example:
        >>> from fnn import train
        >>> plateau = train.ReduceOnPlateau("eval_loss", patience=3)
        >>> train_state, history = train.fit(
        ...     step, train_state, batches, epochs=100, eval=evaluate, callbacks=[plateau]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        monitor: str = "eval_loss",
        *,
        patience: int = 10,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ):
        for name, choice, allowed in (
            ("mode", mode, ("min", "max")),
            ("threshold_mode", threshold_mode, ("rel", "abs")),
        ):
            if choice not in allowed:
                raise ValueError(f"ReduceOnPlateau: {name} is {choice!r}, expected {allowed[0]!r} or {allowed[1]!r}")
        for name, count in {"patience": patience, "cooldown": cooldown}.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"ReduceOnPlateau: {name} is {count!r}, expected a number of rows, at least 0")
        if not 0 <= factor < 1:
            raise ValueError(f"ReduceOnPlateau: factor is {factor!r}, expected a number in [0, 1)")
        for name, number in {"threshold": threshold, "min_lr": min_lr, "eps": eps}.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"ReduceOnPlateau: {name} is {number!r}, expected a number of at least 0")
        self.monitor, self.patience, self.mode, self.factor = monitor, patience, mode, factor
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.min_lr, self.eps = cooldown, min_lr, eps
        self._forget()

    def _forget(self) -> None:
        self.best, self.waited, self.cooling = math.inf if self.mode == "min" else -math.inf, 0, 0

    def start(self, run: Run) -> None:
        constant_rates("ReduceOnPlateau", run.train_state.opt_state)
        self._forget()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run lowers the rate when an undisturbed one would."""
        return {"best": self.best, "waited": self.waited, "cooling": self.cooling}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.best, self.waited, self.cooling = saved["best"], saved["waited"], saved["cooling"]

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        if self.monitor not in row:
            if run.stop_reason is not None:  # a row that was broken off is not evaluated
                return
            raise ValueError(
                f"ReduceOnPlateau: the history has no column {self.monitor!r} to monitor; its columns are {list(row)}"
                + (", and those of eval come with fit(eval=...)" if self.monitor.startswith("eval_") else "")
            )
        if self._improves(row[self.monitor]):
            self.best, self.waited = row[self.monitor], 0
        else:
            self.waited += 1
        if self.cooling > 0:
            self.cooling, self.waited = self.cooling - 1, 0
        if self.waited > self.patience:
            self._lower(run)
            self.waited, self.cooling = 0, self.cooldown

    def _improves(self, value: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        change = self.best * self.threshold if self.threshold_mode == "rel" else self.threshold
        if math.isinf(self.best):
            return math.isfinite(value)
        return math.isfinite(value) and sign * value < sign * (self.best - sign * change)

    def _lower(self, run: Run) -> None:
        rates = constant_rates("ReduceOnPlateau", run.train_state.opt_state)
        lower = {path: max(rate * self.factor, self.min_lr) for path, rate in rates.items()}
        changes = {path: new for path, new in lower.items() if rates[path] - new > self.eps}
        opt_state = optim.set(run.train_state.opt_state, **changes)
        run.train_state = run.train_state.replace(opt_state=opt_state)
