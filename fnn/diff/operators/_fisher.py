"""Fisher information matrices as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from fnn import random
from fnn._rules._checks import check_function
from fnn.diff._hessian import sandwich
from fnn.diff._purity import call
from fnn.diff.operators._batches import DataOperator, Reduction
from fnn.diff.operators._likelihood import (
    Kind,
    Likelihood,
    check_likelihood,
    check_outputs,
    information_product,
    mean_outer_product,
    sampled_scores,
    score,
)


class FisherOperator(DataOperator):
    """The Fisher information matrix of a model: the mean over examples of E[g g.T].

    g is the gradient of one example's negative log-likelihood in the parameters. The expectation is over the model's
    own distribution, computed ("exact") or over `samples` draws ("sampled", which is unbiased); or the given target
    takes its place ("empirical").

    Args:
        model: `model(params, x)`, one tensor of outputs for a batch, examples along the leading axis.
        params: a tree of n elements in all; F is `(n, n)`, in the order of `fnn.tree`'s leaves.
        x, y: one batch. Only the empirical Fisher needs the targets y.
        likelihood: of the outputs. "categorical": logits `(batch, classes, ...)`, y integers `(batch, ...)`.
            "bernoulli": logits of any shape, y 0 or 1 in the same shape. "gaussian": means of any shape, each target
            with variance 1, y in the same shape. Several outcomes of an example are independent, so that its
            log-likelihood is their sum.
        kind: "exact", "empirical" or "sampled".
        key, samples: of `fnn.random`, and how many draws an example, for the sampled one. Batch i of a loader draws
            from `fnn.random.fold_in(key, i)`.
        reduction: "mean" over all examples, or "sum".
        loader, chunk_size: as in `HessianOperator`; a batch of a loader is `(x, y)`, or x alone.

    For `(batch, classes)` logits the exact Fisher is the GGN of the mean cross-entropy, and for `(batch, outputs)` the
    gaussian one that of half the squared error, summed over outputs and averaged over examples (`fnn.losses.mse`
    averages over both, its GGN is 2 / outputs times as large).

    Raises `ValueError` for options and shapes that do not fit, a missing key, missing targets, a random model, and a
    loader that gives other batches in a second pass.

    Example:
        >>> from fnn.diff.operators import FisherOperator
        >>> F = FisherOperator(lambda w, x: x @ w, torch.zeros(2, 1), torch.tensor([[1.0, 2.0]]), likelihood="gaussian")
        >>> F.to_dense()
        tensor([[1., 2.],
                [2., 4.]])

    Source: Martens 2020, https://arxiv.org/abs/1412.1193; Kunstner, Hennig and Balles 2019,
    https://arxiv.org/abs/1905.12558 (the empirical one is no approximation of the exact one)
    """

    def __init__(
        self,
        model: Callable[[Any, Any], Any],
        params: Any,
        x: Any = None,
        y: Tensor | None = None,
        *,
        likelihood: Likelihood = "categorical",
        kind: Kind = "exact",
        key: Tensor | None = None,
        samples: int = 1,
        loader: Iterable[Any] | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        check_function("FisherOperator", model)
        check_likelihood("FisherOperator", likelihood, kind, key, samples)
        self._key = key

        def product(v: Any, x: Any, y: Any = None, key: Any = None) -> Any:
            def information(outputs: Tensor, tangent: Tensor) -> tuple[Tensor, None]:
                if kind == "exact":
                    cotangent = information_product(outputs, tangent, likelihood)
                elif kind == "sampled":
                    cotangent = mean_outer_product(sampled_scores(outputs, likelihood, key, samples), tangent)
                else:
                    cotangent = mean_outer_product(score(outputs, y, likelihood)[None], tangent)
                return cotangent / outputs.shape[0] if reduction == "mean" else cotangent, None

            return sandwich("FisherOperator", lambda p: model(p, x), (params,), (v,), information)[0][0]

        if x is None and loader is None:
            raise ValueError("FisherOperator: expected a batch, x, or loader=")
        super().__init__(product, params, () if x is None else (x, y), loader, reduction, chunk_size)
        x, y, _ = next(self._batches())
        check_outputs("FisherOperator", call("FisherOperator", model, params, x), y, likelihood, kind)

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        for index, batch in enumerate(super()._batches()):
            x, y, *_ = (*batch, None)
            yield x, y, None if self._key is None else random.fold_in(self._key, index)
