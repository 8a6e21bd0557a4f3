"""The arguments of one call as a list of tensors, and the way back: what rules of tensors need of trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fnn import tree
from fnn._rules._rule import Maybe, is_differentiable


class Call:
    """A call with its tensors taken out. Numbers, strings and None in the arguments stay as they are."""

    def __init__(self, positions: Sequence[int], nondiff: Sequence[Any], args: Any, kwargs: Any = ()) -> None:
        self.positions, self.nondiff = positions, nondiff
        self.leaves, self.structure = tree.flatten((args, dict(kwargs)))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def arguments(self, tensors: Sequence[Any], others: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in them; without `others`, None stands for what is no tensor."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf if others else None for leaf in self.leaves]
        return tree.unflatten(self.structure, leaves)

    def __call__(self, f: Callable[..., Any], tensors: Sequence[Any]) -> Any:
        """`f` of these tensors in the place of the call's."""
        args, kwargs = self.arguments(tensors)
        return f(*join(self.positions, self.nondiff, args), **kwargs)

    @property
    def count(self) -> int:
        """The number of differentiable arguments."""
        return len(self.arguments(self.tensors)[0])

    def match(self, name: str, inputs: Sequence[Tensor], cotangents: tuple[Any, ...]) -> Maybe:
        """One cotangent for each input; raises where the cotangents have not the arguments' structure and shapes."""
        positions = [index for index in range(self.count + len(self.positions)) if index not in self.positions]
        found: list[Tensor | None] = []
        for index, argument, cotangent in zip(positions, self.arguments(inputs)[0], cotangents, strict=True):
            found.extend(match(f"{name} of argument {index}", argument, cotangent))
        return found


def match(name: str, like: Any, derivatives: Any) -> Maybe:
    """One leaf of `derivatives`, or None, for each tensor of `like`; raises where structure or shapes differ.

    None stands for zero, for a whole tree and for a leaf.
    """
    if derivatives is None:
        return [None for leaf in tree.leaves(like) if isinstance(leaf, Tensor)]
    if (difference := tree.difference(like, derivatives)) is not None:
        raise ValueError(f"{name}: {difference}")
    found: list[Tensor | None] = []
    for index, (leaf, derivative) in enumerate(zip(tree.leaves(like), tree.leaves(derivatives), strict=True)):
        if not isinstance(leaf, Tensor):
            continue
        if derivative is None or not is_differentiable(leaf):
            found.append(None)
            continue
        path = list(tree.paths(like))[index]
        where = f"{name}: leaf {path!r}" if path else name
        if not isinstance(derivative, Tensor):
            raise TypeError(f"{where} is {type(derivative).__name__}, expected a tensor or None for zero")
        if derivative.shape != leaf.shape:
            raise ValueError(f"{where} has shape {tuple(derivative.shape)}, expected {tuple(leaf.shape)}")
        found.append(derivative.to(leaf.dtype))
    return found


def nondiff_positions(name: str, positions: int | Sequence[int]) -> tuple[int, ...]:
    """`nondiff_argnums` as increasing positions."""
    found = (positions,) if isinstance(positions, int) else tuple(sorted(positions))
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in found):
        raise TypeError(f"{name}: nondiff_argnums must be positions from 0 on, got {positions!r}")
    return found


def split(name: str, positions: tuple[int, ...], args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments at `nondiff_argnums`, and the others."""
    if positions and positions[-1] >= len(args):
        raise TypeError(f"{name}: nondiff_argnums={positions}, but the function was called with {len(args)} arguments")
    nondiff = tuple(args[index] for index in positions)
    for index, value in zip(positions, nondiff, strict=True):
        if any(isinstance(leaf, Tensor) for leaf in tree.leaves(value)):
            raise TypeError(
                f"{name}: argument {index} is in nondiff_argnums and holds a tensor; make it an ordinary argument, "
                "whose derivative may be None"
            )
    return nondiff, tuple(value for index, value in enumerate(args) if index not in positions)


def join(positions: Sequence[int], nondiff: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The inverse of `split`."""
    joined = list(args)
    for index, value in zip(positions, nondiff, strict=True):
        joined.insert(index, value)
    return joined
