"""Taps: the input and the pre-activation of every linear, convolution and embedding in any function.

The gradient of a weight is a sum of products, of what the layer was given and of the derivative with respect to what
it gave. Norms, kernels and curvature factors need these two, never the product. Here they come from any function
`f(params, *args)` of ONE example, without a change to it:

    from fnn.ops import _taps as taps

    plan = taps.plan(f, params, *example)                 # once, outside `vmap`; static, so it costs nothing compiled
    def one(*example):                                    # under `torch.vmap` over the examples, or alone
        output, pullback, inputs = plan.vjp(f, params, *example)
        deltas, grads = pullback(torch.ones_like(output))
        ...

`plan.taps[i]` says which leaf is used and how, `inputs[i]` is what it met, `deltas[i]` the derivative with respect to
its pre-activation; `plan.taps[i].rows(inputs[i], deltas[i])` gives two matrices whose product is the leaf's gradient.
Leaves in `plan.free` have their whole gradient in `grads`, in the order of `plan.free`: the biases and scales, which
are no larger than an activation, and every leaf that is used in another way too. A leaf used by several taps has the
sum of their gradients.

How it works: a `TorchFunctionMode` sees the calls whose weight *is* a leaf. They compute with the weight of the level
outside, a constant here but not to outer transforms, and their result gets a zero added, with respect to which the
derivative is taken. Whether a leaf reaches the output by any other way is not guessed: the function is run once with
nothing but these leaves recording, and if its output records, they are not structured. So a use that the mode cannot
see (a slice, a cast, an `autograd.Function`) costs memory and never gives a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.overrides import TorchFunctionMode

from fnn import tree
from fnn.ops._tap_rules import RULES, TRANSPOSITIONS, Tap

recorders: list[Recorder] = []
"""The recorders at work, the innermost last; `fnn.ops.linear` shows them its weight before it is transposed."""


def plan(f: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False, biases: bool = False) -> Plan:
    """What `f(params, *args)` does with the leaves of params: which have taps, and which have other uses too.

    f takes one example and returns a tree of tensors, or `(output, aux)` with `has_aux`. biases: leaves that do nothing
    but add in calls with taps are structured too; the gradient of such a leaf is the sum of these calls' deltas.
    """
    leaves, structure = tree.flatten(params)
    names = list(tree.paths(params))

    def run(structured: list[int]) -> tuple[list[Tap], bool, list[Tap]]:
        """The taps of these leaves, whether one of them reaches the output by another way, and the output's own tap."""
        found: list[tuple[list[Tap], bool, list[Tap]]] = []

        def recorded(shadows: list[Tensor]) -> tuple[Any, ...]:
            values = list(leaves)
            for index, shadow in zip(structured, shadows, strict=True):
                values[index] = shadow
            recorder = Recorder(leaves, values, structured, names, None)
            with recorder:
                output = f(tree.unflatten(structure, values), *args)
            output = output[0] if has_aux else output
            tensors = [leaf for leaf in tree.leaves(output) if isinstance(leaf, Tensor)]
            last = [tap for tap, given in zip(recorder.taps, recorder.outputs, strict=True) if given is output]
            found.append((recorder.taps, any([tensor.requires_grad for tensor in tensors]), last))
            return tuple(tensors)

        torch.func.vjp(recorded, [leaves[index] for index in structured])
        return found[0]

    def sound(candidates: list[int], others: list[int]) -> list[int]:
        """The candidates that reach the output by their taps only, found by halving; the others are known to."""
        if not candidates or not run(others + candidates)[1]:
            return candidates
        half = len(candidates) // 2
        return [] if half == 0 else sound(candidates[:half], others) + sound(candidates[half:], others)

    floating = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    taps, _, last = run(floating)
    weights = sound([index for index in floating if any([tap.leaf == index for tap in taps])], [])
    taps = [tap for tap in taps if tap.leaf in weights]
    adding = [index for index in floating if biases and any([tap.bias == index for tap in taps])]
    adding = sound([index for index in adding if index not in weights], weights)
    free = [index for index in floating if index not in weights and index not in adding]
    last = next((i for i, tap in enumerate(taps) if any([tap is other for other in last])), None)
    return Plan(taps, weights, adding, free, names, [leaf.shape for leaf in leaves], last)


