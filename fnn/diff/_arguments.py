"""What every transform does with its arguments: the chosen ones become one pytree, checked by name.

`at(f, argnums, args, kwargs)` makes of any call a function of ONE pytree, the selected arguments; so each transform is
written once, for a function of one tree, and its result has the structure of `argnums`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import tree

Argnums = int | tuple[int, ...]


def own_code(derivative: Any) -> Callable[..., Any]:
    """The function around a code object of its own, so that compiled derivatives do not share the compiler's cache.

    Dynamo allows eight recompiles for a code object: without this the ninth function whose gradient is compiled
    would fail, and functions of other shapes would be compiled for all shapes.
    """
    if torch.compiler.is_compiling():  # a part of that function's code
        return derivative
    own = types.FunctionType(
        derivative.__code__.replace(), derivative.__globals__, derivative.__name__, None, derivative.__closure__
    )
    own.__qualname__ = derivative.__qualname__
    return own


def at(
    name: str, f: Callable[..., Any], argnums: Argnums, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[Callable[[Any], Any], Any]:
    """`f` as a function of the arguments at `argnums` alone, and these: one tree, or a tuple of trees for a tuple.

    Raises `ValueError` for positions that are not there, and what `check_differentiable` raises.
    """
    kwargs = kwargs or {}
    single = not isinstance(argnums, tuple | list)
    positions = []
    for index in (argnums,) if single else argnums:  # type: ignore[union-attr]
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"{name}: argnums must be an int or a tuple of ints, got {argnums!r}")
        if not -len(args) <= index < len(args):
            raise ValueError(f"{name}: argnums={argnums!r}, but the function was called with {len(args)} arguments")
        positions.append(index % len(args))
    if len(positions) == 0 or len(set(positions)) != len(positions):
        raise ValueError(f"{name}: argnums must name at least one argument, each once, got {argnums!r}")
    for index in positions:
        check_differentiable(name, args[index], f"argument {index}")

    def of_selected(selected: Any) -> Any:
        arguments = list(args)
        for index, value in zip(positions, (selected,) if single else selected, strict=True):
            arguments[index] = value
        return f(*arguments, **kwargs)

    return of_selected, args[positions[0]] if single else tuple(args[index] for index in positions)


def check_differentiable(name: str, value: Any, where: str) -> None:
    """Raise `TypeError`, naming the leaf's path, unless every leaf is a floating-point or complex tensor."""
    for leaf in tree.leaves(value):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            continue
        path = next((path for path, other in tree.paths(value).items() if other is leaf), "")
        which = f"leaf {path!r} of {where}" if path else where
        if isinstance(leaf, Tensor):
            raise TypeError(
                f"{name}: {which} is {leaf.dtype}, and only floating-point tensors have derivatives; leave it out, by "
                "argnums, fnn.tree.partition or a function that closes over it, or convert it with .float()"
            )
        cure = "; torch.tensor makes one of a number" if isinstance(leaf, int | float | complex) else ""
        raise TypeError(f"{name}: {which} is {type(leaf).__name__}, expected a floating-point tensor{cure}")


def split_aux(name: str, output: Any, has_aux: bool) -> tuple[Any, Any]:
    """An output as `(output, aux)`; `aux` is () without `has_aux`."""
    if not has_aux:
        return output, ()
    if not isinstance(output, tuple) or len(output) != 2:
        found = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
        raise TypeError(f"{name}: with has_aux=True the function must return (output, aux), got {found}")
    return output
