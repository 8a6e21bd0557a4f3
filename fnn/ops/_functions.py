"""The operations. Each is a torch function or an operator of `triton_kernels`, as `fnn.ops.use` and the rule say."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import triton_kernels
from fnn.ops import _taps
from fnn.ops._use import setting
from triton_kernels import _activation, _choice, _functions, _tables
from triton_kernels._cross_entropy import linear as _linear_cross_entropy
from triton_kernels._cross_entropy import op as _cross_entropy
from triton_kernels._matmul import choice, cpu
from triton_kernels._softmax import op as _softmax

PLAIN = frozenset((Tensor, torch.nn.Parameter))


def matmul(a: Tensor, b: Tensor, *, precision: str = "ieee", out_dtype: torch.dtype | None = None) -> Tensor:
    """The matrix product `a @ b`, equal to `torch.matmul`.

    a: (..., m, k) or (k,), b: (..., k, n) or (k,), with batch dimensions that broadcast; any strides.
    precision: how float32 is multiplied on CUDA, "ieee" exactly, "tf32" and "bf16x3" on the tensor cores with 10 and
    about 16 bits of mantissa. On the CPU, and for other dtypes, it changes nothing. Sums are float32 at least.
    out_dtype: of the result, that of the operands by default.

    Raises ValueError for shapes and TypeError for dtypes that do not fit.

    Example:
        >>> from fnn import ops
        >>> ops.matmul(torch.ones(2, 3), torch.ones(3, 4)).shape
        torch.Size([2, 4])
    """
    a, b = autocast(a, b)
    _functions.check_matmul(a, b, precision, out_dtype)
    kernel = product_kernel(a, b, None, precision, out_dtype)
    if kernel == "onednn":
        return cpu.onednn(a, b)
    if kernel == "operator":
        return triton_kernels.matmul(a, b, precision=precision, out_dtype=out_dtype, backend=setting.backend)
    if a.is_cuda and a.dtype == torch.float32 and precision != choice.library_precision():
        raise ValueError(
            f'matmul: precision={precision!r} under fnn.ops.use("torch"), where torch computes in '
            f"{choice.library_precision()!r}; see torch.set_float32_matmul_precision"
        )
    return torch.matmul(a, b) if out_dtype is None else torch.matmul(a.to(out_dtype), b.to(out_dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """`activation(x @ weight.T + bias)`, equal to `torch.nn.functional.linear` and the activation.

    x: (..., in_features), weight: (out_features, in_features), bias: (out_features,) -> (..., out_features).
    activation: "relu", "gelu" (exact), "silu", "tanh", "sigmoid" or "leaky_relu" (slope 0.01), or None.
    float32 on CUDA is multiplied as `torch.set_float32_matmul_precision` says.

    Raises ValueError for shapes and TypeError for dtypes that do not fit.

    Example:
        >>> from fnn import ops
        >>> ops.linear(torch.tensor([[1.0, -1.0]]), torch.eye(2), activation="relu")
        tensor([[1., 0.]])
    """
    if _taps.recorders:
        return _activation.activate(_taps.linear(linear, x, weight, bias), activation)
    x, weight, bias = autocast(x, weight, bias)
    _functions.check_linear("linear", x, weight, bias, activation)
    kernel = product_kernel(x, weight.mT, bias, "default", None)
    if kernel == "onednn":
        out = cpu.onednn(x, weight.mT, bias)
    elif kernel == "torch":
        out = F.linear(x, weight, bias)
    elif x.is_cuda or setting.backend == "triton":
        return triton_kernels.linear(x, weight, bias, activation=activation, backend=setting.backend)
    else:
        out = triton_kernels.linear(x, weight, bias)
    return _activation.activate(out, activation)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Softmax along `dim`, equal to `torch.softmax`.

    Example:
        >>> from fnn import ops
        >>> ops.softmax(torch.zeros(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    dim = _functions.check_dim("softmax", x, dim)
    if softmax_is_ours(x, dim):
        return triton_kernels.softmax(x, dim, backend=setting.backend)
    return torch.softmax(x, dim)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of softmax along `dim`, equal to `torch.log_softmax`.

    Example:
        >>> from fnn import ops
        >>> ops.log_softmax(torch.zeros(4))
        tensor([-1.3863, -1.3863, -1.3863, -1.3863])
    """
    dim = _functions.check_dim("log_softmax", x, dim)
    if softmax_is_ours(x, dim):
        return triton_kernels.log_softmax(x, dim, backend=setting.backend)
    return torch.log_softmax(x, dim)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of softmax(logits) and integer labels, equal to `torch.nn.functional.cross_entropy`.

    logits: (batch, classes), (batch, classes, d1, ...) or (classes,). labels: integers in [0, classes), of that shape
    without the class axis. Rows labelled `ignore_index` do not count; where none counts the mean is 0 (torch: NaN).
    `fnn.losses.cross_entropy` takes class weights, probabilities and a mask too.

    Raises ValueError for shapes, TypeError for dtypes that do not fit, and torch's IndexError or ValueError on the
    CPU for a label out of range; on CUDA the Triton kernel's loss and gradient are NaN there.

    Example:
        >>> from fnn import ops
        >>> ops.cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        tensor(0.1269)
    """
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    _functions.check_labels("cross_entropy", logits, labels, ignore_index, label_smoothing, reduction)
    if fused(logits):
        return triton_kernels.cross_entropy(
            logits, labels, **options, reduction=reduction, backend=setting.backend
        )  # fmt: skip
    try:
        losses = F.cross_entropy(logits, labels.long(), **options, reduction="none")
    except IndexError:  # of a label, which torch does not say
        _cross_entropy.check_range(labels, ignore_index, logits.shape[min(1, logits.dim() - 1)])
        raise
    return _functions.reduce("cross_entropy", losses, labels, ignore_index, reduction).to(logits.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(linear(x, weight, bias), labels)`, for many classes: the last layer of a language model.

    x: (..., features), weight: (classes, features), labels: (...) integers, bias: (classes,). Where the logits would
    take more than 64 MiB they are computed for some rows at a time, used and dropped, and computed again for the
    gradient: a third more arithmetic, for memory that does not grow with rows x classes. Forward mode and
    derivatives beyond the first hold all logits. The other arguments, and errors, are those of `cross_entropy`.

    Example:
        >>> from fnn import ops
        >>> ops.linear_cross_entropy(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
        tensor(0.3133)
    """
    name = "linear_cross_entropy"
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    x, weight, bias = autocast(x, weight, bias)
    _functions.check_linear(name, x, weight, bias)
    _functions.check_labels(name, x, labels, **options, features=True)
    if in_pieces(x, weight):
        return triton_kernels.linear_cross_entropy(x, weight, labels, bias, **options, backend=setting.backend)
    logits = linear(x, weight, bias).reshape(-1, weight.shape[0])
    loss = cross_entropy(logits, labels.reshape(-1), **options)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def product_kernel(a: Tensor, b: Tensor, bias: Tensor | None, precision: str, out_dtype: torch.dtype | None) -> str:
    """What computes a (..., m, k) @ b (..., k, n): "operator", "torch", or "onednn" itself if nothing differentiates.

    An operator costs some microseconds of Python in eager mode, which a small product does not have; so there its rule
    is asked beforehand. A compiled graph pays nothing for it, and under a transform only the operator sees the sizes
    that count.
    """
    if setting.backend != "auto":
        return "operator" if setting.backend == "triton" else "torch"
    if a.is_cuda:
        float32 = a.dtype == torch.float32 and precision != "default"
        ours = _tables.any_loaded() or (float32 and precision != choice.library_precision())
        return "operator" if ours else "torch"
    if a.dtype is not torch.float32 or cpu.RULE is None or out_dtype not in (None, torch.float32):
        return "torch"
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return "torch"
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
        return "operator"
    # Of a subclass, torch knows what to make.
    if not cpu.use_onednn(a, b) or type(a) not in PLAIN or type(b) not in PLAIN or torch._C._is_tracing():
        return "torch"
    if forward_ad._current_level >= 0:
        return "operator"
    recorded = a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    return "operator" if recorded and torch.is_grad_enabled() else "onednn"


