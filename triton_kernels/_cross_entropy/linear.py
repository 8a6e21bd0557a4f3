"""Cross-entropy of a linear layer's outputs, without the (rows, classes) logits in memory.

The logits of some rows at a time are computed, used and dropped; the gradient computes them again. That is a fourth
product on top of the three that the plain composition takes, for memory that does not grow with rows x classes.
Derivatives beyond the first, and forward mode, go through the plain composition, which holds all logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels._cross_entropy.op import (
    both,
    cross_entropy,
    empty_losses,
    gradient_kernel,
    gradient_reference,
    kernel,
    rows_join,
    vmap_rule,
    wide,
)
from triton_kernels._matmul import op as matmul
from triton_kernels._matmul.op import product
from triton_kernels._register import register

CHUNK_BYTES = 2**26  # of logits in memory at a time; each chunk has at least CHUNK_ROWS rows
CHUNK_ROWS = 128


def chunk_rows(classes: int, dtype: torch.dtype) -> int:
    return max(CHUNK_ROWS, CHUNK_BYTES // max(classes * dtype.itemsize, 1))


def _chunks(x: Tensor, weight: Tensor):
    rows = chunk_rows(weight.shape[0], x.dtype)
    for start in range(0, x.shape[0], rows):
        yield slice(start, min(start + rows, x.shape[0]))


def _logits(x, weight, bias, precision, backend):
    return matmul.kernel(x, weight.mT, bias, precision, None, backend)


def _forward(x, weight, bias, labels, ignore_index, label_smoothing, precision, backend):
    losses, normalizers = empty_losses(x)
    for rows in _chunks(x, weight):
        logits = _logits(x[rows], weight, bias, precision, backend)
        losses[rows], normalizers[rows] = kernel(logits, labels[rows], ignore_index, label_smoothing, backend)
    return losses, normalizers


def _gradients(
    grad_losses, grad_normalizers, x, weight, bias, labels, normalizers,
    needs, ignore_index, label_smoothing, precision, backend,
):  # fmt: skip
    """The gradients of x, weight and bias where `needs` says so; the others are empty."""
    sums = wide(x.dtype)  # over chunks: in the operands' dtype each addition would round
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    grad_weight = weight.new_zeros(weight.shape if needs[1] else 0, dtype=sums)
    grad_bias = x.new_zeros(weight.shape[0] if needs[2] else 0, dtype=sums)
    for rows in _chunks(x, weight):
        logits = _logits(x[rows], weight, bias, precision, backend)
        grad = gradient_kernel(
            grad_losses[rows], grad_normalizers[rows], logits, labels[rows], normalizers[rows],
            ignore_index, label_smoothing, backend,
        )  # fmt: skip
        del logits
        if needs[0]:
            grad_x[rows] = matmul.kernel(grad, weight, None, precision, None, backend)
        if needs[1]:
            grad_weight += matmul.kernel(grad.mT, x[rows], None, precision, sums, backend)
        if needs[2]:
            grad_bias += grad.sum(0, dtype=sums)
    return grad_x, grad_weight.to(x.dtype), grad_bias.to(x.dtype)


def _reference(x, weight, bias, labels, ignore_index, label_smoothing, precision, backend):
    logits = product(x, weight.mT, bias, precision, None, backend)
    return cross_entropy(logits, labels, ignore_index, label_smoothing, backend)


def _gradients_reference(
    grad_losses, grad_normalizers, x, weight, bias, labels, normalizers,
    needs, ignore_index, label_smoothing, precision, backend,
):  # fmt: skip
    """The same as differentiable operations. All may have one batch dimension in front, x and weight of size 1."""
    logits = product(x, weight.mT, None, precision, None, backend)
    if bias is not None:
        logits = logits + bias.unsqueeze(-2)
    rows = (grad_losses, grad_normalizers, logits, labels, normalizers)
    joined: Any = [value.flatten(0, x.dim() - 2) for value in rows]
    grad = gradient_reference(
        *joined, ignore_index=ignore_index, label_smoothing=label_smoothing, backend=backend
    ).reshape(logits.shape)
    grad_x = product(grad, weight, None, precision, None, backend) if needs[0] else x.new_zeros(0)
    grad_weight = product(grad.mT, x, None, precision, None, backend) if needs[1] else x.new_zeros(0)
    return grad_x, grad_weight, grad.sum(-2) if needs[2] else x.new_zeros(0)


def _fake(x, weight, bias, labels, *options):
    return empty_losses(x)


def _fake_gradients(grad_losses, grad_normalizers, x, weight, bias, labels, normalizers, needs, *options):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _vmap(op, in_dims, x, weight, bias, labels, ignore_index, label_smoothing, precision, backend):
    x_dim, weight_dim, bias_dim, labels_dim = in_dims[:4]
    options = (ignore_index, label_smoothing)
    if weight_dim is None and bias_dim is None:  # the batch joins the rows
        size, (x, labels) = rows_join((x_dim, labels_dim), x, labels)
        losses, normalizers = op(x, weight, bias, labels, *options, precision, backend)
        return (losses.unflatten(0, (size, -1)), normalizers.unflatten(0, (size, -1))), (0, 0)
    if weight_dim is not None:
        weight, weight_dim = weight.movedim(weight_dim, 0), 0
    dims = (x_dim, weight_dim, bias_dim)
    logits, dim = matmul.vmap_rule(product, dims, x, weight.mT, bias, precision, None, backend)
    return vmap_rule(cross_entropy, (dim, labels_dim), logits, labels, *options, backend)


def _vmap_gradients(op, in_dims, *inputs):
    needs, options = inputs[7], inputs[8:]
    if in_dims[3] is None and in_dims[4] is None and not needs[1] and not needs[2]:  # the batch joins the rows
        rows = (0, 1, 2, 5, 6)
        size, joined = rows_join([in_dims[i] for i in rows], *(inputs[i] for i in rows))
        found = op(*joined[:3], inputs[3], inputs[4], *joined[3:], needs, *options)
        return (found[0].unflatten(0, (size, -1)), *found[1:]), (0, None, None)
    size = next(x.shape[dim] for x, dim in zip(inputs, in_dims, strict=False) if dim is not None)
    reference: Any = _gradients_reference
    batched = [
        None if x is None else x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)
        for x, dim in zip(inputs[:7], in_dims, strict=False)
    ]
    found = reference(*batched, needs, *options)
    return found, tuple(0 if need else None for need in needs)


class LinearCrossEntropyRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.precision, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad_losses, grad_normalizers):
        x, weight, bias, labels, normalizers = ctx.saved_tensors
        grads = both(grad_losses, grad_normalizers, normalizers)
        options = (ctx.ignore_index, ctx.label_smoothing, ctx.precision, ctx.backend)
        needs = list(ctx.needs[:3])
        found = linear_cross_entropy_gradients(*grads, x, weight, bias, labels, normalizers, needs, *options)
        wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return *wanted, *[None] * 5


linear_cross_entropy = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore_index,"
    " float label_smoothing, str precision, str backend) -> (Tensor, Tensor)",
    cpu=_forward,
    cuda=_forward,
    fake=_fake,
    vmap=_vmap,
    rule=LinearCrossEntropyRule,
    reference=_reference,
)
linear_cross_entropy_gradients = register(
    "linear_cross_entropy_gradients(Tensor grad_losses, Tensor grad_normalizers, Tensor x, Tensor weight,"
    " Tensor? bias, Tensor labels, Tensor normalizers, bool[] needs, int ignore_index, float label_smoothing,"
    " str precision, str backend) -> (Tensor, Tensor, Tensor)",
    cpu=_gradients,
    cuda=_gradients,
    fake=_fake_gradients,
    vmap=_vmap_gradients,
    reference=_gradients_reference,
)
