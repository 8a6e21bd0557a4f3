"""`Repeat`: n copies of one layer, one after another, each with parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.nn._containers import Children, Container, Located, Nursery, Run, named_children, without_carry
from fnn.nn._layer import Layer, Params, State, as_layer, layer


@layer
class Repeat(Container):
    """`layer` n times, one after another, each copy with its own parameters; named inputs go to every copy.

    A copy takes one value and hands one on; of a recurrent layer every copy starts from zeros, its carry is dropped.

    params and state hold the copies under "0" to "n-1", as torch names them. With `stacked=True` they hold one tree
    under "*", each leaf with an axis of length n in front: optimizers and graphs then see n times fewer leaves, which
    compiles faster; `interop.to_state_dict` writes torch's names all the same. Numbers and keys are equal either way.
    Optimizers that look at a leaf's shape (Muon, LAMB, decay by `ndim`) see the stack.

    Example:
        >>> from fnn import nn, random
        >>> net = nn.Repeat(nn.Linear(4), 3, stacked=True)
        >>> params, _ = net.init(random.key(0), torch.zeros(2, 4))
        >>> params["*"]["weight"].shape
        torch.Size([3, 4, 4])

    Raises `ValueError` where an output has another shape than the input, which a next copy could not take, and for
    several inputs without names, of which only the first copy would see all.
    """

    children: Children
    stacked: bool = False

    def __init__(self, layer: Layer | Callable[..., Any], n: int, *, stacked: bool = False):
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"Repeat: n must be a number of copies >= 1, got {n!r}")
        copies = [as_layer(layer, "layer")] * n
        object.__setattr__(self, "children", named_children("Repeat", tuple(copies)))
        object.__setattr__(self, "stacked", bool(stacked))

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        _check_one(xs)
        nursery = Nursery(key, xs, inputs)
        xs, inputs = nursery.xs, nursery.inputs
        for index, (name, child) in enumerate(self.children):
            y = nursery.add(index, name, child, xs, inputs)
            xs = (self._next(name, child, y, xs),)
        if not self.stacked:
            return nursery.params, nursery.state
        return _stack(nursery.params), _stack(nursery.state)

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        _check_one(xs)
        if self.stacked:
            params, state = self._unstack(params, "params"), self._unstack(state, "state")
        run = Run(self, params, state, key, train)
        for index, (name, child) in enumerate(self.children):
            xs = (self._next(name, child, run(index, name, child, xs, inputs), xs),)
        new = run.new_state()
        return xs[0], _stack(new) if self.stacked else new

    def _next(self, name: str, child: Layer, y: Any, xs: tuple[Any, ...]) -> Any:
        y = without_carry(child, y)
        with Located(name, child):
            if [x.shape for x in tree.leaves(y)] != [x.shape for x in tree.leaves(xs[0])]:
                raise ValueError(
                    f"Repeat: gives {_shapes(y)} for {_shapes(xs[0])}; the copies need outputs of the input's shape"
                )
        return y

    def _unstack(self, stacked: Any, of: str) -> dict[str, Any]:
        if not isinstance(stacked, dict) or list(stacked) not in ([], ["*"]):
            got = list(stacked) if isinstance(stacked, dict) else type(stacked).__name__
            raise ValueError(f"Repeat: {of} of stacked copies must be a dict with the entry '*', got {got}")
        if not stacked:
            return {}
        leaves, structure = tree.flatten(stacked["*"])
        for path, leaf in tree.paths(stacked["*"]).items():
            if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != len(self.children):
                got = f"has shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"is {type(leaf).__name__}"
                raise ValueError(
                    f"Repeat: {of} leaf '*.{path}' {got}; expected {len(self.children)}, the number of copies, first"
                )
        # `unbind` is one node of the graph, and one backward that stacks; n selections would be n of either.
        copies = zip(*[leaf.unbind() for leaf in leaves], strict=True)
        return {name: tree.unflatten(structure, copy) for (name, _), copy in zip(self.children, copies, strict=True)}

    def __repr__(self) -> str:
        stacked = ", stacked=True" if self.stacked else ""
        return f"Repeat({self.children[0][1]!r}, {len(self.children)}{stacked})"


def _stack(copies: dict[str, Any]) -> dict[str, Any]:
    trees = list(copies.values())
    return {"*": tree.map(lambda *leaves: torch.stack(leaves), *trees)} if trees else {}


def _check_one(xs: tuple[Any, ...]) -> None:
    if len(xs) != 1:
        raise ValueError(
            f"Repeat: takes one input, which each copy hands to the next, got {len(xs)}; give others by name, "
            "they go to every copy"
        )


def _shapes(value: Any) -> str:
    found = [tuple(leaf.shape) for leaf in tree.leaves(value)]
    return f"shape {found[0]}" if len(found) == 1 else f"shapes {found}"
