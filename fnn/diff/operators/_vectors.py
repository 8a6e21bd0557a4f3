"""Trees as vectors, and products with one vector as products with many, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from fnn import tree
from fnn.diff._arguments import check_differentiable, own_code


def check_real(name: str, value: Any, where: str) -> None:
    """Raise `TypeError` unless every leaf is a real floating-point tensor, `ValueError` where there is no leaf."""
    check_differentiable(name, value, where)
    if not tree.leaves(value):
        raise ValueError(f"{name}: {where} has no leaves")
    for path, leaf in tree.paths(value).items():
        if leaf.is_complex():
            which = f"leaf {path!r} of {where}" if path else where
            raise TypeError(f"{name}: {which} is complex; operators are real, so use torch.view_as_real")


def ravel(value: Any, dtype: torch.dtype) -> Tensor:
    """The leaves of a tree as one vector."""
    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in tree.leaves(value)])


def unravel(v: Tensor, like: Any) -> Any:
    """The inverse of `ravel` for trees like `like`."""
    leaves, structure = tree.flatten(like)
    parts = torch.split(v, [leaf.numel() for leaf in leaves])
    return tree.unflatten(structure, [p.reshape(x.shape).to(x.dtype) for p, x in zip(parts, leaves, strict=True)])


def over_columns(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`product(v, *batch)` for each column of a matrix in the place of v."""

    def block(columns: Tensor, *batch: Any) -> Tensor:
        return torch.vmap(lambda v: product(v, *batch), 1, 1)(columns)

    return block


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; inside of transforms and of compiled functions, where that cannot be called, as it is."""
    program = torch.compile(own_code(function), fullgraph=True)

    def run(*args: Any) -> Any:
        plain = torch.compiler.is_compiling() or get_interpreter_stack()
        return (function if plain else program)(*args)

    return run
