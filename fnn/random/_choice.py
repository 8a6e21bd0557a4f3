"""Draws from distributions over a few outcomes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnn.random._arguments import FLOATS, as_integer, check_dtype, check_shape, describe
from fnn.random._integers import randint
from fnn.random._keys import check_key
from fnn.random._permutation import check_axis, permutation
from fnn.random._rounding import round_to
from fnn.random._uniform import draw_unit, scaling, uniform, working_dtype


def categorical(key: Tensor, logits: Tensor, axis: int = -1, shape: Sequence[int] | None = None) -> Tensor:
    """Outcomes with the probabilities softmax(logits, axis).

    key: (2,) int32. logits: float32, float16, bfloat16 or float64. shape: of the result, which ends in that of logits
    without `axis`, or in what that broadcasts to; by default just that.
    Returns `shape` of int64, equal to JAX's unless two outcomes tie within the last bits. Raises TypeError for logits
    that are no float tensor, ValueError for a shape that does not fit.

    >>> fnn.random.categorical(fnn.random.key(0), torch.tensor([0.0, 0.0, 2.0]), shape=(6,))
    tensor([1, 2, 2, 1, 2, 2])

    Source: `jax.random.categorical`: the largest of logits plus Gumbel noise.
    """
    check_key(key)
    if not isinstance(logits, Tensor):
        raise TypeError(f"`logits` is a tensor, not {describe(logits)}.")
    check_dtype("the dtype of `logits`", logits.dtype, FLOATS)
    if logits.ndim == 0:
        raise ValueError("`logits` has at least one dimension, the outcomes.")
    axis = check_axis(axis, logits)
    batch = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    shape = batch if shape is None else check_shape("shape", shape)
    prefix, last = shape[: len(shape) - len(batch)], shape[len(shape) - len(batch) :]
    if len(shape) < len(batch) or any(size not in (1, given) for size, given in zip(batch, last, strict=True)):
        raise ValueError(f"`shape` {shape} does not end in {batch}, the shape of logits without axis {axis}.")
    noise = _gumbel(key, (*prefix, *last[:axis], logits.shape[axis], *last[axis:]), logits.dtype)
    total = noise + logits.detach().to(noise.dtype)
    if noise.dtype != logits.dtype:
        total = round_to(total, logits.dtype)
    return total.argmax(axis + len(prefix))


def choice(
    key: Tensor,
    a: int | Tensor,
    shape: Sequence[int] = (),
    replace: bool = True,
    p: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Numbers below `a`, or slices of a tensor along `axis`, drawn with or without replacement.

    key: (2,) int32. a: an integer, or a tensor of at least one dimension, through which gradients flow. shape: of the
    draws. p: (n,) float, the probabilities of the n outcomes; equal ones by default.
    Returns `shape` of int64, or a.shape with `axis` replaced by `shape`. Raises ValueError for more draws without
    replacement than outcomes, or no outcomes; TypeError for other arguments.

    >>> fnn.random.choice(fnn.random.key(0), 10, (3,), replace=False)
    tensor([0, 1, 8])

    Source: `jax.random.choice`.
    """
    check_key(key)
    shape = check_shape("shape", shape)
    if isinstance(a, Tensor) and a.ndim:
        axis = check_axis(axis, a)
        outcomes = a.shape[axis]
    else:
        outcomes = as_integer(a)
        if outcomes is None:
            raise TypeError(f"`a` is an integer or a tensor of at least one dimension, not {describe(a)}.")
    draws = math.prod(shape)
    if draws and outcomes < 1:
        raise ValueError(f"`a` has no outcomes to draw from: it is {describe(a)}.")
    if not replace and draws > outcomes:
        raise ValueError(f"{draws} draws without replacement need as many outcomes, but `a` has {outcomes}.")
    if p is not None:
        places = _places(key, shape, replace, p, outcomes)
    elif replace:
        places = randint(key, shape, 0, max(outcomes, 1)).to(torch.int64)
    else:
        places = permutation(key, outcomes)[:draws]
    if not isinstance(a, Tensor):
        return places.reshape(shape)
    taken = a.index_select(axis, places.flatten())
    return taken.reshape(*a.shape[:axis], *shape, *a.shape[axis + 1 :])


def _places(key: Tensor, shape: tuple[int, ...], replace: bool, p: Tensor, outcomes: int) -> Tensor:
    if not isinstance(p, Tensor):
        raise TypeError(f"`p` is a tensor, not {describe(p)}.")
    check_dtype("the dtype of `p`", p.dtype, FLOATS)
    if p.shape != (outcomes,):
        raise ValueError(f"`p` has a probability for each outcome, shape ({outcomes},), not {tuple(p.shape)}.")
    p = p.detach()
    if replace:
        total = p.cumsum(0)
        return torch.searchsorted(total, (total[-1] * (1 - uniform(key, shape, p.dtype))).contiguous())
    noise = _gumbel(key, (outcomes,), p.dtype) + p.log()
    return noise.sort(descending=True, stable=True).indices[: math.prod(shape)]


def _gumbel(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """-log(-log(u)) of uniform u, in `working_dtype(dtype)`."""
    work = working_dtype(dtype)
    tiny, one = (torch.full((), value, dtype=work, device=key.device) for value in (torch.finfo(dtype).tiny, 1.0))
    scale = scaling(dtype, tiny, one)

    def finish(u: Tensor) -> Tensor:
        # In float64, so that the last bit of a backend's logarithm does not decide between two outcomes.
        u = scale(u)
        if dtype == work:
            return -torch.log(-torch.log(u.to(torch.float64))).to(dtype)
        return -round_to(torch.log(-round_to(torch.log(u.to(torch.float64)).to(work), dtype)), dtype)

    return draw_unit(key, shape, dtype, finish)
