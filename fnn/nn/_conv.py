"""Convolutions: `Conv1d`, `Conv2d`, `Conv3d`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fnn import random
from fnn.nn._floating import floating
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn._window import Size, check_count, check_fit, check_sizes, per_axis, space
from fnn.nn.initializers import Initializer, fan_in_uniform, uniform_bound
from fnn.ops._whole import whole

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(Layer):
    """Weight and bias of a convolution, transposed or not: subclasses give the weight's shape."""

    out_channels: int
    bias: bool
    weight_init: Initializer
    bias_init: Initializer | None

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        shape = self._weight_shape(x)
        dtype = parameter_dtype(x)
        weight_key, bias_key = random.split(key).unbind()
        params = {"weight": self.weight_init(weight_key, shape, dtype)}
        if self.bias:
            # Of a transposed one torch takes the channels out for those in here too.
            bias_init = self.bias_init or uniform_bound(math.prod(shape[1:]) ** -0.5)
            params["bias"] = bias_init(bias_key, (self.out_channels,), dtype)
        expect(self, params, self._shapes(x))
        return params, {}

    def _shapes(self, x: Tensor) -> Shapes:
        shapes: Shapes = {"weight": self._weight_shape(x)}
        return {**shapes, "bias": (self.out_channels,)} if self.bias else shapes

    def _weight_shape(self, x: Tensor) -> tuple[int, ...]:
        raise NotImplementedError


@layer
class _Conv(Convolution):
    """A convolution over `dims` axes."""

    out_channels: int
    kernel_size: Size
    stride: Size = 1
    padding: Size | str = 0
    dilation: Size = 1
    groups: int = 1
    bias: bool = True
    weight_init: Initializer = fan_in_uniform
    bias_init: Initializer | None = None
    uses_key: ClassVar[bool] = False
    dims: ClassVar[int]

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_bias(self, self.bias, "channels")
        check_count(self, out_channels=self.out_channels, groups=self.groups)
        check_sizes(self, self.dims, kernel_size=1, stride=1, dilation=1)
        if not isinstance(self.padding, str):
            check_sizes(self, self.dims, padding=0)
        elif self.padding not in ("same", "valid"):
            raise ValueError(f"{who}: padding must be a size, 'same' or 'valid', got {self.padding!r}")
        elif self.padding == "same" and max(per_axis(self.stride, self.dims)) > 1:
            raise ValueError(f"{who}: padding='same' keeps the size, so it needs stride 1, got {self.stride!r}")
        if self.out_channels % self.groups:
            raise ValueError(f"{who}: groups={self.groups} must divide the {self.out_channels} channels out")

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        weight, *bias = [whole(leaf) for leaf in expect(self, params, self._shapes(x))]
        x = whole(floating(self, x, weight.dtype), examples=x.dim() == self.dims + 2)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return CONVOLUTIONS[self.dims](x, weight, bias[0] if bias else None, *options), state

    def _weight_shape(self, x: Tensor) -> tuple[int, ...]:
        sizes = space(self, x, self.dims)
        if self.padding != "same":
            padding = 0 if isinstance(self.padding, str) else self.padding
            check_fit(self, sizes, self.kernel_size, padding, self.dilation)
        channels = x.shape[-1 - self.dims]
        if channels % self.groups or not channels:
            raise ValueError(f"{type(self).__name__}: groups={self.groups} must divide the {channels} channels in")
        return (self.out_channels, channels // self.groups, *per_axis(self.kernel_size, self.dims))


@layer
class Conv1d(_Conv):
    """Cross-correlation over sequences, x: (N, C, L) or (C, L) -> (N, out_channels, L'); C comes from the input.

    params: `weight` (out_channels, C / groups, kernel_size), `bias` (out_channels,), initialised as in torch.
    `padding` is a number, "same" or "valid". Sizes and arguments as in `torch.nn.Conv1d`.

    Raises ValueError for sizes that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> conv = nn.Conv1d(16, 5)
        >>> params, _ = conv.init(random.key(0), torch.zeros(1, 3, 200))
        >>> conv(params, torch.zeros(8, 3, 200)).shape
        torch.Size([8, 16, 196])
    """

    dims: ClassVar[int] = 1


@layer
class Conv2d(_Conv):
    """Cross-correlation over images, x: (N, C, H, W) or (C, H, W) -> (N, out_channels, H', W'); C from the input.

    params: `weight` (out_channels, C / groups, *kernel_size), `bias` (out_channels,), initialised as in torch.
    `padding` is a number, a pair, "same" or "valid". Sizes and arguments as in `torch.nn.Conv2d`.

    Raises ValueError for sizes that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> depthwise = nn.Conv2d(8, 3, padding="same", groups=8)
        >>> params, _ = depthwise.init(random.key(0), torch.zeros(1, 8, 32, 32))
        >>> depthwise(params, torch.zeros(4, 8, 32, 32)).shape
        torch.Size([4, 8, 32, 32])
    """

    dims: ClassVar[int] = 2


@layer
class Conv3d(_Conv):
    """Cross-correlation over volumes, x: (N, C, D, H, W) or (C, D, H, W); C comes from the input.

    params: `weight` (out_channels, C / groups, *kernel_size), `bias` (out_channels,), initialised as in torch.
    `padding` is a number, a triple, "same" or "valid". Sizes and arguments as in `torch.nn.Conv3d`.

    Raises ValueError for sizes that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> conv = nn.Conv3d(4, 3)
        >>> params, _ = conv.init(random.key(0), torch.zeros(1, 2, 8, 8, 8))
        >>> conv(params, torch.zeros(1, 2, 8, 8, 8)).shape
        torch.Size([1, 4, 6, 6, 6])
    """

    dims: ClassVar[int] = 3
