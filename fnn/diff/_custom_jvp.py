"""`custom_jvp`: a function with a forward-mode derivative written by hand; `stop_gradient`: one with none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._call import Call, match, nondiff_positions, split
from fnn._rules._checks import check_function, check_tensors
from fnn._rules._closures import check_closures
from fnn._rules._opaque import held, in_graph, release
from fnn._rules._rule import (
    Like,
    Maybe,
    Tensors,
    apply,
    is_differentiable,
    is_differentiated,
    pick,
    vmap_some,
)


class custom_jvp:
    """A function whose tangent is a rule of one's own, used by every transform, compiled or not, to every order.

    f: `(*args) -> out`, trees of tensors. nondiff_argnums: positions of arguments that are no tensors (functions,
    settings). `f.defjvp(rule)` gives the rule: `rule(*nondiff, primals, tangents) -> (out, out_tangent)`, where
    primals and tangents are tuples of the other arguments, tangents of integers and numbers are None, and the tangent
    of out has its structure and shapes, None for zero. The rule must be linear in the tangents; reverse mode (`grad`,
    `vjp`, `jacrev`) uses its transpose. `f.defjvps(*rules)` takes one rule `(tangent, out, *args) -> out_tangent` for
    each argument, None for zero.

    Tensors come as arguments: one that is differentiated and comes from outside (a closure, a default, a module, a
    global) raises ValueError. What else the functions read from outside is a constant of a compiled program, which the
    decorated function must exist before.
    Raises AttributeError where the rule is missing, and ValueError or TypeError, naming the leaf's path, where what
    the rule returns does not fit.

    Example:
        >>> @fnn.custom_jvp
        ... def log1pexp(x):
        ...     return torch.log1p(torch.exp(x))
        >>> log1pexp.defjvps(lambda tangent, out, x: tangent * (1 - 1 / (1 + torch.exp(x))))
        >>> fnn.grad(log1pexp)(torch.tensor(100.0))
        tensor(1.)

    Semantics of `jax.custom_jvp`.
    """

    def __init__(self, f: Callable[..., Any], nondiff_argnums: int | Sequence[int] = ()) -> None:
        check_function("custom_jvp", f)
        functools.update_wrapper(self, f)
        self.f = f
        self.holder = held(self)
        self.name = getattr(f, "__name__", type(f).__name__)
        self.nondiff = nondiff_positions("custom_jvp", nondiff_argnums)
        self.rule: Callable[..., Any] | None = None

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Set the rule, and return it, so that this is a decorator too; see the class."""
        check_function("defjvp", rule)
        self.rule = rule
        self.holder = held(self)  # programs compiled with another rule are compiled anew
        return rule

    def defjvps(self, *rules: Callable[..., Any] | None) -> None:
        """Set one rule for each argument, None for a zero derivative; see the class."""
        if self.nondiff:
            raise TypeError("defjvps: a function with nondiff_argnums takes its rule from defjvp")

        def rule(primals: Any, tangents: Any) -> Any:
            if len(rules) != len(primals):
                raise TypeError(
                    f"defjvps: {self.name} has {len(rules)} rules and was called with {len(primals)} arguments"
                )
            out = self(*primals)
            terms = [
                of_one(tangent, out, *primals)
                for of_one, tangent in zip(rules, tangents, strict=True)
                if of_one is not None and tangent is not None
            ]
            return out, functools.reduce(lambda a, b: tree.map(torch.add, a, b), terms) if terms else None

        self.rule = rule

    def __call__(self, *args: Any) -> Any:
        nondiff, args = split("custom_jvp", self.nondiff, args)
        return _call((self.holder, *nondiff), args, {})


def _applied(functions: tuple[Any, ...], args: tuple[Any, ...], _: Any) -> Any:
    self, nondiff = release(functions[0]), functions[1:]
    if self.rule is None:
        raise AttributeError(f"custom_jvp: {self.name} has no rule yet; give it one by {self.name}.defjvp(rule)")
    call = Call(self.nondiff, nondiff, args)
    if not is_differentiated(call.tensors):
        return call(self.f, call.tensors)
    check_closures("custom_jvp", call, self.f, self.rule)
    pair = _OfTensors(self, call)
    outputs = apply(_Rule(pair.f, pair.rule), call.tensors)
    return tree.unflatten(pair.structure, outputs)


