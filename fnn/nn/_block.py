"""`Block`: any Python function over named layers, the general form of a container."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fnn.nn._containers import Children, Container, Nursery, Run, named_children
from fnn.nn._layer import Layer, Params, State, expression, layer


@layer
class Block(Container):
    """`f(m, *xs, **inputs)` written in plain Python over named layers: `m.name(...)` applies the layer `name`.

    `m.name.params` is that layer's parameters, for weights used twice; `m.train` tells the mode. A layer may be
    called several times. `init` runs `f` on fake tensors in training mode; a layer that `f` never calls is an error.

    Example: a transformer's feed-forward block.
        >>> from fnn import nn, random
        >>> block = nn.Block(lambda m, x: x + m.down(nn.gelu(m.up(m.norm(x)))),
        ...                  norm=nn.LayerNorm(), up=nn.Linear(256), down=nn.Linear(64))
        >>> params, state = block.init(random.key(0), torch.zeros(2, 8, 64))
        >>> block(params, torch.zeros(2, 8, 64)).shape
        torch.Size([2, 8, 64])
    """

    f: Callable[..., Any]
    children: Children

    def __init__(self, f: Callable[..., Any], /, **layers: Layer | Callable[..., Any]):
        if not callable(f):
            raise TypeError(f"Block: expected a function f(m, *xs), got {f!r}")
        for name in layers:
            if name == "train" or name.startswith("_"):
                raise ValueError(f"Block: a layer cannot be called {name!r}; m.train is the mode, _names are private")
        object.__setattr__(self, "f", f)
        object.__setattr__(self, "children", named_children("Block", (layers,)))

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        nursery = Nursery(key, xs, inputs)
        handle = _Init(nursery, self.children)
        with nursery.inference:
            self.f(handle, *nursery.xs, **nursery.inputs)
        params, state = nursery.params, nursery.state
        if unused := [name for name, _ in self.children if name not in handle._seen]:
            raise ValueError(f"Block: f never calls the layer {unused[0]!r}; call m.{unused[0]}(...) or leave it out")
        names = [name for name, _ in self.children]
        return _ordered(params, names), _ordered(state, names)

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        run = Run(self, params, state, key, train)
        y = self.f(_Apply(run, self.children), *xs, **inputs)
        return y, run.new_state()

    def __repr__(self) -> str:
        f = getattr(self.f, "__name__", repr(self.f))
        return expression("Block", [f] + [f"{name}={child!r}" for name, child in self.children])


class _Handle:
    """What `f` gets as `m`: the layers by name, and `train`. Everything else is private, so any name is free."""

    def __init__(self, children: Children, train: bool):
        self._children = {name: (index, child) for index, (name, child) in enumerate(children)}
        self.train = train

    def __getattr__(self, name: str) -> _Bound:
        if name.startswith("_") or name not in self._children:
            raise AttributeError(f"Block has no layer {name!r}; its layers are {list(self._children)}")
        return _Bound(self, name)


class _Bound:
    """One layer of a block, ready to be called."""

    def __init__(self, handle: Any, name: str):
        self._handle, self._name = handle, name

    def __call__(self, *xs: Any, **inputs: Any) -> Any:
        return self._handle._call(self._name, xs, inputs)

    @property
    def params(self) -> Params:
        return self._handle._params(self._name)


class _Apply(_Handle):
    def __init__(self, run: Run, children: Children):
        super().__init__(children, run.train)
        self._run = run
        self._turns: dict[str, int] = {}

    def _call(self, name: str, xs: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        index, child = self._children[name]
        turn = self._turns.get(name, 0)
        self._turns[name] = turn + 1
        return self._run(index, name, child, xs, inputs, turn)

    def _params(self, name: str) -> Params:
        return self._run.params.get(name, {})


class _Init(_Handle):
    def __init__(self, nursery: Nursery, children: Children):
        super().__init__(children, train=True)
        self._nursery = nursery
        self._seen: set[str] = set()

    def _call(self, name: str, xs: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        index, child = self._children[name]
        if name not in self._seen:
            self._seen.add(name)
            return self._nursery.add(index, name, child, xs, inputs)
        params, state = self._nursery.params.get(name, {}), self._nursery.state.get(name, {})
        return self._nursery.run(name, child, params, state, xs, inputs)

    def _params(self, name: str) -> Params:
        if name not in self._seen:
            raise ValueError(
                f"Block: m.{name}.params is read before m.{name}(...) is called; init cannot know its shapes"
            )
        return self._nursery.inference.fake(self._nursery.params.get(name, {}))


def _ordered(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """In the order in which the layers were named, whatever the order of the calls."""
    return {name: found[name] for name in names if name in found}
