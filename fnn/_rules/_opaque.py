"""Python functions that a compiled program calls without Dynamo looking into them.

Dynamo calls only functions that it knows beforehand, with tensors and constants. So a function is put into a table
while the program is traced, and its number there is such a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import tree

_functions: list[Any] = []
_NONE = "fnn._rules: None"  # in the place of None, which Dynamo hands on to no such function


def in_graph(call: Callable[..., Any]) -> Callable[..., Any]:
    """Of `call(functions, args, kwargs)` a function that works in compiled programs too.

    `functions` is a tuple of objects that the program has from outside; args and kwargs are trees of tensors, numbers,
    strings and None; the result is a tree of tensors.
    """

    def traced(number: int, args: Any, kwargs: Any) -> Any:
        shown = tree.map(lambda leaf: None if isinstance(leaf, str) and leaf == _NONE else leaf, (args, kwargs))
        return call(_functions[number], *shown)

    def dispatch(functions: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return call(functions, args, kwargs)
        for function in functions:
            id(function)  # of this Dynamo makes a guard: another function compiles anew
        for leaf in tree.leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                torch.ops.aten.alias(leaf)  # modes see no call of a nonstrict function, and this one in its place
        # Adding zero makes a plain constant of one that Dynamo would want to guard.
        number = _functions_defined_outside_the_compiled_function(*functions) + 0
        hidden = tree.map(lambda leaf: _NONE if leaf is None else leaf, (args, kwargs))
        return torch._dynamo.nonstrict_trace(traced)(number, *hidden)

    return dispatch


# Dynamo quotes this name where it finds no object, as for a function that closes over a variable of the program.
def _functions_defined_outside_the_compiled_function(*functions: Any) -> int:
    for number, known in enumerate(_functions):
        if len(known) == len(functions) and all(a is b for a, b in zip(known, functions, strict=True)):
            return number
    _functions.append(functions)
    return len(_functions) - 1


_functions_defined_outside_the_compiled_function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def held(value: Any) -> Any:
    """`value` in a function, which Dynamo takes for a constant on every torch; `release` takes it out."""
    if torch.compiler.is_compiling():
        return value

    def holder() -> None: ...

    holder.value = value  # type: ignore[attr-defined]
    holder.is_holder = True  # type: ignore[attr-defined]
    return holder


def release(holder: Any) -> Any:
    """The inverse of `held`."""
    return holder.value if getattr(holder, "is_holder", False) else holder
