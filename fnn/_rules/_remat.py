"""`remat`: what a function computes is not kept for the backward pass but computed again there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._call import Call
from fnn._rules._checks import check_function, check_tensors
from fnn._rules._closures import check_closures
from fnn._rules._opaque import held, in_graph, release
from fnn._rules._rule import Like, Maybe, Tensors, apply, at, is_differentiable, is_differentiated, pick
from triton_kernels._inductor import tracing


def remat(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, but of what it computes only the inputs are kept for the backward pass, which computes the rest again.

    f: any function of trees of tensors and numbers, an fnn layer too; returns a tree of tensors. The values and
    derivatives are those of `f`, in every mode and to every order; memory falls by what `f` would have kept, for the
    time of one more run of `f`. Compiled programs gain; eager `torch.func.grad` keeps the recomputed values as well.
    Random numbers are the same in both runs where they come from a key, as those of `fnn.random` do.

    Tensors come as arguments: one that is differentiated and comes from outside (a closure, a default, a module, a
    global) raises ValueError. What else `f` reads from outside is a constant of a compiled program, and `f` must be
    defined outside of it.

    Example:
        >>> block = fnn.remat(lambda w, x: torch.tanh(x @ w))
        >>> fnn.grad(lambda w: block(w, torch.eye(2)).sum())(torch.zeros(2, 2))
        tensor([[1., 1.],
                [1., 1.]])

    Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; `jax.checkpoint`.
    """
    check_function("remat", f)
    return _rematerialized(f, _call)


def remat_shards(f: Callable[..., Any]) -> Callable[..., Any]:
    """`remat` of a function that makes whole tensors of parts: the tensors of its first argument, each a part.

    In a compiled program every part waits for the cotangents of `f` before it is used again: a compiler that finds
    the same whole made twice makes it once, and keeps it from the one use to the other.
    """
    return _rematerialized(f, _call_of_shards)


def _rematerialized(f: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    holder = held(f)

    @functools.wraps(f)
    def rematerialized(*args: Any, **kwargs: Any) -> Any:
        return call((holder,), args, kwargs)

    return rematerialized


def _applied(functions: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], shards: int = 0) -> Any:
    f = release(functions[0])
    call = Call((), (), args, kwargs)
    if not is_differentiated(call.tensors):
        return call(f, call.tensors)
    check_closures("remat", call, f)
    structure: Any = None

    def of_tensors(*inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal structure
        out = call(f, inputs)
        check_tensors("remat", out)
        leaves, structure = tree.flatten(out)
        return tuple(leaves)

    outputs = apply(_Rule(of_tensors, shards), call.tensors)
    return tree.unflatten(structure, outputs)


def _applied_to_shards(functions: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _applied(functions, args, kwargs, shards=len(tree.leaves(args[0])))


_call = in_graph(_applied)
_call_of_shards = in_graph(_applied_to_shards)


class _Rule:
    """A function of tensors with its own derivatives, computed from the inputs, of which the first may be shards."""

    saved = 0

    def __init__(self, f: Callable[..., tuple[Tensor, ...]], shards: int) -> None:
        self.f, self.shards = f, shards

    def value(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.f(*inputs)

    def pullback(self, inputs: Tensors, saved: Tensors, cotangents: Maybe, needs: Sequence[bool], like: Like) -> Maybe:
        wanted = [index for index, need in enumerate(needs) if need]
        given = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]
        inputs = _after(pick(cotangents, given), inputs, self.shards)
        of_wanted = at(lambda *values: pick(self.f(*values), given), inputs, wanted)
        pullback = torch.func.vjp(of_wanted, *pick(inputs, wanted))[1]
        grads: list[Tensor | None] = [None] * len(inputs)
        for index, grad in zip(wanted, pullback(pick(cotangents, given)), strict=True):
            grads[index] = grad
        return grads

    def pushforward(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        wanted = [index for index, tangent in enumerate(tangents) if tangent is not None]
        numbers: list[int] = []
        count = 0

        def differentiable(*values: Tensor) -> tuple[Tensor, ...]:
            nonlocal count
            outputs = at(self.f, inputs, wanted)(*values)
            count, numbers[:] = len(outputs), [i for i, y in enumerate(outputs) if is_differentiable(y)]
            return pick(outputs, numbers) or (torch.zeros(()),)  # torch.func.jvp wants an output

        results = torch.func.jvp(differentiable, pick(inputs, wanted), pick(tangents, wanted))[1]
        found: list[Tensor | None] = [None] * count
        for index, tangent in zip(numbers, results[: len(numbers)], strict=True):
            found[index] = tangent
        return found

    def batched(self, in_dims: tuple[int | None, ...], randomness: str) -> _Rule:
        return _Rule(torch.vmap(self.f, in_dims, randomness=randomness), self.shards)


def _after(cotangents: Tensors, inputs: Tensors, shards: int) -> Tensors:
    """The inputs, of which the shards or else the largest wait for the cotangents where a graph is traced.

    Without that Inductor may order the recomputation next to the first computation, where it saves no memory. Both
    branches are the same value: what the condition is does not matter, only that it must be known first.
    """
    if not tracing():
        return inputs
    sizes = [x.numel() if is_differentiable(x) else 0 for x in inputs]
    if max(sizes) == 0 or cotangents[0].numel() == 0:
        return inputs
    first = cotangents[0].detach().reshape(-1)[0]
    numbers = range(shards) if shards else (sizes.index(max(sizes)),)
    waiting = list(inputs)
    for number in numbers:
        waiting[number] = torch.where(first == first, inputs[number], inputs[number])
    return waiting
