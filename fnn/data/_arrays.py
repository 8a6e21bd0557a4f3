"""Data in memory: trees of arrays that share their first axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fnn import tree


def common_length(data: Any, caller: str) -> int:
    """The number of examples: the length of the first axis that all leaves share.

    Raises `TypeError` or `ValueError`, headed by `caller`, naming the leaf that is no array, has no axis, or
    differs in length from the others.
    """
    lengths: dict[str, int] = {}
    for path, leaf in tree.paths(data).items():
        if not isinstance(leaf, Tensor | np.ndarray):
            raise TypeError(
                f"{caller}: {place(path)} is {type(leaf).__name__}, expected a tensor or numpy array; "
                f"turn lists of numbers into one with torch.tensor"
            )
        if leaf.ndim == 0:
            raise ValueError(f"{caller}: {place(path)} is a single number, expected a first axis over the examples")
        lengths[path] = len(leaf)
    if not lengths:
        raise ValueError(f"{caller}: data has no leaves, expected at least one tensor or numpy array")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path!r}: {length}" for path, length in lengths.items())
        raise ValueError(
            f"{caller}: the leaves of data differ in length along the first axis ({listed}); "
            f"expected one entry per example in each"
        )
    size = next(iter(lengths.values()))
    if size == 0:
        raise ValueError(f"{caller}: data is empty, expected at least one example")
    return size


def place(path: str) -> str:
    """How an error message calls the leaf at `path`."""
    return f"leaf {path!r} of data" if path else "data"
