"""`explain`: which kernel a call takes."""

from __future__ import annotations

from collections.abc import Callable

import triton_kernels
from fnn.ops import _functions
from fnn.ops._use import setting
from triton_kernels import Choice, _tables

OPERATORS = {
    getattr(_functions, name): getattr(triton_kernels, name)
    for name in ("matmul", "linear", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy")
}


def explain(function: Callable, *args, **kwargs) -> Choice:
    """Which kernel `function(*args, **kwargs)` takes under the present setting, and why.

    function: one of this module's. The answer has `kernel`, `reason` and, where a table names one, the Triton
    kernel's `config`; its `str()` is a sentence. Under `vmap` the sizes that count are those of the whole batch.
    Raises ValueError for another function.

    Example:
        >>> from fnn import ops
        >>> print(ops.explain(ops.softmax, torch.ones(2, 3)))
        PyTorch: torch's own kernel
    """
    if function not in OPERATORS:
        raise ValueError(f"explain: expected a function of fnn.ops such as ops.matmul, got {function!r}")
    if setting.backend == "torch":
        return Choice("PyTorch", 'fnn.ops.use("torch")')
    x = args[0]
    if setting.backend == "auto" and x.is_cuda and not _tables.any_loaded():
        return Choice("PyTorch", "no table of this card; `python -m triton_kernels.tune` measures one")
    return triton_kernels.explain(OPERATORS[function], *args, **kwargs, backend=setting.backend)
