"""The neural tangent kernel as a linear operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fnn._rules._checks import check_function, check_tensors
from fnn.diff.operators._jacobian import JacobianOperator
from fnn.diff.operators._operator import LinearOperator
from fnn.diff.operators._vectors import check_real


class NTKOperator(LinearOperator):
    """The neural tangent kernel J J.T over the outputs for a batch; neither J nor the kernel is formed.

    Args:
        f: `f(params, x)`, the output for ONE example, a tensor or a tree of them.
        params: the parameters that J differentiates.
        x: the batch, a tree of tensors with a leading axis of B examples.
        chunk_size: as in `LinearOperator`.

    The kernel is square, over values of the shape of the outputs `(B, *out)`: a vector holds the first example's
    outputs, then the second's. It is positive semi-definite. Raises what `JacobianOperator` does.

    Example:
        >>> from fnn.diff.operators import NTKOperator
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> NTKOperator(lambda w, x: w @ x, torch.zeros(2), x).to_dense()
        tensor([[1., 1.],
                [1., 2.]])

    Source: Novak, Sohl-Dickstein and Schoenholz 2022, https://arxiv.org/abs/2206.08720 (NTK-vector products)
    """

    def __init__(self, f: Callable[[Any, Any], Any], params: Any, x: Any, *, chunk_size: int | None = None) -> None:
        check_function("NTKOperator", f)
        check_real("NTKOperator", params, "params")

        def output(params: Any, x: Any) -> Any:
            value = f(params, x)
            check_tensors("NTKOperator", value)
            return value

        jacobian = JacobianOperator(lambda p: torch.vmap(output, (None, 0))(p, x), params)
        forward, backward = jacobian._apply, jacobian._apply_transposed
        assert backward is not None
        super().__init__(lambda w: forward(backward(w)), jacobian.codomain, symmetric=True, chunk_size=chunk_size)
