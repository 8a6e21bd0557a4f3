"""A function of any pytrees as one from a vector to a vector, the form that has a matrix for a derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_tensors
from fnn.diff._arguments import Argnums, at, split_aux
from fnn.diff._composed import by_operators


@dataclass(frozen=True, eq=False)
class FlatFunction:
    """`f` at the selected arguments, flattened in `fnn.tree`'s leaf order, outputs too.

    scalar: the output must have shape (), as for a Hessian.
    """

    name: str
    f: Callable[..., Any]
    argnums: Argnums
    has_aux: bool
    scalar: bool

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[[Tensor], Any], Tensor]:
        """`(function, x)`, x: (n,); `function(x)` gives `(out, (value, aux))`, out: (m,), or () for a scalar."""
        of_selected, selected = at(self.name, self.f, self.argnums, args, kwargs)
        leaves, structure = tree.flatten(selected)
        for leaf in leaves:
            if leaf.is_complex():
                raise TypeError(
                    f"{self.name}: complex inputs are not supported; split them into real and imaginary parts"
                )
        shapes, sizes = [leaf.shape for leaf in leaves], [leaf.numel() for leaf in leaves]
        dtypes = [leaf.dtype for leaf in leaves]

        def function(x: Tensor) -> Any:
            parts = torch.split(x, sizes) if len(sizes) > 1 else [x]
            restored = [p.reshape(s).to(d) for p, s, d in zip(parts, shapes, dtypes, strict=True)]
            with by_operators():
                output = of_selected(tree.unflatten(structure, restored))
            value, aux = split_aux(self.name, output, self.has_aux)
            return self._flat_output(value), (value, aux)

        return function, _joined(leaves)

    def _flat_output(self, value: Any) -> Tensor:
        check_tensors(self.name, value)
        leaves = tree.leaves(value)
        if not leaves:
            raise TypeError(f"{self.name}: the function returns no tensor")
        for path, leaf in tree.paths(value).items():
            where = f"leaf {path!r} of the output" if path else "the output"
            if not leaf.is_floating_point():
                raise TypeError(
                    f"{self.name}: {where} is {leaf.dtype}, expected a real floating-point tensor; return others "
                    "through has_aux=True"
                )
        if not self.scalar:
            return _joined(leaves)
        if len(leaves) != 1 or leaves[0].shape != ():
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"{self.name}: expected one scalar output of shape (), got {shapes}; use .sum() or .mean()"
            )
        return leaves[0]


def input_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a prepared derivative is prepared for: the structure of the arguments, then the shapes of their tensors."""
    leaves, structure = tree.flatten((args, kwargs))
    return (structure, *(tuple(leaf.shape) if isinstance(leaf, Tensor) else _constant(leaf) for leaf in leaves))


def _constant(leaf: Any) -> tuple[str, Any]:
    """What tells an argument that is no tensor from another: a number's or a word's value, else the object."""
    plain = leaf is None or isinstance(leaf, bool | int | float | complex | str)
    return type(leaf).__name__, leaf if plain else id(leaf)


def place(names: dict[str, int], index: int) -> str:
    """Where in a tree, given as `{path: size}` in leaf order, the element `index` of its vector is, in words."""
    for path, size in names.items():
        if index < size:
            return f"element {index} of {path!r}" if path else f"element {index}"
        index -= size
    raise IndexError(index)


def _joined(leaves: list[Tensor]) -> Tensor:
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])
