"""Losses of scores for classes, from integer labels or probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fnn import ops
from fnn.losses._reduction import Reduction, expanded, hidden, reduced
from fnn.ops._functions import fused


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    where: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy between softmax(logits) and labels, equal to `torch.nn.functional.cross_entropy`.

    :math:`-\sum_c w_c\, q_c \log \mathrm{softmax}(x)_c` for each example, where :math:`q` is one at the label, or the
    given probabilities; with `label_smoothing` :math:`s` it is :math:`(1 - s)\, q + s / C`.

    Args:
        logits: `(batch, classes)`, `(batch, classes, d1, ...)`, or `(classes,)` for one example.
        labels: integers in `[0, classes)`, of the shape of logits without the class axis; or probabilities,
            floating, of the shape of logits.
        ignore_index: examples with this label do not count.
        label_smoothing: a float in [0, 1].
        weight: `(classes,)`, the weight of each class. The mean over integer labels is then a weighted mean.
        reduction, where: as in every loss; the values have the shape of logits without the class axis.

    Where no example counts, the mean is 0 (torch: NaN).

    A label out of range never gives a number. On the CPU it raises `ValueError`; where labels cannot be read
    (compiled, under `vmap`) or reading them would wait for the device (CUDA), the loss of that example is NaN and
    so is its gradient (under `fnn.ops.use("triton")` the CPU raises there too). Raises `ValueError` too for shapes
    and options that do not fit.

    Example:
        >>> from fnn import losses
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> losses.cross_entropy(logits, torch.tensor([0, 1]))
        tensor(0.1269)
        >>> losses.cross_entropy(logits, torch.tensor([0, 2]), where=torch.tensor([True, False]))
        tensor(0.1269)

    Reference: Szegedy et al., Rethinking the Inception architecture for computer vision, 2016 (label smoothing),
    https://arxiv.org/abs/1512.00567
    """
    name = "cross_entropy"
    axis = _class_axis(name, "logits", logits, labels, weight, probabilities=True)
    if isinstance(label_smoothing, bool) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    examples = logits.shape[:axis] + logits.shape[axis + 1 :]
    counted = expanded(name, where, examples)
    if not labels.is_floating_point() and weight is None and where is None and fused(logits):
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        return ops.cross_entropy(logits, labels, **options, reduction=reduction)
    log_probs = ops.log_softmax(hidden(logits, counted, axis), axis)
    if not labels.is_floating_point():
        return _from_labels(name, log_probs, labels, axis, ignore_index, label_smoothing, weight, reduction, counted)
    probabilities = hidden(labels, counted, axis)
    if label_smoothing:
        probabilities = probabilities * (1 - label_smoothing) + label_smoothing / logits.shape[axis]
    return reduced(name, -_weighted(log_probs * probabilities, weight, axis).sum(axis), reduction, counted)


def nll(
    log_probs: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    where: Tensor | None = None,
) -> Tensor:
    r"""Negative log-likelihood of integer labels, :math:`-w_y \log p_y`, equal to `torch.nn.functional.nll_loss`.

    log_probs: log-probabilities, `(batch, classes)`, `(batch, classes, d1, ...)` or `(classes,)`. The rest, labels
    out of range included, is as in `cross_entropy`, which is this after a log-softmax.

    Example:
        >>> from fnn import losses
        >>> losses.nll(torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log(), torch.tensor([0, 1]), reduction="none")
        tensor([0.1054, 0.2231])
    """
    axis = _class_axis("nll", "log_probs", log_probs, labels, weight, probabilities=False)
    counted = expanded("nll", where, labels.shape)
    log_probs = hidden(log_probs, counted, axis)
    return _from_labels("nll", log_probs, labels, axis, ignore_index, 0.0, weight, reduction, counted)


def _from_labels(
    name: str,
    log_probs: Tensor,
    labels: Tensor,
    axis: int,
    ignore_index: int,
    label_smoothing: float,
    weight: Tensor | None,
    reduction: str,
    counted: Tensor | None,
) -> Tensor:
    """The reduced loss of integer labels; `counted` says which examples `where` leaves in."""
    labels = labels.long()  # unsigned labels would wrap a negative ignore_index
    classes = log_probs.shape[axis]
    counted = labels != ignore_index if counted is None else counted & (labels != ignore_index)
    wrong = counted & ((labels < 0) | (labels >= classes))
    if _readable(wrong) and bool(wrong.any()):
        shown = torch.where(counted, labels, labels[counted][0])
        raise ValueError(
            f"{name}: labels must be in [0, {classes}) for {classes} classes (or ignore_index={ignore_index}), "
            f"got labels from {int(shown.min())} to {int(shown.max())}"
        )
    safe = torch.where(counted & ~wrong, labels, 0)
    losses = F.nll_loss(log_probs, safe, reduction="none")
    shares = None if weight is None else weight.to(losses.dtype)[safe]
    if shares is not None:
        losses = losses * shares
    if label_smoothing:
        spread = -_weighted(log_probs, weight, axis).sum(axis) / classes
        losses = (1 - label_smoothing) * losses + label_smoothing * spread
    # a factor, not a value put in its place, so that the gradient is NaN too
    losses = losses * torch.where(wrong, float("nan"), torch.ones_like(losses))
    return reduced(name, losses, reduction, counted, shares)


def _readable(flags: Tensor) -> bool:
    """Whether Python may look at values here: of a plain CPU tensor in eager mode, at most inside of `torch.func.grad`.

    Elsewhere there are none (tracing, fake and meta tensors), or one for each example of a `vmap`, or looking
    would wait for the device. All that depends on how torch marks such tensors is in this function.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    plain = torch.func.debug_unwrap(flags)  # what grad, jvp and vmap wrap; only vmap hides a dimension
    return plain.ndim == flags.ndim and plain.device.type == "cpu"


def _weighted(x: Tensor, weight: Tensor | None, axis: int) -> Tensor:
    """`x` times the weight of each class along `axis`."""
    return x if weight is None else x * weight.to(x.dtype).reshape((-1,) + (1,) * (x.ndim - axis - 1))


def _class_axis(
    name: str, what: str, scores: Tensor, labels: Tensor, weight: Tensor | None, probabilities: bool
) -> int:
    """Where the classes are in `scores`. Raises unless labels and weight fit them."""
    for argument, tensor in ((what, scores), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}")
    if scores.ndim == 0 or not scores.is_floating_point():
        raise ValueError(
            f"{name}: {what} must be floating of shape (batch, classes, ...) or (classes,), "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    axis = min(1, scores.ndim - 1)
    shape, classes = tuple(scores.shape), scores.shape[axis]
    one_label_each = shape[:axis] + shape[axis + 1 :]
    got = f"got {labels.dtype} of shape {tuple(labels.shape)}"
    if labels.is_floating_point() and probabilities:
        if labels.shape != shape:
            raise ValueError(
                f"{name}: floating labels are class probabilities and must have the shape {shape} of {what}, {got}; "
                "for class numbers use labels.long()"
            )
    elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: labels must be integers, {got}")
    elif labels.shape != one_label_each:
        hint = "; for probabilities use labels.float()" if probabilities and labels.shape == shape else ""
        raise ValueError(
            f"{name}: integer labels must have shape {one_label_each} for {what} of shape {shape}, {got}{hint}"
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"{name}: weight must have shape ({classes},), got {tuple(weight.shape)}")
    return axis
