"""Losses of two tensors of one shape, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.losses._reduction import REDUCTIONS, Reduction, check_not_empty, check_reduction, expanded, hidden, reduced


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
    check_reduction("kl_div", reduction, (*REDUCTIONS, "batchmean"))

    def values(p: Tensor, t: Tensor) -> Tensor:
        return t.exp() * (t - p) if log_target else torch.xlogy(t, t) - t * p

    pair = {"log_predictions": log_predictions, "targets": targets}
    if reduction != "batchmean":
        return _elementwise("kl_div", values, reduction, where, **pair)
    total = _elementwise("kl_div", values, "sum", where, **pair)
    if log_predictions.ndim == 0:
        raise ValueError('kl_div: reduction="batchmean" needs a batch dimension, got 0-d tensors')
    if where is None:
        check_not_empty("kl_div", log_predictions.shape)
        return total / log_predictions.shape[0]
    examples = where if where.ndim == 1 else where.flatten(1).any(1)
    return total / examples.sum().clamp(min=1)


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
    counted = expanded(name, where, a.shape)
    return reduced(name, values(hidden(a, counted), hidden(b, counted)), reduction, counted)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to the shape `to`."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))
