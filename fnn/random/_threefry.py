"""Threefry-2x32 with 20 rounds: random words as a pure function of a key and a counter.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The unsigned words are held
in int32 tensors, whose sums wrap as unsigned ones do: torch has no arithmetic on uint32.
"""

import torch
from torch import Tensor

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF

# A hash of Python integers takes 4 us; tensor operations take 250 us for one, and for a thousand.
FEW_HASHES = 32


def signed(word: int) -> int:
    """The low 32 bits of `word` as a signed number: what an int32 tensor can hold."""
    return ((word + 0x80000000) & _WORD) - 0x80000000


def encrypt(k0: Tensor, k1: Tensor, high: Tensor | int, low: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of key and the high and low word of a counter, int32, that broadcast together: two words of result."""
    schedule = (k1, k0 ^ k1 ^ _PARITY, k0)
    # as_strided below, under vmap, wants the mapped dimensions first in memory.
    x0 = (k0 + high).contiguous()
    x1 = (k1 + low).contiguous()
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            # x1 rotated left: a logical right shift (an arithmetic one, masked) plus x1 * 2**rotation, which wraps.
            rotated = (x1 >> (32 - rotation)).bitwise_and_((1 << rotation) - 1).add_(x1, alpha=1 << rotation)
            x1 = _materialize(rotated.bitwise_xor_(x0))
        x0 = x0 + schedule[group % 3]
        x1 = x1 + (schedule[(group + 1) % 3] + (group + 1))
    return x0, x1


def _materialize(x: Tensor) -> Tensor:
    # Inductor inlines an expression into each of its uses, so that 20 rounds, which use each word twice, become trees
    # of thousands of operations [8 dropouts: 132 s to compile, 17 s with this]. It never inlines what as_strided reads;
    # the loops still fuse into one.
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


def _encrypt_integers(k0: int, k1: int, x1: int) -> list[int]:
    schedule = (k1, k0 ^ k1 ^ _PARITY, k0)
    x0 = k0 & _WORD
    x1 = (x1 + k1) & _WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _WORD
            x1 = (x1 << rotation) & _WORD | x1 >> (32 - rotation)
            x1 ^= x0
        x0 = (x0 + schedule[group % 3]) & _WORD
        x1 = (x1 + schedule[(group + 1) % 3] + group + 1) & _WORD
    return [signed(x0), signed(x1)]


# In eager mode a few hashes are an operator of their own, computed with Python integers on CPU: 25 times faster than a
# hundred tensor operations. As an operator it has a vmap rule and a fake, so every transform and tracer sees it whole.
_LIBRARY = torch.library.Library("fnn", "FRAGMENT")
_LIBRARY.define("threefry2x32(Tensor key, Tensor count) -> Tensor")


def _hash(key: Tensor, count: Tensor) -> Tensor:
    if key.device.type == "cpu" and key.ndim == 1 and count.numel() <= FEW_HASHES:
        k0, k1 = key.tolist()
        words = [_encrypt_integers(k0, k1, x1) for x1 in count.flatten().tolist()]
        return torch.tensor(words, dtype=torch.int32, device="cpu").reshape(*count.shape, 2)
    return hash_inline(key, count)


def hash_inline(key: Tensor, count: Tensor) -> Tensor:
    """key (..., 2) and count (...), a counter's low word, int32: the hash (..., 2), as tensor operations."""
    k0, k1 = key.unbind(-1)
    return torch.stack(encrypt(k0, k1, 0, count), -1)


def _hash_fake(key: Tensor, count: Tensor) -> Tensor:
    return key.new_empty((*torch.broadcast_shapes(key.shape[:-1], count.shape), 2))


def _hash_vmap(info, in_dims, key: Tensor, count: Tensor) -> tuple[Tensor, int]:
    key_dim, count_dim = in_dims
    key_batch = key.ndim - 1 - (key_dim is not None)
    count_batch = count.ndim - (count_dim is not None)
    # Each is (mapped, batch...): fill up the shorter batch with ones after the mapped dimension.
    if key_dim is not None:
        key = key.movedim(key_dim, 0)
        key = key.reshape(key.shape[0], *[1] * (count_batch - key_batch), *key.shape[1:])
    if count_dim is not None:
        count = count.movedim(count_dim, 0)
        count = count.reshape(count.shape[0], *[1] * (key_batch - count_batch), *count.shape[1:])
    return hash_words(key, count), 0


_LIBRARY.impl("threefry2x32", _hash, "CompositeExplicitAutograd")
torch.library.register_fake("fnn::threefry2x32", _hash_fake, lib=_LIBRARY)
torch.library.register_vmap("fnn::threefry2x32", _hash_vmap, lib=_LIBRARY)
hash_words = torch.ops.fnn.threefry2x32.default
