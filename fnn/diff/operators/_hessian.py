"""The Hessian as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fnn._rules._checks import check_function
from fnn.diff._hessian import hvp
from fnn.diff._purity import call
from fnn.diff._transforms import scalar
from fnn.diff.operators._batches import DataOperator, Reduction


class HessianOperator(DataOperator):
    """The Hessian of a loss with respect to the parameters; `H @ v` takes a few gradients' time.

    Args:
        loss: `loss(params, *batch)`, a 0-d tensor.
        params: a tree of n elements in all; H is `(n, n)`, in the order of `fnn.tree`'s leaves.
        data: one batch, the further arguments of `loss`.
        loader: instead of one batch, an iterable of batches, each a tuple of arguments or a single one. It is read
            twice now, and once in every product.
        reduction: what `loss` does with the examples of a batch, along the leading axis of its first tensor; over a
            loader "mean" weighs each batch's Hessian by its share of examples, and "sum" adds them.
        chunk_size: as in `LinearOperator`.

    Raises `ValueError` for a loss that is not 0-d or is random, and for a loader that gives other batches in a second
    pass; `TypeError` for parameters that are not real floating tensors.

    Example:
        >>> from fnn.diff.operators import HessianOperator
        >>> H = HessianOperator(lambda p, x: ((p["w"] @ x) ** 2).sum(), {"w": torch.ones(1, 2)}, torch.eye(2))
        >>> H.to_dense()
        tensor([[2., 0.],
                [0., 2.]])

    Source: Pearlmutter, Fast exact multiplication by the Hessian, 1994.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        params: Any,
        *data: Any,
        loader: Iterable[Any] | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        check_function("HessianOperator", loss)

        def product(v: Any, *batch: Any) -> Any:
            return hvp(lambda p: loss(p, *batch), (params,), (v,))[0]

        super().__init__(product, params, data, loader, reduction, chunk_size)
        scalar("HessianOperator", call("HessianOperator", loss, params, *next(self._batches())))
