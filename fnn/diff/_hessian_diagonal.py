"""`hessian_diagonal`: the second derivative along each element of a tree, exactly or by random probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fnn import random, tree
from fnn._rules._checks import check_function
from fnn.diff._arguments import Argnums, at, own_code
from fnn.diff._composed import by_operators
from fnn.diff._purity import call
from fnn.diff._seeds import unit_vectors
from fnn.diff._transforms import scalar

METHODS = ("exact", "hutchinson")


def hessian_diagonal(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    method: Literal["exact", "hutchinson"] = "exact",
    key: Tensor | None = None,
    samples: int = 1,
    value: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The diagonal of the Hessian of a scalar function, as a tree of the structure and shapes of the argument.

    "exact" takes one Hessian-vector product for each of the argument's n elements; "hutchinson" takes `samples` of
    them, with Rademacher vectors from `key`, and averages z * (H z): an unbiased estimate whose variance in element i
    is the sum over j != i of H_ij^2, over `samples`. chunk_size: how many products at once; all by default.
    value=True gives `(f(x), diagonal)`.

    Raises ValueError for an output that is no scalar or an unknown method, TypeError for an argument that is not
    real, and for a missing key.

    Example:
        >>> fnn.hessian_diagonal(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
        tensor([ 6., 12.])

    Source: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, 2007.
    """
    name = "hessian_diagonal"
    check_function(name, f)
    check_method(name, method, METHODS)
    check_chunk_size(name, chunk_size)
    check_probes(name, method, key, samples)

    def diagonal(*args: Any, **kwargs: Any) -> Any:
        of_tree, x = at(name, f, argnums, args, kwargs)
        check_real(name, x)

        def run(point: Any, *_: Any) -> Any:
            output = scalar(name, of_tree(point))
            product = hessian_product(of_tree, point)
            if tree.size(point) == 0:
                return output, tree.zeros_like(point)
            if method == "hutchinson":
                return output, mean_over_probes(product, point, key, samples, chunk_size)
            rows = concatenate([torch.vmap(product)(units) for units in chunks(point, chunk_size)])
            return output, tree.map(lambda leaf: leaf.sum(0), rows)

        with by_operators():
            output, found = call(name, run, x, args, kwargs)
        return (output, found) if value else found

    return own_code(diagonal)


def hessian_product(f: Callable[[Any], Tensor], x: Any) -> Callable[[Any], Any]:
    """z -> z * (H z), H the Hessian of f at x.

    Reverse over reverse: forward over reverse fails in the compiler under an outer vmap wherever f takes views.
    """

    def product(vector: Any) -> Any:
        _, pullback, *_ = torch.func.vjp(torch.func.grad(f), x)
        return tree.map(torch.mul, vector, pullback(vector)[0])

    return product


def chunks(x: Any, chunk_size: int | None) -> list[Any]:
    """The unit vectors of a tree, in chunks: leaves (rows, *leaf.shape)."""
    size = tree.size(x)
    step = chunk_size or max(size, 1)
    return [unit_vectors(x, start, min(start + step, size)) for start in range(0, size, step)]


def mean_over_probes(f: Callable[[Any], Any], x: Any, key: Any, samples: int, chunk_size: int | None) -> Any:
    """The mean of f over `samples` Rademacher vectors like x, each leaf's drawn with its own key."""
    leaves, structure = tree.flatten(x)
    keys = random.split(key, len(leaves)).unbind()
    probes = [
        torch.where(random.bernoulli(leaf_key, 0.5, (samples, *leaf.shape)), 1.0, -1.0).to(leaf.dtype)
        for leaf_key, leaf in zip(keys, leaves, strict=True)
    ]
    step = chunk_size or samples
    found = [
        torch.vmap(f)(tree.unflatten(structure, [probe[start : start + step] for probe in probes]))
        for start in range(0, samples, step)
    ]
    return tree.map(lambda leaf: leaf.mean(0), concatenate(found))


def concatenate(parts: list[Any]) -> Any:
    """Trees whose leaves have a leading axis, one behind the other."""
    return parts[0] if len(parts) == 1 else tree.map(lambda *leaves: torch.cat(leaves), *parts)


def check_method(name: str, method: Any, methods: tuple[str, ...]) -> None:
    if method not in methods:
        raise ValueError(f"{name}: method must be one of {', '.join(map(repr, methods))}, got {method!r}")


def check_chunk_size(name: str, chunk_size: Any) -> None:
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"{name}: chunk_size must be a positive int or None, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be a positive int or None, got {chunk_size}")


def check_probes(name: str, method: str, key: Any, samples: Any) -> None:
    """Raise unless a key comes with "hutchinson", and not with "exact"."""
    if method == "exact" and key is not None:
        raise TypeError(f'{name}: key= is for method="hutchinson"; "exact" draws nothing')
    if method == "hutchinson" and key is None:
        raise TypeError(f'{name}: method="hutchinson" draws random vectors; give it key=fnn.random.key(0)')
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"{name}: samples must be a positive int, got {samples!r}")


def check_real(name: str, x: Any) -> None:
    """Raise unless there is something to differentiate by, and no complex number in it."""
    for path, leaf in tree.paths(x).items():
        if leaf.is_complex():
            where = f"leaf {path!r}" if path else "the argument"
            raise TypeError(
                f"{name}: {where} is {leaf.dtype}, expected a real tensor; "
                "differentiate by the real and the imaginary part, as a function of two real tensors"
            )