class Plan:
    """Which leaves of the params are structured, by which taps, and which are not; numbers are those of tree order."""

    def __init__(
        self,
        taps: list[Tap],
        structured: list[int],
        biases: list[int],
        free: list[int],
        paths: list[str],
        shapes: list[torch.Size],
        last: int | None,
    ) -> None:
        self.taps, self.structured, self.biases, self.free = taps, structured, biases, free
        self.paths, self.shapes = paths, shapes
        self.last = last
        """Number of the tap whose pre-activation is itself the output, so that its delta is the cotangent."""

    def vjp(self, f: Callable[..., Any], params: Any, *args: Any, has_aux: bool = False) -> tuple[Any, ...]:
        """`(output, pullback, inputs)`, and aux with `has_aux`; `pullback(cotangent) -> (deltas, grads)`.

        inputs: what the weight of each tap met. deltas: the cotangents of the taps' pre-activations. grads: those of
        the leaves in `free`.
        """
        leaves, structure = tree.flatten(params)
        zeros = [torch.zeros(tap.shape, dtype=tap.dtype, device=tap.device) for tap in self.taps]

        def run(zeros: list[Tensor], free: list[Tensor]) -> tuple[Any, Any]:
            values = list(leaves)
            for index, leaf in zip(self.free, free, strict=True):
                values[index] = leaf
            structured = self.structured + self.biases
            for index in structured:
                # A tensor of its own: the function may hold the leaf itself, as a constant.
                values[index] = leaves[index].view_as(leaves[index])
            recorder = Recorder(leaves, values, structured, self.paths, zeros)
            with recorder:
                output = f(tree.unflatten(structure, values), *args)
            if [tap.signature() for tap in recorder.taps] != [tap.signature() for tap in self.taps]:
                raise RuntimeError(
                    "the function does not use its parameters in the same way in each call, or for each example: "
                    f"expected the taps {self.taps}, got {recorder.taps}"
                )
            output, aux = output if has_aux else (output, None)
            return output, (recorder.inputs, aux) if has_aux else recorder.inputs

        found: tuple[Any, ...] = torch.func.vjp(run, zeros, [leaves[i] for i in self.free], has_aux=True)
        output, pullback, extra = found
        return (output, pullback, *extra) if has_aux else (output, pullback, extra)


class Recorder(TorchFunctionMode):
    """Sees the calls whose weight is one of the structured `values`, and computes them with the same of `leaves`."""

    def __init__(
        self,
        leaves: list[Tensor],
        values: list[Tensor],
        structured: list[int],
        paths: list[str],
        zeros: list[Tensor] | None,
    ) -> None:
        super().__init__()
        self.leaves, self.paths, self.zeros = leaves, paths, zeros
        self.numbers = {value: index for index, value in enumerate(values)}
        self.shadows = {values[index]: index for index in structured}
        self.transposed: dict[Tensor, int] = {}
        self.taps: list[Tap] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.level = 0

    def __enter__(self) -> Recorder:
        self.level = retrieve_current_functorch_interpreter().level()
        recorders.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        recorders.pop()
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # its Python body has a super() that Dynamo cannot trace inside a mode
            func = torch.unflatten
        if func in RULES:
            return self.call(RULES[func], func, args, kwargs)
        out = func(*args, **kwargs)
        if func in TRANSPOSITIONS and args[0] in self.shadows and TRANSPOSITIONS[func](args, kwargs):
            self.transposed[out] = self.shadows[args[0]]
        return out

    def call(self, rule: Callable[..., Any], func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """`func(*args, **kwargs)`, tapped if its rule finds the weight to be a leaf."""
        use = rule(self, *args, **kwargs)
        # Inside a transform of the function's own, the pre-activation of one call here is that of many.
        if use is None or retrieve_current_functorch_interpreter().level() != self.level:
            return func(*args, **kwargs)
        out = func(*use.args)
        self.inputs.append(use.input.clone())  # the function may write into it afterwards
        path, weight = self.paths[use.leaf], tuple(self.leaves[use.leaf].shape)
        about = (tuple(out.shape), out.dtype, out.device, use.bias, use.options)
        self.taps.append(Tap(use.leaf, path, use.kind, weight, *about))
        out = out if self.zeros is None else out + self.zeros[len(self.taps) - 1]
        self.outputs.append(out)
        return out

    def matrix(self, weight: Tensor) -> tuple[int | None, Tensor | None, str]:
        """Of the right factor of a product: the leaf that it is, that leaf outside, and how it is stored."""
        if weight in self.transposed:
            leaf = self.transposed[weight]
            return leaf, self.leaves[leaf].mT, "oi"
        leaf = self.shadows.get(weight)
        return leaf, None if leaf is None else self.leaves[leaf], "io"

    def addend(self, bias: Tensor | None, features: int) -> tuple[int | None, Tensor | None]:
        """Of a bias: the number of the leaf that it is, if it is one number a feature, and what to add."""
        if bias is None or bias.shape != (features,):
            return None, bias
        leaf = self.shadows.get(bias)
        return self.numbers.get(bias), bias if leaf is None else self.leaves[leaf]


def linear(call: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`call(x, weight, bias)`, shown to the recorder: the operators inside would only see a transposed weight."""
    recorder = recorders.pop()
    try:
        return recorder.call(RULES[torch.nn.functional.linear], call, (x, weight, bias), {})
    finally:
        recorders.append(recorder)
