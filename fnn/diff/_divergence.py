"""`divergence`: the trace of the Jacobian of a vector field, exactly or by random probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function, check_tensors
from fnn.diff._arguments import Argnums, at, own_code
from fnn.diff._composed import by_operators
from fnn.diff._hessian_diagonal import (
    METHODS,
    check_chunk_size,
    check_method,
    check_probes,
    check_real,
    chunks,
    concatenate,
    mean_over_probes,
)
from fnn.diff._purity import call


def divergence(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    method: Literal["exact", "hutchinson"] = "exact",
    key: Tensor | None = None,
    samples: int = 1,
    value: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The sum over i of d f_i / d x_i, for a function whose output has the structure and shapes of its argument.

    "exact" takes one vector-Jacobian product for each of the n elements of x; "hutchinson" takes `samples` of them,
    with Rademacher vectors from `key`, and averages z . (J z): an unbiased estimate, whose variance is the sum over
    i < j of (J_ij + J_ji)^2, over `samples`. chunk_size: how many products at once; all by default.
    value=True gives `(f(x), divergence)`; the divergence is a scalar.

    Raises ValueError where output and argument differ in structure or shape or the method is unknown, TypeError for
    an argument that is not real, and for a missing key.

    Example:
        >>> fnn.divergence(lambda x: x * x)(torch.tensor([1.0, 2.0]))
        tensor(6.)

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990; for flows, Grathwohl et
    al., FFJORD, 2019.
    """
    name = "divergence"
    check_function(name, f)
    check_method(name, method, METHODS)
    check_chunk_size(name, chunk_size)
    check_probes(name, method, key, samples)

    def of_point(*args: Any, **kwargs: Any) -> Any:
        of_tree, x = at(name, f, argnums, args, kwargs)
        check_real(name, x)

        def run(point: Any, *_: Any) -> Any:
            output = of_tree(point)
            _check_field(point, output)

            def product(vector: Any) -> Tensor:
                """z . (J z), by the transposed product, which the compiler knows under an outer vmap too."""
                _, pullback, *_ = torch.func.vjp(of_tree, point)
                pairs = zip(tree.leaves(pullback(vector)[0]), tree.leaves(vector), strict=True)
                return torch.stack([(a * b).sum() for a, b in pairs]).sum()

            if tree.size(point) == 0:
                return output, torch.stack([leaf.sum() for leaf in tree.leaves(output)]).sum()
            if method == "hutchinson":
                return output, mean_over_probes(product, point, key, samples, chunk_size)
            return output, concatenate([torch.vmap(product)(units) for units in chunks(point, chunk_size)]).sum()

        with by_operators():
            output, found = call(name, run, x, args, kwargs)
        return (output, found) if value else found

    return own_code(of_point)


def _check_field(x: Any, output: Any) -> None:
    check_tensors("divergence", output)
    try:
        tree.check_like(x, output, "the output")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"divergence: expected an output of the structure, shapes and dtypes of the argument; {error}"
        ) from None
