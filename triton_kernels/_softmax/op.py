"""Softmax and log-softmax with their derivatives: one operator for the function, one for its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import _choice
from triton_kernels._register import register


def key(x: Tensor, dim: int) -> tuple[str, tuple[int, int]]:
    """The row of the table and the sizes there: rows and columns."""
    columns = x.shape[dim] if x.dim() else 1
    inner = "last" if x.dim() == 0 or x.stride(dim) == 1 else "strided"
    return f"{str(x.dtype).removeprefix('torch.')} {inner}", (x.numel() // columns if columns else 0, columns)


def choose(x: Tensor, dim: int, backend: str) -> _choice.Choice:
    """The kernel of a softmax along `dim`."""
    if x.device.type == "cuda":
        return _choice.on_cuda("softmax", *key(x, dim), x.device, x.dtype, backend)
    if _choice.interpreted(x, backend):
        return _choice.Choice("Triton", "in its interpreter, because TRITON_INTERPRET=1")
    return _choice.Choice("PyTorch", "torch's own kernel" + (", Triton needs CUDA" if backend == "triton" else ""))


def _kernel(x, dim, log, backend):
    if choose(x, dim, backend).triton:
        from triton_kernels._softmax._launch import softmax as launch

        return launch(x, dim, log=log)
    return (torch.log_softmax(x, dim) if log else torch.softmax(x, dim)).contiguous()


def _backward_kernel(grad, output, dim, log, backend):
    if choose(output, dim, backend).triton:
        from triton_kernels._softmax._launch import softmax_backward as launch

        return launch(grad, output, dim, log=log)
    gradient = torch.ops.aten._log_softmax_backward_data if log else torch.ops.aten._softmax_backward_data
    return gradient(grad, output, dim, output.dtype).contiguous()


def _gradient(grad, output, dim, log, backend):
    """The gradient of the input, as torch operations."""
    if log:
        return grad - output.exp() * grad.sum(dim, keepdim=True)
    return output * (grad - (output * grad).sum(dim, keepdim=True))


def _fake(x, dim, log, backend):
    return x.new_empty(x.shape)


def _fake_gradient(grad, output, dim, log, backend):
    return output.new_empty(output.shape)


def _vmap(op, in_dims, x, dim, log, backend):
    x = x.movedim(in_dims[0], 0)
    if x.dim() == 1:  # each example is a scalar
        return op(x.unsqueeze(1), 1, log, backend).squeeze(1), 0
    return op(x, dim % (x.dim() - 1) + 1, log, backend), 0


def _vmap_gradient(op, in_dims, grad, output, dim, log, backend):
    size = next(x.shape[d] for x, d in zip((grad, output), in_dims, strict=False) if d is not None)
    grad, output = (
        x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip((grad, output), in_dims, strict=False)
    )
    if output.dim() == 1:
        return op(grad.unsqueeze(1), output.unsqueeze(1), 1, log, backend).squeeze(1), 0
    return op(grad, output, dim % (output.dim() - 1) + 1, log, backend), 0


class SoftmaxRule:
    """With y = softmax(x) and a tangent t, both directions are y (t - sum(y t)); log-softmax's is t - sum(exp(y) t)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        (output,) = ctx.saved_tensors
        return softmax_gradient(grad, output, *ctx.options), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (x,) = ctx.primals
        dim, log, backend = ctx.options
        output = softmax(x, dim, log, backend)  # anew: the saved one knows nothing of the outer levels' tangents
        if log:
            return tangent - (output.exp() * tangent).sum(dim, keepdim=True)
        return softmax_gradient(tangent, output, *ctx.options)


softmax = register(
    "softmax(Tensor x, int dim, bool log, str backend) -> Tensor",
    cpu=_kernel,
    cuda=_kernel,
    fake=_fake,
    vmap=_vmap,
    rule=SoftmaxRule,
)
softmax_gradient = register(
    "softmax_gradient(Tensor grad, Tensor output, int dim, bool log, str backend) -> Tensor",
    cpu=_backward_kernel,
    cuda=_backward_kernel,
    fake=_fake_gradient,
    vmap=_vmap_gradient,
    reference=_gradient,
)
