"""Uniform floats, and the coin flips made from them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fnn.random._arguments import FLOATS, check_broadcast, check_dtype, check_shape, real_tensor
from fnn.random._bits import draw
from fnn.random._keys import check_key
from fnn.random._rounding import multiply_add, round_to

# The binary digits behind the point of a draw: those of the dtype's fraction.
DIGITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float64: 52}


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Floats spread evenly over [minval, maxval).

    key: (2,) int32. shape: of the result. dtype: float32, float16, bfloat16 or float64. minval, maxval: numbers, or
    tensors that broadcast to `shape`; gradients flow to them.
    Returns `shape` of `dtype`, equal to JAX's bit for bit, eager or compiled. Raises TypeError for other arguments,
    ValueError for bounds that do not broadcast, or numbers in the wrong order.

    >>> fnn.random.uniform(fnn.random.key(0), (2,), minval=-1.0)
    tensor([0.8953, 0.9572])

    Source: `jax.random.uniform`.
    """
    check_key(key)
    shape = check_shape("shape", shape)
    check_dtype("`dtype`", dtype, FLOATS)
    numbers = not isinstance(minval, Tensor) and not isinstance(maxval, Tensor)
    if numbers and minval == 0 and maxval == 1:
        return draw_unit(key, shape, dtype, lambda u: u.to(dtype))
    work = working_dtype(dtype)
    low, high = real_tensor("minval", minval, work, key.device), real_tensor("maxval", maxval, work, key.device)
    if numbers and minval > maxval:
        raise ValueError(f"`minval` is at most `maxval`, but {minval} is more than {maxval}.")
    check_broadcast(shape, minval=low, maxval=high)
    scale = scaling(dtype, low, high)
    return draw_unit(key, shape, dtype, lambda u: scale(u).to(dtype), low, high)


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """True with probability p.

    key: (2,) int32. p: a number, or a tensor that broadcasts to `shape`. shape: of the result, by default that of p.
    Returns `shape` of bool. Raises TypeError for a `p` that is not real, ValueError for a number outside [0, 1].

    >>> fnn.random.bernoulli(fnn.random.key(0), 0.9, (3,))
    tensor([False, False,  True])

    Source: `jax.random.bernoulli`.
    """
    check_key(key)
    if isinstance(p, Tensor):
        check_dtype("the dtype of `p`", p.dtype, FLOATS)
        dtype = p.dtype
    else:
        dtype = torch.float32
    work = working_dtype(dtype)
    threshold = real_tensor("p", p, work, key.device)
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"`p` is a probability, from 0 to 1, not {p}.")
    shape = tuple(threshold.shape) if shape is None else check_shape("shape", shape)
    check_broadcast(shape, p=threshold)
    return draw_unit(key, shape, dtype, lambda u: u < threshold, threshold)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute a draw of `dtype` in: half types are float32 numbers of fewer digits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fraction(x0: Tensor, x1: Tensor, dtype: torch.dtype) -> Tensor:
    """The random digits of a draw of `dtype`: an integer below 2**DIGITS[dtype], exact in `working_dtype(dtype)`."""
    if dtype == torch.float64:
        return (((x0.to(torch.int64) & 0xFFFFFFFF) << 20) | ((x1 >> 12) & 0xFFFFF)).to(torch.float64)
    # Half types take the low 16 bits, bfloat16 the low 8, and drop the lowest of them.
    dropped = {torch.float32: 9, torch.float16: 6, torch.bfloat16: 1}[dtype]
    return (((x0 ^ x1) >> dropped) & ((1 << DIGITS[dtype]) - 1)).to(torch.float32)


def draw_unit(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, finish: Callable[[Tensor], Tensor], *parameters: Tensor
) -> Tensor:
    """`finish(u)` of draws u of `dtype` in [0, 1), held in `working_dtype(dtype)`; elementwise in u and parameters."""

    def unit(x0: Tensor, x1: Tensor) -> Tensor:
        return fraction(x0, x1, dtype) * 2.0 ** -DIGITS[dtype]

    if all(parameter.ndim == 0 for parameter in parameters):
        return draw(key, shape, lambda x0, x1: finish(unit(x0, x1)))
    return finish(draw(key, shape, unit))


def scaling(dtype: torch.dtype, low: Tensor, high: Tensor) -> Callable[[Tensor], Tensor]:
    """The map from [0, 1) to [low, high) that XLA computes for `dtype`; all in `working_dtype(dtype)`."""
    if dtype == low.dtype:
        span = high - low
        return lambda u: torch.maximum(low, multiply_add(u, span, low))
    # In half types XLA rounds after every step.
    low, high = round_to(low, dtype), round_to(high, dtype)
    span = round_to(high - low, dtype)
    return lambda u: torch.maximum(low, round_to(round_to(u * span, dtype) + low, dtype))
