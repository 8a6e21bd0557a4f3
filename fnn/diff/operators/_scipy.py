"""Operators for SciPy's iterative methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fnn.diff.operators._operator import LinearOperator


def to_scipy(operator: LinearOperator) -> Any:
    """See `LinearOperator.to_scipy`."""
    try:
        from scipy.sparse.linalg import LinearOperator as SciPyOperator
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy: pip install scipy") from error
    # NumPy has no bfloat16.
    outside = torch.float32 if operator.dtype in (torch.float16, torch.bfloat16) else operator.dtype

    def over_arrays(factor: LinearOperator) -> Callable[[Any], Any]:
        @torch.no_grad()
        def product(array: Any) -> Any:
            value = factor @ torch.as_tensor(array).to(dtype=factor.dtype, device=factor.device)
            return value.to(device="cpu", dtype=outside).numpy()

        return product

    forward, backward = over_arrays(operator), over_arrays(operator.T)
    products = {"matvec": forward, "rmatvec": backward, "matmat": forward, "rmatmat": backward}
    return SciPyOperator(shape=operator.shape, dtype=torch.empty(0, dtype=outside).numpy().dtype, **products)
