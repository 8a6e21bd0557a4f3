"""Steps whose loss or update is not finite: why, and when a run gives up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.train._callback import Run
from fnn.train._history import History
from fnn.train._state import TrainState

TRIES = 10
"""So many bad steps are run again, one by one, to see whether their batch is to blame; by then it is the training."""


class NonFiniteError(FloatingPointError):
    """Losses or updates were not finite.

    `train_state` holds finite weights, if the step was made of `pure_step`; `step` is the number of the first bad step,
    `history` has the rows so far.
    """

    def __init__(self, message: str, train_state: TrainState, step: int, history: History):
        super().__init__(message)
        self.train_state, self.step, self.history = train_state, step, history


def check_skipped(run: Run, loader: Any, bad: list[int], in_a_row: range, limit: int) -> None:
    """Raise `NonFiniteError` where the data is to blame for a bad step, or where `limit` of them came in a row.

    bad: the bad steps since the last time
    in_a_row: the longest sequence of them
    """
    given_up = len(in_a_row) >= limit
    for step in bad[:TRIES]:
        batch = _batch_again(run, loader, step)
        reason = None if batch is None else _wrong_batch(run, batch, try_it=given_up or run.skipped <= TRIES)
        if reason is not None:
            message = f"the loss or an update was not finite in step {step}; {reason}"
            raise NonFiniteError(message, run.train_state, step, run.history)
    if bad and given_up:
        first, last = in_a_row[0], in_a_row[-1]
        message = f"the loss or an update was not finite in step {first}"
        if last > first:
            message = f"the losses or updates of {len(in_a_row)} steps in a row, {first} to {last}, were not finite"
        reason = _first_bad_leaf(run, last, _batch_again(run, loader, last))
        cure = "try a lower learning rate or optim.clip_by_global_norm"
        raise NonFiniteError(f"{message}; {reason}{cure}", run.train_state, first, run.history)


def _batch_again(run: Run, loader: Any, step: int) -> Any:
    """The batch of a step, where it can be had again."""
    if step + 1 == run.step:
        return run.batch
    if not callable(getattr(loader, "epoch", None)) or run.steps_per_epoch is None:
        return None
    return next(iter(loader.epoch(step // run.steps_per_epoch, start=step % run.steps_per_epoch)))


def _wrong_batch(run: Run, batch: Any, *, try_it: bool) -> str | None:
    """What is wrong with the batch itself, if anything is; `try_it` runs a whole step eagerly to see.

    That step runs on the CPU, which alone says what is wrong with a label.
    """
    path = _bad_path(batch)
    if path is not None:
        return f"its batch holds values that are not finite, in leaf {path!r}"
    if not try_it:
        return None
    try:
        with torch.no_grad():
            run.step_fn.update(*tree.map(Tensor.cpu, (run.train_state, batch)))
    except (ValueError, IndexError, RuntimeError) as error:  # what a compiled graph cannot raise
        if not any(word in str(error) for word in ("memory", "device")):  # of this second run, not of the first
            return f"run eagerly, it says: {error}"
    return None


def _first_bad_leaf(run: Run, step: int, batch: Any) -> str:
    """What is infinite or NaN in a bad step that is run again eagerly: loss, gradients or the new state, by path."""
    unguarded = getattr(run.step_fn.update, "unguarded", None)
    if unguarded is None or batch is None:
        return ""
    at = TrainState(*run.train_state.parts[:-1], torch.full_like(run.train_state.step, step))  # its key, its rate
    try:
        with torch.no_grad():
            grads, after, loss, _ = unguarded(at, batch)
    except RuntimeError:  # no memory for a step that is not compiled
        return ""
    if not bool(torch.isfinite(loss)):
        found = f"the loss is {float(loss)}"
        path = _bad_path({"params": grads})
        return found + (f", and the gradient of {path!r} is not finite either; " if path else "; ")
    if path := _bad_path({"params": grads}):
        return f"the loss is finite, the gradient of {path!r} is not; "
    if path := _bad_path({"params": after.params, "state": after.state, "opt_state": after.opt_state}):
        return f"loss and gradients are finite, the new {path!r} is not; "
    return ""


def _bad_path(values: Any) -> str | None:
    """The path of the first leaf that is not finite; that of a bare tensor is empty."""
    for path, leaf in tree.paths(values).items():
        if (leaf.is_floating_point() or leaf.is_complex()) and not bool(torch.isfinite(leaf).all()):
            return path
    return None
