"""Layers made of layers: `Sequential`, `Parallel`, `Residual`.

A container's `params` is a dict with one entry for each child that has parameters, under the child's name;
`state` likewise. Child `i` gets the key `random.fold_in(key, i)`, and only if it uses one: a hash is
148 graph nodes. Sizes are inferred by running each child on fake tensors, in training mode so that every
child is reached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import random, tree
from fnn.nn._inference import Inference
from fnn.nn._layer import Layer, Params, State, as_layer, expression, layer

Children = tuple[tuple[str, Layer], ...]


class Container(Layer):
    """A layer whose field `children` holds named layers."""

    children: Children

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return any(child.uses_key for _, child in self.children)

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        """Params and state of children that all take the same inputs; a container that hands on values has its own."""
        nursery = Nursery(key, xs, inputs)
        for index, (name, child) in enumerate(self.children):
            nursery.add(index, name, child, nursery.xs, nursery.inputs)
        return nursery.params, nursery.state

    def with_children(self, children: Children) -> Container:
        """The same container around other layers of the same names."""
        clone = copy.copy(self)
        object.__setattr__(clone, "children", children)
        return clone


@layer
class Sequential(Container):
    """Apply layers one after another: all inputs go to the first, one value to each later one.

    A recurrent layer starts from zeros here and its carry is dropped; in a `Block` it is at hand.

    `Sequential(a, b)` names its children "0", "1" as torch does; `Sequential({"conv": a, "head": b})` by the
    dict's keys. Plain tensor functions are layers too.

    Example:
        >>> from fnn import nn, random
        >>> net = nn.Sequential(nn.Linear(64), nn.relu, nn.Linear(10))
        >>> params, state = net.init(random.key(0), torch.zeros(1, 784))
        >>> net(params, torch.zeros(32, 784)).shape
        torch.Size([32, 10])
    """

    children: Children

    def __init__(self, *layers: Layer | Callable[..., Any] | dict[str, Any]):
        object.__setattr__(self, "children", named_children("Sequential", layers))

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        nursery = Nursery(key, xs, inputs)
        xs, inputs = nursery.xs, nursery.inputs
        for index, (name, child) in enumerate(self.children):
            y = nursery.add(index, name, child, xs, inputs)
            xs, inputs = (without_carry(child, y),), {}
        return nursery.params, nursery.state

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        run = Run(self, params, state, key, train)
        for index, (name, child) in enumerate(self.children):
            y = run(index, name, child, xs, inputs)
            xs, inputs = (without_carry(child, y),), {}
        return xs[0], run.new_state()

    def __repr__(self) -> str:
        return show_children("Sequential", self.children)


@layer
class Parallel(Container):
    """Give all inputs to every branch: a tuple of the results, or a dict of them where the branches have names.

    Example:
        >>> from fnn import nn
        >>> nn.Sequential(nn.Parallel(nn.Linear(8), nn.Linear(8)), lambda ys: torch.cat(ys, -1))
        Sequential(Parallel(Linear(8), Linear(8)), <lambda>)
    """

    children: Children
    named: bool = False

    def __init__(self, *branches: Layer | Callable[..., Any] | dict[str, Any]):
        object.__setattr__(self, "children", named_children("Parallel", branches))
        object.__setattr__(self, "named", len(branches) == 1 and isinstance(branches[0], dict))

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        run = Run(self, params, state, key, train)
        ys = {name: run(index, name, child, xs, inputs) for index, (name, child) in enumerate(self.children)}
        return (ys if self.named else tuple(ys.values())), run.new_state()

    def __repr__(self) -> str:
        return show_children("Parallel", self.children)


@layer
class Residual(Container):
    """`body(x) + shortcut(x)`; without a shortcut, `body(x) + x`. Both must have one shape; a carry is dropped.

    Example:
        >>> from fnn import nn
        >>> nn.Residual(nn.Sequential(nn.Linear(64), nn.relu), shortcut=nn.Linear(64))
        Residual(Sequential(Linear(64), relu), shortcut=Linear(64))
    """

    children: Children

    def __init__(self, body: Layer | Callable[..., Any], shortcut: Layer | Callable[..., Any] | None = None):
        branches = {"body": body} if shortcut is None else {"body": body, "shortcut": shortcut}
        object.__setattr__(self, "children", named_children("Residual", (branches,)))

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        run = Run(self, params, state, key, train)
        ys = [
            without_carry(child, run(index, name, child, xs, inputs))
            for index, (name, child) in enumerate(self.children)
        ]
        left, right = ys[0], ys[1] if len(ys) == 2 else xs[0]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            raise TypeError(f"Residual: adds tensors, got {type(left).__name__} and {type(right).__name__}")
        if left.shape != right.shape:
            raise ValueError(
                f"Residual: body gives shape {tuple(left.shape)}, the shortcut {tuple(right.shape)}; "
                "give a shortcut layer that makes them equal"
            )
        return left + right, run.new_state()

    def __repr__(self) -> str:
        shown = [repr(self.children[0][1])] + [f"shortcut={child!r}" for _, child in self.children[1:]]
        return expression("Residual", shown)


class Nursery:
    """Initialises children one by one and runs them on fake tensors to learn the next one's input."""

    def __init__(self, key: Tensor, xs: tuple[Any, ...], inputs: dict[str, Any]):
        random.check_key(key)
        for leaf in tree.leaves(xs):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"init: x must be a tensor, an example of the input, got {type(leaf).__name__}")
        self.key = key
        self.inference = Inference(key, (xs, inputs))
        self.xs, self.inputs = self.inference.fake((xs, inputs))
        self.params: dict[str, Any] = {}
        self.state: State = {}

    def add(self, index: int, name: str, child: Layer, xs: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        """Initialise `child` for these inputs (fakes); returns its output as fakes."""
        with Located(name, child):
            params, state = child.init(random.fold_in(self.key, index), *xs, **inputs)
            if tree.leaves(params):
                self.params[name] = params
            if tree.leaves(state):
                self.state[name] = state
        return self.run(name, child, params, state, xs, inputs)

    def run(
        self, name: str, child: Layer, params: Params, state: State, xs: tuple[Any, ...], inputs: dict[str, Any]
    ) -> Any:
        params, state = self.inference.fake((params, state))
        with Located(name, child), self.inference:
            y, _ = child.apply(params, state, *xs, key=self.inference.key(), train=True, **inputs)
        return y


class Run:
    """One application of a container's children: hands out params, state and keys, collects the new state."""

    def __init__(self, container: Container, params: Params, state: State, key: Tensor | None, train: bool):
        names = [name for name, _ in container.children]
        for of, given in (("params", params), ("state", state)):
            if not isinstance(given, dict):
                raise TypeError(f"{type(container).__name__}: {of} must be a dict, got {type(given).__name__}")
            for name in given:
                if name not in names:
                    raise ValueError(
                        f"{type(container).__name__}: {of} has an unexpected entry {name!r}; its layers are {names}"
                    )
        self.params, self.state, self.key, self.train = params, state, key, train
        # Row i of a split is fold_in(key, i); one hash for all children makes one hash's graph.
        self.keys = random.split(key, len(names)) if key is not None and container.uses_key else None
        self.changed: State = {}

    def __call__(
        self, index: int, name: str, child: Layer, xs: tuple[Any, ...], inputs: dict[str, Any], turn: int = 0
    ) -> Any:
        """Apply a child; `turn` counts earlier calls of the same child, so that each draws its own numbers."""
        key = None
        if self.key is not None and self.keys is not None and child.uses_key:
            key = random.fold_in(self.key, index + turn * len(self.keys)) if turn else self.keys[index]
        state = self.changed.get(name, self.state.get(name, {}))
        with Located(name, child):
            y, new = child.apply(self.params.get(name, {}), state, *xs, key=key, train=self.train, **inputs)
        if name in self.state:
            self.changed[name] = new
        return y

    def new_state(self) -> State:
        """The state after all calls, in the order it came."""
        return {name: self.changed.get(name, old) for name, old in self.state.items()}


class Located:
    """Prefixes an error raised inside with the path of the layer: ``layer '0.conv' Conv2d(6, 5): ...``."""

    def __init__(self, name: str, child: Layer):
        self.name, self.child = name, child

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or torch.compiler.is_compiling():
            return  # Dynamo reports an error by its own line, and cannot trace what follows
        unlocated = str(error).removeprefix(f"{type(self.child).__name__}: ")
        path, shown, message = getattr(error, "layer", (None, repr(self.child), unlocated))
        path = self.name if path is None else f"{self.name}.{path}"
        error.layer = (path, shown, message)  # type: ignore[attr-defined]
        error.args = (f"layer {path!r} {shown}: {message}",)


def without_carry(child: Layer, y: Any) -> Any:
    """What a layer hands on to the next: its output, of a recurrent one without the carry."""
    return y[0] if child.carries else y


def named_children(owner: str, layers: tuple[Any, ...]) -> Children:
    """Children with their names: from one dict, or by position."""
    if len(layers) == 1 and isinstance(layers[0], dict):
        named = layers[0]
    else:
        named = {str(index): child for index, child in enumerate(layers)}
    if not named:
        raise ValueError(f"{owner} needs at least one layer")
    for name in named:
        if not isinstance(name, str) or not name or "." in name or "*" in name:
            raise ValueError(f"{owner}: a layer's name must be a non-empty string without dots and stars, got {name!r}")
    return tuple((name, as_layer(child, name)) for name, child in named.items())


def show_children(owner: str, children: Children) -> str:
    if [name for name, _ in children] == [str(index) for index in range(len(children))]:
        return expression(owner, [repr(child) for _, child in children])
    entries = [f"{name!r}: {child!r}" for name, child in children]
    body = expression("", entries)
    return f"{owner}({{{body[1:-1]}}})"
