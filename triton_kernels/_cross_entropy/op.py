"""Cross-entropy of logits and integer labels with its derivatives; the probabilities are never stored.

The operator returns the loss of each row and two numbers more, all that the gradient needs besides the logits: the
row's maximum and the logarithm of its sum of exp(logit - maximum), together the row's normalizers. They are kept apart
because their sum would round off the logarithm where logits are large. The maximum counts as a constant: no derivative
depends on it. All are float32, float64 for float64 logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels import _choice
from triton_kernels._register import register


def key(logits: Tensor, axis: int = 1) -> tuple[str, tuple[int, int]]:
    """The row of the table and the sizes there: rows and classes."""
    classes = logits.shape[axis]
    return str(logits.dtype).removeprefix("torch."), (logits.numel() // classes if classes else 0, classes)


def choose(logits: Tensor, backend: str) -> _choice.Choice:
    """The kernel of the cross-entropy of logits (rows, classes)."""
    if logits.device.type == "cuda":
        return _choice.on_cuda("cross_entropy", *key(logits), logits.device, logits.dtype, backend)
    if _choice.interpreted(logits, backend):
        return _choice.Choice("Triton", "in its interpreter, because TRITON_INTERPRET=1")
    return _choice.Choice("PyTorch", "torch's own kernels" + (", Triton needs CUDA" if backend == "triton" else ""))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and normalizers."""
    return torch.promote_types(dtype, torch.float32)


def losses_of(logits, log_totals, labels, ignore_index, label_smoothing):
    """The loss of each row, as torch operations, given the logarithm of its sum of exponentials."""
    counted, label, wrong = _read(labels, ignore_index, logits.shape[1])
    losses = log_totals - (1 - label_smoothing) * logits.gather(1, label[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(1)
    return torch.where(wrong, torch.nan, torch.where(counted, losses, 0.0))


def probabilities(logits, normalizers):
    maximum, log_totals = normalizers.detach()[:, :1], normalizers[:, 1:]
    return ((logits.to(normalizers.dtype) - maximum) - log_totals).exp()


def gradient_reference(
    grad_losses, grad_normalizers, logits, labels, normalizers, ignore_index, label_smoothing, backend
):
    """The gradient of the logits, as torch operations."""
    counted, label, wrong = _read(labels, ignore_index, logits.shape[1])
    # a factor for wrong labels, not a value put in their place, so that higher derivatives are NaN too
    grad = grad_losses * torch.where(wrong, torch.nan, torch.where(counted, 1.0, 0.0).to(grad_losses.dtype))
    out = (grad + grad_normalizers[:, 1])[:, None] * probabilities(logits, normalizers)
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


def check_range(labels, ignore_index, classes):
    """Raises unless each label is a class or ignored."""
    wrong = _read(labels, ignore_index, classes)[2]
    if bool(wrong.any()):
        shown = labels[wrong]
        raise ValueError(
            f"cross_entropy: labels must be in [0, {classes}) for {classes} classes (or ignore_index={ignore_index}), "
            f"got labels from {int(shown.min())} to {int(shown.max())}"
        )


def kernel(logits, labels, ignore_index, label_smoothing, backend):
    if logits.device.type == "cpu":
        check_range(labels, ignore_index, logits.shape[1])
    if choose(logits, backend).triton:
        from triton_kernels._cross_entropy._launch import cross_entropy as launch

        return launch(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing)
    logits = logits.to(wide(logits.dtype))
    maximum = logits.amax(1)
    shifted = logits - maximum[:, None]
    log_totals = shifted.exp().sum(1).log()
    losses = losses_of(shifted, log_totals, labels, ignore_index, label_smoothing)
    return losses, torch.stack([maximum, log_totals], 1)


def gradient_kernel(grad_losses, grad_normalizers, logits, labels, normalizers, ignore_index, label_smoothing, backend):
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if choose(logits, backend).triton:
        from triton_kernels._cross_entropy._launch import cross_entropy_backward as launch

        return launch(grad_losses, grad_normalizers[:, 1], logits, labels, normalizers, **options)
    inputs = (grad_losses, grad_normalizers, logits, labels, normalizers)
    return gradient_reference(*inputs, **options, backend=backend).contiguous()


def empty_losses(of):
    """Losses and normalizers of as many rows as `of` has."""
    rows, dtype = of.shape[0], wide(of.dtype)
    return of.new_empty(rows, dtype=dtype), of.new_empty((rows, 2), dtype=dtype)


def _fake(logits, labels, ignore_index, label_smoothing, backend):
    return empty_losses(logits)


def _fake_gradient(grad_losses, grad_normalizers, logits, labels, normalizers, ignore_index, label_smoothing, backend):
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
    losses, normalizers = op(*rows, *options)
    return (losses.unflatten(0, (size, -1)), normalizers.unflatten(0, (size, -1))), (0, 0)


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
    def backward(ctx, grad_losses, grad_normalizers):
        logits, labels, normalizers = ctx.saved_tensors
        grads = both(grad_losses, grad_normalizers, normalizers)
        return cross_entropy_gradient(*grads, logits, labels, normalizers, *ctx.options), *[None] * 4

    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, labels = ctx.primals
        ignore_index, label_smoothing, _ = ctx.options
        _, normalizers = cross_entropy(logits, labels, *ctx.options)
        tangent = tangent.to(normalizers.dtype)
        along = (probabilities(logits, normalizers) * tangent).sum(1)
        losses = losses_of(tangent, along, labels, ignore_index, label_smoothing)
        return losses, torch.stack([torch.zeros_like(along), along], 1)


def both(grad_losses, grad_normalizers, normalizers):
    """The two gradients, with zeros for one that is None."""
    if grad_losses is None:
        grad_losses = torch.zeros_like(normalizers[:, 0])
    return grad_losses, torch.zeros_like(normalizers) if grad_normalizers is None else grad_normalizers


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
    "cross_entropy_gradient(Tensor grad_losses, Tensor grad_normalizers, Tensor logits, Tensor labels,"
    " Tensor normalizers, int ignore_index, float label_smoothing, str backend) -> Tensor",
    cpu=gradient_kernel,
    cuda=gradient_kernel,
    fake=_fake_gradient,
    vmap=_vmap_gradient,
    reference=gradient_reference,
)
