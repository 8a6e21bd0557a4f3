"""The public functions: they check their arguments, name the kernel's choice, and call the operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_kernels import _check
from triton_kernels._activation import ACTIVATIONS
from triton_kernels._choice import BACKENDS, Choice
from triton_kernels._cross_entropy import op as _cross_entropy
from triton_kernels._cross_entropy.linear import linear_cross_entropy as _linear_cross_entropy
from triton_kernels._matmul import choice as _matmul_choice
from triton_kernels._matmul.activated import activated
from triton_kernels._matmul.op import product
from triton_kernels._softmax import op as _softmax

PRECISIONS = ("ieee", "tf32", "bf16x3")
REDUCTIONS = ("mean", "sum", "none")


def matmul(
    a: Tensor,
    b: Tensor,
    *,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The matrix product `a @ b`, equal to `torch.matmul`.

    a: (..., m, k) or (k,), b: (..., k, n) or (k,), with batch dimensions that broadcast; any strides, none is copied.
    precision: how float32 is multiplied on CUDA, "ieee" exactly, "tf32" and "bf16x3" on the tensor cores with 10 and
    about 16 bits of mantissa. On the CPU, and for other dtypes, it changes nothing. Sums are float32 at least.
    out_dtype: of the result, that of the operands by default.

    Raises ValueError for shapes and TypeError for dtypes that do not fit.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.matmul(torch.ones(2, 3), torch.ones(3, 4)).shape
        torch.Size([2, 4])
    """
    check_matmul(a, b, precision, out_dtype)
    _check.one_of("matmul", "backend", backend, BACKENDS)
    left = a.unsqueeze(0) if a.dim() == 1 else a
    right = b.unsqueeze(1) if b.dim() == 1 else b
    out = product(left, right, None, precision, out_dtype, backend)
    out = out.squeeze(-1) if b.dim() == 1 else out
    return out.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, backend: str = "auto"
) -> Tensor:
    """`activation(x @ weight.T + bias)` in one kernel, equal to `torch.nn.functional.linear` and the activation.

    x: (..., in_features), weight: (out_features, in_features), bias: (out_features,) -> (..., out_features).
    activation: "relu", "gelu" (exact), "silu", "tanh", "sigmoid" or "leaky_relu" (slope 0.01), or None.
    float32 on CUDA is multiplied as `torch.set_float32_matmul_precision` says.

    Raises ValueError for shapes and TypeError for dtypes that do not fit.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.linear(torch.tensor([[1.0, -1.0]]), torch.eye(2), activation="relu")
        tensor([[1., 0.]])
    """
    check_linear("linear", x, weight, bias, activation)
    _check.one_of("linear", "backend", backend, BACKENDS)
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    if activation is None:
        out = product(rows, weight.mT, bias, "default", None, backend)
    else:
        out = activated(rows, weight.mT, bias, activation, "default", backend)
    return out.squeeze(0) if x.dim() == 1 else out


