"""Data in memory: trees of arrays that share their first axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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


def check_labels(stratify: Tensor | np.ndarray, size: int, caller: str) -> Tensor:
    """`stratify` as a CPU tensor; raises unless it holds an integer label for each of `size` examples."""
    if isinstance(stratify, np.ndarray) and stratify.dtype.kind not in "biuf":
        raise TypeError(
            f"{caller}: stratify has dtype {stratify.dtype}, expected integer labels; "
            f"np.unique(labels, return_inverse=True)[1] numbers them"
        )
    labels = to_tensor(stratify, "", caller) if isinstance(stratify, np.ndarray) else torch.as_tensor(stratify).cpu()
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{caller}: stratify has shape {tuple(labels.shape)} and dtype {labels.dtype}, "
            f"expected one integer label for each of the {size} examples: ({size},)"
        )
    return labels


def take(data: Any, index: Tensor) -> Any:
    """The examples of `data` at `index`, a CPU tensor; each leaf stays what and where it is."""

    def one(leaf: Tensor | np.ndarray) -> Tensor | np.ndarray:
        return rows(leaf, index.to(leaf.device)) if isinstance(leaf, Tensor) else leaf[index.numpy()]

    return tree.map(one, data)


def rows(leaf: Tensor, index: Tensor) -> Tensor:
    """The entries of `leaf` at `index` along its first axis."""
    if leaf.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which index_select lacks
        return leaf[index]
    return leaf.index_select(0, index)


def first_device(data: Any) -> torch.device:
    """The device of the first tensor in `data`; the CPU where there is none."""
    return next((leaf.device for leaf in tree.leaves(data) if isinstance(leaf, Tensor)), torch.device("cpu"))


def to_tensor(leaf: Tensor | np.ndarray, path: str, caller: str) -> Tensor:
    """The array at `path` as a tensor, without a copy where torch can share its memory."""
    if isinstance(leaf, Tensor):
        return leaf
    if leaf.dtype.kind not in "biufc":
        raise TypeError(
            f"{caller}: {place(path)} has numpy dtype {leaf.dtype}, expected numbers; encode it as integers"
        )
    # torch takes neither foreign byte orders nor reversed axes, and warns of memory that is read-only.
    native = leaf.astype(leaf.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))
