"""`laplacian`: the sum of second derivatives, in one forward pass where every operation has a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function, check_tensors
from fnn.diff._arguments import Argnums, at, own_code, split_aux
from fnn.diff._composed import by_operators
from fnn.diff._forward_laplacian import Unsupported, forward_laplacian
from fnn.diff._hessian_diagonal import check_chunk_size, check_method, check_real, chunks, hessian_product
from fnn.diff._purity import call

METHODS = ("auto", "forward", "products")


def laplacian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    value: bool = False,
    has_aux: bool = False,
    method: Literal["auto", "forward", "products"] = "auto",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The Laplacian of a function: for each element of its output, the sum of its second derivatives by an argument.

    `laplacian(f)(x)` has the structure and shapes of `f(x)`; x is a tensor of any shape, or a tree, of n elements in
    all. Of many points: `torch.vmap(laplacian(f))(points)`. The result can be differentiated again, for example by
    parameters that `f` uses.

    method "forward" is one pass in which every value carries its Jacobian and its Laplacian; it knows linear layers,
    products, activations, reductions, softmax, layer norm and indexing, and raises NotImplementedError with the name
    of anything else. "products" takes n Hessian-vector products of any function with a scalar output, and n second
    directional derivatives otherwise. "auto" is "forward" where it can be: `explain_laplacian` tells.
    What the pass cannot see is NaN: compiled, write `x.abs()`, for the compiler hides Python's `abs(x)`.
    chunk_size: how many of the n directions at once; all by default. value=True gives `(f(x), laplacian)`; with
    has_aux=True, `f` returns `(output, aux)`, and the results are `(laplacian, aux)` and `((output, aux), laplacian)`.

    Raises TypeError for an argument that is not real and ValueError for an unknown method.

    Example:
        >>> fnn.laplacian(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0, 3.0]))
        tensor(6.)

    Source: Li et al., A computational framework for neural network-based variational Monte Carlo with forward
    Laplacian, 2024.
    """
    name = "laplacian"
    check_function(name, f)
    check_method(name, method, METHODS)
    check_chunk_size(name, chunk_size)

    def of_point(*args: Any, **kwargs: Any) -> Any:
        of_tree, x = at(name, f, argnums, args, kwargs)
        check_real(name, x)

        def run(point: Any, *_: Any) -> Found:
            found = reason = None
            if method != "products" and tree.size(point) > 0:
                found, reason = _by_forward_pass(of_tree, point, has_aux, chunk_size)
            if method == "forward" and reason is not None:
                raise NotImplementedError(
                    f'{name}: method="forward" has no rule for {reason}; method="auto" or "products" needs none'
                )
            if found is None:
                with by_operators():
                    found = _by_products(of_tree, point, has_aux, chunk_size)
            return found

        output, aux, sums = call(name, run, x, args, kwargs)
        if value:
            return ((output, aux) if has_aux else output), sums
        return (sums, aux) if has_aux else sums

    return own_code(of_point)


def explain_laplacian(f: Callable[..., Any], *args: Any, argnums: Argnums = 0, has_aux: bool = False, **kwargs) -> str:
    """Which way `laplacian(f, argnums)(*args)` goes, and why: "forward", or "products: " and what has no rule.

    Example:
        >>> fnn.explain_laplacian(torch.tanh, torch.ones(2))
        'forward'
        >>> fnn.explain_laplacian(torch.special.i0, torch.ones(2))
        'products: no rule for special_i0'
    """
    name = "explain_laplacian"
    check_function(name, f)
    of_tree, x = at(name, f, argnums, args, kwargs)
    check_real(name, x)
    _, reason = call(name, lambda point, *_: _by_forward_pass(of_tree, point, has_aux, None), x, args, kwargs)
    return "forward" if reason is None else f"products: no rule for {reason}"


Found = tuple[Any, Any, Any]  # the output, the auxiliary output, the Laplacian


def _by_forward_pass(f: Callable, x: Any, has_aux: bool, chunk_size: int | None) -> tuple[Found | None, str | None]:
    """What was found, or in words what had no rule."""
    size = tree.size(x)
    step = chunk_size or max(size, 1)

    def checked(point: Any) -> Any:
        output, aux = split_aux("laplacian", f(point), has_aux)
        check_tensors("laplacian", output)
        return output, aux

    found: Any = None
    try:
        for start in range(0, max(size, 1), step):
            output, aux, part = forward_laplacian(checked, x, start, min(start + step, size))
            found = output, aux, part if start == 0 else tree.map(torch.add, found[2], part)
    except Unsupported as reason:
        return None, reason.args[0]  # torch 2.11 does not compile str(reason)
    return found, None


def _by_products(f: Callable, x: Any, has_aux: bool, chunk_size: int | None) -> Found:
    output, aux = split_aux("laplacian", f(x), has_aux)
    check_tensors("laplacian", output)

    def first(point: Any) -> Any:
        return split_aux("laplacian", f(point), has_aux)[0]

    if isinstance(output, Tensor) and output.numel() == 1:
        product = hessian_product(lambda point: first(point).sum(), x)

        def along(unit: Any) -> Any:
            """The second derivative of each output along one direction."""
            parts = [leaf.sum() for leaf in tree.leaves(product(unit))]
            return torch.stack(parts).sum().reshape(output.shape).to(output.dtype)
    else:

        def along(unit: Any) -> Any:
            return _derivative(lambda z: _derivative(first, z, unit), x, unit)

    sums = None
    for units in chunks(x, chunk_size):
        part = tree.map(lambda leaf: leaf.sum(0), torch.vmap(along)(units))
        sums = part if sums is None else tree.map(torch.add, sums, part)
    return output, aux, tree.zeros_like(output) if sums is None else sums


def _derivative(f: Callable[[Any], Any], x: Any, tangent: Any) -> Any:
    """The derivative of f along a direction, by transposing the transposed product.

    Reverse mode alone treats `torch.no_grad` and autograd functions as it does for a scalar output, and passes the
    compiler under an outer vmap, where forward mode fails on views.
    """
    output, pullback, *_ = torch.func.vjp(f, x)
    _, transposed, *_ = torch.func.vjp(lambda cotangent: pullback(cotangent)[0], tree.zeros_like(output))
    return transposed(tangent)[0]
