"""Pooling over images: `MaxPool2d`, `AvgPool2d`, `AdaptiveAvgPool2d`."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fnn.nn._layer import Layer, Params, State, expect, layer

Size = int | tuple[int, int]


class _Pool(Layer):
    """A layer without parameters: subclasses give `pool`."""

    uses_key: ClassVar[bool] = False

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        expect(self, params, {})
        if x.dim() not in (3, 4):
            raise ValueError(
                f"{type(self).__name__}: expected an input of shape (N, C, H, W) or (C, H, W), got {tuple(x.shape)}"
            )
        return self.pool(x), state

    def pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@layer
class MaxPool2d(_Pool):
    """The largest value of each window, x: (N, C, H, W) -> (N, C, H', W'); arguments as in `torch.nn.MaxPool2d`."""

    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    dilation: Size = 1
    ceil_mode: bool = False

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


@layer
class AvgPool2d(_Pool):
    """The mean of each window, x: (N, C, H, W) -> (N, C, H', W'); arguments as in `torch.nn.AvgPool2d`."""

    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def pool(self, x: Tensor) -> Tensor:
        stride = self.kernel_size if self.stride is None else self.stride
        return F.avg_pool2d(x, self.kernel_size, stride, self.padding, self.ceil_mode, self.count_include_pad)


@layer
class AdaptiveAvgPool2d(_Pool):
    """The mean over windows that cut each image into `output_size` cells, as `torch.nn.AdaptiveAvgPool2d`."""

    output_size: Size

    def pool(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.output_size)
