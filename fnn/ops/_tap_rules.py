"""Which calls have taps: where their weight is, what it meets, and its gradient as a product of two matrices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels._matmul.op import product


class Tap(NamedTuple):
    """One use of a leaf: a call of which it is the weight."""

    leaf: int
    """Number of the leaf in tree order."""
    path: str
    kind: str
    """"linear", "conv" or "embedding"."""
    weight: tuple[int, ...]
    """Shape of the leaf."""
    shape: tuple[int, ...]
    """Of the pre-activation, for one example."""
    dtype: torch.dtype
    device: torch.device
    bias: int | None
    """Number of the leaf that the same call adds, where it is one."""
    options: tuple[Any, ...]
    """linear: (layout,), the letters of its weight's axes, "oi" as torch stores it or "io", and of its input's and
    output's last, "rows" or, for `weight @ x` with a matrix x, "columns". conv: (stride, padding, dilation, groups).
    embedding: (padding_idx,)."""

    @property
    def groups(self) -> int:
        """In how many parts the weight is cut, each for its own channels."""
        return self.options[-1] if self.kind == "conv" else 1

    @property
    def positions(self) -> int:
        """T, the number of rows of `rows`."""
        out = self.weight[1] if self.kind == "embedding" or self.options[0] == "io" else self.weight[0]
        count = 1
        for size in self.shape:
            count *= size
        return count // max(1, out)

    def rows(self, input: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """`(inputs, deltas)` of one example, (groups, T, k) and (groups, T, n): what each of T positions met and gave.

        The gradient of the weight is the sum over T of the outer products, one for each group; `gradient` shows how
        it is laid out. Of an embedding the first is (1, T) instead: the rows that were looked up.
        """
        return self.met(input), self.given(input, delta)

    def met(self, input: Tensor) -> Tensor:
        """The first of `rows`."""
        if self.kind == "embedding":
            return input.reshape(1, -1) % self.weight[0]
        if self.kind == "conv":
            return patches(input, self.weight, *self.options)
        input = input.mT if self.options[1] == "columns" else input
        return input.reshape(1, -1, input.shape[-1])

    def given(self, input: Tensor, delta: Tensor) -> Tensor:
        """The second of `rows`."""
        if self.kind == "conv":
            return channels_last(delta, self.weight, self.groups)
        if self.kind == "linear" and self.options[1] == "columns":
            delta = delta.mT
        delta = delta.reshape(1, -1, delta.shape[-1])
        if self.kind == "embedding" and self.options[0] is not None:
            padding = input.reshape(1, -1, 1) % self.weight[0] == self.options[0]
            delta = torch.where(padding, 0, delta)
        return delta

    def gradient(self, inputs: Tensor, deltas: Tensor) -> Tensor:
        """The leaf's gradient from the rows of one example."""
        if self.kind == "embedding":
            return deltas.new_zeros(self.weight).index_add(0, inputs[0], deltas[0])
        first, second = (inputs, deltas) if self.options[0] == "io" else (deltas, inputs)
        return (first.mT @ second).reshape(self.weight)

    def signature(self) -> tuple[Any, ...]:
        """What must be the same in each run of one function."""
        return self.leaf, self.kind, self.shape, self.bias, self.options


class Use(NamedTuple):
    """What a rule found: the leaf, what it meets, and the arguments of the call with the outer leaf in its place."""

    leaf: int
    kind: str
    input: Tensor
    args: tuple[Any, ...]
    bias: int | None = None
    options: tuple[Any, ...] = ()


