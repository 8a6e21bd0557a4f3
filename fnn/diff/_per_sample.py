"""`per_sample_grad`, `per_sample_grad_norm`, `clipped_grad`: what each example of a batch does to the parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function
from fnn.diff._arguments import Argnums, at, check_differentiable, own_code, split_aux
from fnn.diff._composed import by_operators
from fnn.diff._factors import Factors, factors, is_whole, over_examples, squared_norm, whole, widened
from fnn.diff._purity import call, is_nested
from fnn.ops import _taps as taps


def per_sample_grad(
    loss: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The gradient of the loss of each example: a function `(params, *batch) -> grads`, with a leading batch axis.

    loss: `loss(params, *example)`, the scalar loss of ONE example, or `(loss, aux)` with has_aux. Every array of the
    batch has a leading axis of B examples; a batch argument may be any tree of arrays.
    argnums: the arguments to differentiate; 0 are the params, others are of the batch.
    chunk_size: examples at a time, all by default; memory grows with it.
    Returns gradients (B, *leaf) in a tree like the argument, and with has_aux `(grads, aux)`, aux (B, ...).

    Raises ValueError for a loss that is not a scalar, and for arrays of different or no batch size.

    Example:
        >>> import fnn
        >>> loss = lambda params, x, y: (params["w"] @ x - y) ** 2
        >>> x, y = torch.eye(2), torch.tensor([0.0, 1.0])
        >>> fnn.per_sample_grad(loss)({"w": torch.ones(2)}, x, y)
        {'w': tensor([[2., 0.],
                [0., 0.]])}
    """
    name = "per_sample_grad"
    check_function(name, loss)

    def gradients(params: Any, *batch: Any) -> Any:
        check_batch(name, batch)

        def one(*example: Any) -> Any:
            of_selected, selected = at(name, loss, argnums, (params, *example))
            return torch.func.grad(lambda x: scalar(name, of_selected(x), has_aux), has_aux=has_aux)(selected)

        return torch.vmap(one, chunk_size=chunk_size)(*batch)

    return _of_params(name, gradients)


def per_sample_grad_norm(
    loss: Callable[..., Any], has_aux: bool = False, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The norm of the gradient of each example's loss: a function `(params, *batch) -> norms`, norms (B,).

    loss: `loss(params, *example)` for ONE example, as in `per_sample_grad`, whose gradients' norm over all leaves
    this is. They are never made for weights of linear layers, convolutions and embeddings, in fnn's layers or any
    other function; there the norm comes from what the layer was given and the derivative of what it gave. Biases and
    the parameters of normalisations have gradients no larger than an activation. A weight that is used in another way
    too (in a penalty, as a slice) takes the memory of `per_sample_grad`.
    Returns norms, and with has_aux `(norms, aux)`. Differentiable. Errors are those of `per_sample_grad`.

    Source: Goodfellow, "Efficient per-example gradient computations", 2015; Li et al., 2022, for sequences.

    Example:
        >>> import fnn
        >>> loss = lambda params, x, y: (params["w"] @ x - y) ** 2
        >>> x, y = torch.eye(2), torch.tensor([0.0, 1.0])
        >>> fnn.per_sample_grad_norm(loss)({"w": torch.ones(2)}, x, y)
        tensor([2., 0.])
    """
    name = "per_sample_grad_norm"
    check_function(name, loss)

    def norms(params: Any, *batch: Any) -> Any:
        one = _example(name, loss, params, batch, has_aux)

        def norm(*example: Any) -> tuple[Tensor, Any]:
            squared, _, aux = one(*example)
            return squared, aux

        squared, aux = torch.vmap(norm, chunk_size=chunk_size)(*batch)
        lengths = root(squared).to(dtype_of_norms(params, squared))
        return (lengths, aux) if has_aux else lengths

    return _of_params(name, norms)


def clipped_grad(
    loss: Callable[..., Any],
    max_norm: float | Tensor,
    has_aux: bool = False,
    *,
    norms: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The sum of the examples' gradients, each scaled down to a norm of at most max_norm: the sum of DP-SGD.

    A function `(params, *batch) -> grads`, a tree like params: sum_i g_i min(1, max_norm / |g_i|). One backward pass,
    and the gradients of single examples are not made, as in `per_sample_grad_norm`.
    loss, has_aux: as in `per_sample_grad`; with has_aux the result is `(grads, aux)`.
    max_norm: a positive number or 0-d tensor. norms: append the norms (B,) before clipping to the results.
    chunk_size: examples at a time, all by default.

    Raises ValueError for a max_norm that is not positive, and what `per_sample_grad` raises.

    Source: Abadi et al., "Deep learning with differential privacy", 2016; Bu et al., 2023, for the single pass.

    Example:
        >>> import fnn
        >>> loss = lambda params, x, y: (params["w"] @ x - y) ** 2
        >>> x, y = torch.eye(2), torch.tensor([0.0, 0.5])
        >>> fnn.clipped_grad(loss, 0.5)({"w": torch.ones(2)}, x, y)
        {'w': tensor([0.5000, 0.5000])}
    """
    name = "clipped_grad"
    check_function(name, loss)
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise ValueError(f"{name}: max_norm must be positive, got {max_norm!r}")

    def clipped(params: Any, *batch: Any) -> Any:
        one = _example(name, loss, params, batch, has_aux)
        leaves, structure = tree.flatten(params)
        total: list[Tensor] | None = None
        found: list[tuple[Tensor, Any]] = []
        for part in in_chunks(batch, chunk_size):
            squared, gradients, aux = torch.vmap(one)(*part)
            lengths = root(squared)
            weights = torch.where(lengths > max_norm, max_norm / lengths, torch.ones_like(lengths))
            sums = []
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if isinstance(gradient, Tensor):
                    gradient = widened(gradient)
                    sums.append(torch.tensordot(weights.to(gradient.dtype), gradient, 1))
                else:
                    sums.append(whole(over_examples(gradient, weights.to(widened(leaf).dtype)), leaf.shape))
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            found.append((lengths.to(dtype_of_norms(params, lengths)), aux))
        assert total is not None
        grads = tree.unflatten(structure, [a.to(leaf.dtype) for a, leaf in zip(total, leaves, strict=True)])
        result: tuple[Any, ...] = (grads,)
        if has_aux:
            result += (tree.map(lambda *parts: torch.cat(parts), *[aux for _, aux in found]),)
        if norms:
            result += (torch.cat([lengths for lengths, _ in found]),)
        return result if has_aux or norms else grads

    return _of_params(name, clipped)


def _of_params(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def derivative(params: Any, *batch: Any) -> Any:
        return checked(name, run, params, *batch)

    return own_code(derivative)


def checked(name: str, run: Callable[..., Any], *values: Any) -> Any:
    """`run(*values)`, which batches pullbacks of the user's function: see `by_operators`, and `call` for its errors."""
    leaves = [leaf for leaf in tree.leaves(values) if isinstance(leaf, Tensor)]
    differentiated = is_nested() or (torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]))
    with by_operators() if differentiated else nullcontext():
        return call(name, run, *values)


