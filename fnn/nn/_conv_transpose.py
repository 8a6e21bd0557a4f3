"""Transposed convolutions: `ConvTranspose1d`, `ConvTranspose2d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fnn.nn._conv import Convolution
from fnn.nn._floating import floating
from fnn.nn._layer import Params, State, check_bias, expect, layer
from fnn.nn._window import Size, check_count, check_sizes, per_axis, space
from fnn.nn.initializers import Initializer, fan_in_uniform
from fnn.ops._whole import whole

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d}


@layer
class _ConvTranspose(Convolution):
    """The transpose of a convolution over `dims` axes."""

    out_channels: int
    kernel_size: Size
    stride: Size = 1
    padding: Size = 0
    output_padding: Size = 0
    groups: int = 1
    bias: bool = True
    dilation: Size = 1
    weight_init: Initializer = fan_in_uniform
    bias_init: Initializer | None = None
    uses_key: ClassVar[bool] = False
    dims: ClassVar[int]

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_bias(self, self.bias, "channels")
        check_count(self, out_channels=self.out_channels, groups=self.groups)
        check_sizes(self, self.dims, kernel_size=1, stride=1, padding=0, output_padding=0, dilation=1)
        if self.out_channels % self.groups:
            raise ValueError(f"{who}: groups={self.groups} must divide the {self.out_channels} channels out")
        for extra, stride, dilation in self._axes("output_padding", "stride", "dilation"):
            if extra >= max(stride, dilation):
                raise ValueError(
                    f"{who}: output_padding must be less than the stride or the dilation, got {self.output_padding!r}"
                )

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        weight, *bias = [whole(leaf) for leaf in expect(self, params, self._shapes(x))]
        x = whole(floating(self, x, weight.dtype), examples=x.dim() == self.dims + 2)
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return CONVOLUTIONS[self.dims](x, weight, bias[0] if bias else None, *options), state

    def _weight_shape(self, x: Tensor) -> tuple[int, ...]:
        who, sizes = type(self).__name__, space(self, x, self.dims)
        fields = self._axes("kernel_size", "stride", "padding", "output_padding", "dilation")
        for size, (kernel, stride, padding, extra, dilation) in zip(sizes, fields, strict=True):
            if (size - 1) * stride - 2 * padding + (kernel - 1) * dilation + extra < 0:
                raise ValueError(
                    f"{who}: padding={self.padding!r} leaves nothing of the output for an image of {sizes}"
                )
        channels = x.shape[-1 - self.dims]
        if channels % self.groups or not channels:
            raise ValueError(f"{who}: groups={self.groups} must divide the {channels} channels in")
        return (channels, self.out_channels // self.groups, *per_axis(self.kernel_size, self.dims))

    def _axes(self, *names: str) -> list[tuple[int, ...]]:
        """These fields, axis by axis."""
        return list(zip(*[per_axis(getattr(self, name), self.dims) for name in names], strict=True))


@layer
class ConvTranspose1d(_ConvTranspose):
    """The transpose of `Conv1d`, x: (N, C, L) or (C, L) -> (N, out_channels, L'); C comes from the input.

    L' = (L - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1.
    params: `weight` (C, out_channels / groups, kernel_size), `bias` (out_channels,), initialised as in torch.
    Arguments as in `torch.nn.ConvTranspose1d`.

    Raises ValueError for sizes that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> up = nn.ConvTranspose1d(4, 2, stride=2)
        >>> params, _ = up.init(random.key(0), torch.zeros(1, 3, 10))
        >>> up(params, torch.zeros(1, 3, 10)).shape
        torch.Size([1, 4, 20])
    """

    dims: ClassVar[int] = 1


@layer
class ConvTranspose2d(_ConvTranspose):
    """The transpose of `Conv2d`, x: (N, C, H, W) or (C, H, W) -> (N, out_channels, H', W'); C from the input.

    H' = (H - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1, and W' likewise.
    params: `weight` (C, out_channels / groups, *kernel_size), `bias` (out_channels,), initialised as in torch.
    Arguments as in `torch.nn.ConvTranspose2d`.

    Raises ValueError for sizes that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> up = nn.ConvTranspose2d(4, 3, stride=2, padding=1, output_padding=1)
        >>> params, _ = up.init(random.key(0), torch.zeros(1, 8, 16, 16))
        >>> up(params, torch.zeros(1, 8, 16, 16)).shape
        torch.Size([1, 4, 32, 32])
    """

    dims: ClassVar[int] = 2
