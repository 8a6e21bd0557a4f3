"""Layers around one other layer, with its params and state: `Remat` and `Cast`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._remat import remat
from fnn.nn._layer import Layer, Params, State, as_layer, layer


class Wrapper(Layer):
    """A layer whose field `inner` is another; params and state are the inner layer's own, at the same paths."""

    inner: Layer

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return self.inner.uses_key

    @property
    def carries(self) -> bool:  # type: ignore[override]
        return self.inner.carries

    def around(self, inner: Layer) -> Wrapper:
        """The same wrapper around another layer."""
        clone = copy.copy(self)
        object.__setattr__(clone, "inner", inner)
        return clone


@layer
class Remat(Wrapper):
    """`layer`, but of what it computes only the inputs are kept for the backward pass, which computes the rest again.

    Values, derivatives, params and state are the layer's own; what it draws is the same in both runs. Saves memory in
    compiled steps, for the time of one more forward pass; see `fnn.remat`.

    Example: a deep stack that keeps one activation for each block.
        >>> from fnn import nn
        >>> nn.Repeat(nn.Remat(nn.Residual(nn.Sequential(nn.Linear(64), nn.gelu, nn.Linear(16)))), 12)
        Repeat(Remat(Residual(Sequential(Linear(64), gelu, Linear(16)))), 12)
    """

    inner: Layer

    def __init__(self, inner: Layer | Callable[..., Any]):
        object.__setattr__(self, "inner", as_layer(inner, "layer"))
        object.__setattr__(self, "_rematerialized", remat(self._run))

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        return self.inner.init(key, *xs, **inputs)

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        return self._rematerialized(params, state, xs, inputs, key, train)  # type: ignore[attr-defined]

    def _run(self, params: Params, state: State, xs: Any, inputs: Any, key: Tensor | None, train: bool) -> Any:
        return self.inner.apply(params, state, *xs, key=key, train=train, **inputs)

    def __reduce__(self) -> tuple[type[Remat], tuple[Layer]]:
        return Remat, (self.inner,)  # a copy, or what a pickle gives, makes its own function of `_run`

    def around(self, inner: Layer) -> Remat:
        return Remat(inner)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of mixed precision: of the parameters, of the computation, of the output.

    Example: bfloat16 arithmetic on float32 parameters.
        >>> from fnn import nn
        >>> nn.Policy(compute=torch.bfloat16)
        Policy(param=torch.float32, compute=torch.bfloat16, output=torch.float32)
    """

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    output: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("param", "compute", "output"):
            dtype = getattr(self, name)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise TypeError(f"Policy: {name} must be a floating dtype such as torch.bfloat16, got {dtype!r}")


@layer
class Cast(Wrapper):
    """`layer` in mixed precision: it computes in `policy.compute` and gives `policy.output`.

    Parameters start in `policy.param`, stay in it, and so do their gradients; state keeps its dtypes. Floating inputs
    are cast at the border, integers and bools are not. Inside, normalisation and softmax are taken in float32 all the
    same. The taps behind `per_sample_grad_norm` and its like see cast weights as ordinary uses: right, without the
    savings.

    Example:
        >>> from fnn import nn, random
        >>> net = nn.Cast(nn.Linear(4), nn.Policy(compute=torch.bfloat16))
        >>> params, _ = net.init(random.key(0), torch.zeros(2, 3))
        >>> params["weight"].dtype, net(params, torch.zeros(2, 3)).dtype
        (torch.float32, torch.float32)

    Micikevicius et al., Mixed Precision Training, 2018.
    """

    inner: Layer
    policy: Policy

    def __init__(self, inner: Layer | Callable[..., Any], policy: Policy):
        if not isinstance(policy, Policy):
            raise TypeError(f"Cast: policy must be an nn.Policy, got {policy!r}")
        object.__setattr__(self, "inner", as_layer(inner, "layer"))
        object.__setattr__(self, "policy", policy)

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        xs, inputs = _cast((xs, inputs), self.policy.param)
        params, state = self.inner.init(key, *xs, **inputs)
        return _cast(params, self.policy.param), state

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        params, xs, inputs = _cast((params, xs, inputs), self.policy.compute)
        y, new = self.inner.apply(params, state, *xs, key=key, train=train, **inputs)
        return _cast(y, self.policy.output), tree.map(lambda leaf, old: leaf.to(old.dtype), new, state)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    def one(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype
        return leaf.to(dtype) if floating else leaf

    return tree.map(one, values)