def softmax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """Softmax along `dim`, equal to `torch.softmax`; x of any shape and strides, arithmetic in float32 at least.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.softmax(torch.zeros(2, 4))[0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _softmax.softmax(x, check_dim("softmax", x, dim, backend), False, backend)


def log_softmax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """The logarithm of softmax along `dim`, equal to `torch.log_softmax`.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.log_softmax(torch.zeros(1, 4))
        tensor([[-1.3863, -1.3863, -1.3863, -1.3863]])
    """
    return _softmax.softmax(x, check_dim("log_softmax", x, dim, backend), True, backend)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(logits) and integer labels, equal to `torch.nn.functional.cross_entropy`.

    logits: (batch, classes), (batch, classes, d1, ...) or (classes,). labels: integers in [0, classes), of that shape
    without the class axis. Rows labelled `ignore_index` do not count; where none counts the mean is 0 (torch: NaN).
    The probabilities are never stored; the gradient computes them again. Sums are float32 at least.

    A label out of range raises ValueError on the CPU; on CUDA, where looking would wait for the device, the loss
    and its gradient are NaN. Raises ValueError for shapes and TypeError for dtypes that do not fit.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        tensor(0.1269)
    """
    name = "cross_entropy"
    check_labels(name, logits, labels, ignore_index, label_smoothing, reduction)
    _check.one_of(name, "backend", backend, BACKENDS)
    axis = min(1, logits.dim() - 1)
    rows = logits.movedim(axis, -1).reshape(-1, logits.shape[axis])
    losses, _ = _cross_entropy.cross_entropy(rows, labels.reshape(-1), ignore_index, float(label_smoothing), backend)
    return reduce(name, losses, labels, ignore_index, reduction).to(logits.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`cross_entropy(linear(x, weight, bias), labels)` without the logits in memory: the last layer of a classifier.

    x: (..., features), weight: (classes, features), labels: (...) integers, bias: (classes,). The logits of some rows
    at a time are computed, used and dropped, and computed again for the gradient: a third more arithmetic, for memory
    that does not grow with rows x classes. Forward mode and derivatives beyond the first hold all logits.
    The other arguments, and errors, are those of `cross_entropy`.

    Example:
        >>> import torch, triton_kernels
        >>> x, weight = torch.eye(2), torch.eye(2)
        >>> triton_kernels.linear_cross_entropy(x, weight, torch.tensor([0, 1]))
        tensor(0.3133)
    """
    name = "linear_cross_entropy"
    check_linear(name, x, weight, bias)
    check_labels(name, x, labels, ignore_index, label_smoothing, reduction, features=True)
    _check.one_of(name, "backend", backend, BACKENDS)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    options = (ignore_index, float(label_smoothing), "default", backend)
    losses, _ = _linear_cross_entropy(rows, weight, bias, labels.reshape(-1), *options)
    return reduce(name, losses, labels, ignore_index, reduction).to(x.dtype)


def explain(function: Callable, *args: Any, **kwargs: Any) -> Choice:
    """Which kernel `function(*args, **kwargs)` would take, and why; `str()` of the result is a sentence.

    Example:
        >>> import torch, triton_kernels
        >>> triton_kernels.explain(triton_kernels.softmax, torch.ones(2, 3)).kernel
        'PyTorch'
    """
    backend = kwargs.get("backend", "auto")
    if function is matmul:
        a, b = args
        precision, out_dtype = kwargs.get("precision", "ieee"), kwargs.get("out_dtype")
        check_matmul(a, b, precision, out_dtype)
        left, right = a.unsqueeze(0) if a.dim() == 1 else a, b.unsqueeze(1) if b.dim() == 1 else b
        return _matmul_choice.choose(left, right, precision, out_dtype, backend)
    if function in (linear, linear_cross_entropy):
        x, weight, *_ = args
        fused = kwargs.get("activation") is not None
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return _matmul_choice.choose(rows, weight.mT, "default", None, backend, activated=fused)
    if function in (softmax, log_softmax):
        x, *dim = args
        return _softmax.choose(x, dim[0] if dim else kwargs.get("dim", -1), backend)
    if function is cross_entropy:
        logits = args[0]
        axis = min(1, logits.dim() - 1)
        return _cross_entropy.choose(logits.movedim(axis, -1).reshape(-1, logits.shape[axis]), backend)
    raise ValueError(f"explain: expected a function of triton_kernels, got {function!r}")


def check_matmul(a: Tensor, b: Tensor, precision: str, out_dtype: torch.dtype | None) -> None:
    """Raises unless `matmul` takes these arguments."""
    if precision != "ieee":
        _check.one_of("matmul", "precision", precision, PRECISIONS)
    if out_dtype is not None and out_dtype not in _check.FLOATING:
        raise TypeError(f"matmul: out_dtype must be a floating torch.dtype, got {out_dtype!r}")
    if fits(a, b):  # the fast way: what follows only finds out what is wrong, or what broadcasts
        return
    _check.floating("matmul", a=a, b=b)
    shapes = f"got a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)}"
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"matmul: a and b must have at least one dimension, {shapes}")
    if a.shape[-1] != b.shape[0 if b.dim() == 1 else -2]:
        which = "only" if b.dim() == 1 else "second-to-last"
        raise ValueError(f"matmul: the last dimension of a must equal the {which} dimension of b, {shapes}")
    for left, right in zip(a.shape[:-2][::-1], b.shape[:-2][::-1], strict=False):
        if left != right and 1 not in (left, right):
            raise ValueError(f"matmul: batch dimensions must be equal or 1, {shapes}")


def fits(a: object, b: object) -> bool:
    """Whether a (..., m, k) and b (k, n) are floating, of one dtype and device, and of fitting sizes."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype is b.dtype
        and a.dtype in _check.FLOATING
        and a.device == b.device
        and a.dim() > 0
        and b.dim() == 2
        and a.shape[-1] == b.shape[-2]
    )


