"""`fit`: the training loop around a step.

Metrics stay on the device and are read every `log_every` steps, so the loop does not wait for the device at each
step. A run's position is its step count alone: batch `step % len(loader)` of epoch `step // len(loader)`.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.train._callback import Callback, Run
from fnn.train._history import History
from fnn.train._state import TrainState
from fnn.train._step import Metrics, Step, batch_size


class NonFiniteError(FloatingPointError):
    """A loss or an update was not finite.

    `train_state` holds finite weights, `step` is the number of the bad step, `history` has the rows so far.
    """

    def __init__(self, message: str, train_state: TrainState, step: int, history: History):
        super().__init__(message)
        self.train_state, self.step, self.history = train_state, step, history


def fit(
    step: Step,
    train_state: TrainState,
    loader: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    eval: Callable[[TrainState], dict[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    log_every: int = 20,
) -> tuple[TrainState, History]:
    """Train until the run has had `epochs` epochs, or `steps` steps, counted from its step 0; returns the new state.

    `loader` is a `data.Loader` or any iterable of batches, iterated once an epoch. `eval(train_state)` returns
    numbers for the history after each epoch, recorded as "eval_...": `lambda ts: train.evaluate(eval_step, ts, test)`.
    A state that comes from step n goes on with step n + 1, in the middle of an epoch if need be; where the loader has
    no length, `epochs` counts from this call on.

    Ctrl-C ends the run after the current step with `history.stopped == "interrupted"`; a second one at once.
    Raises `NonFiniteError`, naming the step and its cause, when a loss or an update was not finite. That is noticed
    when metrics are read; until then the step has kept such numbers out of the state (see `pure_step`).
    Whatever error ends a run carries the trained state and the rows so far as `error.train_state`, `error.history`.
    """
    if (epochs is None) == (steps is None):
        raise TypeError("fit needs either epochs= or steps=")
    for name, value in (("epochs", epochs), ("steps", steps), ("log_every", log_every)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"fit: {name} must be a positive integer, got {value!r}")
    if train_state.step.dim():
        raise ValueError("fit trains one network; for an ensemble, call the step in a loop of your own")
    per_epoch = _length(loader)
    if per_epoch == 0:
        raise ValueError("fit: the loader has no batches")
    total = steps if epochs is None else epochs * per_epoch if per_epoch else None
    run = Run(step, train_state, History(), int(train_state.step), total, per_epoch)
    if total is not None and run.step >= total:
        warnings.warn(
            f"fit: the state is at step {run.step} and the run was to end at step {total}, so there is nothing to do; "
            "epochs and steps count from step 0 of the run",
            RuntimeWarning,
            stacklevel=2,
        )
        return train_state, run.history

    started: list[Callback] = []
    with _Interrupt(run):
        try:
            for callback in callbacks:
                callback.start(run)
                started.append(callback)
            while run.stop_reason is None and (run.step < total if total is not None else run.epoch < (epochs or 0)):
                _epoch(run, loader, eval, callbacks, log_every)
        except BaseException as error:
            run.stop(type(error).__name__)
            error.train_state, error.history = run.train_state, run.history  # type: ignore[attr-defined]
            error.add_note(f"fit: the state after step {run.step} is error.train_state, the rows are error.history")
            raise
        finally:
            run.history.stopped = run.stop_reason
            for callback in started:
                callback.end(run)
    return run.train_state, run.history


def _length(loader: Any) -> int | None:
    """Batches in an epoch, where the loader knows."""
    try:
        return len(loader)
    except TypeError:
        return None


def _epoch(
    run: Run,
    loader: Iterable[Any],
    eval: Callable[[TrainState], dict[str, float]] | None,
    callbacks: Sequence[Callback],
    log_every: int,
) -> None:
    started, epoch, totals, count = time.perf_counter(), run.epoch, {}, 0
    recent = _Recent(run, loader)
    for batch in _batches(loader, run):
        run.train_state, metrics = run.step_fn(run.train_state, batch)
        run.step, run.batch = run.step + 1, batch
        count += 1
        totals = {name: totals.get(name, 0.0) + _wide(value) for name, value in metrics.items()}
        recent.add(metrics, batch)
        if run.step % log_every == 0 or count == 1:
            values = recent.read()
            for callback in callbacks:
                callback.log(run, values)
        if run.stop_reason is not None or run.step == run.total_steps:
            break
    if not count:
        raise ValueError("fit: the loader gave no batches; an iterator that is used up cannot be iterated again")
    recent.read()
    if run.steps_per_epoch and run.step % run.steps_per_epoch and run.step != run.total_steps and not run.stop_reason:
        raise ValueError(f"fit: the loader has length {run.steps_per_epoch}, but gave {count} batches")
    row = {"epoch": epoch + 1, "step": run.step} | {name: float(value) / count for name, value in totals.items()}
    if eval is not None and run.stop_reason is None:
        row |= {f"eval_{name}": value for name, value in eval(run.train_state).items()}
    row |= {"seconds": time.perf_counter() - started, "examples_per_second": run.examples_per_second}
    run.history.rows.append(row)
    for callback in callbacks:
        callback.epoch(run, row)


def _batches(loader: Any, run: Run) -> Iterator[Any]:
    """The batches of the current epoch from the current step on."""
    start = run.step % run.steps_per_epoch if run.steps_per_epoch else 0
    if callable(getattr(loader, "epoch", None)):
        return loader.epoch(run.epoch, start=start)
    return itertools.islice(loader, start, run.steps_per_epoch)


def _wide(value: Tensor) -> Tensor:
    """Metrics are added up in a dtype of their own: 1000 bfloat16 losses of 1.0 would make 256."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


