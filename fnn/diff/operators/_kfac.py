"""Kronecker-factored approximate curvature, from the taps of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import random, tree
from fnn._rules._checks import check_function
from fnn.diff._purity import call
from fnn.diff.operators._batches import Reduction, as_arguments
from fnn.diff.operators._likelihood import Kind, Likelihood, check_likelihood, check_outputs, square_root
from fnn.diff.operators._operator import LinearOperator
from fnn.diff.operators._vectors import check_real
from fnn.ops import _taps as taps
from fnn.ops._tap_rules import Tap

_LARGEST_DENSE_BLOCK = 2048


class KroneckerBlock(NamedTuple):
    """One block of the matrix: `G kron A` over a weight `(out, in)`, row by row, joined by its bias as a last column.

    paths: the leaves of the block, the weight and perhaps its bias. inputs: A, `(groups, k, k)`; deltas: G, `(groups,
    n, n)`; groups is 1 but for grouped convolutions. A block of a leaf without a layer has one dense factor: inputs is
    `(1, 1, 1)`, a one, and deltas the exact block.
    """

    paths: tuple[str, ...]
    inputs: Tensor
    deltas: Tensor


class _Layer(NamedTuple):
    """Where a block's entries are: the numbers of its leaves, the taps that use them, and how the weight is stored."""

    weight: int
    bias: int | None
    taps: list[int]
    transposed: bool


