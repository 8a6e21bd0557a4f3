"""A function with a derivative of its own, which every transform uses, compiled or not.

A *rule* says how some tensors become others and what the derivatives are; `apply` makes of it one autograd function
for every level of `torch.func`. Dynamo would inline that function and lose the derivative, so a compiled program calls
it through `in_graph`, which Dynamo leaves alone and AOTAutograd traces into: what Inductor sees are ordinary operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.utils import unwrap_dead_wrappers
from torch._subclasses.fake_tensor import fake_tensor_tls
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual

from triton_kernels._inductor import give_zeros_memory, tracing

Tensors = Sequence[Tensor]
Maybe = Sequence[Tensor | None]
Like = Sequence[tuple[torch.Size, torch.dtype, torch.device]]  # of each output


class Rule(Protocol):
    """A differentiable function of tensors; its methods are written with operators, to differentiate again."""

    @property
    def saved(self) -> int:
        """How many of the last outputs the pullback needs; known after `value`."""
        ...

    def value(self, *inputs: Tensor) -> tuple[Tensor, ...]: ...

    def pullback(self, inputs: Tensors, saved: Tensors, cotangents: Maybe, needs: Sequence[bool], like: Like) -> Maybe:
        """Gradients of the inputs that are needed, None for zero; `cotangents` of all outputs, None for zero."""
        ...

    def pushforward(self, inputs: Tensors, tangents: Maybe) -> Maybe:
        """Tangents of all outputs."""
        ...

    def batched(self, in_dims: tuple[int | None, ...], randomness: str) -> Rule:
        """The rule of the function under `vmap`: batched inputs and all outputs have the batch axis first."""
        ...


def apply(rule: Rule, inputs: Tensors) -> tuple[Tensor, ...]:
    """The outputs of a rule, differentiable by it at every level."""
    if tracing():
        give_zeros_memory()
    return _Apply.apply(rule, *inputs)  # type: ignore[return-value]


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(rule: Rule, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        with _inside():
            outputs = rule.value(*inputs)
        # Autograd takes an output that is an input, or a view of one, for the input itself.
        return tuple(y.clone() if y._is_view() or any(y is x for x in inputs) else y for y in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.count = inputs[0], len(inputs) - 1
        ctx.like = [(y.shape, y.dtype, y.device) for y in output]
        ctx.save_for_backward(*inputs[1:], *output[len(output) - inputs[0].saved :])
        # Saved outputs know nothing of the tangents of outer levels, so forward mode gets the inputs alone.
        ctx.save_for_forward(*inputs[1:])
        ctx.mark_non_differentiable(*(y for y in output if not is_differentiable(y)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (ctx.count + 1)
        saved = unwrap_dead_wrappers(ctx.saved_tensors)  # of levels that a pullback outlives
        with _inside():
            needs = ctx.needs_input_grad[1:]
            return None, *ctx.rule.pullback(saved[: ctx.count], saved[ctx.count :], cotangents, needs, ctx.like)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> Any:
        # Torch calls this with forward mode off, which would lose the outer levels' tangents; this level's own must not
        # be there.
        with _inside(), _set_fwd_grad_enabled(True):
            inputs = [unpack_dual(x, level=0).primal if is_differentiable(x) else x for x in ctx.saved_tensors]
            results = ctx.rule.pushforward(inputs, tangents)
            return tuple(_tangent(t, *like) for t, like in zip(results, ctx.like, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], rule: Rule, *inputs: Tensor) -> Any:
        dims = tuple(None if dim is None else 0 for dim in in_dims[1:])
        moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(inputs, in_dims[1:], strict=True)]
        outputs = apply(rule.batched(dims, info.randomness), moved)
        return outputs, (0,) * len(outputs)


def _tangent(tangent: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A tangent that autograd takes: zeros for None except of integers, and memory of its own where it is expanded."""
    if tangent is not None:
        return tangent.clone() if 0 in tangent.stride() else tangent
    return torch.zeros(shape, dtype=dtype, device=device) if dtype.is_floating_point or dtype.is_complex else None


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    """What a rule needs around it while a compiled program is traced: constant tensors, and `torch.func.jvp`."""
    constants = fake_tensor_tls.allow_non_fake_inputs_override
    nesting, level = eager_transforms.JVP_NESTING, forward_ad._current_level
    fake_tensor_tls.allow_non_fake_inputs_override = True
    if _forward_mode_is_on():  # torch keeps its own account of that, which a traced graph does not
        eager_transforms.JVP_NESTING, forward_ad._current_level = max(nesting, 1), 0
    try:
        yield
    finally:
        eager_transforms.JVP_NESTING, forward_ad._current_level = nesting, level
        fake_tensor_tls.allow_non_fake_inputs_override = constants


def _forward_mode_is_on() -> bool:
    try:
        level = torch._C._enter_dual_level()  # type: ignore[attr-defined]
    except RuntimeError:  # there is one at most
        return True
    torch._C._exit_dual_level(level=level)  # type: ignore[attr-defined]
    return False


def is_differentiable(x: Any) -> bool:
    """Whether a leaf can have a derivative: a floating-point or complex tensor."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def is_differentiated(tensors: Sequence[Any]) -> bool:
    """Whether a derivative may be asked for here."""
    levels = [level.key() for level in _stack()]
    if torch._C._functorch.TransformType.Grad in levels or torch._C._functorch.TransformType.Jvp in levels:  # type: ignore[attr-defined]
        return True
    for x in tensors:
        while torch._C._functorch.is_functorch_wrapped_tensor(x):  # type: ignore[attr-defined]
            x = torch._C._functorch.get_unwrapped(x)  # type: ignore[attr-defined]
        recorded = x.requires_grad and torch.is_grad_enabled()
        if recorded or unpack_dual(x, level=0).tangent is not None:
            return True
    return False


def reverse_level() -> int:
    """The number of the innermost level that differentiates in reverse mode, 0 for none."""
    grad = torch._C._functorch.TransformType.Grad  # type: ignore[attr-defined]
    return max((level.level() for level in _stack() if level.key() == grad), default=0)


def current_level() -> int:
    """The number of the level being processed, 0 for none."""
    return torch._C._functorch.maybe_current_level() or 0  # type: ignore[attr-defined]


def _stack() -> list[Any]:
    return torch._C._functorch.get_interpreter_stack() or []  # type: ignore[attr-defined]


def at(f: Callable[..., Any], inputs: Tensors, wanted: Sequence[int]) -> Callable[..., Any]:
    """`f` as a function of the inputs with these numbers alone."""

    def of_wanted(*values: Tensor) -> Any:
        arguments = list(inputs)
        for index, value in zip(wanted, values, strict=True):
            arguments[index] = value
        return f(*arguments)

    return of_wanted


def pick(values: Sequence[Any], numbers: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[index] for index in numbers)


def vmap_some(f: Callable[..., Maybe], in_dims: Any, randomness: str) -> Callable[..., Maybe]:
    """`vmap` of a function that returns tensors and None."""

    def batched(*args: Any) -> Maybe:
        present: list[bool] = []

        def tensors(*args: Any) -> tuple[Tensor, ...]:
            results = f(*args)
            present[:] = [result is not None for result in results]
            return tuple(result for result in results if result is not None)

        remaining = iter(torch.vmap(tensors, in_dims, randomness=randomness)(*args))
        return [next(remaining) if there else None for there in present]

    return batched
