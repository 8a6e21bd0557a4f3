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


def check_function(name: str, f: Any) -> None:
    """Raise unless `f` is a function that can be differentiated: a callable that `torch.compile` has not made."""
    if not callable(f):
        hint = f"; {name} takes the function first and returns a function: {name}(f)(x)" if _has_tensor(f) else ""
        raise TypeError(f"{name}: expected a function, got {type(f).__name__}{hint}")
    # torch.compile marks functions by the first of these attributes, as torch.compiler.disable does, and modules by the
    # second.
    marked = hasattr(f, "_torchdynamo_orig_callable") and not getattr(f, "_torchdynamo_disable", False)
    if marked or hasattr(f, "_orig_mod"):
        raise TypeError(
            f"{name}: the function is already compiled, and a compiled function cannot be differentiated to every "
            f"order; compile the outside instead: torch.compile(fnn.{name}(f)), not fnn.{name}(torch.compile(f))"
        )


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


def check_tensors(name: str, value: Any, where: str = "the output") -> None:
    """Raise `TypeError`, naming the leaf's path, unless every leaf of an output is a tensor."""
    for leaf in tree.leaves(value):
        if not isinstance(leaf, Tensor):
            path = next((path for path, other in tree.paths(value).items() if other is leaf), "")
            which = f"leaf {path!r} of {where}" if path else where
            cure = "; return other values through has_aux=True" if where == "the output" else ""
            raise TypeError(f"{name}: {which} is {type(leaf).__name__}, expected a tensor{cure}")


def split_aux(name: str, output: Any, has_aux: bool) -> tuple[Any, Any]:
    """An output as `(output, aux)`; `aux` is () without `has_aux`."""
    if not has_aux:
        return output, ()
    if not isinstance(output, tuple) or len(output) != 2:
        found = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
        raise TypeError(f"{name}: with has_aux=True the function must return (output, aux), got {found}")
    return output


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree.leaves(value))
