"""The generalized Gauss-Newton matrix as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fnn._rules._checks import check_function
from fnn.diff._hessian import gnvp
from fnn.diff._purity import call
from fnn.diff._transforms import scalar
from fnn.diff.operators._batches import DataOperator, Reduction
from fnn.diff.operators._vectors import check_real


class GGNOperator(DataOperator):
    """The generalized Gauss-Newton matrix: the loss's Hessian if the model were linear in its parameters.

    G = J.T H J with J the Jacobian of the model's outputs in the parameters, and H the Hessian of the loss in the
    outputs. It is positive semi-definite where the loss is convex in the outputs.

    Args:
        model: `model(params, x)`, a tensor or a tree of them.
        loss: `loss(outputs, *targets)`, a 0-d tensor.
        params: a tree of n elements in all; G is `(n, n)`, in the order of `fnn.tree`'s leaves.
        data: one batch, `x, *targets`.
        loader, reduction, chunk_size: as in `HessianOperator`; a batch of a loader is `(x, *targets)`.

    Raises what `HessianOperator` does.

    Example:
        >>> from fnn.diff.operators import GGNOperator
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0.0])
        >>> G = GGNOperator(lambda w, x: x @ w, lambda out, y: ((out - y) ** 2).sum() / 2, torch.zeros(2), x, y)
        >>> G.to_dense()
        tensor([[1., 2.],
                [2., 4.]])

    Source: Schraudolph 2002; Martens 2020, https://arxiv.org/abs/1412.1193
    """

    def __init__(
        self,
        model: Callable[[Any, Any], Any],
        loss: Callable[..., Any],
        params: Any,
        *data: Any,
        loader: Iterable[Any] | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        check_function("GGNOperator", model)
        check_function("GGNOperator", loss)

        def product(v: Any, x: Any, *targets: Any) -> Any:
            return gnvp(lambda p: model(p, x), lambda outputs: loss(outputs, *targets), (params,), (v,))[0]

        super().__init__(product, params, data, loader, reduction, chunk_size)
        batch = next(self._batches())
        if not batch:
            raise ValueError("GGNOperator: expected a batch, x and the targets, or loader=")
        outputs = call("GGNOperator", model, params, batch[0])
        check_real("GGNOperator", outputs, "the model's output")
        scalar("GGNOperator", call("GGNOperator", loss, outputs, *batch[1:]))
