"""`implicit_diff`: the derivative of a root or a fixed point, whatever found it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._call import Call
from fnn._rules._checks import check_function, check_tensors
from fnn._rules._closures import check_closures
from fnn._rules._opaque import held, in_graph, release
from fnn._rules._rule import Maybe, Tensors, apply, at, is_differentiable, is_differentiated, pick, reverse_level
from fnn.diff._custom_jvp import _Rule
from fnn.diff._custom_vjp import _Rule as VjpRule
from triton_kernels._inductor import tracing

Solve = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def implicit_diff(
    residual: Callable[..., Any], *, fixed_point: bool = False, solve: Solve | None = None, tol: float | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a solver `solver(x0, *theta) -> x` of `residual(x, *theta) = 0`: x becomes differentiable in theta.

    residual: returns a tree like x (with fixed_point, the map `T` of `T(x, *theta) = x` instead). The derivative is
    that of the implicit function theorem, `-(dF/dx)^-1 dF/dtheta`, in every mode and to every order; the solver itself
    is not differentiated, may loop and stop as it likes, and x0 has derivative zero. x and theta are trees of tensors.
    A tensor that is differentiated and comes from outside (a closure, a default, a module, a global) raises ValueError.
    solve: `(matvec, b) -> A^-1 b` for vectors, also for b = 0 and for the transpose; it is not differentiated either.
    Without it the Jacobian is formed, (n, n), and solved by LU.
    tol: in eager mode raises ValueError where the largest residual exceeds it: by default 1e-2 in float32, 1e-5 in
    float64, times one plus the largest entry of x; the norm is said.

    Example:
        >>> @fnn.implicit_diff(lambda x, a: x**2 - a)
        ... def sqrt(x0, a):
        ...     for _ in range(20):
        ...         x0 = (x0 + a / x0) / 2
        ...     return x0
        >>> fnn.grad(lambda a: sqrt(torch.ones(()), a))(torch.tensor(4.0))
        tensor(0.2500)

    Blondel et al., Efficient and Modular Implicit Differentiation, 2022.
    """
    check_function("implicit_diff", residual)

    def decorate(solver: Callable[..., Any]) -> Callable[..., Any]:
        check_function("implicit_diff", solver)
        holder = held((residual, solver, fixed_point, solve, tol))

        def solved(x0: Any, *theta: Any) -> Any:
            return _call((holder,), (x0, *theta), {})

        return solved

    return decorate


def _applied(functions: tuple[Any, ...], args: tuple[Any, ...], _: Any) -> Any:
    residual, solver, fixed_point, solve, tol = release(functions[0])
    call = Call((), (), args)
    if not is_differentiated(call.tensors):
        return call(solver, call.tensors)
    check_closures("implicit_diff", call, solver, residual)
    problem = _Problem(call, solver, residual, fixed_point, solve or _dense, tol)
    outputs = apply(_Rule(problem.root, problem.tangent), call.tensors)
    return tree.unflatten(problem.structure, outputs)


_call = in_graph(_applied)


