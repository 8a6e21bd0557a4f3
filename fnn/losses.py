"""Loss functions: differentiable in every mode and order, under `vmap`, compiled or not.

Every loss takes `reduction` and `where`.

`reduction`: ``"mean"`` over all values (the default), ``"sum"``, or ``"none"`` for the values themselves.

`where`: a bool tensor of the shape of the values or of their leading dimensions, ``(batch,)`` for whole
examples. What it leaves out does not count: not in the sum, not in what a mean divides by, and its gradient is
zero whatever it holds, NaN included. So the padded rows of a last batch leave no trace. With nothing left the mean
is 0, with zero gradients.

Shapes must agree exactly; nothing is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fnn import tree
from fnn.tree import Tree, Where

Reduction = Literal["mean", "sum", "none"]


def mse(predictions: Tensor, targets: Tensor, *, reduction: Reduction = "mean", where: Tensor | None = None) -> Tensor:
    r"""Squared error, :math:`(p - t)^2`, of each element.

    predictions, targets: tensors of one shape. Raises `ValueError` where they differ.

    Example:
        >>> from fnn import losses
        >>> losses.mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)
    """
    return _elementwise(
        "mse", lambda p, t: (p - t).square(), reduction, where, predictions=predictions, targets=targets
    )


def mae(predictions: Tensor, targets: Tensor, *, reduction: Reduction = "mean", where: Tensor | None = None) -> Tensor:
    r"""Absolute error, :math:`|p - t|`, of each element. Its derivative at 0 is taken as 0.

    predictions, targets: tensors of one shape. Raises `ValueError` where they differ.

    Example:
        >>> from fnn import losses
        >>> losses.mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.)
    """
    return _elementwise("mae", lambda p, t: (p - t).abs(), reduction, where, predictions=predictions, targets=targets)


def huber(
    predictions: Tensor,
    targets: Tensor,
    delta: float = 1.0,
    *,
    reduction: Reduction = "mean",
    where: Tensor | None = None,
) -> Tensor:
    r"""Quadratic for small errors, linear for large ones, of each element.

    With :math:`e=p-t`: :math:`\tfrac12 e^2` for :math:`|e| \le \delta`, else :math:`\delta (|e| - \tfrac12 \delta)`.

    predictions, targets: tensors of one shape. Raises `ValueError` where they differ, and unless delta > 0.

    Example:
        >>> from fnn import losses
        >>> losses.huber(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0]), reduction="none")
        tensor([0.5000, 2.5000])

    Reference: Huber, Robust estimation of a location parameter, 1964.
    """
    if not delta > 0:
        raise ValueError(f"huber: delta must be > 0, got {delta!r}")

    def values(p: Tensor, t: Tensor) -> Tensor:
        error = p - t
        near = error.clamp(-delta, delta)
        return near * (error - 0.5 * near)  # without |error|, whose second derivative at 0 would be lost

    return _elementwise("huber", values, reduction, where, predictions=predictions, targets=targets)


def binary_cross_entropy_with_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    pos_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    where: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of each element, from logits, without overflow.

    :math:`-w\,t \log\sigma(x) - (1 - t) \log(1 - \sigma(x))` with :math:`w` the `pos_weight`, 1 by default.

    logits, targets: tensors of one shape, targets in [0, 1] (bools and integers are fine). pos_weight: broadcasts
    to that shape, for example `(classes,)`. Raises `ValueError` where shapes do not fit.

    Example:
        >>> from fnn import losses
        >>> losses.binary_cross_entropy_with_logits(torch.tensor([0.0, 2.0]), torch.tensor([1, 0]), reduction="none")
        tensor([0.6931, 2.1269])
    """
    name = "binary_cross_entropy_with_logits"
    if pos_weight is not None and not _broadcasts(pos_weight.shape, logits.shape):
        raise ValueError(
            f"{name}: pos_weight must broadcast to the shape {tuple(logits.shape)} of logits, "
            f"got shape {tuple(pos_weight.shape)}"
        )

    def values(x: Tensor, t: Tensor) -> Tensor:
        t = t if t.is_floating_point() else t.to(x.dtype)
        weight = 1 if pos_weight is None else 1 + (pos_weight - 1) * t
        return (1 - t) * x - weight * F.logsigmoid(x)

    return _elementwise(name, values, reduction, where, logits=logits, targets=targets)


