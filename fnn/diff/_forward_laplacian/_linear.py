"""Functions linear in what they follow: the Jacobian and the Laplacian go through the function itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnn.diff._forward_laplacian._carried import Carried, Unsupported, result, zeros


def along_first(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Any function linear in its first argument, the other arguments constant; perhaps with several results."""
    if not isinstance(x, Carried):
        raise Unsupported(func.__name__)
    return _apply(lambda t: func(t, *args, **kwargs), [x])


def of_list(func: Callable, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """cat and stack: linear in all tensors of a list."""
    return _apply(lambda *ts: func(list(ts), *args, **kwargs), tensors)


def where(func: Callable, condition: Any, x: Any, other: Any) -> Any:
    """Linear in both branches; a branch that is a number goes along as a tensor."""
    if isinstance(condition, Carried):
        raise Unsupported("where with a condition that is no bool")
    like = x.value if isinstance(x, Carried) else other.value
    branches = [
        b if isinstance(b, Carried | Tensor) else torch.full((), b, dtype=like.dtype, device=like.device)
        for b in (x, other)
    ]
    return _apply(lambda a, b: func(condition, a, b), branches)


def _apply(f: Callable, operands: Sequence[Any]) -> Any:
    value = f(*[x.value if isinstance(x, Carried) else x for x in operands])
    jacobians = [x.jacobian if isinstance(x, Carried) else zeros(x) for x in operands]
    in_dims = tuple(0 if isinstance(x, Carried) else None for x in operands)
    jacobian = torch.vmap(f, in_dims)(*jacobians)
    laplacian = None
    if any(isinstance(x, Carried) and x.laplacian is not None for x in operands):
        laplacian = f(*[_laplacian(x) for x in operands])
    if isinstance(value, Tensor):
        return result(value, jacobian, laplacian)
    laplacians = [None] * len(value) if laplacian is None else laplacian
    return tuple(result(v, j, w) for v, j, w in zip(value, jacobian, laplacians, strict=True))


def _laplacian(x: Carried | Tensor) -> Tensor:
    if not isinstance(x, Carried):
        return zeros(x)
    return zeros(x.value) if x.laplacian is None else x.laplacian


def reshaped(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Carried:
    """Functions that keep all elements in their order."""
    if not isinstance(x, Carried):
        raise Unsupported(func.__name__)
    value = func(x.value, *args, **kwargs)
    if value.numel() != x.value.numel():
        return along_first(func, x, *args, **kwargs)
    jacobian = x.jacobian.reshape(x.jacobian.shape[0], *value.shape)
    return result(value, jacobian, None if x.laplacian is None else x.laplacian.reshape(value.shape))


def converted(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Carried:
    """Conversions of dtype and device."""
    value, jacobian = func(x.value, *args, **kwargs), func(x.jacobian, *args, **kwargs)
    return result(value, jacobian, None if x.laplacian is None else func(x.laplacian, *args, **kwargs))


def reduced(func: Callable, x: Any, dim: Any = None, keepdim: bool = False) -> Carried:
    """sum and mean."""
    dim = last_dims(x.value, dim)
    laplacian = None if x.laplacian is None else func(x.laplacian, dim, keepdim)
    if len(dim) == 0:
        return result(func(x.value), x.jacobian, laplacian)
    return result(func(x.value, dim, keepdim), func(x.jacobian, dim, keepdim), laplacian)


def last_dims(x: Tensor, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """`dim` counted from the end, so that it holds for the Jacobian too; None and () are all axes."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(x.dim()))
    return tuple(d - x.dim() if d >= 0 else d for d in dims)


def item(func: Callable, x: Any, index: Any) -> Carried:
    """x[index]."""
    if not isinstance(x, Carried):
        raise Unsupported("indexing with a floating-point tensor")
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return along_first(func, x, index)
    laplacian = None if x.laplacian is None else x.laplacian[index]
    return result(x.value[index], x.jacobian[(slice(None), *parts)], laplacian)


ALONG_FIRST = [
    "T",
    "avg_pool1d",
    "avg_pool2d",
    "broadcast_to",
    "chunk",
    "cumsum",
    "diag",
    "diagonal",
    "expand",
    "expand_as",
    "flip",
    "gather",
    "index_select",
    "mT",
    "movedim",
    "narrow",
    "pad",
    "permute",
    "repeat",
    "roll",
    "select",
    "split",
    "swapaxes",
    "take_along_dim",
    "tensor_split",
    "tile",
    "trace",
    "transpose",
    "tril",
    "triu",
    "unbind",
]
RESHAPED = [
    "clone",
    "contiguous",
    "flatten",
    "positive",
    "ravel",
    "reshape",
    "squeeze",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
]
CONVERTED = ["double", "float", "to"]
