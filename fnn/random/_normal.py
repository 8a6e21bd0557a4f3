"""Normal draws: the inverse error function of uniform ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnn.random._arguments import FLOATS, check_broadcast, check_dtype, check_shape, real_tensor
from fnn.random._bits import draw
from fnn.random._erf import erf, erfinv, erfinv_closed
from fnn.random._keys import check_key
from fnn.random._rounding import next_above, next_below, round_to
from fnn.random._uniform import DIGITS, draw_unit, fraction, scaling, working_dtype

# sqrt(2) and its inverse as numbers of each dtype. XLA divides by a constant by multiplying with its inverse.
_SQRT2 = {dtype: torch.tensor(math.sqrt(2), dtype=dtype, device="cpu").item() for dtype in FLOATS}
_INVERSE_SQRT2 = {dtype: torch.tensor(1 / _SQRT2[dtype], dtype=dtype, device="cpu").item() for dtype in FLOATS}


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal floats of mean 0 and standard deviation 1.

    key: (2,) int32. shape: of the result. dtype: float32, float16, bfloat16 or float64.
    Returns `shape` of `dtype`, within 4 ulp of JAX's (3 seen over every float32 draw; half types equal). Eager and
    compiled agree bit for bit, but for perhaps one float32 draw in 2**28; of float64 ones the last two bits can differ.
    Raises TypeError for other arguments.

    >>> fnn.random.normal(fnn.random.key(0), (2,))
    tensor([1.6226, 2.0253])

    Source: `jax.random.normal`.
    """
    check_key(key)
    shape = check_shape("shape", shape)
    check_dtype("`dtype`", dtype, FLOATS)
    digits = DIGITS[dtype]

    def finish(x0: Tensor, x1: Tensor) -> Tensor:
        # Uniform on the open interval (-1, 1), as JAX draws it; both steps are exact.
        u = fraction(x0, x1, dtype) * 2.0 ** (1 - digits) - (1.0 - 2.0 ** (-1 - digits))
        return _standard(erfinv(u), dtype)

    return draw(key, shape, finish)


def truncated_normal(
    key: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal floats of mean 0 and standard deviation 1, given that they lie between `lower` and `upper`.

    key: (2,) int32. lower, upper: numbers, or tensors that broadcast to `shape`; gradients flow to them. shape: of the
    result, by default that of the bounds. dtype: float32, float16, bfloat16 or float64. The deviation of the result is
    below 1: divide by 0.8796 for bounds at -2 and 2 to have 1.
    Returns `shape` of `dtype`, within 4 ulp of JAX's (float64 with bounds beyond two deviations: within 1e-14). Eager
    and compiled agree as those of `normal` do. Raises TypeError for other arguments, ValueError for bounds that do not
    broadcast, or numbers in the wrong order.

    >>> fnn.random.truncated_normal(fnn.random.key(0), -2, 2, (2,))
    tensor([1.4560, 1.7147])

    Source: `jax.random.truncated_normal`.
    """
    check_key(key)
    check_dtype("`dtype`", dtype, FLOATS)
    work = working_dtype(dtype)
    low, high = real_tensor("lower", lower, work, key.device), real_tensor("upper", upper, work, key.device)
    numbers = not isinstance(lower, Tensor) and not isinstance(upper, Tensor)
    if numbers and lower > upper:
        raise ValueError(f"`lower` is at most `upper`, but {lower} is more than {upper}.")
    if shape is None:
        shape = torch.broadcast_shapes(low.shape, high.shape)
    shape = check_shape("shape", shape)
    check_broadcast(shape, lower=low, upper=high)
    if dtype != work:
        low, high = round_to(low, dtype), round_to(high, dtype)
    scale = scaling(dtype, _erf_of(low, dtype), _erf_of(high, dtype))
    # Rounding may reach a bound, or pass it.
    least, most = next_above(low, dtype).to(dtype), next_below(high, dtype).to(dtype)

    def finish(u: Tensor) -> Tensor:
        drawn = _standard(erfinv_closed(scale(u), differentiable=not numbers), dtype)
        return torch.minimum(torch.maximum(drawn, least), most)

    return draw_unit(key, shape, dtype, finish, low, high)


def _standard(value: Tensor, dtype: torch.dtype) -> Tensor:
    # erfinv(u), in the working dtype, as a draw of `dtype`. In half types XLA rounds after every step.
    if dtype != value.dtype:
        value = round_to(value, dtype)
    return (value * _SQRT2[dtype]).to(dtype)


def _erf_of(bound: Tensor, dtype: torch.dtype) -> Tensor:
    # Where the bound lies on the scale of erf: erf(bound / sqrt(2)).
    if dtype == bound.dtype:
        return erf(bound * _INVERSE_SQRT2[dtype])
    return round_to(erf(round_to(bound * _INVERSE_SQRT2[dtype], dtype)), dtype)
