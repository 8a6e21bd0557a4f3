"""What a checkpoint was made with, and whether a run that goes on from it has the same."""

from __future__ import annotations

import enum
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnn import _ranks
from fnn._placement import is_parted, placement


def plain(name: str, values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Values as JSON has them: tuples as lists; paths, dtypes and members of an Enum as strings.

    Raises `TypeError`, headed by `name`, for what has no such form: it could not be compared in another process.
    """
    if values is None:
        return None
    if not isinstance(values, dict):
        raise TypeError(f"Checkpointer: {name} is {type(values).__name__}, expected a dict (dataclasses.asdict)")

    def value(other: Any) -> Any:
        if isinstance(other, np.generic):
            return other.item()
        if isinstance(other, os.PathLike | enum.Enum | torch.dtype | torch.device):
            return str(other)
        raise TypeError(f"Checkpointer: {name} holds {other!r}, expected numbers, strings, paths, lists and dicts")

    return json.loads(json.dumps(values, default=value))


def check_same(what: str, now: dict[str, Any] | None, was: dict[str, Any] | None, path: Path, cure: str) -> None:
    """Raise `ValueError` naming the entries that differ. What was given on one side only is not compared."""
    if now is None or was is None or now == was:
        return
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    listed = ", ".join(f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in names)
    raise ValueError(f"Checkpointer: {what} of {path} differs: {listed}; {cure}, or give another folder")


def check_processes(was: int, path: Path) -> None:
    """Raise where a run would go on with more or fewer processes than it had."""
    if (now := _ranks.count()) != was:
        raise ValueError(
            f"Checkpointer: {path} is of a run of {was} process{'es' * (was > 1)}, this one has {now}: sums over "
            f"processes would round otherwise, and it would not end bit for bit as without the break; start {was} "
            "again, or let it go on all the same with Checkpointer(reshard=True)"
        )


def check_same_everywhere(values: dict[str, Any]) -> None:
    """Raise `ValueError`, on every process, naming what was not given alike to all; dicts are compared by entry."""
    if _ranks.count() == 1:
        return
    flat: dict[str, Any] = {}
    for name, value in values.items():
        entries = {f"{name} {key!r}": entry for key, entry in value.items()} if isinstance(value, dict) else None
        flat |= {name: value} if entries is None else entries
    # As text where equality says nothing: a NaN that was sent is not equal to the one that stayed.
    simple = int | float | str | None
    plain = {
        name: value if isinstance(value, simple) and value == value else json.dumps(value)
        for name, value in flat.items()
    }
    _ranks.check_same("Checkpointer", plain, "give every process the same")


def environment(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the rounding of a run depends on."""
    device = next((leaf.device.type for leaf in tensors.values()), "cpu")
    found = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    parted = [placement(leaf) for leaf in tensors.values() if is_parted(leaf)]
    if parted:
        found["placement"] = "; ".join(f"{parted.count(one)} leaves {one}" for one in sorted(set(parted)))
    return found


def warn_of_other_environment(was: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    differences = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names]
    if differences:
        warnings.warn(
            f"Checkpointer: {path.name} was written elsewhere ({', '.join(differences)}), so the run goes on "
            "with other rounding than it would have had",
            RuntimeWarning,
            stacklevel=5,
        )