def _example(name: str, loss: Callable[..., Any], params: Any, batch: tuple[Any, ...], has_aux: bool) -> Callable:
    """The function of one example that gives its squared gradient norm, its gradient in parts, and aux."""
    check_batch(name, batch)
    check_differentiable(name, params, "argument 0")

    def of_example(params: Any, *example: Any) -> Any:
        return scalar(name, loss(params, *example), has_aux)

    plan = taps.plan(of_example, params, *first(batch), has_aux=has_aux)

    def one(*example: Any) -> tuple[Tensor, list[Tensor | list[Factors]], Any]:
        value, pullback, inputs, *aux = plan.vjp(of_example, params, *example, has_aux=has_aux)
        deltas, grads = pullback(torch.ones_like(value))
        gradients: dict[int, Tensor | list[Factors]] = dict(zip(plan.free, grads, strict=True))
        squares = [widened(grad).square().sum() for grad in grads]
        for leaf in plan.structured:
            parts = factors(plan, leaf, inputs, deltas)
            if is_whole(plan, leaf):
                gradient = whole(parts, plan.shapes[leaf])
                gradients[leaf] = gradient
                squares.append(widened(gradient).square().sum())
            else:
                gradients[leaf] = parts
                squares.append(squared_norm(parts))
        squared = torch.stack(squares).sum() if squares else torch.zeros_like(widened(value))
        return squared, [gradients[leaf] for leaf in range(len(gradients))], aux[0] if has_aux else ()

    return one


def scalar(name: str, output: Any, has_aux: bool) -> Any:
    """The loss's output, after a check that it is a scalar, with aux beside it where has_aux says so."""
    value, _ = split_aux(name, output, has_aux)
    if not isinstance(value, Tensor):
        hint = "; did you mean has_aux=True?" if isinstance(value, tuple) else ""
        raise TypeError(f"{name}: the loss of one example must be a scalar tensor, got {type(value).__name__}{hint}")
    if value.dim() != 0:
        raise ValueError(
            f"{name}: the loss of one example must be a scalar, got shape {tuple(value.shape)}; loss(params, *example) "
            "sees one example, without the batch axis, and its result may need .mean() or .sum()"
        )
    return output


def check_batch(name: str, batch: tuple[Any, ...]) -> None:
    """Raise unless every leaf of the batch is a tensor with the same leading axis, of one example at least."""
    sizes: dict[str, int] = {}
    for index, argument in enumerate(batch):
        for path, leaf in tree.paths(argument).items():
            where = f"leaf {path!r} of argument {index + 1}" if path else f"argument {index + 1}"
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{name}: {where} is {type(leaf).__name__}, expected a tensor with a batch axis")
            if leaf.dim() == 0:
                raise ValueError(f"{name}: {where} is a scalar, expected a leading axis of examples")
            sizes[where] = leaf.shape[0]
    if not sizes:
        raise ValueError(f"{name}: called without a batch; expected (params, *batch)")
    expected, size = next(iter(sizes.items()))
    if size == 0:
        raise ValueError(f"{name}: {expected} has no examples, and torch.vmap needs one")
    for where, other in sizes.items():
        if other != size:
            raise ValueError(f"{name}: {where} has {other} examples, but {expected} has {size}")


def first(batch: Any) -> Any:
    """One example to look at: the first."""
    return tree.map(lambda leaf: leaf[0], batch)


def in_chunks(batch: Any, size: int | None) -> list[Any]:
    """The batch in parts of at most `size` examples."""
    leaves, structure = tree.flatten(batch)
    count = leaves[0].shape[0]
    if size is None or size >= count:
        return [batch]
    return [
        tree.unflatten(structure, [leaf[start : start + size] for leaf in leaves]) for start in range(0, count, size)
    ]


def dtype_of_norms(params: Any, computed: Tensor) -> torch.dtype:
    """The dtype that torch gives to a sum over all leaves; their norms are computed in no less than float32."""
    leaves = tree.leaves(params)
    if not leaves:
        return computed.dtype
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def root(squared: Tensor) -> Tensor:
    """The square root, whose derivative at zero is zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), squared)
