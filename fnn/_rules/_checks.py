"""What every transform asks of its function and of the function's output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fnn import tree


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


def check_tensors(name: str, value: Any, where: str = "the output") -> None:
    """Raise `TypeError`, naming the leaf's path, unless every leaf of an output is a tensor."""
    for leaf in tree.leaves(value):
        if not isinstance(leaf, Tensor):
            path = next((path for path, other in tree.paths(value).items() if other is leaf), "")
            which = f"leaf {path!r} of {where}" if path else where
            cure = "; return other values through has_aux=True" if where == "the output" else ""
            raise TypeError(f"{name}: {which} is {type(leaf).__name__}, expected a tensor{cure}")


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree.leaves(value))
