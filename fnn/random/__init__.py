"""Random numbers as a pure function of a key: the same key gives the same bits as `jax.random`.

A key is an int32 tensor of shape (2,), made by `key(seed)`. Nothing is hidden and nothing moves on: a key used twice
gives the same numbers twice, and `split` and `fold_in` make new keys. Every function is legal under `torch.vmap` (over
keys and parameters), `torch.func.grad` and `jvp`, and `torch.compile(fullgraph=True)`; from a meta key it gives shapes
and dtypes only.

>>> key = fnn.random.key(0)
>>> weight_key, noise_key = fnn.random.split(key)
>>> fnn.random.normal(weight_key, (2, 3)).shape
torch.Size([2, 3])
"""

from fnn.random._bits import bits
from fnn.random._choice import categorical, choice
from fnn.random._integers import randint
from fnn.random._keys import check_key, fold_in, key, split
from fnn.random._normal import normal, truncated_normal
from fnn.random._permutation import permutation
from fnn.random._uniform import bernoulli, uniform

__all__ = [
    "bernoulli",
    "bits",
    "categorical",
    "check_key",
    "choice",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "truncated_normal",
    "uniform",
]
