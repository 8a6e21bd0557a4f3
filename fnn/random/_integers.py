"""Uniform integers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fnn.random._arguments import as_integer, check_broadcast, check_dtype, check_shape, describe
from fnn.random._bits import bits
from fnn.random._keys import check_key, split

_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def randint(
    key: Tensor,
    shape: Sequence[int],
    minval: int | Tensor,
    maxval: int | Tensor,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """Integers spread evenly over [minval, maxval).

    key: (2,) int32. shape: of the result. minval, maxval: integers that `dtype` holds (below 64 bits, `maxval` may be
    one more), or integer tensors that broadcast to `shape`, clipped to what it holds; where those leave no number,
    minval is drawn. dtype: int32, int64, int16, int8 or uint8.
    Returns `shape` of `dtype`, equal to JAX's bit for bit. The probabilities are even to a relative span / 2**64 for
    spans up to 2**16, and span / 2**32 beyond (int64: span / 2**128 up to 2**32, and span / 2**64).
    Raises TypeError for bounds that are no integers, ValueError for those that do not fit.

    >>> fnn.random.randint(fnn.random.key(0), (5,), 0, 10)
    tensor([9, 0, 2, 3, 1], dtype=torch.int32)

    Source: `jax.random.randint`.
    """
    check_key(key)
    shape = check_shape("shape", shape)
    check_dtype("`dtype`", dtype, _DTYPES)
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    low, high = _bound("minval", minval, least, most), _bound("maxval", maxval, least, most + (dtype != torch.int64))
    for name, bound in (("minval", low), ("maxval", high)):
        if isinstance(bound, Tensor):
            check_broadcast(shape, **{name: bound})
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        span = torch.where(torch.as_tensor(high > low), high - low, 1)
    elif low < high:
        span = high - low
    else:
        raise ValueError(f"`minval` is less than `maxval`, but {low} is not less than {high}.")
    higher_key, lower_key = split(key)
    if dtype == torch.int64:
        if not isinstance(span, Tensor):
            span = torch.full((), (span + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=key.device)
        # As in 32 bits, below, in unsigned numbers that wrap.
        multiplier = _remainder64(torch.full_like(span, 2**32), span)
        multiplier = _remainder64(multiplier * multiplier, span)
        higher, lower = (_remainder64(bits(k, shape, dtype), span) for k in (higher_key, lower_key))
        return low + _remainder64(higher * multiplier + lower, span)
    # The remainder by span of a number of 64 bits: (higher * 2**32 + lower) % span. Where span is more than 2**16, the
    # square wraps to 0 in JAX, and higher does not count.
    multiplier = (2**16 % span) ** 2 % 2**32 % span
    offset = _unsigned(bits(lower_key, shape)) % span
    if isinstance(multiplier, Tensor) or multiplier != 0:
        offset = (_unsigned(bits(higher_key, shape)) % span * multiplier + offset) % span
    return (low + offset).to(dtype)


def _bound(name: str, value: int | Tensor, least: int, most: int) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"`{name}` is an integer or a tensor of integers, not {describe(value)}.")
        return value.to(torch.int64).clamp(least, most)
    number = as_integer(value)
    if number is None:
        raise TypeError(f"`{name}` is an integer or a tensor of integers, not {describe(value)}.")
    if not least <= number <= most:
        raise ValueError(f"`{name}` lies between {least} and {most} for this dtype, but is {number}.")
    return number


def _unsigned(word: Tensor) -> Tensor:
    return word.to(torch.int64) & 0xFFFFFFFF


def _remainder64(x: Tensor, span: Tensor) -> Tensor:
    # x % span of unsigned numbers held in int64, span > 0.
    positive = torch.where(span > 0, span, 1)
    doubled = ((x >> 1) & (2**63 - 1)) % positive * 2 + (x & 1)
    small = torch.where(_below(doubled, positive), doubled, doubled - positive)
    large = torch.where(_below(x, span), x, x - span)
    return torch.where(span > 0, small, large)


def _below(x: Tensor, y: Tensor) -> Tensor:
    return (x ^ -(2**63)) < (y ^ -(2**63))
