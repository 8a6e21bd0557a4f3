"""Elementwise functions s: from a value each gives s, s' and s'', and so the Jacobian and the Laplacian of s(x)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.diff._forward_laplacian._carried import Carried, Unsupported, result, total

# The value, the first derivative and the second; None for a second derivative of zero.
Derivatives = tuple[Tensor, Tensor, Tensor | None]


def elementwise(x: Carried, derivatives: Derivatives) -> Carried:
    """s(x), where the Laplacian is s'(x) lap(x) + s''(x) |grad x|^2."""
    value, first, second = derivatives
    jacobian = x.rows(value.dim())
    curvature = None if second is None else second * jacobian.square().sum(0)
    drift = None if x.laplacian is None else first * x.laplacian
    return result(value, first * jacobian, total([curvature, drift]))


def tanh(x: Tensor) -> Derivatives:
    t = torch.tanh(x)
    first = 1 - t * t
    return t, first, -2 * t * first


def sigmoid(x: Tensor) -> Derivatives:
    s = torch.sigmoid(x)
    first = s * (1 - s)
    return s, first, first * (1 - 2 * s)


def logsigmoid(x: Tensor) -> Derivatives:
    s = torch.sigmoid(-x)
    return F.logsigmoid(x), s, s * (s - 1)


def relu(x: Tensor, inplace: bool = False) -> Derivatives:
    _out_of_place(inplace)
    return torch.relu(x), (x > 0).to(x.dtype), None


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Derivatives:
    _out_of_place(inplace)
    return F.leaky_relu(x, negative_slope), torch.where(x > 0, torch.ones_like(x), negative_slope), None


def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Derivatives:
    _out_of_place(inplace)
    tail = alpha * torch.exp(x.clamp(max=0))
    return F.elu(x, alpha), torch.where(x > 0, 1.0, tail), torch.where(x > 0, 0.0, tail)


def gelu(x: Tensor, approximate: str = "none") -> Derivatives:
    value = F.gelu(x, approximate=approximate)
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return value, 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, density * (2 - x * x)
    c, a = math.sqrt(2 / math.pi), 0.044715
    t, slope, curve = tanh(c * (x + a * x * x * x))
    inner, bend = c * (1 + 3 * a * x * x), 6 * c * a * x
    assert curve is not None
    first = 0.5 * (1 + t) + 0.5 * x * slope * inner
    return value, first, slope * inner + 0.5 * x * (curve * inner * inner + slope * bend)


def silu(x: Tensor, inplace: bool = False) -> Derivatives:
    _out_of_place(inplace)
    s = torch.sigmoid(x)
    return F.silu(x), s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    s = torch.sigmoid(beta * x)
    linear = beta * x > threshold
    return F.softplus(x, beta, threshold), torch.where(linear, 1.0, s), torch.where(linear, 0.0, beta * s * (1 - s))


def exp(x: Tensor) -> Derivatives:
    e = torch.exp(x)
    return e, e, e


def expm1(x: Tensor) -> Derivatives:
    e = torch.exp(x)
    return torch.expm1(x), e, e


def log(x: Tensor) -> Derivatives:
    r = 1 / x
    return torch.log(x), r, -r * r


def log1p(x: Tensor) -> Derivatives:
    r = 1 / (1 + x)
    return torch.log1p(x), r, -r * r


def sin(x: Tensor) -> Derivatives:
    s = torch.sin(x)
    return s, torch.cos(x), -s


def cos(x: Tensor) -> Derivatives:
    c = torch.cos(x)
    return c, -torch.sin(x), -c


def tan(x: Tensor) -> Derivatives:
    t = torch.tan(x)
    first = 1 + t * t
    return t, first, 2 * t * first


def atan(x: Tensor) -> Derivatives:
    first = 1 / (1 + x * x)
    return torch.atan(x), first, -2 * x * first * first


def sinh(x: Tensor) -> Derivatives:
    s = torch.sinh(x)
    return s, torch.cosh(x), s


def cosh(x: Tensor) -> Derivatives:
    c = torch.cosh(x)
    return c, torch.sinh(x), c


def erf(x: Tensor) -> Derivatives:
    first = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    return torch.erf(x), first, -2 * x * first


def sqrt(x: Tensor) -> Derivatives:
    s = torch.sqrt(x)
    first = 0.5 / s
    return s, first, -0.5 * first / x


def rsqrt(x: Tensor) -> Derivatives:
    r = torch.rsqrt(x)
    return r, -0.5 * r * r * r, 0.75 * r * r * r * r * r


def square(x: Tensor) -> Derivatives:
    return x * x, 2 * x, torch.full_like(x, 2)


def reciprocal(x: Tensor) -> Derivatives:
    r = 1 / x
    return r, -r * r, 2 * r * r * r


def absolute(x: Tensor) -> Derivatives:
    return torch.abs(x), torch.sign(x), None


def negative(x: Tensor) -> Derivatives:
    return -x, -torch.ones_like(x), None


def clamp(x: Tensor, min: Any = None, max: Any = None) -> Derivatives:
    if isinstance(min, Tensor | Carried) or isinstance(max, Tensor | Carried):
        raise Unsupported("clamp with bounds that are tensors")
    inside = torch.ones_like(x, dtype=torch.bool)
    inside = inside if min is None else inside & (x >= min)
    inside = inside if max is None else inside & (x <= max)
    return torch.clamp(x, min, max), inside.to(x.dtype), None


def power(base: Any, exponent: Any) -> Carried:
    """base ** exponent, where one of them is a number."""
    if isinstance(base, Carried) and isinstance(exponent, int | float):
        return elementwise(base, _to_number(base.value, exponent))
    if isinstance(exponent, Carried) and isinstance(base, int | float) and base > 0:
        value, rate = torch.pow(base, exponent.value), math.log(base)
        return elementwise(exponent, (value, rate * value, rate * rate * value))
    raise Unsupported("pow of two tensors")


def _to_number(x: Tensor, n: float) -> Derivatives:
    # The general formula would compute 0 * 0 ** -1 at zero.
    if n in (0, 1):
        return torch.pow(x, n), torch.full_like(x, n), None
    if n == 2:
        return square(x)
    return torch.pow(x, n), n * torch.pow(x, n - 1), n * (n - 1) * torch.pow(x, n - 2)


def _out_of_place(inplace: bool) -> None:
    if inplace:
        raise Unsupported("an activation in place")


FUNCTIONS: dict[str, Callable[..., Derivatives]] = {
    "abs": absolute,
    "absolute": absolute,
    "arctan": atan,
    "atan": atan,
    "clamp": clamp,
    "clip": clamp,
    "cos": cos,
    "cosh": cosh,
    "elu": elu,
    "erf": erf,
    "exp": exp,
    "expm1": expm1,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "log": log,
    "log1p": log1p,
    "logsigmoid": logsigmoid,
    "neg": negative,
    "negative": negative,
    "reciprocal": reciprocal,
    "relu": relu,
    "rsqrt": rsqrt,
    "sigmoid": sigmoid,
    "silu": silu,
    "sin": sin,
    "sinh": sinh,
    "softplus": softplus,
    "sqrt": sqrt,
    "square": square,
    "tan": tan,
    "tanh": tanh,
}
