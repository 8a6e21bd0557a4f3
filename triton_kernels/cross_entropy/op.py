"""Cross-entropy of logits and integer labels with its derivatives; the probabilities are never stored.

The operator returns the loss of each row and the row's log-normalizer (the logarithm of the sum of the exponentials),
which is all that the gradient needs besides the logits. Both are float32, float64 for float64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import _choice, _launch
from triton_kernels._register import register


def choose(logits: Tensor, backend: str) -> _choice.Choice:
    """The kernel of the cross-entropy of logits (rows, classes)."""
    if logits.device.type == "cuda":
        kind = str(logits.dtype).removeprefix("torch.")
        sizes = (logits.shape[0], logits.shape[1])
        return _choice.on_cuda("cross_entropy", kind, sizes, logits.device, logits.dtype, backend)
    if backend == "triton" and _launch.INTERPRETED and logits.dtype != torch.float64:
        return _choice.Choice("Triton", "in its interpreter, because TRITON_INTERPRET=1")
    return _choice.Choice("PyTorch", "torch's own kernels" + (", Triton needs CUDA" if backend == "triton" else ""))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and log-normalizers."""
    return torch.promote_types(dtype, torch.float32)


def losses_of(logits, log_normalizers, labels, ignore_index, label_smoothing):
    """The loss of each row, as torch operations, given the log-normalizers."""
    counted, label, wrong = _read(labels, ignore_index, logits.shape[1])
    logits = logits.to(log_normalizers.dtype)
    losses = log_normalizers - (1 - label_smoothing) * logits.gather(1, label[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(1)
    return torch.where(wrong, torch.nan, torch.where(counted, losses, 0.0))


def gradient_reference(
    grad_losses, grad_log_normalizers, logits, labels, log_normalizers, ignore_index, label_smoothing, backend
):
    """The gradient of the logits, as torch operations."""
    counted, label, wrong = _read(labels, ignore_index, logits.shape[1])
    # a factor for wrong labels, not a value put in their place, so that higher derivatives are NaN too
    grad = grad_losses * torch.where(wrong, torch.nan, torch.where(counted, 1.0, 0.0).to(grad_losses.dtype))
    p = (logits.to(log_normalizers.dtype) - log_normalizers[:, None]).exp()
    out = (grad + grad_log_normalizers)[:, None] * p
    target = (torch.arange(logits.shape[1], device=logits.device) == label[:, None]).to(grad.dtype)
    out = out - (1 - label_smoothing) * target * grad[:, None]
    if label_smoothing:
        out = out - label_smoothing / logits.shape[1] * grad[:, None]
    return out.to(logits.dtype)


def _read(labels, ignore_index, classes):
    """Which rows count, a label that may be indexed with, and which labels are wrong."""
    labels = labels.long()
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= classes))
    return counted, torch.where(counted & ~wrong, labels, 0), wrong


def _check_labels(labels, ignore_index, classes):
    wrong = _read(labels, ignore_index, classes)[2]
    if bool(wrong.any()):
        shown = labels[wrong]
        raise ValueError(
            f"cross_entropy: labels must be in [0, {classes}) for {classes} classes (or ignore_index={ignore_index}), "
            f"got labels from {int(shown.min())} to {int(shown.max())}"
        )


def kernel(logits, labels, ignore_index, label_smoothing, backend):
    if logits.device.type == "cpu":
        _check_labels(labels, ignore_index, logits.shape[1])
    if choose(logits, backend).triton:
        from triton_kernels.cross_entropy._launch import cross_entropy as launch

        return launch(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing)
    log_normalizers = logits.to(wide(logits.dtype)).logsumexp(1)
    return losses_of(logits, log_normalizers, labels, ignore_index, label_smoothing), log_normalizers


def gradient_kernel(
    grad_losses, grad_log_normalizers, logits, labels, log_normalizers, ignore_index, label_smoothing, backend
):
    inputs = (grad_losses, grad_log_normalizers, logits, labels, log_normalizers)
    if choose(logits, backend).triton:
        from triton_kernels.cross_entropy._launch import cross_entropy_backward as launch

        return launch(*inputs, ignore_index=ignore_index, label_smoothing=label_smoothing)
    return gradient_reference(*inputs, ignore_index, label_smoothing, backend)


def _fake(logits, labels, ignore_index, label_smoothing, backend):
    rows = logits.new_empty(logits.shape[:1], dtype=wide(logits.dtype))
    return rows, torch.empty_like(rows)


def _fake_gradient(
    grad_losses, grad_log_normalizers, logits, labels, log_normalizers, ignore_index, label_smoothing, backend
):
    return logits.new_empty(logits.shape)


def rows_join(in_dims, *inputs):
    """The batch of a `vmap` joined to the rows of each input (rows, ...), and its size."""
    size = next(x.shape[d] for x, d in zip(inputs, in_dims, strict=False) if d is not None)
    joined = [
        (x.expand(size, *x.shape) if d is None else x.movedim(d, 0)).flatten(0, 1)
        for x, d in zip(inputs, in_dims, strict=False)
    ]
    return size, joined


def vmap_rule(op, in_dims, logits, labels, *options):
    size, rows = rows_join(in_dims, logits, labels)
    losses, log_normalizers = op(*rows, *options)
    return (losses.unflatten(0, (size, -1)), log_normalizers.unflatten(0, (size, -1))), (0, 0)


def _vmap_gradient(op, in_dims, *inputs):
    size, rows = rows_join(in_dims, *inputs[:5])
    return op(*rows, *inputs[5:]).unflatten(0, (size, -1)), 0


class CrossEntropyRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, *ctx.options = inputs
        ctx.save_for_backward(logits, labels, output[1])
        ctx.save_for_forward(logits, labels)

    @staticmethod
    def backward(ctx, grad_losses, grad_log_normalizers):
        logits, labels, log_normalizers = ctx.saved_tensors
        zero = torch.zeros_like(log_normalizers)
        grads = [zero if grad is None else grad for grad in (grad_losses, grad_log_normalizers)]
        return cross_entropy_gradient(*grads, logits, labels, log_normalizers, *ctx.options), *[None] * 4

    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, labels = ctx.primals
        ignore_index, label_smoothing, _ = ctx.options
        _, log_normalizers = cross_entropy(logits, labels, *ctx.options)
        tangent = tangent.to(log_normalizers.dtype)
        p = (logits.to(log_normalizers.dtype) - log_normalizers[:, None]).exp()
        along = (p * tangent).sum(1)
        return losses_of(tangent, along, labels, ignore_index, label_smoothing), along


cross_entropy = register(
    "cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, str backend)"
    " -> (Tensor, Tensor)",
    cpu=kernel,
    cuda=kernel,
    fake=_fake,
    vmap=vmap_rule,
    rule=CrossEntropyRule,
)
cross_entropy_gradient = register(
    "cross_entropy_gradient(Tensor grad_losses, Tensor grad_log_normalizers, Tensor logits, Tensor labels,"
    " Tensor log_normalizers, int ignore_index, float label_smoothing, str backend) -> Tensor",
    cpu=gradient_kernel,
    cuda=gradient_kernel,
    fake=_fake_gradient,
    vmap=_vmap_gradient,
    reference=gradient_reference,
)
