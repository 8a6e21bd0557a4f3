"""Computing with tensors that are parted among processes (torch's `DTensor`): what has to be asked for.

DTensor works out, operation by operation, what each process computes of its part. It knows torch's own operations, not
those of `triton_kernels`. To a convolution it gives a part of the weights, of the channels, or of a sum, as if it were
the whole; and inside `torch.func.grad` a layer cannot gather a weight by hand, for the tensor that it sees there only
wraps one. So `whole` is an operator, the identity, of which torch is told which parts it may be given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnn._placement import implicit_replication  # not torch's, which does not nest
from fnn.ops._use import use
from triton_kernels._inductor import decompose, tracing
from triton_kernels._register import register


class _Setting:
    placed: bool = False


setting = _Setting()


@contextlib.contextmanager
def placed() -> Iterator[None]:
    """Around a call, compiled or not, with DTensors: a plain tensor in it counts as the same on every process."""
    _tell_torch()
    before = setting.placed
    with use("torch"), implicit_replication():
        setting.placed = True
        try:
            yield
        finally:
            setting.placed = before


def whole(x: Tensor, *, examples: bool = False) -> Tensor:
    """`x`, all of it on every process, or each of its `examples` on one; outside of `placed` nothing is done."""
    return identity(x, examples) if setting.placed else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of batches (..., m, k) and (..., k, n), which may be parted along any of their batch axes.

    Torch makes one axis of them, whose parts, where two axes are parted, do not lie side by side: planning how to move
    those takes it minutes for one net.
    """
    return multiply(a, b) if setting.placed and a.dim() == b.dim() else a @ b


def _fake_identity(x, examples):
    if tracing():
        _install()
    return torch.empty_like(x)


def _fake_multiply(a, b):
    if tracing():
        _install()
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@functools.cache
def _install() -> None:
    """Tells Inductor what the operators are."""
    decompose(__file__, {identity: lambda x, examples: x, multiply: lambda a, b: torch.matmul(a, b)})


def _vmap_identity(op, in_dims, x, examples):
    return op(x, examples), in_dims[0]


def _vmap_multiply(op, in_dims, a, b):
    count = next(x.shape[dim] for x, dim in zip((a, b), in_dims, strict=True) if dim is not None)
    a, b = (
        x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), in_dims, strict=True)
    )
    return op(a, b), 0


class _IdentityRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.examples = inputs

    @staticmethod
    def backward(ctx, grad):
        return grad, None  # each process may have a term of it, whose sum is taken when the optimizer needs it

    @staticmethod
    def jvp(ctx, tangent, *_):
        return identity(tangent, ctx.examples)


class _MultiplyRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        wanted = ctx.needs
        return multiply(grad, b.mT) if wanted[0] else None, multiply(a.mT, grad) if wanted[1] else None

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent):
        a, b = ctx.primals
        terms = []
        if a_tangent is not None:
            terms.append(multiply(a_tangent, b))
        if b_tangent is not None:
            terms.append(multiply(a, b_tangent))
        return sum(terms[1:], terms[0])


LIBRARY = torch.library.Library("fnn", "FRAGMENT")


def _operator(schema: str, kernel: Any, fake: Any, vmap: Any, rule: type) -> Any:
    return register(schema, cpu=kernel, cuda=kernel, fake=fake, vmap=vmap, rule=rule, library=LIBRARY)


identity = _operator(
    "whole(Tensor x, bool examples) -> Tensor",
    *(lambda x, examples: x.clone(), _fake_identity, _vmap_identity, _IdentityRule),
)
multiply = _operator(
    "product(Tensor a, Tensor b) -> Tensor", *(torch.matmul, _fake_multiply, _vmap_multiply, _MultiplyRule)
)


@functools.cache
def _tell_torch() -> None:
    """Gives DTensor the rules it lacks: of each, where results lie for where operands lie."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(identity)
    def of_identity(x: Any, examples: bool) -> list[Any]:
        wanted = (Replicate(), Shard(0)) if examples else (Replicate(),)
        return [([where], [where, None]) for where in wanted]

    @register_sharding(multiply)
    def of_multiply(a: Any, b: Any) -> list[Any]:
        return [([where], [where, where]) for where in (Replicate(), *[Shard(axis) for axis in range(a.ndim - 2)])]

    aten, known = torch.ops.aten, DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    if aten.avg_pool2d_backward.default not in known:

        @register_sharding(aten.avg_pool2d_backward.default)
        def of_mean(grad: Any, x: Any, *options: Any) -> list[Any]:
            rest = [None] * len(options)
            return [([where], [where, where, *rest]) for where in (Shard(0), Replicate())]

    if aten.var_mean.correction not in known:  # torch 2.11

        @register_sharding(aten.var_mean.correction)
        def of_moments(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> list[Any]:
            reduced = [axis % x.ndim for axis in (range(x.ndim) if dim is None else dim)]
            kept = [axis for axis in range(x.ndim) if axis not in reduced]
            after = kept if keepdim else range(len(kept))
            parted = [([Shard(new)] * 2, [Shard(old), None]) for old, new in zip(kept, after, strict=True)]
            return [([Replicate()] * 2, [Replicate(), None]), *parted]