class KFACOperator(LinearOperator):
    """The Kronecker-factored approximation of a `FisherOperator` with the same arguments.

    Block-diagonal, one block a layer: E[a a.T] kron E[g g.T] in place of E[a a.T kron g g.T], with a what the layer is
    given and g the gradient in its pre-activation. In the order of torch's weights `(out, in)` the block is G kron A:
    with V a tangent of the weight, its product is G V A. A layer's bias is an input of 1, the last one. A is the mean
    over examples of a a.T, summed over the positions of a layer that is used at several (a convolution, a sequence); G
    the sum over draws of g g.T, averaged over examples and positions ("expand"). For reduction="sum" G is N times as
    large, with N examples.

    Weights of linear layers, convolutions and embeddings have Kronecker blocks, wherever the weight is a leaf of
    params. Any other leaf (the scale of a normalisation, a bias that is added apart) has its exact diagonal block.
    It is exact, within a layer's block, for a single example and position, and for deep linear networks with a gaussian
    likelihood.

    Args:
        model, params, x, y, likelihood, kind, key, samples, reduction: as in `FisherOperator`. The model must treat
            examples alone, as networks in evaluation mode do.
        loader: instead of one batch, an iterable of batches `(x, y)`, or x alone. It is read once.
        chunk_size: as in `LinearOperator`.

    `blocks` are the factors. Raises what `FisherOperator` does, and `ValueError` for a leaf without a layer, or a
    vocabulary, of more than 2,048 elements.

    Example:
        >>> from fnn.diff.operators import KFACOperator
        >>> model = lambda w, x: torch.nn.functional.linear(x, w)
        >>> K = KFACOperator(model, torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), likelihood="gaussian")
        >>> K.to_dense()
        tensor([[1., 2.],
                [2., 4.]])

    Source: Martens and Grosse 2015, https://arxiv.org/abs/1503.05671; Grosse and Martens 2016,
    https://arxiv.org/abs/1602.01407; Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636
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
        name = "KFACOperator"
        check_function(name, model)
        check_real(name, params, "params")
        check_likelihood(name, likelihood, kind, key, samples)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"{name}: reduction must be 'mean' or 'sum', got {reduction!r}")
        if (x is None) == (loader is None):
            raise ValueError(f"{name}: expected one batch, x, or loader=, and not both")

        sums: list[tuple[Tensor, Tensor]] = []
        layers: list[_Layer] = []
        count = 0
        for index, batch in enumerate([(x, y)] if loader is None else map(as_arguments, loader)):
            xs, ys, *_ = (*batch, None)
            outputs = call(name, model, params, xs)
            check_outputs(name, outputs, ys, likelihood, kind)
            batch_key = None if key is None else random.fold_in(key, index)
            roots = square_root(outputs, ys, likelihood, kind, batch_key, samples)
            layers, factors = _factors(model, params, xs, roots)
            sums = [(a + b, g + h) for (a, g), (b, h) in zip(sums, factors, strict=True)] if sums else factors
            count += outputs.shape[0]
        if not sums:
            raise ValueError(f"{name}: the loader has no batches")

        paths = list(tree.paths(params))
        self._layers, self.blocks = layers, []
        for layer, (inputs, deltas) in zip(layers, sums, strict=True):
            leaves = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
            inputs = inputs / count if layer.taps else inputs / inputs
            deltas = deltas / count if reduction == "mean" else deltas
            self.blocks.append(KroneckerBlock(tuple(paths[leaf] for leaf in leaves), inputs, deltas))
        super().__init__(self._times_factors, params, symmetric=True, chunk_size=chunk_size)

    def inverse(self, damping: float) -> LinearOperator:
        """The inverse of this operator plus `damping` times the identity, exactly, by eigenvectors of the factors.

        Raises `ValueError` for a damping that is not positive.
        """
        if not damping > 0:
            raise ValueError(f"KFACOperator: inverse needs a positive damping, got {damping!r}")
        decomposed = [(torch.linalg.eigh(block.deltas), torch.linalg.eigh(block.inputs)) for block in self.blocks]

        def product(v: Any) -> Any:
            def of_block(index: int, matrix: Tensor) -> Tensor:
                (left_values, left), (right_values, right) = decomposed[index]
                values = left_values.clamp_min(0)[:, :, None] * right_values.clamp_min(0)[:, None, :]
                return left @ ((left.mT @ matrix @ right) / (values + damping)) @ right.mT

            return self._by_blocks(of_block, v)

        return LinearOperator(product, self.domain, symmetric=True, chunk_size=self.chunk_size)

    def _times_factors(self, v: Any) -> Any:
        return self._by_blocks(lambda i, matrix: self.blocks[i].deltas @ matrix @ self.blocks[i].inputs, v)

    def _by_blocks(self, of_block: Callable[[int, Tensor], Tensor], v: Any) -> Any:
        leaves, structure = tree.flatten(v)
        results = list(leaves)
        for index, (layer, block) in enumerate(zip(self._layers, self.blocks, strict=True)):
            groups, n, k = *block.deltas.shape[:2], block.inputs.shape[1]
            weight = leaves[layer.weight]
            width = k if layer.bias is None else k - 1
            matrix = weight.reshape(groups, width, n).mT if layer.transposed else weight.reshape(groups, n, width)
            if layer.bias is not None:
                matrix = torch.cat([matrix, leaves[layer.bias].reshape(groups, n, 1)], 2)
            matrix = of_block(index, matrix)
            if layer.bias is not None:
                results[layer.bias] = matrix[:, :, width].reshape(leaves[layer.bias].shape)
                matrix = matrix[:, :, :width]
            results[layer.weight] = (matrix.mT if layer.transposed else matrix).reshape(weight.shape)
        return tree.unflatten(structure, results)


def _factors(
    model: Callable[[Any, Any], Any], params: Any, x: Any, roots: Tensor
) -> tuple[list[_Layer], list[tuple[Tensor, Tensor]]]:
    """The layers, and for each the sums over examples of its two factors. roots: (batch, draws, *output)."""

    def one_example(p: Any, example: Any) -> Any:
        return model(p, tree.map(lambda leaf: leaf[None], example))[0]

    plan = taps.plan(one_example, params, tree.map(lambda leaf: leaf[0], x))
    layers = _layers(plan)
    leaves = tree.leaves(params)
    for layer in layers:
        _check_size(plan, layer, leaves)

    def of_example(example: Any, root: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        _, pullback, inputs = plan.vjp(one_example, params, example)
        deltas, grads = torch.vmap(pullback)(root)
        factors, apart = [], []
        for layer in layers:
            if not layer.taps:
                grad = grads[plan.free.index(layer.weight)].flatten(1)
                factors.append((grad.new_ones(1, 1, 1), (grad.mT @ grad)[None]))
                continue
            rows = [_rows(plan.taps[i], inputs[i], deltas[i], layer.bias is not None) for i in layer.taps]
            a, d = torch.cat([a for a, _ in rows], 1), torch.cat([d for _, d in rows], 2)
            # a: (groups, T, k), d: (draws, groups, T, n)
            factors.append((a.mT @ a, torch.einsum("sgtn,sgtm->gnm", d, d) / a.shape[1]))
            if layer.bias is not None:
                whole = grads[plan.free.index(layer.bias)].flatten(1)
                apart.append((whole - d.sum(2).flatten(1)).abs().amax() / whole.abs().amax().clamp_min(1e-30))
        return factors, apart

    factors, apart = torch.vmap(of_example)(x, roots)
    joined = [layer for layer in layers if layer.bias is not None]
    for layer, difference in zip(joined, apart, strict=True):
        if float(difference.max()) > 1e-3:
            raise ValueError(
                f"KFACOperator: the bias {plan.paths[layer.bias or 0]!r} is used by more than the layer of "
                f"{plan.paths[layer.weight]!r}; add it apart from F.linear or the convolution"
            )
    return layers, [(a.sum(0), g.sum(0)) for a, g in factors]


def _layers(plan: taps.Plan) -> list[_Layer]:
    layers, joined = [], set()
    for leaf in plan.structured:
        mine = [index for index, tap in enumerate(plan.taps) if tap.leaf == leaf]
        used: list[Tap] = [plan.taps[index] for index in mine]
        biases = {tap.bias for tap in used}
        bias = biases.pop() if len(biases) == 1 else None
        elsewhere = any(tap.bias == bias and tap.leaf != leaf for tap in plan.taps)
        if bias is not None and (elsewhere or bias not in plan.free):
            bias = None
        joined.add(bias)
        transposed = {tap.kind == "embedding" or tap.options[0] == "io" for tap in used}
        if len(transposed) > 1:
            raise ValueError(
                f"KFACOperator: {plan.paths[leaf]!r} is used both ways round, as by a tied embedding and head, so it "
                "has no Kronecker factors; leave it out with fnn.tree.partition and a model that closes over it"
            )
        layers.append(_Layer(leaf, bias, mine, transposed.pop()))
    return layers + [_Layer(leaf, None, [], False) for leaf in plan.free if leaf not in joined]


def _check_size(plan: taps.Plan, layer: _Layer, leaves: Sequence[Tensor]) -> None:
    leaf, path = leaves[layer.weight], plan.paths[layer.weight]
    embedding = layer.taps and plan.taps[layer.taps[0]].kind == "embedding"
    size = leaf.shape[0] if embedding else 0 if layer.taps else leaf.numel()
    if size > _LARGEST_DENSE_BLOCK:
        what = "is an embedding of" if embedding else "is not the weight of a layer, so its block is dense, with"
        raise ValueError(
            f"KFACOperator: {path!r} {what} {size} rows, more than {_LARGEST_DENSE_BLOCK}; leave it out with "
            "fnn.tree.partition and a model that closes over it"
        )


def _rows(tap: Tap, input: Tensor, deltas: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """What each position met, (groups, T, k), with a one for the bias, and gave back, (draws, groups, T, n)."""
    a = tap.rows(input, deltas[0])[0]
    d = torch.vmap(lambda delta: tap.rows(input, delta)[1])(deltas)
    if tap.kind == "embedding":
        a = torch.nn.functional.one_hot(a, tap.weight[0]).to(d.dtype)
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    return a, d