def check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
    """Raises unless x, weight and bias make a linear layer."""
    if activation is not None:
        _check.one_of(name, "activation", activation, tuple(ACTIVATIONS))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not fits(x, weight.mT):
        _check.floating(name, x=x, weight=weight, bias=bias)
        raise ValueError(
            f"{name}: weight must be (out_features, in_features) for x of (..., in_features), "
            f"got weight of shape {tuple(weight.shape)} and x of shape {tuple(x.shape)}"
        )
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype is not weight.dtype or bias.device != weight.device:
            _check.floating(name, weight=weight, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_dim(name: str, x: Tensor, dim: int, backend: str = "auto") -> int:
    """`dim` counted from the front."""
    _check.floating(name, x=x)
    _check.one_of(name, "backend", backend, BACKENDS)
    dims = max(x.dim(), 1)
    if not isinstance(dim, int):
        raise TypeError(f"{name}: dim must be an int, got {dim!r}")
    if not -dims <= dim < dims:
        raise IndexError(f"{name}: dim must be in [{-dims}, {dims}) for x of shape {tuple(x.shape)}, got {dim}")
    return dim % dims


def check_labels(
    name: str,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    features: bool = False,
) -> None:
    """Raises unless labels fit logits (batch, classes, ...), or x (..., features)."""
    _check.floating(name, **{"x" if features else "logits": logits})
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: labels must be integers, got {_check.described(labels)}")
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must be (batch, classes, ...) or (classes,), got a scalar")
    axis = logits.dim() - 1 if features else min(1, logits.dim() - 1)
    expected = logits.shape[:axis] + logits.shape[axis + 1 :]
    if labels.shape != expected:
        of = "x" if features else "logits"
        raise ValueError(
            f"{name}: labels must have shape {tuple(expected)} for {of} of shape {tuple(logits.shape)}, "
            f"got {_check.described(labels)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"{name}: labels are on {labels.device}, the rest is on {logits.device}")
    number = isinstance(label_smoothing, int | float) and not isinstance(label_smoothing, bool)
    if not number or not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{name}: ignore_index must be an int, got {ignore_index!r}")
    _check.one_of(name, "reduction", reduction, REDUCTIONS)


def reduce(name: str, losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The losses of all rows in the shape of labels, their sum, or their mean over the rows that count."""
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))  # sums of half-precision numbers overflow
    if reduction == "none":
        return losses.reshape(labels.shape)
    if reduction == "sum":
        return losses.sum()
    if math.prod(labels.shape) == 0:
        raise ValueError(f"{name}: the mean of no rows (labels of shape {tuple(labels.shape)}) is undefined")
    counted = (labels.long() != ignore_index).sum()  # unsigned labels would wrap a negative ignore_index
    return losses.sum() / torch.where(counted == 0, 1, counted)
