"""Which input made a compiled function compile again, by its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from fnn import tree


class RecompileError(RuntimeError):
    """A step or evaluation made with `strict=True` was given something its one graph does not fit."""


def graphs_compiled() -> int:
    """The number of graphs that this process has compiled since the compiler was last reset."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def described(inputs: dict[str, Any]) -> dict[str, str]:
    """What a graph is compiled for: {"batch leaf '0'": "float32 (64, 1, 32, 32) on cpu", "batch": its structure}."""
    found = {}
    for name, values in inputs.items():
        for path, leaf in tree.paths(values).items():
            found[f"{name} leaf {path!r}" if path else name] = _describe(leaf)
        if "" not in tree.paths(values):
            found[name] = " ".join(str(tree.flatten(values)[1]).split())
    return found


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)} on {leaf.device}"
    return "None" if leaf is None else type(leaf).__name__


def changed(before: dict[str, str], now: dict[str, str]) -> str:
    """The first difference between two descriptions, and how many leaves there are more."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    leaves = [name for name in names if " leaf " in name] or names
    if not leaves:
        return "the structure of an input changed"
    first, *others = leaves
    said = f"{first} was {before.get(first, 'absent')}, is {now.get(first, 'absent')}"
    return f"{said} (and {len(others)} more changed)" if others else said


def guard_reason(code: CodeType) -> str:
    """Why the newest graph of a function was compiled, as the compiler's guards say it."""
    from torch._dynamo.utils import guard_failures

    reasons = next((reasons for known, reasons in guard_failures.items() if known is code), [])
    return _without_id(reasons[-1]) if reasons else "the compiler gives no reason"


@contextmanager
def one_graph(name: str) -> Iterator[None]:
    """Inside, what would compile raises `RecompileError` with the guard that failed."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        reasons = [line.strip()[2:] for line in str(error).splitlines() if line.strip().startswith("- ")]
        reason = _without_id(reasons[0]) if reasons else "its graph is gone; was the compiler reset?"
        raise RecompileError(refusal(name, reason)) from None


def refusal(name: str, reason: str) -> str:
    return (
        f"{name}: this call does not fit the graph compiled at first: {reason}. Keep it as it was at the first call, "
        "or pass strict=False to compile another graph"
    )


def _without_id(reason: str) -> str:
    """A reason without the number of the graph, "0/0: ", nor the stack below it."""
    number, _, text = reason.splitlines()[0].partition(": ")
    return text if number.replace("/", "").replace("_", "").isdigit() else reason.splitlines()[0]
