"""The optimizer inside a transformation: what each of those that wrap one needs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import GradientTransformation
from fnn.tree import Tree

State = TypeVar("State")


def check_transformation(owner: str, argument: str, transformation: Any) -> None:
    """Raise `TypeError` unless a transformation is one. `owner` is the function that it was given to."""
    if not isinstance(transformation, GradientTransformation):
        raise TypeError(
            f"{owner}: {argument} is {transformation!r}, expected a GradientTransformation such as sgd(0.1); "
            "was a factory passed without calling it, or were the arguments swapped?"
        )


def check_count(owner: str, least: int, **counts: int) -> None:
    """Raise `ValueError` unless each count is an int from `least` on."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{owner}: {name} must be an int >= {least}, got {count!r}")


def check_state(state: Any, kind: type[State]) -> State:
    """The state, known to be of the kind that this optimizer makes."""
    if not isinstance(state, kind):
        raise ValueError(
            f"opt_state: expected {kind.__name__}, got {type(state).__name__}; it was made by another optimizer. "
            "Use the state that this optimizer's init(params) returned"
        )
    return state


def choose(condition: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` where a 0-d condition holds, otherwise `old`, leaf by leaf."""
    return tree.map(lambda x, y: torch.where(condition, x, y), new, old)


def updates_if(condition: Tensor, updates: Tree) -> Tree:
    """The updates where a 0-d condition holds, otherwise updates that leave every parameter as it is."""
    # -0.0 and not 0.0, which added to a parameter of -0.0 would change it
    return tree.map(lambda u: torch.where(condition, u, -0.0), updates)