class _Recent:
    """The metrics of the steps since the device was last read."""

    def __init__(self, run: Run, loader: Any):
        self.run, self.loader = run, loader
        self.losses: list[Tensor] = []
        self.metrics: Metrics = {}
        self.examples, self.since, self.compile_seconds = 0, time.perf_counter(), run.step_fn.compile_seconds

    def add(self, metrics: Metrics, batch: Any) -> None:
        if "loss" not in metrics or metrics["loss"].dim():
            raise ValueError('fit: the metrics of a step must contain "loss", a 0-d tensor')
        self.losses.append(metrics["loss"])
        self.metrics = metrics
        self.examples += batch_size(batch)

    def read(self) -> dict[str, float]:
        """The last step's metrics as numbers; raises where any step since the last read was not finite."""
        if not self.losses:
            return {}
        finite = torch.isfinite(torch.stack(self.losses)).tolist()
        values = {name: float(value) for name, value in self.metrics.items()}
        elapsed = time.perf_counter() - self.since
        if self.compile_seconds == self.run.step_fn.compile_seconds:  # a speed with compilation in it says nothing
            self.run.examples_per_second = self.examples / elapsed
        self.compile_seconds = self.run.step_fn.compile_seconds
        first = self.run.step - len(finite)
        self.losses, self.examples, self.since = [], 0, time.perf_counter()
        if not all(finite):
            bad = first + finite.index(False)
            message = f"the loss or an update was not finite in step {bad}; {_diagnosis(self.run, self.loader, bad)}"
            raise NonFiniteError(message, self.run.train_state, bad, self.run.history)
        return values


def _diagnosis(run: Run, loader: Any, step: int) -> str:
    """Why a step was not finite, found by running it again eagerly on its batch, where that can be had again."""
    advice = "try a lower learning rate or optim.clip_by_global_norm"
    if not callable(getattr(loader, "epoch", None)) or run.steps_per_epoch is None:
        return advice
    batch = next(iter(loader.epoch(step // run.steps_per_epoch, start=step % run.steps_per_epoch)))
    for path, leaf in tree.paths(batch).items():
        if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
            return f"its batch holds values that are not finite, in leaf {path!r}"
    try:
        run.step_fn.update(run.train_state, batch)
    except Exception as error:
        return f"run eagerly, it says: {error}"
    return advice


class _Interrupt:
    """The first Ctrl-C asks the run to stop after its step; the second raises KeyboardInterrupt at once."""

    def __init__(self, run: Run):
        self.run = run
        self.previous: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *error: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.run.stop_reason is not None:
            raise KeyboardInterrupt
        self.run.stop("interrupted")
