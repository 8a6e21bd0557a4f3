"""`fit`: the training loop around a step.

Metrics stay on the device and are read every `log_every` steps, so the loop does not wait for the device at each
step. A run's position is its step count alone: batch `step % len(loader)` of epoch `step // len(loader)`.

A checkpoint is taken between two steps, after the row of the history and all callbacks of the step before, so that
what it holds decides the rest of the run. An interrupted run is saved before its broken row is written down: the run
that goes on from there writes the whole row.

Several processes that train one network are all in the same place of this loop, since each of its steps, rows and
checkpoints may be an operation of all. What only one of them knows, such as a signal, decides nothing before it is
settled (`Run.settle`).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fnn import _ranks
from fnn.train._callback import Callback, Run
from fnn.train._checkpoint import Checkpointer
from fnn.train._checkpoint_content import apply_callbacks
from fnn.train._history import History
from fnn.train._meter import Meter
from fnn.train._nonfinite import check_skipped
from fnn.train._signals import Signals
from fnn.train._state import TrainState
from fnn.train._step import Step
from fnn.train._together import any_of, check_alike, check_trained_together, explain

Evaluation = Callable[[TrainState], dict[str, float]]


def fit(
    step: Step,
    train_state: TrainState,
    loader: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    eval: Evaluation | None = None,
    eval_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    log_every: int = 20,
    checkpoints: Checkpointer | None = None,
    resume: bool = False,
    nonfinite_limit: int = 10,
) -> tuple[TrainState, History]:
    """Train until the run has had `epochs` epochs, or `steps` steps, counted from its step 0; returns the new state.

    loader: a `data.Loader` or any iterable of batches, iterated once an epoch. A run can be resumed bit for bit where
        it gives the same batches again, as a `data.Loader` does
    eval: ``eval(train_state)`` returns numbers for the history, recorded as "eval_...":
        ``lambda ts: train.evaluate(eval_step, ts, test)``
    eval_every: steps from one row of the history, with its evaluation, to the next; None makes a row an epoch
    log_every: steps from one reading of the device to the next
    checkpoints: where the run is saved: at each row, at the end, and when a signal ends it
    resume: go on from the newest good checkpoint; a run of n steps and one that was resumed after k of them end bit
        for bit alike. Where there is none, the run starts from `train_state`
    nonfinite_limit: so many steps in a row whose loss or update is not finite end the run

    A state that comes from step n goes on with step n + 1, in the middle of an epoch if need be; where the loader has
    no length, `epochs` counts from this call on, or from where the resumed run started. A state that is further than
    the run was to end is returned as it is, with a warning.

    Ctrl-C and SIGTERM end the run after the current step, with `history.stopped` "interrupted" or "terminated"; a
    second one ends it at once.

    In several processes (`fnn.distributed.init`) every one calls this, with the same arguments. They settle at each
    reading whether one of them has got a signal or was asked to stop, and then all end after the same step; where
    readings are more than five seconds apart, signals are settled after each step. The history is that of rank 0.

    A step whose loss or update is not finite is skipped inside the step (see `pure_step`) and counts in no mean; a
    row says how many were "skipped". Raises `NonFiniteError` where too many come in a row, naming the step and the
    first leaf that is not finite, and at once where the batch itself is to blame. That is noticed when metrics are
    read. Whatever error ends a run carries the trained state and the rows so far as `error.train_state` and
    `error.history`. Raises `ValueError`, on every process, where options or states differ between processes.
    """
    _check(epochs, steps, eval_every=eval_every, log_every=log_every, nonfinite_limit=nonfinite_limit)
    if resume and checkpoints is None:
        raise ValueError("fit: resume=True needs checkpoints=train.Checkpointer(folder), where the run was saved")
    if checkpoints is not None and not isinstance(checkpoints, Checkpointer):
        raise TypeError(f"fit: checkpoints is {checkpoints!r}, expected train.Checkpointer(folder) or None")
    if not isinstance(callbacks, Sequence) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise TypeError(f"fit: callbacks is {callbacks!r}, expected a list of callbacks, such as [train.Progress()]")
    if train_state.step.dim():
        raise ValueError("fit trains one network; for an ensemble, call the step in a loop of your own")
    per_epoch = _length(loader)
    if per_epoch == 0:
        raise ValueError("fit: the loader has no batches")
    total = steps if epochs is None else epochs * per_epoch if per_epoch else None
    at = int(train_state.step)
    options = {
        "epochs": epochs,
        "steps": steps,
        "eval": eval is not None,
        "eval_every": eval_every,
        "log_every": log_every,
        "nonfinite_limit": nonfinite_limit,
        "checkpoints": checkpoints is not None,
        "resume": resume,
        "callbacks": [type(callback).__name__ for callback in callbacks if not callback.main_only],
        "len(loader)": per_epoch,
    }
    check_alike(options, train_state)
    check_trained_together(step, train_state, loader)
    callbacks = [callback for callback in callbacks if _ranks.is_main() or not callback.main_only]
    run = Run(step, train_state, History(), at, total, per_epoch, started_at=at, epoch_began=at)
    meter = Meter(run, loader)
    if total is not None:  # a run of five bad steps is no success either
        nonfinite_limit = min(nonfinite_limit, max(total - at, 1))
    saved = None if checkpoints is None else checkpoints.open(run, meter, loader, resume=resume)
    if total is not None and (run.step > total or (run.step == total and saved is None)):
        warnings.warn(
            f"fit: the state is at step {run.step} and the run was to end at step {total}, so there is nothing to do; "
            "epochs and steps count from step 0 of the run",
            RuntimeWarning,
            stacklevel=2,
        )
        if saved is None:
            if checkpoints is not None:
                checkpoints.close()
            return train_state, run.history

    loop = _Loop(run, meter, loader, epochs, eval, eval_every, callbacks, log_every, checkpoints, nonfinite_limit)
    started: list[Callback] = []
    with Signals(run):
        try:
            for callback in callbacks:
                callback.start(run)
                started.append(callback)
            if saved is not None:
                apply_callbacks(callbacks, saved, run.train_state)
            run.settle()
            loop.run_all()
        except BaseException as error:
            explain(error)
            run.ended = run.ended or type(error).__name__
            error.train_state, error.history = run.train_state, run.history  # type: ignore[attr-defined]
            torn = "" if isinstance(error, Exception) else ", parts of which may be of the step that was under way"
            error.add_note(
                f"fit: error.train_state is the state after step {run.step}{torn}; error.history has the rows"
            )
            raise
        finally:
            run.history.stopped = run.stop_reason
            with contextlib.ExitStack() as ending:  # each of these, whatever the others raise
                if checkpoints is not None:
                    ending.callback(checkpoints.close)
                for callback in reversed(started):
                    ending.callback(callback.end, run)
    return run.train_state, run.history


class _Loop:
    """The steps of a run and what happens between them."""

    def __init__(
        self,
        run: Run,
        meter: Meter,
        loader: Iterable[Any],
        epochs: int | None,
        eval: Evaluation | None,
        eval_every: int | None,
        callbacks: Sequence[Callback],
        log_every: int,
        checkpoints: Checkpointer | None,
        nonfinite_limit: int,
    ):
        self.run, self.meter, self.loader, self.epochs = run, meter, loader, epochs
        self.eval, self.eval_every, self.log_every, self.checkpoints = eval, eval_every, log_every, checkpoints
        self.callbacks = callbacks
        self.after_step = [callback.step for callback in callbacks if type(callback).step is not Callback.step]
        self.nonfinite_limit = nonfinite_limit

    def run_all(self) -> None:
        run = self.run
        if self.meter.steps and self.row_due():  # the run was broken off after the step, before the row
            self.row()
        while run.stop_reason is None and (
            run.step < run.total_steps if run.total_steps is not None else run.epoch < (self.epochs or 0)
        ):
            self.epoch()
        further = run.total_steps is not None and run.step > run.total_steps
        if self.checkpoints is not None and run.signal is None and not further:  # a stream's end is known only here
            self.checkpoints.save_run(run, self.meter, self.callbacks, finished=True)

    def epoch(self) -> None:
        """The rest of the current epoch, or of the run."""
        run, begun = self.run, self.run.step
        for batch in self.batches():
            run.batch = batch
            run.train_state, metrics = run.step_fn(run.train_state, batch)
            run.step += 1
            self.meter.add(metrics, batch)
            for observe in self.after_step:
                observe(run)
            reading = run.step % self.log_every == 0 or run.step == run.started_at + 1
            saving = self.checkpoints is not None and self.checkpoints.due(run.step)
            if reading:
                values = self.read()
                for callback in self.callbacks:
                    callback.log(run, values)
            if reading or saving or run.slow or self.row_due():
                run.settle(reading=reading or saving or self.row_due())
            if self.row_due():
                self.row()
            elif self.checkpoints is not None and saving:
                self.read()
                self.checkpoints.save_run(run, self.meter, self.callbacks)
            if run.stop_reason is not None or run.step == run.total_steps:
                return
        if run.signal is not None:
            self.read()
            if self.meter.steps:
                self.row()
            return
        self.check_complete(run.step - begun)
        run.epochs_done, run.epoch_began = run.epochs_done + 1, run.step
        if run.steps_per_epoch is None and (self.eval_every is None or self.ends_between_rows()):
            self.row()

    def batches(self) -> Iterator[Any]:
        """The rest of the current epoch; how many batches there are is the same in all processes."""
        batches = self.loaded()
        if _ranks.count() == 1 or self.run.steps_per_epoch is not None:
            yield from batches
            return
        while True:
            given = list(itertools.islice(batches, 1))
            some, none = any_of(bool(given), not given)
            if some and none:
                raise ValueError(
                    f"fit: after step {self.run.step} the loader of rank {_ranks.rank()} has "
                    f"{'another batch' if given else 'ended'}, unlike that of another rank; give every process as many "
                    "batches"
                )
            if none:
                return
            yield from given

    def loaded(self) -> Iterator[Any]:
        """The rest of the current epoch; the processes that load it may die of the signal that ends the run.

        Where the run has to go on to the step after which all processes end, they are started anew.
        """
        run, failed = self.run, -1
        while True:
            try:
                yield from _batches(self.loader, run)
            except Exception:
                if run.heard is None or run.step == failed:
                    raise
                if run.signal is None:
                    failed = run.step
                    continue
            return

    def row_due(self) -> bool:
        """Whether a row of the history ends at this step; of a loader without length only its end tells."""
        run = self.run
        if run.stop_reason is not None or run.step == run.total_steps:
            return True
        every = self.eval_every or run.steps_per_epoch
        return every is not None and run.step % every == 0

    def ends_between_rows(self) -> bool:
        """Whether steps of the last epoch are in no row yet."""
        return self.run.epochs_done == self.epochs and self.run.step % (self.eval_every or 1) != 0

    def check_complete(self, count: int) -> None:
        """Raise where the loader gave nothing, or fewer batches than it said."""
        run = self.run
        if not count and run.step == run.epoch_began:
            raise ValueError("fit: the loader gave no batches; an iterator that is used up cannot be iterated again")
        if run.steps_per_epoch and run.step % run.steps_per_epoch:
            raise ValueError(f"fit: the loader has length {run.steps_per_epoch}, but gave {count} batches")

    def read(self) -> dict[str, float]:
        values, bad = self.meter.read()
        check_skipped(self.run, self.loader, bad, self.meter.worst, self.nonfinite_limit)
        return values

    def row(self) -> None:
        """Write a row of the history, with the evaluation of what was trained, and save the run."""
        run, meter = self.run, self.meter
        self.read()
        stopped, broken_off = run.stop_reason is not None, run.ended is None and run.signal is not None
        if broken_off and self.checkpoints is not None:
            self.checkpoints.save_run(run, meter, self.callbacks)
        skipped = meter.skipped
        row = {"epoch": self.epoch_number(), "step": run.step, **meter.row()}
        if skipped:
            row["skipped"] = skipped
        if self.eval is not None and not stopped:
            row |= _evaluated(self.eval(run.train_state))
        row |= {"seconds": meter.seconds(), "examples_per_second": run.examples_per_second}
        row = _ranks.on_main("fit", lambda: row)  # clocks differ, and callbacks are to decide alike
        run.history.rows.append(row)
        for callback in self.callbacks:
            callback.epoch(run, row)
        run.settle()
        if self.checkpoints is not None and not broken_off:
            self.checkpoints.save_run(run, meter, self.callbacks, row, finished=run.finished)
        meter.restart_clock()

    def epoch_number(self) -> float:
        """The epoch that was begun last; with `eval_every` epochs done, fractions of one too."""
        run, length = self.run, self.run.steps_per_epoch
        if length is None:
            return run.epochs_done + (run.step > run.epoch_began)
        return -(-run.step // length) if self.eval_every is None else round(run.step / length, 4)


def _check(epochs: int | None, steps: int | None, **numbers: int | None) -> None:
    if (epochs is None) == (steps is None):
        raise TypeError("fit needs either epochs= or steps=")
    for name, value in {"epochs": epochs, "steps": steps, **numbers}.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"fit: {name} must be a positive integer, got {value!r}")


def _evaluated(found: Any) -> dict[str, float]:
    """The columns of an evaluation."""
    try:
        return {f"eval_{name}": float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"fit: eval returned {found!r}, expected a dict of numbers by name") from error


def _length(loader: Any) -> int | None:
    """Batches in an epoch, where the loader knows."""
    try:
        return len(loader)
    except TypeError:
        return None


def _batches(loader: Any, run: Run) -> Iterator[Any]:
    """The batches of the current epoch from the current step on."""
    start = run.step % run.steps_per_epoch if run.steps_per_epoch else run.step - run.epoch_began
    if callable(getattr(loader, "epoch", None)):
        return loader.epoch(run.epoch, start=start)
    return itertools.islice(loader, start, run.steps_per_epoch)
