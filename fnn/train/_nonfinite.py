"""Steps whose loss or update is not finite: why, and when a run gives up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn import _ranks, tree
from fnn._placement import local
from fnn.train._callback import Run
from fnn.train._history import History
from fnn.train._state import TrainState
from fnn.train._together import any_of

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

    Both are the same in all processes, as metrics are. What one of them finds in its part of a batch all of them raise.
    """
    given_up = len(in_a_row) >= limit
    for step in bad[:TRIES]:
        batch = _batch_again(run, loader, step)
        reason = _of_any(None if batch is None else _wrong_batch(run, batch, try_it=given_up or run.skipped <= TRIES))
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

    That step runs on the CPU, which alone says what is wrong with a label. Of several processes one whose step raises
    would leave the others waiting, so they try nothing.
    """
    path = _bad_path(batch)
    if path is not None:
        whose = "its batch" if _ranks.count() == 1 else f"the part of its batch that rank {_ranks.rank()} has"
        return f"{whose} holds values that are not finite, in leaf {path!r}"
    if not try_it or _ranks.count() > 1:
        return None
    try:
        with torch.no_grad():
            run.step_fn.update(*tree.map(Tensor.cpu, (run.train_state, batch)))
    except (ValueError, IndexError, RuntimeError) as error:  # what a compiled graph cannot raise
        if not any(word in str(error) for word in ("memory", "device")):  # of this second run, not of the first
            return f"run eagerly, it says: {error}"
    return None


def _of_any(found: str | None) -> str | None:
    """What the first process that has found something has found; every process has to call this."""
    return next((other for other in _ranks.gather("fit", found) if other is not None), None)


def _first_bad_leaf(run: Run, step: int, batch: Any) -> str:
    """What is infinite or NaN in a bad step that is run again eagerly: loss, gradients or the new state, by path."""
    unguarded = getattr(run.step_fn.update, "unguarded", None)
    if unguarded is None or any_of(batch is None)[0]:
        return ""
    at = TrainState(*run.train_state.parts[:-1], torch.full_like(run.train_state.step, step))  # its key, its rate
    try:
        with torch.no_grad():
            grads, after, loss, _ = unguarded(at, batch)
    except RuntimeError:  # no memory for a step that is not compiled
        return ""
    in_grads = _of_any(_bad_path({"params": grads}))
    in_state = _of_any(_bad_path({"params": after.params, "state": after.state, "opt_state": after.opt_state}))
    if not bool(torch.isfinite(loss)):
        found = f"the loss is {float(loss)}"
        return found + (f", and the gradient of {in_grads!r} is not finite either; " if in_grads else "; ")
    if in_grads:
        return f"the loss is finite, the gradient of {in_grads!r} is not; "
    return f"loss and gradients are finite, the new {in_state!r} is not; " if in_state else ""


def _bad_path(values: Any) -> str | None:
    """The path of the first leaf that is not finite in this process; that of a bare tensor is empty."""
    for path, leaf in tree.map(local, tree.paths(values)).items():
        if (leaf.is_floating_point() or leaf.is_complex()) and not bool(torch.isfinite(leaf).all()):
            return path
    return None
