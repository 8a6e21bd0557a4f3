"""How an operator is registered so that every transform sees its derivative, compiled or not.

An operator here is a `torch.library` operator: the compiler keeps it as one node, and `vmap` finds its rule. Its
derivative is a Python kernel on the `Autograd` dispatch key that applies a single-level autograd function, the
kind `torch.func` itself uses for each of its levels. Rules are written with operators, never with bare kernels, so
that each is differentiable and batchable again, to every order.

The public ways were tried and fail silently (torch 2.11 to 2.15): `torch.library.custom_op` has zero tangents under
forward mode, and the compiler drops the rules of a plain `torch.autograd.Function` under `torch.func` transforms.
In this package the private names that registration needs are imported here and nowhere else, as `fnn/diff` does in
`_rules.py` and `_purity.py` for transforms; `tests/test_register.py` watches the private names of both packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual
from torch.autograd.function import _SingleLevelFunction

from triton_kernels._inductor import give_zeros_memory, keep_writes_after_reads, tell_the_caches, tracing

LIBRARY = torch.library.Library("triton_kernels", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable,
    cuda: Callable,
    fake: Callable,
    vmap: Callable,
    rule: type | None = None,
    reference: Callable | None = None,
    differentiated: Callable | None = None,
    library: torch.library.Library = LIBRARY,
) -> Callable[..., Any]:
    """Defines the operator `schema` with its kernels and its behaviour under every transform.

    fake: shapes and dtypes of the results. vmap: `(op, in_dims, *inputs) -> (outputs, out_dims)`.
    rule: the derivative, with `setup_context`, `backward` and perhaps `jvp` as for `torch.autograd.Function`. There
    ctx.needs says of each input whether its gradient is wanted, a gradient or tangent that is None means zero, and
    `jvp` finds what was saved in ctx.primals, where outputs must not be: they know nothing of outer levels' tangents.
    reference: the same function as a composition of differentiable operators; it takes the
    rule's place wherever the rule says nothing: in forward mode if the rule has no `jvp`, in both without a rule.
    differentiated: in place of both, another operator's call that is made wherever a derivative may be asked for.
    """
    name = schema[: schema.index("(")]
    library.define(schema)
    op = getattr(getattr(torch.ops, library.ns), name).default
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")

    def traced(*inputs):
        if tracing():
            keep_writes_after_reads()
            give_zeros_memory()
            tell_the_caches()
        return fake(*inputs)

    torch.library.register_fake(f"{library.ns}::{name}", traced, lib=library)
    torch.library.register_vmap(
        f"{library.ns}::{name}", lambda _, in_dims, *inputs: vmap(op, in_dims, *inputs), lib=library
    )
    if differentiated is not None:
        autograd = _replaced(op, differentiated)
    elif rule is not None and hasattr(rule, "jvp"):
        autograd = _single_level(op, rule)
    else:
        assert reference is not None, "an operator needs a derivative"
        reverse, forward = _single_level(op, rule or _reverse(reference)), reference

        def autograd(keyset, *inputs):
            return forward(*inputs) if has_tangent(*inputs) else reverse(keyset, *inputs)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    return op


def below_autograd(op: OpOverload, keyset: Any, *inputs: Any) -> Any:
    """Calls the operator on the levels below this one: outer transforms, then the kernel."""
    # Without enabled modes the levels below would not record, and second derivatives would be silently wrong.
    with torch.enable_grad(), _set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *inputs)


def has_tangent(*inputs: Any) -> bool:
    """Whether forward mode differentiates with respect to one of the inputs, on the current level."""
    return any(isinstance(x, Tensor) and unpack_dual(x, level=0).tangent is not None for x in inputs)


def _replaced(op: OpOverload, differentiated: Callable) -> Callable:
    def autograd(keyset, *inputs):
        recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if recorded or has_tangent(*inputs):
            return differentiated(*inputs)
        return below_autograd(op, keyset, *inputs)

    return autograd


def _single_level(op: OpOverload, rule: type) -> Callable:
    class Derivative(_SingleLevelFunction):
        @staticmethod
        def forward(keyset, *inputs):
            return below_autograd(op, keyset, *inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.set_materialize_grads(False)  # zeros would be multiplied: an HVP takes 1.27 times as long
            rule.setup_context(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            ctx.needs = ctx.needs_input_grad[1:]
            return None, *rule.backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, _, *tangents):
            # Torch calls this with forward mode off, which would lose the outer levels' tangents.
            with _set_fwd_grad_enabled(True):
                ctx.primals = [None if x is None else unpack_dual(x, level=0).primal for x in ctx.saved_tensors]
                return rule.jvp(ctx, *tangents)

    Derivative.__name__ = Derivative.__qualname__ = op.name().replace("::", "_")

    apply: Callable = Derivative.apply  # type: ignore[attr-defined]

    def autograd(keyset, *inputs):
        with enable_single_level_autograd_function():
            return apply(keyset, *inputs)

    return autograd


def _reverse(reference: Callable) -> type:
    """A rule whose gradients are those of `reference`, computed anew when they are asked for."""

    class Reverse:
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
            ctx.others = [None if tensor else x for x, tensor in zip(inputs, ctx.is_tensor, strict=True)]
            ctx.save_for_backward(*(x if tensor else None for x, tensor in zip(inputs, ctx.is_tensor, strict=True)))

        @staticmethod
        def backward(ctx, *grads):
            inputs = [
                saved if tensor else other
                for saved, other, tensor in zip(ctx.saved_tensors, ctx.others, ctx.is_tensor, strict=True)
            ]
            wanted = [i for i, need in enumerate(ctx.needs) if need]

            def of_wanted(*values):
                arguments = list(inputs)
                for i, value in zip(wanted, values, strict=True):
                    arguments[i] = value
                outputs = reference(*arguments)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                return tuple(output for output, grad in zip(outputs, grads, strict=True) if grad is not None)

            pullback: Any = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[1]
            results: list[Tensor | None] = [None] * len(inputs)
            for i, grad in zip(wanted, pullback(tuple(grad for grad in grads if grad is not None)), strict=True):
                results[i] = grad
            return tuple(results)

    return Reverse
