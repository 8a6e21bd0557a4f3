"""Arithmetic whose roundings are the same on every backend, eager or compiled.

Compilers may fuse `a * b + c` into one rounding, keep half precision in float32 between operations, and drop a pair of
conversions. Here each rounding is written so that they cannot: in float64, where the product of two float32 numbers is
exact, or on the bits.
"""

import torch
from torch import Tensor

_HALF_DIGITS = {torch.float16: 11, torch.bfloat16: 8}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` of float32 or float64 tensors, rounded once, as XLA computes it. Differentiable."""
    if a.dtype == torch.float32:
        total = a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64)
        # The negations keep the rounding to float32 apart from a conversion back that may follow.
        return -(-total).to(torch.float32)
    total = a * b + c
    return total + (_multiply_add64(a.detach(), b.detach(), c.detach()) - total).detach()


def divide(a: Tensor, b: Tensor) -> Tensor:
    """`a / b` of float32 or float64 tensors, correctly rounded where compiled code may approximate. Differentiable."""
    if a.dtype == torch.float32:
        return -(-a.to(torch.float64) / b.to(torch.float64)).to(torch.float32)
    return a / b


def _multiply_add64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    # Dekker's product and Knuth's sum: each operation but the last is exact, so that fusing changes nothing.
    a_head, b_head = _head(a), _head(b)
    a_tail, b_tail = a - a_head, b - b_head
    product = a * b
    product_error = ((a_head * b_head - product) + a_head * b_tail + a_tail * b_head) + a_tail * b_tail
    total = product + c
    c_part = total - product
    total_error = (product - (total - c_part)) + (c - c_part)
    return total + (total_error + product_error)


def _head(x: Tensor) -> Tensor:
    return (x.view(torch.int64) & -(1 << 27)).view(torch.float64)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor rounded to the digits of float16 or bfloat16, still float32. Differentiable as the identity."""
    dropped = 24 - _HALF_DIGITS[dtype]
    word = x.detach().view(torch.int32)
    word = (word + ((1 << (dropped - 1)) - 1) + ((word >> dropped) & 1)) & -(1 << dropped)
    return x + (word.view(torch.float32) - x).detach()


def next_above(x: Tensor) -> Tensor:
    """The next larger number of the tensor's dtype, without a gradient."""
    x = x.detach()
    word = x.view(_INTEGERS[x.dtype.itemsize])
    above = torch.where(x > 0, word + 1, word - 1).view(x.dtype)
    smallest = torch.ones_like(word).view(x.dtype)
    return torch.where(x == 0, smallest, torch.where(x == torch.inf, x, above))


def next_below(x: Tensor) -> Tensor:
    """The next smaller number of the tensor's dtype, without a gradient."""
    return -next_above(-x)
