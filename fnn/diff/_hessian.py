"""Second derivatives: the Hessian, and the products of a vector with it and with the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fnn import tree
from fnn._rules._checks import check_function
from fnn.diff._arguments import Argnums, at, own_code
from fnn.diff._composed import by_operators
from fnn.diff._jacobian import BUDGET, Options, check_options, value_aux_jacobian
from fnn.diff._purity import call, is_outermost
from fnn.diff._transforms import paired, pullback_of, value_aux_grad


def hessian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: str = "auto",
    has_aux: bool = False,
    chunk_size: int | str | None = None,
    flat: bool = False,
    batched: bool = False,
    value: bool = False,
    holomorphic: bool = False,
    budget: int = BUDGET,
) -> Callable[..., Any]:
    """The function that computes the Hessian of a scalar-valued `f`, with the arguments of `f`.

    The result is a tree of trees of the structure of the argument, with leaves of shape a.shape + b.shape, or with
    `flat` one symmetric matrix (n, n) in the order of `fnn.tree.leaves`.
    It is the Jacobian of the gradient, and the keywords are those of `jacobian`; mode "fwd" is forward over reverse,
    "rev" reverse over reverse; "auto" is "fwd", the faster, or "rev" under `vmap`, where the compiler has no forward
    mode of views. value: the result is `(output, hessian)`, or `((output, aux), hessian)`.
    For a function with several outputs there is `jacobian(jacobian(f))`.

    Raises ValueError for an output that is not one number, and what `jacobian` raises.

    Example:
        >>> hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([3.0, 2.0]))
        tensor([[4., 6.],
                [6., 0.]])
    """
    check_function("hessian", f)
    check_options(Options("hessian", mode, True, chunk_size, flat, batched, holomorphic, budget))

    def derivative(*args: Any, **kwargs: Any) -> Any:
        of_selected, selected = at("hessian", f, argnums, args, kwargs)
        outer = mode if mode != "auto" else "fwd" if is_outermost() and not batched else "rev"
        options = Options("hessian", outer, True, chunk_size, flat, batched, holomorphic, budget)

        def gradient(point: Any) -> Any:
            output, aux, grads = value_aux_grad("hessian", of_selected, point, has_aux, holomorphic)
            return grads, (output, aux)

        def run(point: Any, *_: Any) -> Any:
            with by_operators():
                if mode != "auto" or torch.compiler.is_compiling():
                    return value_aux_jacobian(gradient, point, options)
                try:
                    return value_aux_jacobian(gradient, point, options)
                except NotImplementedError:  # an operator whose derivative has no forward mode
                    return value_aux_jacobian(gradient, point, options._replace(mode="rev"))

        _, (output, aux), result = call("hessian", run, selected, args, kwargs)
        if value:
            return ((output, aux) if has_aux else output), result
        return (result, aux) if has_aux else result

    return own_code(derivative)


def hvp(f: Callable[..., Any], primals: Any, tangents: Any, *, has_aux: bool = False, value: bool = False) -> Any:
    """The product of the Hessian of a scalar-valued `f` at the primals with a vector, without the Hessian.

    primals: a tuple of the arguments of `f`, or one bare tensor or tree. tangents: the same structure, shapes and
    dtypes, and so is the result. value: the result is `(output, product)`; has_aux: `f` returns `(output, aux)`, and
    the result is `(product, aux)`, with both `((output, aux), product)`.
    The gradient's own pullback (reverse over reverse; a Hessian is symmetric), in two to three times the time of a
    gradient. Forward over reverse is as fast compiled, but torch has no forward mode of several losses' gradients,
    and its compiler none of views under `vmap`. Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    Raises ValueError, naming the path, for tangents that do not fit, and what `grad` raises.

    Example:
        >>> hvp(lambda x: x[0] ** 2 * x[1], torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0]))
        tensor([4., 6.])
    """
    check_function("hvp", f)
    points, directions = paired("hvp", primals, tangents)

    def gradient(selected: Any) -> Any:
        output, aux, grads = value_aux_grad("hvp", lambda values: f(*values), selected, has_aux)
        return grads, (output, aux)

    def run(*values: Any) -> Any:
        _, pullback, extra = pullback_of("hvp", gradient, (values,), True)
        return pullback(directions, retain_graph=False)[0], extra

    product, (output, aux) = call("hvp", run, *points)
    product = product if type(primals) is tuple else product[0]
    if value:
        return ((output, aux) if has_aux else output), product
    return (product, aux) if has_aux else product


def gnvp(
    model: Callable[..., Any],
    loss: Callable[[Any], Any],
    primals: Any,
    tangents: Any,
    *,
    has_aux: bool = False,
    value: bool = False,
) -> Any:
    """The product J^T H J v of the Gauss-Newton matrix of `loss(model(*primals))` with a vector v.

    J is the Jacobian of the model at the primals and H the Hessian of the loss at the model's output; where the loss
    is convex in the output the matrix is positive semi-definite, which the Hessian need not be.
    model: `model(*primals)` gives the output, a tensor or tree, or `(output, aux)` with has_aux. loss: `loss(output)`
    gives one number. primals, tangents and the result are as for `hvp`; value: the result is `(loss, product)`;
    has_aux: `(product, aux)`, with both `((loss, aux), product)`.
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.

    Raises ValueError, naming the path, for tangents that do not fit, and what `grad` raises.

    Example:
        >>> gnvp(lambda w: w**2, lambda y: (y**2).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 8., 32.])
    """
    check_function("gnvp", model)
    check_function("gnvp", loss)
    points, directions = paired("gnvp", primals, tangents)

    def curvature(output: Any, tangent: Any) -> tuple[Any, Any]:
        def gradient(prediction: Any) -> Any:
            number, _, grads = value_aux_grad("gnvp", loss, prediction, False)
            return grads, number

        _, pullback, number = pullback_of("gnvp", gradient, (output,), True)
        return pullback(tangent)[0], number

    def run(*values: Any) -> Any:
        return sandwich("gnvp", model, values, directions, curvature, has_aux)

    product, number, aux = call("gnvp", run, *points)
    product = product if type(primals) is tuple else product[0]
    if value:
        return ((number, aux) if has_aux else number), product
    return (product, aux) if has_aux else product


def sandwich(
    name: str,
    model: Callable[..., Any],
    points: tuple[Any, ...],
    directions: tuple[Any, ...],
    middle: Callable[[Any, Any], tuple[Any, Any]],
    has_aux: bool = False,
) -> tuple[Any, Any, Any]:
    """`(J^T c, extra, aux)` with J the Jacobian of the model at the points and `(c, extra) = middle(output, J v)`.

    J v is the transposed pullback's: the model is evaluated once, and torch lacks some forward modes.
    """
    with by_operators():
        output, pullback, aux = pullback_of(name, model, points, has_aux)
        tangent = torch.func.vjp(pullback, tree.map(torch.zeros_like, output))[1](directions)[0]
        cotangent, extra = middle(output, tangent)
        return pullback(cotangent), extra, aux
