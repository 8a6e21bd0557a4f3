"""`Conv2d`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fnn import random
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn.initializers import Initializer, fan_in_uniform, uniform_bound


@layer
class Conv2d(Layer):
    """Cross-correlation over images, x: (N, C, H, W) or (C, H, W); C comes from the input.

    params: `weight` (out_channels, C / groups, *kernel_size), `bias` (out_channels,), initialised as in torch.
    `padding` is a number, a pair, "same" or "valid". Sizes and arguments as in `torch.nn.Conv2d`.
    """

    out_channels: int
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True
    weight_init: Initializer = fan_in_uniform
    bias_init: Initializer | None = None
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bias(self, self.bias, "channels")

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        shape = self._weight_shape(x)
        dtype = parameter_dtype(x)
        weight_key, bias_key = random.split(key).unbind()
        params = {"weight": self.weight_init(weight_key, shape, dtype)}
        if self.bias:
            bias_init = self.bias_init or uniform_bound(math.prod(shape[1:]) ** -0.5)
            params["bias"] = bias_init(bias_key, (self.out_channels,), dtype)
        expect(self, params, self._shapes(x))
        return params, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        weight, *bias = expect(self, params, self._shapes(x))
        y = F.conv2d(x, weight, bias[0] if bias else None, self.stride, self.padding, self.dilation, self.groups)
        return y, state

    def _shapes(self, x: Tensor) -> Shapes:
        shapes: Shapes = {"weight": self._weight_shape(x)}
        return {**shapes, "bias": (self.out_channels,)} if self.bias else shapes

    def _weight_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        if x.dim() not in (3, 4):
            raise ValueError(f"Conv2d: expected an input of shape (N, C, H, W) or (C, H, W), got {tuple(x.shape)}")
        channels = x.shape[-3]
        if channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"Conv2d: groups={self.groups} must divide the {channels} channels in and {self.out_channels} out"
            )
        return (self.out_channels, channels // self.groups, *pair(self.kernel_size))


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """A number for both image axes, or one for each."""
    return (value, value) if isinstance(value, int) else value