def linear(recorder: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    leaf = recorder.shadows.get(weight)
    if leaf is None or weight.dim() != 2:
        return None
    number, bias = recorder.addend(bias, weight.shape[0])
    return Use(leaf, "linear", input, (input, recorder.leaves[leaf], bias), number, ("oi", "rows"))


def matmul(recorder: Any, *args: Any, **kwargs: Any) -> Use | None:
    if kwargs or len(args) != 2:
        return None
    a, b = args
    if b.dim() == 2 and a.dim() > 0:
        leaf, weight, layout = recorder.matrix(b)
        if leaf is not None:
            return Use(leaf, "linear", a, (a, weight), None, (layout, "rows"))
    if a.dim() == 2 and b.dim() in (1, 2):
        leaf, weight, layout = recorder.matrix(a)
        if leaf is not None:
            options = ("io" if layout == "oi" else "oi", "rows" if b.dim() == 1 else "columns")
            return Use(leaf, "linear", b, (weight, b), None, options)
    return None


def operator_product(recorder: Any, a: Tensor, b: Tensor, bias: Tensor | None, *options: Any) -> Use | None:
    leaf, weight, layout = recorder.matrix(b)
    if leaf is None or b.dim() != 2:
        return None
    number, bias = recorder.addend(bias, b.shape[1])
    return Use(leaf, "linear", a, (a, weight, bias, *options), number, (layout, "rows"))


def convolution(
    recorder: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Use | None:
    leaf = recorder.shadows.get(weight)
    if leaf is None:
        return None
    number, bias = recorder.addend(bias, weight.shape[0])
    args = (input, recorder.leaves[leaf], bias, stride, padding, dilation, groups)
    options = (*_normal(stride, padding, dilation, weight.dim() - 2), groups)
    return Use(leaf, "conv", input, args, number, options)


def embedding(
    recorder: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Use | None:
    leaf = recorder.shadows.get(weight)
    if leaf is None or weight.dim() != 2 or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    args = (input, recorder.leaves[leaf], padding_idx)
    return Use(leaf, "embedding", input, args, None, (padding,))


def lookup(recorder: Any, weight: Any, index: Any) -> Use | None:
    leaf = recorder.shadows.get(weight)
    if leaf is None or weight.dim() != 2 or not isinstance(index, Tensor):
        return None
    if index.dtype not in (torch.int64, torch.int32):
        return None
    return Use(leaf, "embedding", index, (recorder.leaves[leaf], index), None, (None,))


RULES: dict[Callable[..., Any], Callable[..., Use | None]] = {
    F.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.mv: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    Tensor.mm: matmul,
    Tensor.mv: matmul,
    operator.matmul: matmul,
    product: operator_product,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.embedding: embedding,
    Tensor.__getitem__: lookup,
}


def _always(args: Any, kwargs: Any) -> bool:
    return not kwargs and len(args) == 1


def _of_two_axes(args: Any, kwargs: Any) -> bool:
    return not kwargs and args[1:] in ((0, 1), (1, 0), (-1, -2), (-2, -1))


TRANSPOSITIONS: dict[Any, Callable[..., bool]] = {
    Tensor.t: _always,
    torch.t: _always,
    Tensor.T.__get__: lambda args, kwargs: True,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.mT.__get__: lambda args, kwargs: True,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.transpose: _of_two_axes,
    torch.transpose: _of_two_axes,
}


def _normal(stride: Any, padding: Any, dilation: Any, dims: int) -> tuple[Any, ...]:
    """The options of a convolution as tuples, one number an axis; `padding` as given where it is a word."""

    def per_axis(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    return per_axis(stride), padding if isinstance(padding, str) else per_axis(padding), per_axis(dilation)


def patches(x: Tensor, weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """What each position of a convolution's output sees: (groups, T, channels / groups * kernel), x (N?, C, *space)."""
    kernel = weight[2:]
    dims = len(kernel)
    x = x.unsqueeze(0) if x.dim() == dims + 1 else x
    widths: list[int] = []  # last axis first, as F.pad takes them
    for axis in reversed(range(dims)):
        if padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            widths += [total // 2, total - total // 2]
        elif padding != "valid":
            widths += [padding[axis], padding[axis]]
    if any([width > 0 for width in widths]):
        x = F.pad(x, widths)
    for axis in range(dims):
        span = (kernel[axis] - 1) * dilation[axis] + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    # (N, C, *out, *kernel) -> (groups, N * out, C / groups * kernel)
    batch, channels, out = x.shape[0], x.shape[1], x.shape[2 : 2 + dims]
    x = x.reshape(batch, groups, channels // groups, *out, *kernel)
    space = list(range(3, 3 + dims))
    x = x.permute(1, 0, *space, 2, *range(3 + dims, 3 + 2 * dims))
    positions = batch
    for size in out:
        positions *= size
    width = channels // groups
    for size in kernel:
        width *= size
    return x.reshape(groups, positions, width)


def channels_last(delta: Tensor, weight: tuple[int, ...], groups: int) -> Tensor:
    """The derivative with respect to a convolution's output, (N?, C, *space), as (groups, T, C / groups)."""
    delta = delta.unsqueeze(0) if delta.dim() == len(weight) - 1 else delta
    width = weight[0] // groups
    delta = delta.reshape(delta.shape[0], groups, width, -1)
    return delta.permute(1, 0, 3, 2).reshape(groups, -1, width)
