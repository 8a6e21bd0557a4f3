"""Functions of whole axes, composed of the others: softmax, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fnn.diff._forward_laplacian import _elementwise
from fnn.diff._forward_laplacian._carried import Carried, Unsupported, result
from fnn.diff._forward_laplacian._elementwise import elementwise
from fnn.diff._forward_laplacian._linear import last_dims, reduced
from fnn.diff._forward_laplacian._products import add, mul, sub


def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Carried:
    """The gradient is the softmax p; the second derivative the variance of p."""
    dims = last_dims(x.value, dim)
    value = torch.logsumexp(x.value, dims, keepdim=True)
    p = torch.exp(x.value - value)
    jacobian = (p * x.jacobian).sum(dims, keepdim=True)
    spread = x.jacobian.square().sum(0) if x.laplacian is None else x.jacobian.square().sum(0) + x.laplacian
    laplacian = (p * spread).sum(dims, keepdim=True) - jacobian.square().sum(0)
    if keepdim:
        return result(value, jacobian, laplacian)
    return result(value.squeeze(dims), jacobian.squeeze(dims), laplacian.squeeze(dims))


def log_softmax(x: Any, dim: int | None = None, _stacklevel: int = 3) -> Carried:
    if dim is None:
        raise Unsupported("log_softmax without dim")
    return sub(x, logsumexp(x, dim, keepdim=True))


def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3) -> Carried:
    if dim is None:
        raise Unsupported("softmax without dim")
    return elementwise(out := log_softmax(x, dim), _elementwise.exp(out.value))


def norm(func: Callable, x: Any, p: Any = None, dim: Any = None, keepdim: bool = False) -> Carried:
    """The Euclidean norm over some axes."""
    if p not in (2, "fro", None):
        raise Unsupported(f"a norm of order {p}")
    if func is torch.linalg.norm and p == 2 and len(last_dims(x.value, dim)) == 2:
        raise Unsupported("the spectral norm")
    squares = reduced(torch.sum, elementwise(x, _elementwise.square(x.value)), dim, keepdim)
    return elementwise(squares, _elementwise.sqrt(squares.value))


def layer_norm(
    x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Carried:
    if not isinstance(x, Carried):
        raise Unsupported("layer_norm with a weight that depends on the point")
    dims = tuple(range(-len(shape), 0))
    centred = sub(x, reduced(torch.mean, x, dims, True))
    variance = reduced(torch.mean, elementwise(centred, _elementwise.square(centred.value)), dims, True)
    out = mul(centred, elementwise(variance, _elementwise.rsqrt(variance.value + eps)))
    out = out if weight is None else mul(out, weight)
    return out if bias is None else add(out, bias)
