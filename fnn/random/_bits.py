"""Random bits of any shape: the hash of each element's position, and how a large draw is made in pieces."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fnn.random._arguments import check_dtype, check_shape
from fnn.random._keys import check_key
from fnn.random._threefry import FEW_HASHES, encrypt, hash_words, signed

_SIGNED = (torch.int32, torch.int64, torch.int16, torch.int8)
_UNSIGNED = (torch.uint32, torch.uint64, torch.uint16, torch.uint8)

# Pieces of a draw that fit the cache [2M normals on one core: 58 ns each as a whole, 28 ns so]; on other devices,
# pieces that bound the memory of intermediate results. Powers of two, so that no piece crosses a multiple of 2**32.
_CPU_PIECE = 1 << 17
_DEVICE_PIECE = 1 << 24


def bits(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.int32) -> Tensor:
    """Uniform random bits.

    key: (2,) int32. shape: of the result. dtype: an integer type; a signed one holds the bits of the unsigned one of
    its size, which JAX returns.
    Returns `shape` of `dtype`. Raises TypeError for another dtype.

    >>> fnn.random.bits(fnn.random.key(42), (3,))
    tensor([ 2098992034, -1375260455, -1648100871], dtype=torch.int32)

    Source: `jax.random.bits`.
    """
    check_key(key)
    shape = check_shape("shape", shape)
    check_dtype("`dtype`", dtype, _SIGNED + _UNSIGNED)

    def finish(x0: Tensor, x1: Tensor) -> Tensor:
        if dtype.itemsize < 8:
            return (x0 ^ x1).to(dtype)
        return ((x0.to(torch.int64) << 32) | (x1.to(torch.int64) & 0xFFFFFFFF)).to(dtype)

    return draw(key, shape, finish)


def draw(key: Tensor, shape: tuple[int, ...], finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`finish(x0, x1)`, an elementwise function of the two words of each element, in `shape`.

    An element's counter is its position, so pieces, one kernel, and `vmap` over keys all give the same bits.
    """
    count = math.prod(shape)
    whole = torch.compiler.is_compiling() or key.is_meta or type(key) is not Tensor
    piece = _CPU_PIECE if key.device.type == "cpu" else _DEVICE_PIECE
    if whole or count <= piece:
        return finish(*words(key, 0, count)).reshape(shape)
    pieces = [finish(*words(key, start, min(piece, count - start))) for start in range(0, count, piece)]
    return torch.cat(pieces).reshape(shape)


def words(key: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The two words, (count,) int32 each, of the counters from `start`."""
    if key.is_meta:
        return key.new_empty(count), key.new_empty(count)
    k0, k1 = key.unbind()
    if start == 0 and count > 2**31:
        counter = torch.arange(count, dtype=torch.int64, device=key.device)
        return encrypt(k0, k1, (counter >> 32).to(torch.int32), counter.to(torch.int32))
    low = torch.arange(count, dtype=torch.int32, device=key.device)
    if not torch.compiler.is_compiling() and start == 0 and count <= FEW_HASHES:
        x0, x1 = hash_words(key, low).unbind(-1)
        return x0, x1
    return encrypt(k0, k1, start >> 32, low + signed(start))
