"""What a checkpoint holds: states as named tensors, the memory of callbacks, and the rows of the history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._ranks import everywhere
from fnn.train._callback import Callback
from fnn.train._checkpoint_saved import Saved
from fnn.train._history import History
from fnn.train._state import TrainState

STATE, ROWS = "train_state", "history"


def named(prefix: str, values: Any) -> dict[str, Tensor]:
    return {f"{prefix}.{path}": leaf for path, leaf in tree.paths(values).items()}


def by_name(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks by class, the second of a class with a number: adding one to a run leaves the others' names alone."""
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name = type(callback).__name__
        same = sum(type(other).__name__ == name for other in named.values())
        named[f"{name}.{same}" if same else name] = callback
    return named


def take_callbacks(callbacks: Sequence[Callback], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What callbacks keep, as JSON by name, their tensors put into `tensors`."""
    kept: dict[str, Any] = {}
    for name, callback in by_name(callbacks).items():
        state = callback.state()
        kept[name] = None if state is None else _take_apart(f"callbacks.{name}", state, tensors)
    return kept


def apply_callbacks(callbacks: Sequence[Callback], saved: Saved, like: TrainState) -> None:
    """Hand back to each callback what was kept of it; its states are like `like`, its tensors whole and on the CPU."""
    everywhere("Checkpointer", lambda: _apply_callbacks(callbacks, saved, like))


def _apply_callbacks(callbacks: Sequence[Callback], saved: Saved, like: TrainState) -> None:
    kept, now = saved.facts["callbacks"], by_name(callbacks)
    for kind in {name.partition(".")[0] for name, state in kept.items() if state is not None}:
        counts = [sum(name.partition(".")[0] == kind for name in names) for names in (kept, now)]
        if counts[1] not in (0, counts[0]):
            raise ValueError(
                f"Checkpointer: {saved.path} was saved with {counts[0]} callbacks {kind}, this run has {counts[1]}, so "
                "which of them goes on with what is unknown; give those that the run was started with"
            )
    for name, callback in now.items():
        if kept.get(name) is not None:
            callback.restore(_put_together(f"callbacks.{name}", kept[name], saved, like))


def take_rows(history: History, tensors: dict[str, Tensor]) -> None:
    """The rows as JSON in a tensor of bytes: the header of a file may not be long."""
    text = json.dumps(history.rows, separators=(",", ":"), default=float)
    tensors[ROWS] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def apply_rows(history: History, saved: Saved) -> None:
    history.rows[:] = json.loads(saved.tensor(ROWS).numpy().tobytes())


def _take_apart(prefix: str, state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of a callback as JSON, its tensors put into `tensors`."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        place = f"{prefix}.{name}"
        if isinstance(value, TrainState):
            tensors |= named(place, value)
            plain[name] = {"kind": "TrainState"}
        elif isinstance(value, Tensor):
            tensors[place] = value
            plain[name] = {"kind": "Tensor"}
        else:
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(
                    f"Checkpointer: {place} is {value!r}; the state() of a callback can hold tensors, TrainStates and "
                    "what JSON can hold"
                ) from error
            plain[name] = {"kind": "plain", "value": value}
    return plain


def _put_together(prefix: str, kept: dict[str, Any], saved: Saved, like: TrainState) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, entry in kept.items():
        place = f"{prefix}.{name}"
        if entry["kind"] == "TrainState":
            state[name] = state_like(like, saved, place)
        else:
            state[name] = saved.tensor(place) if entry["kind"] == "Tensor" else entry["value"]
    return state


def state_like(like: TrainState, saved: Saved, prefix: str) -> TrainState:
    """The saved state, in the structure and memory layout of `like`."""
    expected = tree.paths(like)
    found = {
        name.removeprefix(prefix + "."): leaf for name, leaf in saved.leaves.items() if name.startswith(prefix + ".")
    }
    for path in [*expected, *found]:
        was, now = _kind(found.get(path)), _kind(expected.get(path))
        if was != now:
            raise ValueError(
                f"Checkpointer: {saved.path} is of another network or optimizer: leaf {path!r} is {was} there, and "
                f"{now} in this run; make the same network and optimizer, or give another folder"
            )
    blank = tree.map(torch.empty_like, like)
    saved.fill(named(prefix, blank))
    return blank


def _kind(leaf: Tensor | None) -> str:
    return "absent" if leaf is None else f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
