"""Keys: made from a seed, split into new ones, or mixed with a number."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnn.random._arguments import as_integer, check_shape, describe
from fnn.random._threefry import hash_inline, hash_words, signed


def check_key(key: Tensor) -> None:
    """Raise an error that says what a key is, what came and how to get a key, unless `key` is one.

    key: (2,) int32. Raises TypeError for another type or dtype, ValueError for another shape.

    >>> check_key(fnn.random.key(0))
    """
    if isinstance(key, Tensor) and key.dtype == torch.int32 and key.shape == (2,):
        return
    problem = f"a key is an int32 tensor of shape (2,), but `key` is {describe(key)}."
    if not isinstance(key, Tensor) or key.dtype != torch.int32:
        raise TypeError(f"{problem} Make a key with fnn.random.key(seed).")
    if key.ndim > 1 and key.shape[-1] == 2:
        raise ValueError(f"{problem} For one call per key, map over them: torch.vmap(lambda key: ...)(keys).")
    raise ValueError(f"{problem} Make a key with fnn.random.key(seed).")


def key(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The key of a seed.

    seed: an integer from -2**63 to 2**63 - 1, or an integer tensor of shape (). As in JAX's default mode only its low
    32 bits count, so that `2**32 + 7` and `7` give the same key. device: where the key, and all that is drawn from it,
    lives; by default a tensor's own device, or torch's default device.
    Returns the key, (2,) int32. Raises TypeError or ValueError for another seed.

    >>> fnn.random.key(42)
    tensor([ 0, 42], dtype=torch.int32)

    Source: `jax.random.PRNGKey`, whose two words these are.
    """
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool or seed.ndim:
            raise TypeError(f"`seed` is an integer or an integer tensor of shape (), not {describe(seed)}.")
        low = seed.to(device=device, dtype=torch.int32)
        return torch.stack([torch.zeros_like(low), low])
    number = as_integer(seed)
    if number is None:
        raise TypeError(f"`seed` is an integer or an integer tensor of shape (), not {describe(seed)}.")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"`seed` has 64 bits: from -2**63 to 2**63 - 1, not {number}.")
    return torch.tensor([0, signed(number)], dtype=torch.int32, device=device)


def split(key: Tensor, num: int | Sequence[int] = 2) -> Tensor:
    """New keys from one.

    key: (2,) int32. num: how many keys, or a shape of keys.
    Returns (num, 2) or (*num, 2) int32. Raises ValueError for a negative `num`.

    >>> weight_key, bias_key = fnn.random.split(fnn.random.key(0))
    >>> fnn.random.split(weight_key, (3, 4)).shape
    torch.Size([3, 4, 2])

    Source: `jax.random.split`.
    """
    check_key(key)
    shape = check_shape("num", (num,) if isinstance(num, int) else num)
    return _hash(key, torch.arange(math.prod(shape), dtype=torch.int32, device=key.device)).reshape(*shape, 2)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and a number, such as a step, an epoch or a layer's position.

    key: (2,) int32. data: an integer from -2**31 to 2**32 - 1, or an integer tensor of shape (), whose low 32 bits
    count: with a tensor, a new step is no new compilation.
    Returns (2,) int32. Raises TypeError or ValueError for other data.

    >>> step = torch.tensor(3)
    >>> torch.equal(fnn.random.fold_in(fnn.random.key(0), step), fnn.random.fold_in(fnn.random.key(0), 3))
    True

    Source: `jax.random.fold_in`.
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"`data` is an integer or an integer tensor of shape (), not {describe(data)}.")
        if data.ndim:
            raise ValueError(
                f"`data` has shape (), not {describe(data)}. To fold in many, map over them: "
                "torch.vmap(fnn.random.fold_in, (None, 0))(key, data)."
            )
        return _hash(key, data.to(device=key.device, dtype=torch.int32))
    number = as_integer(data)
    if number is None:
        raise TypeError(f"`data` is an integer or an integer tensor of shape (), not {describe(data)}.")
    if not -(2**31) <= number < 2**32:
        raise ValueError(f"`data` has 32 bits: from -2**31 to 2**32 - 1, not {number}.")
    return _hash(key, torch.full((), signed(number), dtype=torch.int32, device=key.device))


def _hash(key: Tensor, count: Tensor) -> Tensor:
    return hash_inline(key, count) if torch.compiler.is_compiling() else hash_words(key, count)