_call = in_graph(_applied)


class _OfTensors:
    """The user's function and rule as functions of tensors."""

    def __init__(self, function: custom_jvp, call: Call) -> None:
        self.function, self.call = function, call

    def f(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.call(self.function.f, inputs)
        check_tensors("custom_jvp", out, f"the output of {self.function.name}")
        leaves, self.structure = tree.flatten(out)
        return tuple(leaves)

    def rule(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        primals, directions = self.call.arguments(inputs)[0], self.call.arguments(tangents, others=False)[0]
        pair = self.function.rule(*self.call.nondiff, primals, directions)  # type: ignore[misc]
        name = f"custom_jvp: the rule of {self.function.name}"
        if not isinstance(pair, tuple) or len(pair) != 2:
            found = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise TypeError(f"{name} must return (output, tangent of the output), got {found}")
        out, tangent = pair
        like = tree.unflatten(self.structure, range(self.structure.num_leaves))
        if (difference := tree.difference(like, out)) is not None:
            raise ValueError(f"{name} returns another output than {self.function.name}: {difference}")
        return match(f"{name}: the tangent of the output", out, tangent)


class _Rule:
    """A function of tensors, `f(*inputs) -> outputs`, and its tangents `rule(inputs, tangents)`."""

    saved = 0

    def __init__(self, f: Callable[..., tuple[Tensor, ...]], rule: Callable[..., Maybe]) -> None:
        self.f, self.rule = f, rule

    def value(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.f(*inputs)

    def pushforward(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        return self.rule(inputs, _zeros_for_none(inputs, tangents))

    def pullback(self, inputs: Tensors, saved: Tensors, cotangents: Maybe, needs: Sequence[bool], like: Like) -> Maybe:
        """The transpose of the rule, which is linear in the tangents."""
        zeros = _zeros_for_none(inputs, [None] * len(inputs))
        wanted = [index for index, need in enumerate(needs) if need and zeros[index] is not None]
        present: list[int] = []

        def of_tangents(*values: Tensor) -> tuple[Tensor, ...]:
            tangents = list(zeros)
            for index, value in zip(wanted, values, strict=True):
                tangents[index] = value
            results = self.rule(inputs, tangents)
            present[:] = [
                index
                for index, (result, cotangent) in enumerate(zip(results, cotangents, strict=True))
                if result is not None and cotangent is not None
            ]
            return pick(results, present) or (zero,)

        zero = torch.zeros(())  # torch.func.vjp wants an output
        pullback = torch.func.vjp(of_tangents, *pick(zeros, wanted))[1]
        grads: list[Tensor | None] = [None] * len(inputs)
        for index, grad in zip(wanted, pullback(pick(cotangents, present) or (zero,)), strict=True):
            grads[index] = grad
        return grads

    def batched(self, in_dims: tuple[int | None, ...], randomness: str) -> _Rule:
        def rule(inputs: Tensors, tangents: Maybe) -> Maybe:
            of_tangents = tuple(None if t is None else dim for t, dim in zip(tangents, in_dims, strict=True))
            return vmap_some(self.rule, (in_dims, of_tangents), randomness)(tuple(inputs), tuple(tangents))

        return _Rule(torch.vmap(self.f, in_dims, randomness=randomness), rule)


def _zeros_for_none(inputs: Tensors, tangents: Maybe) -> list[Tensor | None]:
    return [
        torch.zeros_like(x) if t is None and is_differentiable(x) else t for x, t in zip(inputs, tangents, strict=True)
    ]


def stop_gradient(tree_of_tensors: Any) -> Any:
    """The same values, as constants: their derivative is zero in every mode and to every order.

    Takes a tree and returns one like it; leaves that are no tensors stay as they are.

    Example:
        >>> fnn.grad(lambda x: x * fnn.stop_gradient(x))(torch.tensor(3.0))
        tensor(3.)
    """
    return tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree_of_tensors)
