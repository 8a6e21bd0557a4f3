"""Gradients and the two products with a Jacobian: grad, value_and_grad, vjp, jvp, linearize."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function, check_tensors
from fnn.diff._arguments import Argnums, at, check_differentiable, own_code, split_aux
from fnn.diff._composed import by_operators
from fnn.diff._purity import call, is_nested


def grad(f: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The function that computes the gradient of a scalar-valued `f`, with the arguments of `f`.

    argnums: the argument, or a tuple of arguments, to differentiate with respect to; the gradient has its structure,
    a tuple for a tuple. has_aux: `f` returns `(output, aux)` and the result is `(gradient, aux)`.
    Complex arguments get torch's gradient, the conjugate of JAX's: the direction of steepest ascent.

    Raises ValueError for an output that is not one number, TypeError for arguments without derivatives and for a
    function that draws from torch's global generator, RuntimeError for one that writes into its arguments.

    Example:
        >>> grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    derivative = _gradient("grad", f, argnums, has_aux)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        _, aux, grads = derivative(args, kwargs)
        return (grads, aux) if has_aux else grads

    return own_code(gradient)


def value_and_grad(f: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The function that computes `(value, gradient)` of a scalar-valued `f`; `((value, aux), gradient)` with has_aux.

    Arguments and errors are those of `grad`.

    Example:
        >>> value_and_grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    derivative = _gradient("value_and_grad", f, argnums, has_aux)

    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        value, aux, grads = derivative(args, kwargs)
        return ((value, aux) if has_aux else value), grads

    return own_code(value_and_gradient)


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """The output of `f(*primals)` and its pullback: `(output, pullback)`, or `(output, pullback, aux)` with has_aux.

    `pullback(cotangent)`, of the structure, shapes and dtypes of the output, gives a tuple with one gradient for each
    primal: the product of the cotangent with the Jacobian. It may be called many times, also under `torch.vmap`.

    Raises TypeError for primals without derivatives and for an impure `f`; the pullback raises ValueError, naming
    the path, for a cotangent that does not fit the output.

    Example:
        >>> output, pullback = vjp(torch.sin, torch.zeros(2))
        >>> pullback(torch.tensor([1.0, 2.0]))
        (tensor([1., 2.]),)
    """
    check_function("vjp", f)
    composed = torch.is_grad_enabled() and any(getattr(leaf, "requires_grad", False) for leaf in tree.leaves(primals))
    output, back, aux = call("vjp", lambda *values: pullback_of("vjp", f, values, has_aux, composed), *primals)

    def pullback(cotangent: Any) -> Any:
        tree.check_like(output, cotangent, "the cotangent of vjp")
        return back(cotangent)

    return (output, pullback, aux) if has_aux else (output, pullback)


def jvp(f: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """The output of `f(*primals)` and its derivative in the direction `tangents`: `(output, tangent)`.

    primals: a tuple of arguments; a bare tensor or another tree stands for a tuple of one. tangents: the same
    structure, shapes and dtypes. has_aux: `f` returns `(output, aux)` and the result is `(output, tangent, aux)`.
    `scaled_dot_product_attention` is computed by plain operators here, since its kernels have no forward derivative.

    Raises ValueError, naming the path, for tangents that do not fit, and what `vjp` raises.

    Example:
        >>> jvp(lambda x, y: x * y, (torch.tensor(2.0), torch.tensor(3.0)), (torch.tensor(1.0), torch.tensor(0.0)))
        (tensor(6.), tensor(3.))
    """
    check_function("jvp", f)
    primals, tangents = paired("jvp", primals, tangents)
    output, tangent, aux = call("jvp", lambda *values: pushforward("jvp", f, values, tangents, has_aux), *primals)
    return (output, tangent, aux) if has_aux else (output, tangent)


def linearize(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """The output of `f(*primals)` and its derivative there as a function: `(output, f_jvp)`, then aux with has_aux.

    `f_jvp(*tangents)` gives what `jvp` gives as the tangent, without evaluating `f` again: it is the transpose of
    the pullback, whose intermediate values are kept. For one direction `jvp` is cheaper. `f` needs second
    derivatives in reverse mode. `f_jvp` may be called many times, under `torch.vmap` and in the same compiled function.

    Raises ValueError, naming the path, for tangents that do not fit, and what `vjp` raises.

    Example:
        >>> output, f_jvp = linearize(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> f_jvp(torch.tensor([1.0, 0.0])), f_jvp(torch.tensor([0.0, 1.0]))
        (tensor([2., 0.]), tensor([0., 4.]))
    """
    check_function("linearize", f)
    with by_operators():
        output, pullback, aux = call(
            "linearize", lambda *values: pullback_of("linearize", f, values, has_aux), *primals
        )
        transposed = torch.func.vjp(pullback, tree.map(torch.zeros_like, output))[1]

    def f_jvp(*tangents: Any) -> Any:
        tree.check_like(primals, tangents, "the tangents of f_jvp")
        with by_operators():
            return transposed(tangents)[0]

    return (output, f_jvp, aux) if has_aux else (output, f_jvp)


def pullback_of(
    name: str, f: Callable[..., Any], primals: tuple[Any, ...], has_aux: bool, composed: bool = False
) -> tuple[Any, Any, Any]:
    """`(output, pullback, aux)` of `f` at the primals; aux is () without has_aux.

    composed: the pullback is to be batched, and that differentiated: see `by_operators`.
    """
    for index, primal in enumerate(primals):
        check_differentiable(name, primal, f"argument {index}")
    with by_operators() if composed or is_nested() else nullcontext():
        if has_aux:
            output, pullback, aux = torch.func.vjp(_with_aux(name, f), *primals, has_aux=True)  # type: ignore[misc]
            return output, pullback, aux
        output, pullback = torch.func.vjp(_without_aux(name, f), *primals)  # type: ignore[misc]
        return output, pullback, ()


def pushforward(
    name: str, f: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], has_aux: bool
) -> tuple[Any, Any, Any]:
    """`(output, tangent, aux)` of `f` at checked primals; aux is () without has_aux."""
    primals = tree.map(_own_memory, primals)
    with by_operators():
        if has_aux:
            output, tangent, aux = torch.func.jvp(_with_aux(name, f), primals, tangents, has_aux=True)  # type: ignore[misc]
            return output, tangent, aux
        output, tangent = torch.func.jvp(_without_aux(name, f), primals, tangents)  # type: ignore[misc]
        return output, tangent, ()


def _own_memory(leaf: Tensor) -> Tensor:
    """The primal, or a copy of one that shares memory, for which torch's forward mode fails.

    Writes into an expanded tensor are refused, and the compiler refuses a view with a tangent that is none.
    """
    expanded = any(stride == 0 and size > 1 for stride, size in zip(leaf.stride(), leaf.shape, strict=True))
    return leaf.clone() if expanded or (torch.compiler.is_compiling() and leaf._base is not None) else leaf


def _with_aux(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        output, aux = split_aux(name, f(*values), True)
        check_tensors(name, output)
        check_tensors(name, aux, "aux")
        return output, aux

    return checked


def _without_aux(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        output = f(*values)
        check_tensors(name, output)
        return output

    return checked


def paired(name: str, primals: Any, tangents: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Primals and tangents as tuples of arguments, checked against each other."""
    if type(primals) is not tuple:
        primals, tangents = (primals,), (tangents,)
    for index, primal in enumerate(primals):
        check_differentiable(name, primal, f"argument {index}")
    if type(tangents) is not tuple:
        raise TypeError(
            f"{name}: primals are a tuple of {len(primals)}, so tangents must be, got {type(tangents).__name__}"
        )
    tree.check_like(primals, tangents, f"{name}: tangents")
    return primals, tangents


def scalar(name: str, output: Any, holomorphic: bool = False) -> Tensor:
    """The output of a function whose gradient is taken: one real number, or complex where it is holomorphic."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: the function must return a scalar tensor, got {type(output).__name__}; return other values "
            "through has_aux=True, and use fnn.jacobian for a tree of outputs"
        )
    if output.dim() != 0:
        second = name in ("hessian", "hessian_diagonal", "hvp")
        instead = "fnn.jacobian(fnn.jacobian(f))" if second else "fnn.jacobian, or fnn.vjp with a cotangent"
        raise ValueError(
            f"{name}: the function must return one number, got shape {tuple(output.shape)}; reduce it with .sum() or "
            f".mean(), or use {instead}"
        )
    if holomorphic and output.is_complex():
        return output
    if not output.is_floating_point():
        cure = "take its real part or its absolute value" if output.is_complex() else "convert it with .float()"
        raise TypeError(f"{name}: the function must return a real floating-point number, got {output.dtype}; {cure}")
    return output


def _gradient(name: str, f: Callable[..., Any], argnums: Argnums, has_aux: bool) -> Callable[..., Any]:
    """`(args, kwargs) -> (value, aux, gradient)`."""
    check_function(name, f)

    def derivative(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        of_selected, selected = at(name, f, argnums, args, kwargs)
        return call(name, lambda value, *_: value_aux_grad(name, of_selected, value, has_aux), selected, args, kwargs)

    return derivative


def value_aux_grad(
    name: str, f: Callable[[Any], Any], selected: Any, has_aux: bool, holomorphic: bool = False
) -> tuple[Any, Any, Any]:
    """`(value, aux, gradient)` of a function of one tree; the complex derivative where it is holomorphic."""

    def scalar_valued(value: Any) -> Any:
        output, aux = split_aux(name, f(value), has_aux)
        output = scalar(name, output, holomorphic)
        return (output, aux) if has_aux else output

    value, pullback, aux = pullback_of(name, scalar_valued, (selected,), has_aux)
    # A pullback called outside of its transform records no graph of its own, as torch.func.grad does: half the memory.
    (grads,) = pullback(torch.ones_like(value), retain_graph=False)
    return value, aux, tree.map(torch.conj, grads) if holomorphic else grads
