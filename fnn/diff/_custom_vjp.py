"""`custom_vjp`: a function with a reverse-mode derivative written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._call import Call, nondiff_positions, split
from fnn._rules._checks import check_function, check_tensors
from fnn._rules._closures import check_closures
from fnn._rules._opaque import held, in_graph, release
from fnn._rules._rule import (
    Like,
    Maybe,
    Tensors,
    apply,
    at,
    current_level,
    is_differentiable,
    is_differentiated,
    pick,
    reverse_level,
    vmap_some,
)


class custom_vjp:
    """A function whose gradient is a rule of one's own, used by every transform, compiled or not, to every order.

    f: `(*args) -> out`, trees of tensors. nondiff_argnums: positions of arguments that are no tensors (functions,
    settings). `f.defvjp(fwd, bwd)` gives the rule: `fwd(*args) -> (out, residuals)`, and
    `bwd(*nondiff, residuals, cotangent)` returns a tuple with one cotangent for each other argument, of its structure
    and shapes, None for zero (as for integers). `bwd` must be linear in the cotangent; forward mode (`jvp`, `jacfwd`,
    `hessian`) uses its transpose. Where nothing is differentiated, `f` itself runs.

    Tensors come as arguments: one that is differentiated and comes from outside (a closure, a default, a module, a
    global) raises ValueError. What else the functions read from outside is a constant of a compiled program, which the
    decorated function must exist before.
    Raises AttributeError where the rule is missing, and ValueError or TypeError, naming the leaf's path, where what
    the functions return does not fit.

    Example:
        >>> @fnn.custom_vjp
        ... def clip_gradient(x):
        ...     return x
        >>> clip_gradient.defvjp(lambda x: (x, ()), lambda residuals, g: (g.clamp(-1, 1),))
        >>> fnn.grad(lambda x: (10 * clip_gradient(x)).sum())(torch.zeros(2))
        tensor([1., 1.])

    Semantics of `jax.custom_vjp`, which has no forward mode.
    """

    def __init__(self, f: Callable[..., Any], nondiff_argnums: int | Sequence[int] = ()) -> None:
        check_function("custom_vjp", f)
        functools.update_wrapper(self, f)
        self.f = f
        self.holder = held(self)
        self.name = getattr(f, "__name__", type(f).__name__)
        self.nondiff = nondiff_positions("custom_vjp", nondiff_argnums)
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.checked: list[Any] = []

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> None:
        """Set the rule; see the class."""
        check_function("defvjp", fwd)
        check_function("defvjp", bwd)
        self.fwd, self.bwd = fwd, bwd
        self.holder = held(self)  # programs compiled with another rule are compiled anew
        self.checked = []

    def __call__(self, *args: Any) -> Any:
        nondiff, args = split("custom_vjp", self.nondiff, args)
        return _call((self.holder, *nondiff), args, {})


def _applied(functions: tuple[Any, ...], args: tuple[Any, ...], _: Any) -> Any:
    self, nondiff = release(functions[0]), functions[1:]
    if self.fwd is None:
        raise AttributeError(f"custom_vjp: {self.name} has no rule yet; give it one by {self.name}.defvjp(fwd, bwd)")
    call = Call(self.nondiff, nondiff, args)
    if not is_differentiated(call.tensors):
        return call(self.f, call.tensors)
    check_closures("custom_vjp", call, self.f, self.fwd, self.bwd)
    pair = _OfTensors(self, call)
    outputs = apply(_Rule(pair, pair.fwd, pair.bwd, reverse_level()), call.tensors)
    return tree.unflatten(pair.structure, outputs[: len(outputs) - pair.saved])


_call = in_graph(_applied)


class _OfTensors:
    """The user's fwd and bwd as functions of tensors. What is no tensor bwd takes from the last run of fwd."""

    def __init__(self, function: custom_vjp, call: Call) -> None:
        self.function, self.call = function, call

    def fwd(self, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        name = self.function.name
        pair = self.call(self.function.fwd, inputs)  # type: ignore[arg-type]
        if not isinstance(pair, tuple) or len(pair) != 2:
            found = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else type(pair).__name__
            raise TypeError(f"custom_vjp: fwd of {name} must return (output, residuals), got {found}")
        out, residuals = pair
        check_tensors("custom_vjp", out, f"the output of fwd of {name}")
        self._check_once(out, inputs)
        leaves, self.structure = tree.flatten(out)
        flat, self.residual_structure = tree.flatten(residuals)
        # Of each residual its value where that is no tensor, and the number of the input where it is one.
        numbers = {id(x): index for index, x in enumerate(inputs)}
        self.residuals = [None if isinstance(leaf, Tensor) else leaf for leaf in flat]
        self.numbers = [numbers.get(id(leaf), -1) if isinstance(leaf, Tensor) else None for leaf in flat]
        self.saved = self.numbers.count(-1)
        return tuple(leaves), tuple(x for x, number in zip(flat, self.numbers, strict=True) if number == -1)

    def bwd(self, inputs: Tensors, saved: Tensors, cotangents: Tensors) -> Maybe:
        remaining = iter(saved)
        residuals = [
            other if number is None else next(remaining) if number == -1 else inputs[number]
            for number, other in zip(self.numbers, self.residuals, strict=True)
        ]
        results = self.function.bwd(  # type: ignore[misc]
            *self.call.nondiff,
            tree.unflatten(self.residual_structure, residuals),
            tree.unflatten(self.structure, cotangents),
        )
        name, count = f"custom_vjp: bwd of {self.function.name}", self.call.count
        if not isinstance(results, tuple) or len(results) != count:
            found = f"a tuple of {len(results)}" if isinstance(results, tuple) else type(results).__name__
            raise TypeError(
                f"{name} must return a tuple of {count}, one cotangent for each argument and None for zero, got {found}"
            )
        return self.call.match(f"{name}: the cotangent", inputs, results)

    def _check_once(self, out: Any, inputs: Tensors) -> None:
        """Raise unless fwd returns what f does; f must run for that, so it is asked once for each kind of call."""
        if self.call.structure in self.function.checked:
            return
        name = self.function.name
        expected = self.call(self.function.f, inputs)
        check_tensors("custom_vjp", expected, f"the output of {name}")
        tree.check_like(expected, out, f"custom_vjp: the output of fwd of {name}, which must be as that of {name},")
        self.function.checked.append(self.call.structure)


class _Rule:
    """The rule of fwd and bwd, functions of tensors: `fwd(*inputs) -> (outputs, saved)`."""

    def __init__(self, pair: Any, fwd: Callable[..., Any], bwd: Callable[..., Maybe], reverse: int) -> None:
        self.pair, self.fwd, self.bwd, self.reverse = pair, fwd, bwd, reverse

    @property
    def saved(self) -> int:
        return self.pair.saved

    def value(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, saved = self.fwd(*inputs)
        return *outputs, *saved

    def pullback(self, inputs: Tensors, saved: Tensors, cotangents: Maybe, needs: Sequence[bool], like: Like) -> Maybe:
        count = len(cotangents) - len(saved)
        grads: list[Tensor | None] = [None] * len(inputs)
        if any(cotangent is not None for cotangent in cotangents[:count]):
            given = [
                torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent
                for cotangent, (shape, dtype, device) in zip(cotangents[:count], like[:count], strict=True)
            ]
            grads = list(self.bwd(inputs, saved, given))
        # A second derivative asks for the gradient of what was saved.
        of_saved = {index: cotangent for index, cotangent in enumerate(cotangents[count:]) if cotangent is not None}
        if of_saved:
            wanted = [index for index, need in enumerate(needs) if need]
            pullback = torch.func.vjp(self._saved_by_fwd(inputs, wanted, list(of_saved)), *pick(inputs, wanted))[1]
            for index, grad in zip(wanted, pullback(tuple(of_saved.values())), strict=True):
                ours = grads[index]
                grads[index] = grad if ours is None else ours + grad
        return grads

    def pushforward(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        outputs, saved = self.fwd(*inputs)
        wanted = [index for index, tangent in enumerate(tangents) if tangent is not None]
        directions = pick(tangents, wanted)
        of_saved: list[Tensor | None] = [None] * len(saved)
        # Only a gradient inside of this derivative asks for them, and not every fwd has a forward mode.
        numbers = [index for index, x in enumerate(saved) if is_differentiable(x)]
        if numbers and self.reverse > current_level():
            of_fwd = self._saved_by_fwd(inputs, wanted, numbers)
            results = torch.func.jvp(of_fwd, pick(inputs, wanted), directions)[1]
            for index, tangent in zip(numbers, results, strict=True):
                of_saved[index] = tangent
        return *self._transposed(inputs, outputs, saved, wanted, directions), *of_saved

    def _saved_by_fwd(self, inputs: Tensors, wanted: list[int], numbers: list[int]) -> Callable[..., Any]:
        return at(lambda *values: pick(self.fwd(*values)[1], numbers), inputs, wanted)

    def _transposed(self, inputs: Tensors, outputs: Tensors, saved: Tensors, wanted: list[int], directions: Any) -> Any:
        """The outputs' tangents: bwd is linear in the cotangent, and its transpose takes tangents to tangents."""
        zeros = [torch.zeros_like(y) for y in outputs]
        numbers = [index for index, y in enumerate(outputs) if is_differentiable(y)]
        present: list[int] = []

        def of_cotangents(*values: Tensor) -> tuple[Tensor, ...]:
            cotangents = list(zeros)
            for index, value in zip(numbers, values, strict=True):
                cotangents[index] = value
            grads = pick(self.bwd(inputs, saved, cotangents), wanted)
            present[:] = [place for place, grad in enumerate(grads) if grad is not None]
            return pick(grads, present) or (zero,)

        zero = torch.zeros(())  # torch.func.vjp wants an output
        pullback = torch.func.vjp(of_cotangents, *pick(zeros, numbers))[1]
        tangents: list[Tensor | None] = [None] * len(outputs)
        for index, tangent in zip(numbers, pullback(pick(directions, present) or (zero,)), strict=True):
            tangents[index] = tangent
        return tangents

    def batched(self, in_dims: tuple[int | None, ...], randomness: str) -> _Rule:
        def bwd(inputs: Tensors, saved: Tensors, cotangents: Tensors) -> Maybe:
            grads = vmap_some(self.bwd, (in_dims, 0, 0), randomness)(tuple(inputs), tuple(saved), tuple(cotangents))
            return [
                grad.sum(0) if grad is not None and dim is None else grad
                for grad, dim in zip(grads, in_dims, strict=True)
            ]

        return _Rule(self.pair, torch.vmap(self.fwd, in_dims, randomness=randomness), bwd, self.reverse)
