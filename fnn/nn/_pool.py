"""Pooling: `MaxPool1d`, `MaxPool2d`, `AvgPool1d`, `AvgPool2d`, `AdaptiveAvgPool2d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.nn._floating import floating
from fnn.nn._layer import Layer, Params, State, expect, layer
from fnn.nn._window import Size, check_fit, check_sizes, per_axis, space
from fnn.ops import _max_pool

MAXIMA: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d}
MEANS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d}


class _Pool(Layer):
    """A layer without parameters over the last `dims` axes: subclasses give `pool`."""

    uses_key: ClassVar[bool] = False
    dims: ClassVar[int]

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        expect(self, params, {})
        return self.pool(x, space(self, x, self.dims)), state

    def pool(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The pooled images; `sizes` are those of the axes to pool."""
        raise NotImplementedError


@layer
class _Windows(_Pool):
    """Windows of one size, `stride` apart; by default side by side."""

    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    dilation = 1  # of means; a field of maxima
    ceil_mode = False  # a field of both, whose places differ in torch

    def __post_init__(self) -> None:
        check_sizes(self, self.dims, kernel_size=1, padding=0, dilation=1)
        if self.stride is not None:
            check_sizes(self, self.dims, stride=1)
        kernels, paddings = per_axis(self.kernel_size, self.dims), per_axis(self.padding, self.dims)
        for kernel, padding in zip(kernels, paddings, strict=True):
            if 2 * padding > kernel:
                raise ValueError(
                    f"{type(self).__name__}: padding must be at most half of kernel_size={self.kernel_size!r}, "
                    f"got {self.padding!r}"
                )

    def check(self, sizes: tuple[int, ...]) -> None:
        """Raise where no window fits; with `ceil_mode` the last may stand out at the end."""
        steps = per_axis(self.kernel_size if self.stride is None else self.stride, self.dims)
        slack = tuple([step - 1 if self.ceil_mode else 0 for step in steps])
        check_fit(self, sizes, self.kernel_size, self.padding, self.dilation, slack)


@layer
class _MaxPool(_Windows):
    dilation: Size = 1
    ceil_mode: bool = False

    def pool(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.check(sizes)
        kernel = per_axis(self.kernel_size, self.dims)
        height, width = (1, *kernel)[-2:]
        if self._side_by_side(kernel) and _max_pool.is_faster(x, height, width):
            return _max_pool.max_pool(x, height, width)
        return MAXIMA[self.dims](x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def _side_by_side(self, kernel: tuple[int, ...]) -> bool:
        """Whether the windows neither overlap nor leave gaps nor stand out."""
        steps = kernel if self.stride is None else per_axis(self.stride, self.dims)
        spread = [*per_axis(self.padding, self.dims), *[step - 1 for step in per_axis(self.dilation, self.dims)]]
        return steps == kernel and not any(spread) and not self.ceil_mode


@layer
class _AvgPool(_Windows):
    ceil_mode: bool = False
    count_include_pad: bool = True

    def pool(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.check(sizes)
        x = floating(self, x, torch.float32)  # torch's mean of 0 and 1 as integers is 0
        stride = self.kernel_size if self.stride is None else self.stride
        return MEANS[self.dims](x, self.kernel_size, stride, self.padding, self.ceil_mode, self.count_include_pad)


@layer
class MaxPool1d(_MaxPool):
    """The largest value of each window, x: (N, C, L) or (C, L) -> (N, C, L'); as `torch.nn.MaxPool1d`.

    Raises ValueError for windows that do not fit.

    Example:
        >>> from fnn import nn
        >>> nn.MaxPool1d(2)({}, torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0]]))
        tensor([[3., 2.]])
    """

    dims: ClassVar[int] = 1


@layer
class MaxPool2d(_MaxPool):
    """The largest value of each window, x: (N, C, H, W) or (C, H, W) -> (N, C, H', W'); as `torch.nn.MaxPool2d`.

    Raises ValueError for windows that do not fit.

    Example:
        >>> from fnn import nn
        >>> nn.MaxPool2d(2)({}, torch.arange(4.0).reshape(1, 2, 2))
        tensor([[[3.]]])
    """

    dims: ClassVar[int] = 2


@layer
class AvgPool1d(_AvgPool):
    """The mean of each window, x: (N, C, L) or (C, L) -> (N, C, L'); as `torch.nn.AvgPool1d`.

    Raises ValueError for windows that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn
        >>> nn.AvgPool1d(2)({}, torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0]]))
        tensor([[2., 1.]])
    """

    dims: ClassVar[int] = 1


@layer
class AvgPool2d(_AvgPool):
    """The mean of each window, x: (N, C, H, W) or (C, H, W) -> (N, C, H', W'); as `torch.nn.AvgPool2d`.

    Raises ValueError for windows that do not fit and TypeError for integer inputs.

    Example:
        >>> from fnn import nn
        >>> nn.AvgPool2d(2)({}, torch.arange(4.0).reshape(1, 2, 2))
        tensor([[[1.5000]]])
    """

    dims: ClassVar[int] = 2


@layer
class AdaptiveAvgPool2d(_Pool):
    """The mean over windows that cut each image into `output_size` cells, as `torch.nn.AdaptiveAvgPool2d`.

    Raises TypeError for integer inputs.

    Example:
        >>> from fnn import nn
        >>> nn.AdaptiveAvgPool2d(1)({}, torch.arange(4.0).reshape(1, 2, 2))
        tensor([[[1.5000]]])
    """

    output_size: int | tuple[int, int]
    dims: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_sizes(self, self.dims, output_size=1)

    def pool(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return F.adaptive_avg_pool2d(floating(self, x, torch.float32), self.output_size)
