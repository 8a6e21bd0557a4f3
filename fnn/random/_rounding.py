"""Arithmetic whose roundings are the same on every backend, eager or compiled.

Compilers may fuse `a * b + c` into one rounding, keep half precision in float32 between operations, and drop a pair of
conversions. Here each rounding is written so that they cannot: in float64, where the product of two float32 numbers is
exact, and by sums whose other operations are exact. (Not on the bits: torch 2.11 has no vmap rule for `view(dtype)`.)
"""

import torch
from torch import Tensor

_DIGITS = {torch.float16: 11, torch.bfloat16: 8}


def to_single(x: Tensor) -> Tensor:
    """A float64 tensor rounded to float32. Differentiable."""
    # The negations keep this conversion apart from one back to float64, with which a compiler would drop it.
    return -(-x).to(torch.float32)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of float32 or float64 tensors, rounded once, as XLA computes it. Differentiable."""
    if a.dtype == torch.float32:
        return to_single(a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64))
    return with_derivatives(_multiply_add64(a.detach(), b.detach(), c.detach()), a * b + c)


def _multiply_add64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # Dekker's product and Knuth's sum: each operation but the last is exact, so that fusing changes nothing.
    a_head, b_head = _leading(a, 26), _leading(b, 26)
    a_tail, b_tail = a - a_head, b - b_head
    product = a * b
    product_error = ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail
    total = product + c
    c_part = total - product
    total_error = (product - (total - c_part)) + (c - c_part)
    return total + (total_error + product_error)


def _leading(x: Tensor, digits: int) -> Tensor:
    # The float64 numbers near x * 2**k are 2**k times as far apart as those near x.
    shift = x * 2.0 ** (53 - digits)
    return (x + shift) - shift


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor rounded to the digits of float16 or bfloat16, still float32. Differentiable as the identity."""
    wide = x.detach().to(torch.float64)
    rounded = _leading(wide, _DIGITS[dtype])
    if dtype == torch.float16:
        # Numbers below 2**-14 are 2**-24 apart, as float64 ones near 1.5 * 2**28 are.
        rounded = torch.where(wide.abs() < 2.0**-14, (wide + 1.5 * 2.0**28) - 1.5 * 2.0**28, rounded)
    return with_derivatives(torch.where(wide.isinf(), wide, rounded).to(torch.float32), x)


def with_derivatives(value: Tensor, smooth: Tensor) -> Tensor:
    """`value`, exactly, with the derivatives to every order of a `smooth` that lies within a factor of 2 of it."""
    near = smooth.detach()
    # So close, the difference is exact, and so is the sum. Equal ones may be infinite.
    return smooth + torch.where(value == near, 0.0, value - near)


def next_above(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The next larger number of `dtype`, held in the dtype of x as x is; without a gradient."""
    x = x.detach()
    if x.dtype == dtype:
        return torch.nextafter(x, torch.full_like(x, torch.inf))
    # x plus 0.7 to 1.4 of its last digit's unit rounds to the next number.
    info = torch.finfo(dtype)
    step = (x.abs() * (0.7 * info.eps)).clamp(min=0.7 * info.tiny * info.eps)
    return torch.where(x.isinf(), x.clamp(min=info.min), round_to(x + step, dtype))


def next_below(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The next smaller number of `dtype`, held in the dtype of x as x is; without a gradient."""
    return -next_above(-x, dtype)