class _Problem:
    """A solver and its equation as functions of tensors."""

    def __init__(
        self, call: Call, solver: Callable, residual: Callable, fixed_point: bool, solve: Solve, tol: float | None
    ) -> None:
        self.call, self.solver, self.residual = call, solver, residual
        self.fixed_point, self.solve, self.tol = fixed_point, solve, tol

    def root(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = self.call(self.solver, inputs)
        check_tensors("implicit_diff", x, "what the solver returns")
        leaves, self.structure = tree.flatten(x)
        values = self._equation(x, inputs)
        self._check_root(leaves, values)
        return tuple(leaves)

    def tangent(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        """The tangent of x: minus the Jacobian's inverse times the tangent of the residual along theta.

        x is found anew as a function of the inputs, so that the rule itself differentiates.
        """
        leaves = apply(_Rule(self.root, self.tangent), inputs)
        vector, unravel = tree.ravel(tree.unflatten(self.structure, leaves))
        of_x0 = sum(isinstance(leaf, Tensor) for leaf in tree.leaves(self.call.arguments(inputs)[0][0]))
        wanted = [index for index, tangent in enumerate(tangents) if tangent is not None and index >= of_x0]
        if not wanted:
            return [torch.zeros_like(leaf) for leaf in leaves]
        values = tuple(inputs[index] for index in wanted)

        def of_theta(*theta: Tensor) -> Tensor:
            arguments = list(inputs)
            for index, value in zip(wanted, theta, strict=True):
                arguments[index] = value
            return self._equation(unravel(vector), arguments)

        def residual_of(x: Tensor, *theta: Tensor) -> Tensor:
            return self._equation(unravel(x), theta)

        right = _along(of_theta, values, tuple(tangents[index] for index in wanted))
        return tree.leaves(unravel(-linear_solve(self.solve, residual_of, (vector, *inputs), right)))

    def _equation(self, x: Any, inputs: Any) -> Tensor:
        """The residual at x as one vector."""
        theta = self.call.arguments(inputs)[0][1:]
        value = self.residual(x, *theta)
        name = "implicit_diff: the fixed-point map" if self.fixed_point else "implicit_diff: the residual"
        if (difference := tree.difference(x, value)) is not None:
            raise ValueError(f"{name} must return a tree like x: {difference}")
        tree.check_like(x, value, name)
        vector = tree.ravel(value)[0]
        return vector - tree.ravel(x)[0] if self.fixed_point else vector

    def _check_root(self, leaves: list[Tensor], values: Tensor) -> None:
        if tracing() or torch._C._functorch.is_functorch_wrapped_tensor(values):  # type: ignore[attr-defined]
            return
        default = 1e-5 if values.dtype == torch.float64 else 1e-2
        size = max((leaf.abs().max().item() for leaf in leaves if leaf.numel()), default=0.0)
        limit = default * (1 + size) if self.tol is None else self.tol
        worst = values.abs().max().item() if values.numel() else 0.0
        if not worst <= limit:
            what = "fixed point" if self.fixed_point else "root"
            raise ValueError(
                f"implicit_diff: the solver returned a point that is no {what}: the largest residual is {worst:.3g}, "
                f"allowed is {limit:.3g}; run the solver longer, or give tol="
            )


class _Matrix:
    """The Jacobian of `f` in its first argument, or its transpose, as a function of a vector."""

    def __init__(self, f: Callable[..., Tensor], point: Tensors, transposed: bool) -> None:
        self.f, self.point, self.transposed = f, point, transposed

    def __call__(self, vector: Tensor) -> Tensor:
        if self.transposed:
            return torch.func.vjp(self._of_x, self.point[0])[1](vector)[0]
        return _along(self._of_x, (self.point[0],), (vector,))

    def dense(self) -> Tensor:
        pullback = torch.func.vjp(self._of_x, self.point[0])[1]
        identity = torch.eye(self.point[0].shape[0], dtype=self.point[0].dtype, device=self.point[0].device)
        rows = torch.vmap(lambda row: pullback(row)[0])(identity)
        return rows.T if self.transposed else rows

    def _of_x(self, x: Tensor) -> Tensor:
        return self.f(x, *self.point[1:])


def linear_solve(solve: Solve, f: Callable[..., Tensor], point: Tensors, b: Tensor, transposed: bool = False) -> Tensor:
    """`A^-1 b` of the Jacobian A of `f` in its first argument; its derivative is again such a solve, not that of it."""

    def fwd(b: Tensor, *point: Tensor) -> tuple[tuple[Tensor], tuple[Tensor]]:
        solution = solve(_Matrix(f, point, transposed), b)
        return (solution,), (solution.clone(),)

    def bwd(inputs: Tensors, saved: Tensors, cotangents: Tensors) -> Maybe:
        point, (solution,) = tuple(inputs[1:]), saved
        adjoint = linear_solve(solve, f, point, cotangents[0], not transposed)
        wanted = [index for index, x in enumerate(point) if is_differentiable(x)]

        def product(*values: Tensor) -> Tensor:
            return _Matrix(f, at(lambda *inputs: inputs, point, wanted)(*values), transposed)(solution)

        grads: list[Tensor | None] = [None] * len(point)
        pullback = torch.func.vjp(product, *pick(point, wanted))[1]
        for index, grad in zip(wanted, pullback(-adjoint), strict=True):
            grads[index] = grad
        return adjoint, *grads

    return apply(VjpRule(_Saved, fwd, bwd, reverse_level()), (b, *point))[0]


class _Saved:
    saved = 1


def _along(f: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Any, ...]) -> Tensor:
    """The derivative of `f` along a direction, by transposing its pullback."""

    def pullback(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(f, *point)[1](cotangent)

    return torch.func.vjp(pullback, torch.zeros_like(f(*point)))[1](direction)[0]


def _dense(matvec: Any, b: Tensor) -> Tensor:
    return torch.linalg.solve(matvec.dense(), b)
