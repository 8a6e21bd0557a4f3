"""Collective operations of the processes of a group, as operators with an exact derivative of every order.

Each is linear, and closed under differentiation: forward mode applies the operation to the tangent, reverse mode its
transpose to the gradient. The transpose is that of the program of all processes together, whose value is the sum of
their losses: gathering and scattering a sum are each other's, summing is its own.

Torch's functional collectives, which do the work, have no rule for `torch.func`. Inductor is given them in place of
the operators here, because it knows how to overlap and to bucket them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from triton_kernels._inductor import decompose, tracing
from triton_kernels._register import register


def all_gather(x: Tensor, group: str, count: int, dim: int = 0) -> Tensor:
    """What every process of a group gives, one after the other along `dim`: the length there becomes `count` times x's.

    x: (..., n, ...), contiguous or not, of floats or integers and of one shape on all processes -> (..., count n, ...)
    group: the name of the process group, as `mesh["data"].get_group().group_name`
    count: how many processes are in it; with one, x is returned as it is

    Works under every transform, compiled or not; under `vmap` it is one operation for the whole batch. Its gradient
    is that of the sum of the processes' losses: see `reduce_scatter`, its transpose.

    Raises TypeError for dtypes that processes do not exchange, ValueError for an axis that is not there.

    Example:
        >>> from fnn import ops
        >>> ops.all_gather(torch.ones(2, 3), "alone", 1).shape
        torch.Size([2, 3])
    """
    dim = _axis("all_gather", x, count, dim)
    return x if count == 1 else gathered(x, dim, count, group)


def reduce_scatter(x: Tensor, group: str, count: int, dim: int = 0) -> Tensor:
    """This process's part of the sum over the processes of a group, which is cut into `count` equal parts along `dim`.

    x: (..., count n, ...) -> (..., n, ...); see `all_gather`, its transpose, for the arguments.

    Raises ValueError if `count` does not divide the length, else as `all_gather` does.

    Example:
        >>> from fnn import ops
        >>> ops.reduce_scatter(torch.ones(2, 3), "alone", 1).shape
        torch.Size([2, 3])
    """
    dim = _axis("reduce_scatter", x, count, dim)
    if x.shape[dim] % count:
        raise ValueError(
            f"reduce_scatter: axis {dim} of a tensor of shape {tuple(x.shape)} cannot be cut into {count} equal parts"
        )
    return x if count == 1 else scattered(x, dim, count, group)


def all_reduce(x: Tensor, group: str, count: int) -> Tensor:
    """The sum over the processes of a group, on each of them; see `all_gather` for the arguments.

    It is its own transpose. Divide by `count` for the mean.

    Raises TypeError for dtypes that processes do not exchange.

    Example:
        >>> from fnn import ops
        >>> ops.all_reduce(torch.ones(2), "alone", 1)
        tensor([1., 1.])
    """
    _check("all_reduce", x, count)
    return x if count == 1 else summed(x, group)


def average_gradient(x: Tensor, group: str, count: int) -> Tensor:
    """`x`, the same on every process of a group, whose gradient is the mean of theirs; see `all_gather`.

    For a value that is the mean over the processes, which each of them differentiates by what all have. Forward mode
    takes the tangent, too, to be the same on all.

    Example:
        >>> from fnn import ops
        >>> ops.average_gradient(torch.ones(2), "alone", 1)
        tensor([1., 1.])
    """
    _check("average_gradient", x, count)
    return x if count == 1 else averaged(x, count, group)


def _check(who: str, x: Any, count: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: x is {type(x).__name__}, expected a tensor")
    if x.dtype is torch.bool or x.is_complex():
        cure = "torch.view_as_real(x)" if x.is_complex() else "x.to(torch.uint8)"
        raise TypeError(f"{who}: x has dtype {x.dtype}, expected floats or integers; give {cure}")
    if count < 1:
        raise ValueError(f"{who}: count is {count}, expected the number of processes of the group")


def _axis(who: str, x: Tensor, count: int, dim: int) -> int:
    _check(who, x, count)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{who}: a tensor of shape {tuple(x.shape)} has no axis {dim}")
    return dim % x.dim()


def _gather(x: Tensor, dim: int, count: int, group: str) -> Tensor:
    functional = torch.ops._c10d_functional
    x = x.movedim(dim, 0).contiguous()
    return _back(functional.wait_tensor(functional.all_gather_into_tensor(x, count, group)), dim)


def _scatter(x: Tensor, dim: int, count: int, group: str) -> Tensor:
    functional = torch.ops._c10d_functional
    x = x.movedim(dim, 0).contiguous()
    return _back(functional.wait_tensor(functional.reduce_scatter_tensor(x, "sum", count, group)), dim)


def _back(x: Tensor, dim: int) -> Tensor:
    # No view: in a compiled program torch ends with an internal error where forward mode meets views of other strides.
    return x.movedim(0, dim).contiguous() if dim else x


def _sum(x: Tensor, group: str) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def _fake_gather(x, dim, count, group):
    _prepare()
    return x.new_empty((*x.shape[:dim], x.shape[dim] * count, *x.shape[dim + 1 :]))


def _fake_scatter(x, dim, count, group):
    _prepare()
    return x.new_empty((*x.shape[:dim], x.shape[dim] // count, *x.shape[dim + 1 :]))


def _fake_sum(x, group):
    _prepare()
    return x.new_empty(x.shape)


def _fake_same(x, count, group):
    _prepare()
    return torch.empty_like(x)


def _prepare() -> None:
    if tracing():
        _install()


@functools.cache
def _install() -> None:
    """Gives Inductor torch's collectives."""
    with _disable_current_modes():
        import torch.distributed._functional_collectives  # noqa: F401  (how torch's operators behave on fake tensors)
    decompose(__file__, {gathered: _gather, scattered: _scatter, summed: _sum, averaged: lambda x, count, group: x})


def _vmap_along_axis(op, in_dims, x, dim, count, group):
    return op(x, dim + (in_dims[0] <= dim), count, group), in_dims[0]


def _vmap_elements(op, in_dims, x, *options):
    return op(x, *options), in_dims[0]


class _GatherRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, grad):
        return scattered(grad, *ctx.options), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return gathered(tangent, *ctx.options)


class _ScatterRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, grad):
        return gathered(grad, *ctx.options), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return scattered(tangent, *ctx.options)


class _SumRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, grad):
        return summed(grad, ctx.group), None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return summed(tangent, ctx.group)


class _MeanRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, grad):
        count, group = ctx.options
        return summed(grad, group) / count, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return averaged(tangent, *ctx.options)


LIBRARY = torch.library.Library("fnn", "FRAGMENT")


def _operator(schema: str, kernel: Any, fake: Any, vmap: Any, rule: type) -> Any:
    return register(schema, cpu=kernel, cuda=kernel, fake=fake, vmap=vmap, rule=rule, library=LIBRARY)


gathered = _operator(
    "all_gather(Tensor x, int dim, int count, str group) -> Tensor",
    *(_gather, _fake_gather, _vmap_along_axis, _GatherRule),
)
scattered = _operator(
    "reduce_scatter(Tensor x, int dim, int count, str group) -> Tensor",
    *(_scatter, _fake_scatter, _vmap_along_axis, _ScatterRule),
)
summed = _operator("all_reduce(Tensor x, str group) -> Tensor", _sum, _fake_sum, _vmap_elements, _SumRule)
averaged = _operator(
    "average_gradient(Tensor x, int count, str group) -> Tensor",
    *(lambda x, count, group: x.clone(), _fake_same, _vmap_elements, _MeanRule),
)
