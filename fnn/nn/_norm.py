"""Normalisation within an example: `LayerNorm`, `RMSNorm`, `GroupNorm`.

Written in pure operations: torch's fused ones fail under a compiled `hessian`, or lack a forward mode.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fnn.nn._floating import exact, floating
from fnn.nn._layer import Layer, Params, State, expect, layer, parameter_dtype
from fnn.nn._window import check_count


@layer
class LayerNorm(Layer):
    """Normalise over the last `dims` axes, x: (..., *normalized) -> the same; as `torch.nn.LayerNorm`.

    params: `weight` and `bias` of the shape of those axes.

    Raises ValueError for an input with fewer axes and TypeError for integers.

    Example:
        >>> from fnn import nn
        >>> nn.LayerNorm(affine=False)({}, torch.tensor([1.0, 3.0]))
        tensor([-1.0000,  1.0000])

    Source: Ba, Kiros and Hinton, 2016.
    """

    dims: int = 1
    eps: float = 1e-5
    affine: bool = True
    bias: bool = True
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, dims=self.dims)

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        shape, options = normalized(self, x, self.dims), {"dtype": parameter_dtype(x), "device": key.device}
        start = {"weight": torch.ones(shape, **options), "bias": torch.zeros(shape, **options)}
        return {name: start[name] for name in self._names()}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        leaves = expect(self, params, dict.fromkeys(self._names(), normalized(self, x, self.dims)))
        values = exact(floating(self, x, torch.float32))
        variance, mean = torch.var_mean(values, list(range(-self.dims, 0)), correction=0, keepdim=True)
        y = (values - mean) * torch.rsqrt(variance + self.eps)
        for leaf, operation in zip(leaves, (torch.mul, torch.add), strict=False):
            y = operation(y, leaf)
        return y.to(x.dtype), state

    def _names(self) -> list[str]:
        return [] if not self.affine else ["weight", "bias"] if self.bias else ["weight"]


@layer
class RMSNorm(Layer):
    """Divide by the root mean square over the last `dims` axes, x: (..., *normalized) -> the same.

    params: `weight` of the shape of those axes, where `affine`. `eps=None` is the smallest number that counts beside
    1 in the dtype in which this is computed, float32 for half precision. As `torch.nn.RMSNorm`.

    Raises ValueError for an input with fewer axes and TypeError for integers.

    Example:
        >>> from fnn import nn
        >>> nn.RMSNorm(affine=False)({}, torch.tensor([1.0, -1.0, 1.0, 5.0]))
        tensor([ 0.3780, -0.3780,  0.3780,  1.8898])

    Source: Zhang and Sennrich, 2019.
    """

    dims: int = 1
    eps: float | None = None
    affine: bool = True
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, dims=self.dims)

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        weight = torch.ones(normalized(self, x, self.dims), dtype=parameter_dtype(x), device=key.device)
        return {"weight": weight} if self.affine else {}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        shape = normalized(self, x, self.dims)
        weight = expect(self, params, {"weight": shape} if self.affine else {})
        values = exact(floating(self, x, torch.float32))
        eps = torch.finfo(values.dtype).eps if self.eps is None else self.eps
        y = values * torch.rsqrt(values.square().mean(list(range(-self.dims, 0)), keepdim=True) + eps)
        return (y * weight[0] if weight else y).to(x.dtype), state


@layer
class GroupNorm(Layer):
    """Normalise over space and each of `groups` equal parts of the channels, x: (N, C, ...) -> the same.

    params: `weight` (C,), `bias` (C,) where `affine`. As `torch.nn.GroupNorm`; `GroupNorm(C)` is the instance norm.

    Raises ValueError where the groups do not divide the channels and TypeError for integers.

    Example:
        >>> from fnn import nn
        >>> nn.GroupNorm(2, affine=False)({}, torch.tensor([[1.0, 3.0, 10.0, 30.0]]))
        tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])

    Source: Wu and He, 2018.
    """

    groups: int
    eps: float = 1e-5
    affine: bool = True
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, groups=self.groups)

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        channels, options = self._channels(x), {"dtype": parameter_dtype(x), "device": key.device}
        params = {"weight": torch.ones(channels, **options), "bias": torch.zeros(channels, **options)}
        return params if self.affine else {}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        channels = (self._channels(x),)
        affine = expect(self, params, {"weight": channels, "bias": channels} if self.affine else {})
        values = exact(floating(self, x, torch.float32)).unflatten(1, (self.groups, -1))
        variance, mean = torch.var_mean(values, list(range(2, values.dim())), correction=0, keepdim=True)
        y = ((values - mean) * torch.rsqrt(variance + self.eps)).reshape(x.shape)
        if self.affine:
            weight, bias = (leaf.reshape(-1, *[1] * (x.dim() - 2)) for leaf in affine)
            y = y * weight + bias
        return y.to(x.dtype), state

    def _channels(self, x: Tensor) -> int:
        if x.dim() < 2:
            raise ValueError(f"GroupNorm: expected an input of shape (N, C, ...), got {tuple(x.shape)}")
        if x.shape[1] % self.groups or not x.shape[1]:
            raise ValueError(f"GroupNorm: groups={self.groups} must divide the {x.shape[1]} channels")
        return x.shape[1]


def normalized(layer: Layer, x: Tensor, dims: int) -> tuple[int, ...]:
    """The shape of the last `dims` axes of x."""
    if dims > x.dim():
        raise ValueError(
            f"{type(layer).__name__}: dims={dims} axes to normalise, but the input has shape {tuple(x.shape)}"
        )
    return tuple(x.shape[x.dim() - dims :])
