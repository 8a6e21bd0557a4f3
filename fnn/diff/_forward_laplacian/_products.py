"""Sums, products and quotients, where either operand, or both, may be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import ops
from fnn.diff._forward_laplacian._carried import Carried, Operand, Unsupported, result, total, values
from fnn.diff._forward_laplacian._linear import along_first, reshaped


def add(a: Operand, b: Operand, alpha: float = 1) -> Carried:
    b = b if alpha == 1 else mul(b, alpha)
    value = values(a) + values(b)
    followed = [x for x in (a, b) if isinstance(x, Carried)]
    jacobian = total([x.rows(value.dim()) for x in followed])
    assert jacobian is not None
    return result(value, jacobian, total([x.laplacian for x in followed]))


def sub(a: Operand, b: Operand, alpha: float = 1) -> Carried:
    return add(a, mul(b, -alpha) if isinstance(b, Carried) else -alpha * b)  # type: ignore[operator]


def mul(a: Operand, b: Operand) -> Any:
    if not _any(a, b):
        return a * b  # type: ignore[operator]
    return product_rule(torch.mul, a, b)


def product_rule(f: Callable, a: Operand, b: Operand) -> Carried:
    """A broadcasting f, linear in each operand; its Laplacian is f(a, lap b) + f(lap a, b) + 2 f(grad a, grad b)."""
    plain_a, plain_b = values(a), values(b)
    value = f(plain_a, plain_b)
    dims = max([x.value.dim() if isinstance(x, Carried) else x.dim() if isinstance(x, Tensor) else 0 for x in (a, b)])
    first, second = [], []
    if isinstance(a, Carried):
        first.append(f(a.rows(dims), plain_b))
        second.append(None if a.laplacian is None else f(a.laplacian, plain_b))
    if isinstance(b, Carried):
        first.append(f(plain_a, b.rows(dims)))
        second.append(None if b.laplacian is None else f(plain_a, b.laplacian))
    if isinstance(a, Carried) and isinstance(b, Carried):
        second.append(2 * f(a.rows(dims), b.rows(dims)).sum(0))
    jacobian = total(first)
    assert jacobian is not None
    return result(value, jacobian, total(second))


def div(a: Operand, b: Operand, rounding_mode: str | None = None) -> Carried:
    """From a = q b: the derivatives of a less those of b times q, over b."""
    if rounding_mode is not None:
        raise Unsupported("div with a rounding mode")
    value = values(a) / values(b)
    if not isinstance(b, Carried):
        assert isinstance(a, Carried)
        return result(value, a.rows(value.dim()) / b, None if a.laplacian is None else a.laplacian / b)
    down = b.rows(value.dim())
    up = a.rows(value.dim()) if isinstance(a, Carried) else None
    jacobian = (-value * down if up is None else up - value * down) / b.value
    terms = [
        a.laplacian if isinstance(a, Carried) else None,
        None if b.laplacian is None else -value * b.laplacian,
        -2 * (jacobian * down).sum(0),
    ]
    laplacian = total(terms)
    assert laplacian is not None
    return result(value, jacobian, laplacian / b.value)


def multilinear(func: Callable[..., Tensor], operands: list[Any]) -> Carried:
    """A function linear in each operand, by the product rule."""
    plain = [values(x) for x in operands]
    followed = [i for i, x in enumerate(operands) if isinstance(x, Carried)]

    def along(chosen: dict[int, Tensor]) -> Tensor:
        filled = [chosen.get(i, x) for i, x in enumerate(plain)]
        return torch.vmap(func, tuple(0 if i in chosen else None for i in range(len(plain))))(*filled)

    first, second = [], []
    for position, i in enumerate(followed):
        x = operands[i]
        first.append(along({i: x.jacobian}))
        if x.laplacian is not None:
            second.append(func(*plain[:i], x.laplacian, *plain[i + 1 :]))
        for j in followed[position + 1 :]:
            second.append(2 * along({i: x.jacobian, j: operands[j].jacobian}).sum(0))
    jacobian = total(first)
    assert jacobian is not None
    return result(func(*plain), jacobian, total(second))


def bilinear(func: Callable, a: Any, b: Any, *args: Any, **kwargs: Any) -> Carried:
    return multilinear(lambda a, b: func(a, b, *args, **kwargs), [a, b])


def einsum(func: Callable, equation: Any, *operands: Any) -> Carried:
    if not isinstance(equation, str):
        raise Unsupported("einsum without an equation")
    several = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    return multilinear(lambda *tensors: func(equation, *tensors), list(several))


def matmul(func: Callable, a: Any, b: Any) -> Carried:
    """torch.matmul, and what it is for operands of one or two axes: mm, mv, dot, bmm."""
    if isinstance(b, Tensor) and b.dim() == 2:
        laplacian = None if a.laplacian is None else ops.matmul(a.laplacian, b)
        return result(func(a.value, b), ops.matmul(a.jacobian, b), laplacian)
    row, column = values(a).dim() == 1, values(b).dim() == 1
    out = product_rule(torch.matmul, _unsqueezed(a, 0) if row else a, _unsqueezed(b, 1) if column else b)
    out = reshaped(torch.squeeze, out, -1) if column else out
    return reshaped(torch.squeeze, out, -1 if column else -2) if row else out


def linear(func: Callable, x: Any, weight: Any, bias: Any = None, *others: Any) -> Carried:
    """x weight.T + bias, of torch or of oneDNN, whose further arguments name what is fused: here, nothing."""
    if others not in ((), ("none", [], "")):
        raise Unsupported(f"{func.__name__} with a fused activation")
    if isinstance(weight, Carried):
        out = matmul(torch.matmul, x, along_first(torch.transpose, weight, -1, -2))
        return out if bias is None else add(out, bias)
    if not isinstance(x, Carried):
        return add(func(x, weight, None, *others), bias)
    if isinstance(bias, Carried):
        return add(linear(func, x, weight, None, *others), bias)
    laplacian = None if x.laplacian is None else ops.linear(x.laplacian, weight)
    return result(func(x.value, weight, bias, *others), ops.linear(x.jacobian, weight), laplacian)


def product(func: Callable, a: Any, b: Any, bias: Any, *options: Any) -> Carried:
    """The operator behind `fnn.ops.linear` and `fnn.ops.matmul`."""
    if not isinstance(a, Carried) or _any(b, bias):
        out = multilinear(lambda *ab: func(*ab, None, *options), [a, b]) if _any(a, b) else func(a, b, None, *options)
        return out if bias is None else add(out, bias)
    laplacian = None if a.laplacian is None else func(a.laplacian, b, None, *options)
    return result(func(a.value, b, bias, *options), func(a.rows(b.dim()), b, None, *options), laplacian)


def addmm(func: Callable, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Carried:
    out: Any = matmul(torch.matmul, a, b) if _any(a, b) else torch.matmul(a, b)
    return add(bias if beta == 1 else mul(bias, beta), out, alpha)


def convolution(func: Callable, x: Any, weight: Any, bias: Any = None, *options: Any, **others: Any) -> Carried:
    """conv1d, conv2d and conv3d, linear in their input."""
    if not isinstance(x, Carried) or _any(weight, bias):
        raise Unsupported(f"{func.__name__} with a kernel that depends on the point")
    out = along_first(lambda t: func(t, weight, None, *options, **others), x)
    value = func(x.value, weight, bias, *options, **others)
    return result(value, out.jacobian, out.laplacian)


def _unsqueezed(x: Any, dim: int) -> Any:
    return reshaped(torch.unsqueeze, x, dim) if isinstance(x, Carried) else x.unsqueeze(dim)


def _any(*operands: Any) -> bool:
    return any(isinstance(x, Carried) for x in operands)


BILINEAR = ("cross", "inner", "outer")
