"""A product whose activation is applied before it is written: `activated`, and `activated_pair` for training.

Where nothing is differentiated only the activated values are written. Where a gradient will be asked for, the same
kernel writes the values before the activation too, since the activation's derivative is taken there; so training
reads them once less than an activation of its own would. In forward mode both are their reference, a product
followed by an activation, because there every term is a product of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from triton_kernels._activation import activate
from triton_kernels._matmul import op as plain
from triton_kernels._matmul.choice import choose, resolved
from triton_kernels._matmul.op import product
from triton_kernels._register import register


def _pair_reference(a, b, bias, activation, precision, backend):
    before = product(a, b, bias, precision, None, backend)
    return activate(before, activation), before


def _reference(a, b, bias, activation, precision, backend):
    return _pair_reference(a, b, bias, activation, precision, backend)[0]


def _kernel(a, b, bias, activation, precision, backend, pair=False) -> Any:
    choice = choose(a, b, precision, None, backend, activated=True)
    if choice.triton:
        from triton_kernels._matmul._configs import Config
        from triton_kernels._matmul._launch import product as launch

        config = Config(**choice.config) if choice.config else None
        options = {"activation": activation, "preactivation": pair, "precision": resolved(precision)}
        return launch(a, b, bias, **options, config=config)
    before = plain.by_library(choice, a, b, bias)
    out = activate(before, activation)
    return (out, before) if pair else out


_pair_kernel = functools.partial(_kernel, pair=True)


def _shape(a, b):
    return (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def _fake(a, b, bias, activation, precision, backend):
    return a.new_empty(_shape(a, b))


def _fake_pair(a, b, bias, activation, precision, backend):
    return a.new_empty(_shape(a, b)), a.new_empty(_shape(a, b))


def _vmap_pair(op, in_dims, a, b, bias, activation, precision, backend):
    if _rows_join(in_dims, b):
        return op(a.movedim(in_dims[0], 0), b, bias, activation, precision, backend), (0, 0)
    before, dim = plain.vmap_rule(product, in_dims, a, b, bias, precision, None, backend)
    return (activate(before, activation), before), (dim, dim)


def _vmap(op, in_dims, a, b, bias, *options):
    if _rows_join(in_dims, b):
        return op(a.movedim(in_dims[0], 0), b, bias, *options), 0
    (out, _), (dim, _) = _vmap_pair(None, in_dims, a, b, bias, *options)
    return out, dim


def _rows_join(in_dims, b):
    """Whether a batch of `a` alone joins the rows, so that one fused product does."""
    return in_dims[1] is None and in_dims[2] is None and b.dim() == 2


class PairRule:
    """Gradients of (activation(p), p) for p = a b + bias."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, ctx.activation, ctx.precision, ctx.backend = inputs
        ctx.save_for_backward(a, b, output[1])

    @staticmethod
    def backward(ctx, grad, grad_before):
        a, b, before = ctx.saved_tensors
        if grad is not None:
            pullback: Any = torch.func.vjp(lambda p: activate(p, ctx.activation), before)[1]
            (inner,) = pullback(grad)
            grad_before = inner if grad_before is None else grad_before + inner
        return *plain.gradients(a, b, grad_before, ctx.needs, ctx.precision, ctx.backend), None, None, None


INPUTS = "(Tensor a, Tensor b, Tensor? bias, str activation, str precision, str backend)"
activated_pair = register(
    f"activated_pair{INPUTS} -> (Tensor, Tensor)",
    cpu=_pair_kernel,
    cuda=_pair_kernel,
    fake=_fake_pair,
    vmap=_vmap_pair,
    rule=PairRule,
    reference=_pair_reference,
)
activated = register(
    f"activated{INPUTS} -> Tensor",
    cpu=_kernel,
    cuda=_kernel,
    fake=_fake,
    vmap=_vmap,
    differentiated=lambda *inputs: activated_pair(*inputs)[0],
)
