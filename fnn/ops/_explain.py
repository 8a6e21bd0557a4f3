"""`explain`: which kernel a call takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import triton_kernels
from fnn.ops import _functions
from fnn.ops._use import setting
from triton_kernels import Choice
from triton_kernels._functions import check_dim, check_labels, check_linear, check_matmul

NAMES = ("matmul", "linear", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy")
OPERATORS = {getattr(_functions, name): getattr(triton_kernels, name) for name in NAMES}


def explain(function: Callable, *args: Any, **kwargs: Any) -> Choice:
    """Which kernel `function(*args, **kwargs)` takes under the present setting, and why.

    function: one of this module's; of `linear_cross_entropy` the products are explained. The answer has `kernel`,
    `reason` and, where a table names one, the Triton kernel's `config`; its `str()` is a sentence. Under `vmap` and in
    a compiled function the sizes that count are those of the whole batch.
    Raises what the call would raise for arguments that do not fit, and ValueError for another function.

    Example:
        >>> from fnn import ops
        >>> print(ops.explain(ops.softmax, torch.ones(2, 3)))
        PyTorch: torch's own kernel
    """
    if function not in OPERATORS:
        raise ValueError(f"explain: expected a function of fnn.ops such as ops.matmul, got {function!r}")
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    operand, ours = _decided(function, **call.arguments)
    if setting.backend == "torch":
        return Choice("PyTorch", 'fnn.ops.use("torch")')
    if not ours:
        mkl = operand.device.type == "cpu" and operand.dtype == torch.float32 and torch.backends.mkl.is_available()
        product = function in (_functions.matmul, _functions.linear, _functions.linear_cross_entropy)
        return Choice("MKL" if mkl and product else "PyTorch", "torch's own kernel")
    return triton_kernels.explain(OPERATORS[function], *call.args, **call.kwargs, backend=setting.backend)


def _decided(function: Callable, **values: Any) -> tuple[Tensor, bool]:
    """The first operand as the call would take it, and whether an operator or oneDNN computes; checks all arguments."""
    if function is _functions.matmul:
        a, b = _functions.autocast(values["a"], values["b"])
        options = (values["precision"], values["out_dtype"])
        check_matmul(a, b, *options)
        return a, _functions.product_kernel(a, b, None, *options) != "torch"
    if function in (_functions.softmax, _functions.log_softmax):
        x = values["x"]
        return x, _functions.softmax_is_ours(x, check_dim(function.__name__, x, values["dim"]))
    if function is _functions.cross_entropy:
        check_labels(function.__name__, *values.values())
        return values["logits"], _functions.fused(values["logits"])
    x, weight, bias = _functions.autocast(values["x"], values["weight"], values["bias"])
    check_linear(function.__name__, x, weight, bias, values.get("activation"))
    kernel = _functions.product_kernel(x, weight.mT, bias, "default", None)
    in_pieces = function is _functions.linear_cross_entropy and _functions.in_pieces(x, weight)
    return x, in_pieces or kernel != "torch"