def kl_div(
    log_predictions: Tensor,
    targets: Tensor,
    *,
    log_target: bool = False,
    reduction: Reduction | Literal["batchmean"] = "mean",
    where: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence, :math:`t (\log t - \log p)` of each element, as `torch.nn.functional.kl_div`.

    The divergence of two distributions is the sum of these values over the classes. As in torch, ``"mean"``
    divides by the number of elements; ``"batchmean"`` divides the sum by the number of examples (rows of the first
    dimension with any element in `where`), which is the mean divergence of `(batch, classes)` tensors.

    log_predictions, targets: tensors of one shape; `log_target`: targets are log-probabilities too. Raises
    `ValueError` where the shapes differ.

    Example:
        >>> from fnn import losses
        >>> p, t = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> losses.kl_div(p.log(), t, reduction="batchmean")
        tensor(0.6931)
    """
    _check_reduction("kl_div", reduction, (*_REDUCTIONS, "batchmean"))

    def values(p: Tensor, t: Tensor) -> Tensor:
        return t.exp() * (t - p) if log_target else torch.xlogy(t, t) - t * p

    pair = {"log_predictions": log_predictions, "targets": targets}
    if reduction != "batchmean":
        return _elementwise("kl_div", values, reduction, where, **pair)
    total = _elementwise("kl_div", values, "sum", where, **pair)
    if log_predictions.ndim == 0:
        raise ValueError('kl_div: reduction="batchmean" needs a batch dimension, got 0-d tensors')
    if where is None:
        _check_not_empty("kl_div", log_predictions.shape)
        return total / log_predictions.shape[0]
    examples = where if where.ndim == 1 else where.flatten(1).any(1)
    return total / examples.sum().clamp(min=1)


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
    so is its gradient. Raises `ValueError` too for shapes and options that do not fit.

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
    counted = _expanded(name, where, examples)
    log_probs = torch.log_softmax(_hidden(logits, counted, axis), axis)
    if not labels.is_floating_point():
        return _from_labels(name, log_probs, labels, axis, ignore_index, label_smoothing, weight, reduction, counted)
    probabilities = _hidden(labels, counted, axis)
    if label_smoothing:
        probabilities = probabilities * (1 - label_smoothing) + label_smoothing / logits.shape[axis]
    return _reduced(name, -_weighted(log_probs * probabilities, weight, axis).sum(axis), reduction, counted)


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
    counted = _expanded("nll", where, labels.shape)
    log_probs = _hidden(log_probs, counted, axis)
    return _from_labels("nll", log_probs, labels, axis, ignore_index, 0.0, weight, reduction, counted)


def l1_penalty(params: Tree, where: Where | None = None) -> Tensor:
    r"""Sum of absolute values, :math:`\sum |p|`, over the leaves of a tree; its derivative at 0 is taken as 0.

    `where` chooses the leaves, all by default: a path pattern (``"*.weight"``), a predicate `(path, leaf) -> bool`, or
    a tree of bools. Returns a 0-d tensor, float32 or wider. Raises `TypeError` naming a chosen leaf that is not
    floating, `ValueError` for a pattern that matches nothing.

    Example:
        >>> from fnn import losses
        >>> losses.l1_penalty({"weight": torch.tensor([1.0, -2.0]), "bias": torch.ones(1)}, where="weight")
        tensor(3.)
    """
    return _penalty("l1_penalty", torch.abs, params, where)


def l2_penalty(params: Tree, where: Where | None = None) -> Tensor:
    r"""Sum of squares, :math:`\sum p^2`, over the leaves of a tree. There is no factor 1/2: the gradient is :math:`2p`.

    Added to a loss as `0.5 * decay * l2_penalty(params)` it equals the `weight_decay` of `optim.sgd`.
    Arguments, result and errors as in `l1_penalty`.

    Example:
        >>> from fnn import losses
        >>> losses.l2_penalty({"weight": torch.tensor([1.0, -2.0]), "bias": torch.ones(1)})
        tensor(6.)
    """
    return _penalty("l2_penalty", torch.square, params, where)


def _penalty(name: str, f: Callable[[Tensor], Tensor], params: Tree, where: Where | None) -> Tensor:
    chosen = tree.paths(params)
    if where is not None:
        picks = tree.leaves(tree.mask(params, where))
        chosen = {path: leaf for (path, leaf), pick in zip(chosen.items(), picks, strict=True) if pick}
    total = None
    for path, leaf in chosen.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{name}: leaf {path!r} is {kind}, expected a floating tensor; leave it out with where=")
        term = f(_widened(leaf)).sum()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def _elementwise(
    name: str,
    values: Callable[[Tensor, Tensor], Tensor],
    reduction: str,
    where: Tensor | None,
    **pair: Tensor,
) -> Tensor:
    """The reduced values of a loss of two tensors of one shape; `pair` holds them by the names the caller knows."""
    for what, tensor in pair.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {what} must be a tensor, got {type(tensor).__name__}")
    (first, a), (second, b) = pair.items()
    if a.shape != b.shape:
        raise ValueError(
            f"{name}: {first} has shape {tuple(a.shape)} and {second} has shape {tuple(b.shape)}; they must be equal "
            "(nothing is broadcast): reshape one of them"
        )
    if not a.is_floating_point():
        raise ValueError(f"{name}: {first} must be floating, got {a.dtype}")
    counted = _expanded(name, where, a.shape)
    return _reduced(name, values(_hidden(a, counted), _hidden(b, counted)), reduction, counted)


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
    return _reduced(name, losses, reduction, counted, shares)


def _readable(flags: Tensor) -> bool:
    """Whether Python may look at values here: of a plain CPU tensor in eager mode, at most inside of `torch.func.grad`.

    Elsewhere there are none (tracing, fake and meta tensors), or one for each example of a `vmap`, or looking
    would wait for the device. All that depends on how torch marks such tensors is in this function.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    plain = torch.func.debug_unwrap(flags)  # what grad, jvp and vmap wrap; only vmap hides a dimension
    return plain.ndim == flags.ndim and plain.device.type == "cpu"


def _reduced(name: str, values: Tensor, reduction: str, counted: Tensor | None, shares: Tensor | None = None) -> Tensor:
    """Mean, sum or all of the values, of those `counted`; a mean divides by the sum of their `shares`, 1 by default."""
    _check_reduction(name, reduction, _REDUCTIONS)
    if counted is not None:
        values = torch.where(counted, values, 0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    _check_not_empty(name, values.shape)
    if counted is None:
        return values.mean()
    total = counted.sum() if shares is None else _widened(torch.where(counted, shares, 0)).sum()
    mean = _widened(values).sum() / torch.where(total == 0, 1, total)
    return mean.to(values.dtype)


def _expanded(name: str, where: Tensor | None, shape: torch.Size) -> Tensor | None:
    """`where`, which speaks of the leading dimensions, in the full shape of the values."""
    if where is None:
        return None
    if not isinstance(where, Tensor) or where.dtype != torch.bool:
        got = where.dtype if isinstance(where, Tensor) else type(where).__name__
        raise TypeError(f"{name}: where must be a bool tensor, got {got}")
    if where.shape != shape[: where.ndim]:
        raise ValueError(
            f"{name}: where has shape {tuple(where.shape)}, expected {tuple(shape)} or its leading dimensions"
        )
    return where.reshape(where.shape + (1,) * (len(shape) - where.ndim)).expand(shape)


def _hidden(x: Tensor, counted: Tensor | None, axis: int | None = None) -> Tensor:
    """`x` with 1 in place of what does not count: in the domain of every loss, so that no derivative there is NaN."""
    if counted is None:
        return x
    return torch.where(counted if axis is None else counted.unsqueeze(axis), x, 1)


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


_REDUCTIONS = ("mean", "sum", "none")


def _check_reduction(name: str, reduction: str, allowed: tuple[str, ...]) -> None:
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, allowed))}, got {reduction!r}")


def _check_not_empty(name: str, shape: torch.Size) -> None:
    if 0 in shape:
        raise ValueError(f"{name}: the mean of no values (shape {tuple(shape)}) is undefined; is the batch empty?")


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to the shape `to`."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _widened(x: Tensor) -> Tensor:
    """Sums of half-precision numbers are taken in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