def autocast(*operands):
    """The operands of a product as they are, or in the dtype in which `torch.autocast` has products computed."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(operands[0], Tensor):
        return operands
    device = operands[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in operands
    )


def fused(logits: Tensor) -> bool:
    """Whether the cross-entropy of logits (batch, classes, ...) is one kernel here, not a composition of torch's."""
    if setting.backend != "auto":
        return setting.backend == "triton"
    if not logits.is_cuda or not _tables.any_loaded():
        return False
    key = _cross_entropy.key(logits, min(1, logits.dim() - 1))
    return _choice.table_names_triton("cross_entropy", *key, logits.device.index)


def softmax_is_ours(x: Tensor, dim: int) -> bool:
    """Whether a softmax is one of our kernels here."""
    if setting.backend != "auto":
        return setting.backend == "triton"
    if not x.is_cuda or not _tables.any_loaded():
        return False
    return _choice.table_names_triton("softmax", *_softmax.key(x, dim), x.device.index)


def in_pieces(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear cross-entropy computes the logits of some rows at a time: where they would be many."""
    if setting.backend != "auto":
        return setting.backend == "triton"
    rows = math.prod(x.shape[:-1])
    return rows * weight.shape[0] * x.dtype.itemsize > _linear_cross_entropy.CHUNK_BYTES
