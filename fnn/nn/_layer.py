"""The contract of a layer: configuration in a frozen dataclass, and two pure functions.

    params, state = layer.init(key, *xs, **inputs)     # examples or meta tensors; only shapes and dtypes count
    y, state = layer.apply(params, state, *xs, key=None, train=False, **inputs)

`params` and `state` are nested dicts of tensors with torch's names and shapes. `state` holds what training
updates without a gradient (running statistics); it is `{}` for most layers. Optional inputs, such as the mask of an
attention, have names; `key`, `train` and `state` are taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

Params = Any  # a dict; the tensor itself for `Parameter`
State = dict[str, Any]


@dataclass_transform(frozen_default=True)
def layer(cls: type) -> type:
    """Make a layer class a frozen dataclass that keeps `Layer`'s readable `repr`."""
    return dataclasses.dataclass(frozen=True, repr=False)(cls)


class Layer:
    """Base of all layers. Subclasses are frozen dataclasses that define `apply`, and `init` where they have parameters.

    Example: a linear layer of one's own.
        >>> from dataclasses import dataclass
        >>> from fnn import nn
        >>> @dataclass(frozen=True)
        ... class Scale(nn.Layer):
        ...     uses_key = False
        ...     def init(self, key, x):
        ...         return {"weight": torch.ones(x.shape[-1], device=key.device)}, {}
        ...     def apply(self, params, state, x, *, key=None, train=False):
        ...         return params["weight"] * x, state
    """

    uses_key: ClassVar[bool] = True
    """Whether `apply` in training needs a key. A layer without randomness sets it to False, which saves a fold."""

    carries: ClassVar[bool] = False
    """Whether the output is `(y, carry)`, as of a recurrent layer. What hands it on drops the carry."""

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        """New params and state for inputs like these; by default, those of a layer that has none."""
        return {}, {}

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        """The output for these inputs, and the state after it."""
        raise NotImplementedError(
            f"{type(self).__name__} must define apply(self, params, state, *xs, key=None, train=False) -> (y, state)"
        )

    def __call__(self, params: Params, *xs: Any, state: State | None = None, **inputs: Any) -> Any:
        """`apply` in evaluation mode, the new state dropped."""
        return self.apply(params, {} if state is None else state, *xs, **inputs)[0]

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return f"{type(self).__name__}()"
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                arguments.append(_show(value))
            elif value != field.default:
                arguments.append(f"{field.name}={_show(value)}")
        return expression(type(self).__name__, arguments)


@layer
class Function(Layer):
    """A pure tensor function as a layer, such as `nn.relu`; containers make one of every plain function."""

    f: Callable[..., Any]
    uses_key: ClassVar[bool] = False

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        expect(self, params, {})
        return self.f(*xs, **inputs), state

    def __repr__(self) -> str:
        return _show(self.f)


def as_layer(value: Any, name: str) -> Layer:
    """`value` itself if it is a layer, a `Function` around it if it is callable."""
    if isinstance(value, Layer):
        return value
    if isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name!r} is the torch module {type(value).__name__}, which holds its own parameters; use fnn.nn"
        )
    if isinstance(value, type) or not callable(value):
        cure = "; activations are functions such as nn.relu" if isinstance(value, str) else ""
        raise TypeError(f"{name!r} must be a layer or a pure tensor function, got {value!r}{cure}")
    return Function(value)


Shapes = dict[str, tuple[int, ...]]


def expect(layer: Layer, tree: dict[str, Any], shapes: Shapes, of: str = "params") -> list[Any]:
    """The leaves of a layer's `params` (or `state`), after a check that exactly these are there, in these shapes.

    The checks are on Python values and vanish under `torch.compile`.
    """
    who = type(layer).__name__
    if not isinstance(tree, dict):
        raise TypeError(f"{who}: {of} must be a dict with {sorted(shapes)}, got {type(tree).__name__}")
    for name in shapes:
        if name not in tree:
            raise ValueError(f"{who}: {of} has no leaf {name!r}; expected {list(shapes)}, got {list(tree)}")
    for name in tree:
        if name not in shapes:
            raise ValueError(f"{who}: {of} has an unexpected leaf {name!r}; expected {list(shapes)}, got {list(tree)}")
    for name, shape in shapes.items():
        if not isinstance(tree[name], Tensor):
            raise TypeError(f"{who}: {of} leaf {name!r} must be a tensor of shape {shape}, got {tree[name]!r}")
        if tuple(tree[name].shape) != shape:
            raise ValueError(
                f"{who}: {of} leaf {name!r} has shape {tuple(tree[name].shape)}, but this input needs {shape}; "
                "is the input of the size that init saw?"
            )
    return [tree[name] for name in shapes]


def check_bias(layer: Layer, bias: Any, size: str) -> None:
    """Raise for `Linear(64, 128)`, torch's way, which would make 128 the bias."""
    if not isinstance(bias, bool):
        raise TypeError(
            f"{type(layer).__name__}: bias must be True or False, got {bias!r}; "
            f"a layer takes only the {size} that come out, those that go in come from the input"
        )


def parameter_dtype(x: Tensor) -> torch.dtype:
    """The dtype of parameters for an input `x`: its own if floating, float32 for integers."""
    return x.dtype if x.is_floating_point() else torch.float32


def expression(name: str, arguments: list[str], width: int = 88) -> str:
    """`name(arguments)`, one argument a line where it would be long."""
    line = f"{name}({', '.join(arguments)})"
    if len(line) <= width and "\n" not in line:
        return line
    body = "".join(f"    {argument},\n".replace("\n", "\n    ").removesuffix("    ") for argument in arguments)
    return f"{name}(\n{body})"


def _show(value: Any) -> str:
    if isinstance(value, functools.partial):
        arguments = [_show(v) for v in value.args] + [f"{k}={_show(v)}" for k, v in value.keywords.items()]
        return expression(_show(value.func), arguments)
    if callable(value) and not isinstance(value, Layer):
        return getattr(value, "__name__", repr(value))
    return repr(value)
