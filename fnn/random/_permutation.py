"""Random orders."""

import torch
from torch import Tensor

from fnn.random._arguments import as_integer, describe
from fnn.random._bits import bits
from fnn.random._keys import check_key, split

# Sorting by random 32-bit numbers leaves ties in their old order. Up to so many elements, 0, 1, 2 and 3 sorts make it
# improbable that a pair ties in all of them: n elements take ceil(3 log(n) / log(2**32 - 1)) sorts.
_MOST_BY_SORTS = (1, 1625, 2642245, 2**32 - 1)


def permutation(key: Tensor, x: int | Tensor, axis: int = 0, independent: bool = False) -> Tensor:
    """The numbers below `x`, or the slices of a tensor along `axis`, in random order.

    key: (2,) int32. x: an integer, or a tensor of at least one dimension, through which gradients flow. independent:
    whether each vector along `axis` gets an order of its own.
    Returns (x,) int64, or a tensor like x. Raises TypeError for another x, ValueError for a negative one, IndexError
    for an axis that x lacks.

    >>> fnn.random.permutation(fnn.random.key(0), 5)
    tensor([0, 1, 4, 3, 2])

    Source: `jax.random.permutation`: stable sorts by random bits.
    """
    check_key(key)
    if isinstance(x, Tensor) and x.ndim:
        axis = check_axis(axis, x)
        if not independent or x.ndim == 1:
            return x.index_select(axis, _shuffled(key, torch.arange(x.shape[axis], device=key.device), 0))
        places = torch.arange(x.shape[axis], device=key.device)
        places = places.reshape(-1, *[1] * (x.ndim - 1 - axis)).expand(x.shape)
        return x.gather(axis, _shuffled(key, places, axis))
    count = as_integer(x)
    if count is None:
        raise TypeError(f"`x` is an integer or a tensor of at least one dimension, not {describe(x)}.")
    if count < 0:
        raise ValueError(f"`x` is not negative, but is {count}.")
    return _shuffled(key, torch.arange(count, device=key.device), 0)


def check_axis(axis: int, x: Tensor) -> int:
    """`axis` counted from the front."""
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"`axis` {axis} is none of a tensor of shape {tuple(x.shape)}.")
    return axis % x.ndim


def _shuffled(key: Tensor, places: Tensor, axis: int) -> Tensor:
    for most in _MOST_BY_SORTS:
        if places.numel() <= most:
            break
        key, sort_key = split(key)
        # The lowest int32 xor turns the order of signed numbers into that of unsigned ones.
        order = (bits(sort_key, places.shape) ^ -(2**31)).sort(dim=axis, stable=True).indices
        places = places.gather(axis, order)
    return places
