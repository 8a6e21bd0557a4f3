"""The product with its derivatives: `product` is the one operator behind `matmul` and `linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from triton_kernels._inductor import tracing
from triton_kernels._matmul import cpu, inductor
from triton_kernels._matmul.choice import choose, resolved
from triton_kernels._register import register


def kernel(a, b, bias, precision, out_dtype, backend) -> Any:
    """What `choose` says, on either device."""
    choice = choose(a, b, precision, out_dtype, backend)
    if choice.triton:
        from triton_kernels._matmul._configs import Config
        from triton_kernels._matmul._launch import product as launch

        config = Config(**choice.config) if choice.config else None
        return launch(a, b, bias, precision=resolved(precision), out_dtype=out_dtype, config=config)
    if out_dtype not in (None, a.dtype):
        wide = torch.promote_types(a.dtype, out_dtype)
        bias = None if bias is None else bias.to(wide)
        return kernel(a.to(wide), b.to(wide), bias, precision, None, backend).to(out_dtype)
    return by_library(choice, a, b, bias)


def by_library(choice, a, b, bias):
    """a b + bias, contiguous, by the library that was chosen."""
    if choice.kernel == "oneDNN":
        return cpu.onednn(a, b, bias)
    if b.dim() == 2:
        rows = a.flatten(0, -2)
        out = torch.mm(rows, b) if bias is None else torch.addmm(bias, rows, b)
        return out.reshape(*a.shape[:-1], b.shape[1])
    out = torch.matmul(a, b).contiguous()
    return out if bias is None else out.add_(bias)


def _fake(a, b, bias, precision, out_dtype, backend):
    if tracing():
        inductor.install(product)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def vmap_rule(op, in_dims, a, b, bias, *options):
    a_dim, b_dim, bias_dim = in_dims[:3]
    if bias_dim is not None:
        if a_dim is None and b_dim is None:
            out = op(a, b, None, *options).unsqueeze(0)
        else:
            out, dim = vmap_rule(op, (a_dim, b_dim, None), a, b, None, *options)
            out = out.movedim(dim, 0)
        bias = bias.movedim(bias_dim, 0)
        return out + bias.reshape(bias.shape[0], *[1] * (out.dim() - 2), bias.shape[1]).to(out.dtype), 0
    if b_dim is None:  # the batch joins the rows
        a = a.movedim(a_dim, 0)
        return op(a if b.dim() == 2 else _with_dims(a, b.dim() + 1), b, bias, *options), 0
    b = b.movedim(b_dim, 0)
    if a_dim is None and b.dim() == 3 and bias is None:  # the batch joins the columns: one product, not many
        size, k, n = b.shape
        out = op(a, b.mT.reshape(size * n, k).mT, None, *options)  # no copy where b is a transposed weight
        return out.unflatten(-1, (size, n)), out.dim() - 1
    if a_dim is None:
        return op(a, _with_dims(b, a.dim() + 1), bias, *options), 0
    a = a.movedim(a_dim, 0)
    return op(_with_dims(a, b.dim()), _with_dims(b, a.dim()), bias, *options), 0


def _with_dims(x: Tensor, dims: int) -> Tensor:
    """`x` with axes of size 1 after its first, to have at least `dims` of them."""
    return x.reshape(x.shape[0], *[1] * (dims - x.dim()), *x.shape[1:])


class ProductRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, ctx.precision, ctx.out_dtype, ctx.backend = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return *gradients(a, b, grad, ctx.needs, ctx.precision, ctx.backend), None, None, None

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent, bias_tangent, *_):
        a, b = ctx.primals
        options = (ctx.precision, ctx.out_dtype, ctx.backend)
        out = None
        if b_tangent is not None:
            out = product(a, b_tangent, bias_tangent, *options)
        elif bias_tangent is not None:
            shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
            out = bias_tangent.to(ctx.out_dtype or a.dtype).expand(*shape, a.shape[-2], b.shape[-1]).clone()
        if a_tangent is not None:
            first = product(a_tangent, b, None, *options)
            out = first if out is None else first + out
        return out


def gradients(a, b, grad, needs, precision, backend):
    """Of a, b and bias, where `needs` says so, from the gradient of a b + bias."""
    grad_a = grad_b = grad_bias = None
    if needs[2]:
        grad_bias = _rows(grad).sum(0).to(a.dtype)
    wide = torch.promote_types(grad.dtype, a.dtype)  # of a float32 result, a half-precision gradient might overflow
    dtype, a, b, grad = a.dtype, a.to(wide), b.to(wide), grad.to(wide)
    if needs[0]:
        grad_a = product(grad, b.mT, None, precision, None, backend).sum_to_size(a.shape).to(dtype)
    if needs[1]:
        if b.dim() == 2:  # one product over all rows
            a, grad = _rows(a), _rows(grad)
        if b.stride(-2) == 1:  # a transposed weight, whose gradient is best laid out as the weight is
            grad_b = product(grad.mT, a, None, precision, None, backend).mT
        else:
            grad_b = product(a.mT, grad, None, precision, None, backend)
        grad_b = grad_b.sum_to_size(b.shape).to(dtype)
    return grad_a, grad_b, grad_bias


def _rows(x: Tensor) -> Tensor:
    """x (..., m, k) as (rows, k), where k may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


SCHEMA = "product(Tensor a, Tensor b, Tensor? bias, str precision, ScalarType? out_dtype, str backend) -> Tensor"
product = register(SCHEMA, cpu=kernel, cuda=kernel, fake=_fake, vmap=vmap_rule, rule=ProductRule)
