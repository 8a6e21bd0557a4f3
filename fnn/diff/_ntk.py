"""`ntk`: the empirical neural tangent kernel, by the cheapest of three methods; `ntk_cost` says what each takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import ops, tree
from fnn._rules._checks import check_function
from fnn.diff._arguments import check_differentiable
from fnn.diff._composed import by_operators
from fnn.diff._factors import factors, gram, joined, whole
from fnn.diff._ntk_cost import METHODS, Costs, Part, costs, parts
from fnn.diff._per_sample import check_batch, checked, first, in_chunks
from fnn.diff._transforms import pushforward
from fnn.ops import _taps as taps

Features = list[tuple[Tensor, ...]]


def ntk(
    f: Callable[..., Any],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    method: str = "auto",
    trace_outputs: bool = False,
    diagonal: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The neural tangent kernel: entry (i, j, a, b) is <d f_a(params, x1_i), d f_b(params, x2_j)> over all params.

    f: `f(params, x)` of ONE example, a tensor of o elements. x1: (B1, ...), x2: (B2, ...), each may be a tree; x2 is x1
    by default. Returns (B1, B2, o, o); with trace_outputs the sum over a = b, (B1, B2). With diagonal only the pairs
    i = j, (B, o, o) or (B,).
    method: "contraction" of two Jacobians; "products" of one Jacobian with the rows of the other; "structured" from
    what each linear layer, convolution and embedding was given and the derivative of what it gave, without Jacobians
    of their weights; "auto" takes the one with the least arithmetic in `ntk_cost`. All give the same numbers.
    chunk_size: examples of x1 at a time, for "products" of x2; all by default.

    Raises ValueError for an unknown method, and with diagonal for batches of different size.

    Source: Jacot et al., 2018; Novak, Sohl-Dickstein and Schoenholz, "Fast finite width neural tangent kernel", 2022.

    Example:
        >>> import fnn
        >>> f = lambda params, x: params["w"] @ x
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> fnn.ntk(f, {"w": torch.zeros(3, 2)}, x, trace_outputs=True)
        tensor([[3., 3.],
                [3., 6.]])
    """
    if method not in ("auto", *METHODS):
        raise ValueError(f"ntk: method must be 'auto' or one of {METHODS}, got {method!r}")
    check_function("ntk", f)

    def run(params: Any, x1: Any, *x2: Any) -> Tensor:
        kernel = _Kernel("ntk", f, params, x1, x2[0] if x2 else None, trace_outputs, diagonal)
        how = kernel.costs().cheapest() if method == "auto" else method
        if how == "products":
            return kernel.by_products(chunk_size)
        return kernel.by_features(how == "structured", chunk_size)

    return checked("ntk", run, params, x1, *(() if x2 is None else (x2,)))


def ntk_cost(
    f: Callable[..., Any],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    trace_outputs: bool = False,
    diagonal: bool = False,
) -> Costs:
    """What each method of `ntk` would take: `{method: (flops, memory in bytes)}`, which prints as a table.

    The arguments are those of `ntk`. Counted are the products in linear layers, convolutions and embeddings and those
    that make the kernel, not elementwise work; the memory is that of Jacobians, or of what takes their place.

    Example:
        >>> import fnn
        >>> f = lambda params, x: params["w"] @ x
        >>> fnn.ntk_cost(f, {"w": torch.zeros(3, 2)}, torch.zeros(4, 2)).cheapest()
        'structured'
    """
    check_function("ntk_cost", f)
    return _Kernel("ntk_cost", f, params, x1, x2, trace_outputs, diagonal).costs()


class _Kernel:
    """One call of `ntk`: its checked arguments, the taps of its function, and the three methods."""

    def __init__(
        self, name: str, f: Callable[..., Any], params: Any, x1: Any, x2: Any, trace: bool, diagonal: bool
    ) -> None:
        check_differentiable(name, params, "params")
        check_batch(name, (x1,))
        self.same = x2 is None
        self.params, self.x1, self.x2, self.trace, self.diagonal = params, x1, x1 if x2 is None else x2, trace, diagonal
        if not self.same:
            check_batch(name, (x2,))
        self.examples = (tree.leaves(x1)[0].shape[0], tree.leaves(self.x2)[0].shape[0])
        if diagonal and self.examples[0] != self.examples[1]:
            raise ValueError(f"{name}: diagonal=True pairs x1[i] with x2[i], but they have {self.examples} examples")

        def output(params: Any, x: Any) -> Tensor:
            out = f(params, x)
            if not isinstance(out, Tensor):
                raise TypeError(f"{name}: f(params, x) must return one tensor, got {type(out).__name__}")
            return out if out.dim() == 1 else out.reshape(-1)

        self.f = output
        self.plan = taps.plan(output, params, first(x1), biases=True)
        self.example = output(params, first(x1))
        self.outputs = self.example.shape[0]

    def costs(self) -> Costs:
        return costs(self.plan, self.outputs, *self.examples, self.trace, self.diagonal, self.example.dtype.itemsize)

    def by_features(self, structured: bool, chunk_size: int | None) -> Tensor:
        """From what is made of each example by itself: factors of its Jacobian, or the Jacobian."""
        how = parts(self.plan, self.outputs) if structured else []
        features = self._structured(how) if structured else self._jacobian
        axes = [_axes(part) for part in how]
        axes += [(1,)] * (len(self.plan.free) if structured else len(self.plan.shapes))

        def pair(a: Any, b: Any) -> Tensor:
            return self._contract(how, _lifted(features(a), axes), _lifted(features(b), axes)).squeeze((0, 1))

        if self.diagonal:
            return torch.vmap(pair, chunk_size=chunk_size)(self.x1, self.x2)

        def anchored(x: Any) -> Features:
            zero = self._anchor(x)
            return [
                tuple([y + zero if axis == 1 else y for y, axis in zip(part, where, strict=True)])
                for part, where in zip(features(x), axes, strict=True)
            ]

        batched = torch.vmap(anchored, out_dims=axes)  # type: ignore[arg-type]
        second = batched(self.x2)
        if self.same and chunk_size is None:
            return self._contract(how, second, second)
        return torch.cat([self._contract(how, batched(part), second) for part in in_chunks(self.x1, chunk_size)])

    def by_products(self, chunk_size: int | None) -> Tensor:
        """Each row of the Jacobian at an example of x2 is a tangent at those of x1."""
        seeds = torch.eye(self.outputs, dtype=self.example.dtype, device=self.example.device)

        def rows(x: Any) -> Any:
            pullback = torch.func.vjp(lambda params: self.f(params, x), self.params)[1]
            return torch.vmap(lambda seed: pullback(seed)[0])(seeds)

        def tangents(x: Any, rows: Any) -> Tensor:  # (a, b) for one example of x1
            def of(row: Any) -> Tensor:
                return pushforward("ntk", lambda params: self.f(params, x), (self.params,), (row,), False)[1]

            if torch.compiler.is_compiling():  # the compiler's forward mode fails for views under vmap
                with by_operators():
                    pullback = torch.func.vjp(lambda params: self.f(params, x), self.params)[1]
                    transposed = torch.func.vjp(lambda seed: pullback(seed)[0], torch.zeros_like(self.example))[1]
                    block = torch.vmap(lambda row: transposed(row)[0], out_dims=1)(rows)
            else:
                block = torch.vmap(of, out_dims=1)(rows)
            return block.diagonal().sum() if self.trace else block

        def column(x: Any) -> Tensor:
            at = rows(x)
            return torch.vmap(lambda x1: tangents(x1, at))(self.x1) + self._anchor(x)

        if self.diagonal:
            return torch.vmap(lambda a, b: tangents(a, rows(b)), chunk_size=chunk_size)(self.x1, self.x2)
        return torch.vmap(column, out_dims=1, chunk_size=chunk_size)(self.x2)

    def _jacobian(self, x: Any) -> Features:
        """The rows (o, size) of each leaf, for one example."""
        pullback = torch.func.vjp(lambda params: self.f(params, x), self.params)[1]
        grads = torch.vmap(lambda seed: pullback(seed)[0])(self._seeds())
        return [(leaf.reshape(self.outputs, -1),) for leaf in tree.leaves(grads)]

    def _structured(self, how: list[Part]) -> Callable[[Any], Features]:
        """What `how` asks of each leaf, for one example: its Jacobian (o, size), or inputs and deltas (o, ...)."""
        taps = self.plan.taps

        def features(x: Any) -> Features:
            _, pullback, inputs = self.plan.vjp(self.f, self.params, x)

            def asked(seed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
                deltas, grads = pullback(seed)
                given = [tap.given(met, delta) for tap, met, delta in zip(taps, inputs, deltas, strict=True)]
                found = []
                for part in how:
                    if part.gram:
                        of = [d for tap, d in zip(taps, given, strict=True) if tap.leaf == part.leaf]
                        found.append(joined(of, 1))
                    elif part.leaf in self.plan.biases:
                        sums = [
                            d.sum(1).reshape(-1) for tap, d in zip(taps, given, strict=True) if tap.bias == part.leaf
                        ]
                        found.append(sum(sums[1:], sums[0]))
                    else:
                        shape = self.plan.shapes[part.leaf]
                        found.append(whole(factors(self.plan, part.leaf, inputs, deltas), shape).reshape(-1))
                return found, [grad.reshape(-1) for grad in grads]

            found, grads = torch.vmap(asked)(self._seeds())
            result: Features = []
            for part, deltas in zip(how, found, strict=True):
                met = [tap.met(x) for tap, x in zip(taps, inputs, strict=True) if tap.leaf == part.leaf]
                result.append((deltas,) if not part.gram else (joined(met, 1), *[deltas][part.seeds :]))
            return result + [(grad,) for grad in grads]

        return features

    def _anchor(self, x: Any) -> Tensor:
        """A zero of the example: torch expands along no axis but the first what does not depend on the example."""
        return tree.leaves(x)[0].new_zeros((), dtype=self.example.dtype)

    def _seeds(self) -> Tensor:
        return torch.eye(self.outputs, dtype=self.example.dtype, device=self.example.device)

    def _contract(self, how: list[Part], a: Features, b: Features) -> Tensor:
        """The kernel (B1, B2, o, o), or (B1, B2), from features with an axis of examples."""
        total = None
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            if index < len(how) and how[index].gram:
                block = self._by_gram(how[index], left, right)
            else:
                block = self._rows(left[0], right[0])
            total = block if total is None else total + block
        assert total is not None
        return total if self.trace else total.permute(1, 3, 0, 2)

    def _rows(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products of rows (o, B, size): (o, B1, o, B2), or their trace over o, (B1, B2)."""
        if self.trace:
            return product(a.transpose(0, 1).flatten(1), b.transpose(0, 1).flatten(1))
        out = product(a.flatten(0, 1), b.flatten(0, 1))
        return out.reshape(a.shape[0], a.shape[1], b.shape[0], b.shape[1])

    def _by_gram(self, part: Part, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        """The share of a leaf, and of its bias, from what its calls met, (B, groups, T, k), and their deltas."""
        (first, *first_deltas), (second, *second_deltas) = a, b
        examples, positions = (first.shape[0], second.shape[0]), (first.shape[2], second.shape[2])
        # (groups, B1 T, B2 T)
        met = gram(first.transpose(0, 1).flatten(1, 2), second.transpose(0, 1).flatten(1, 2)).to(self.example.dtype)
        met = met + 1 if part.bias is not None else met
        if part.seeds:
            met = met[0]
            if self.trace:
                return met * self.outputs
            return self._seeds()[:, None, :, None] * met[None, :, None, :]
        x, y = first_deltas[0], second_deltas[0]  # (o, B, groups, T, n)
        met = met.reshape(met.shape[0], examples[0], positions[0], examples[1], positions[1])
        if self.trace:
            x, y = (z.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2) for z in (x, y))
            return (product(x, y).reshape(met.shape) * met).sum((0, 2, 4))
        x, y = (z.permute(2, 0, 1, 3, 4).flatten(1, 3) for z in (x, y))
        shape = (met.shape[0], self.outputs, examples[0], positions[0], self.outputs, examples[1], positions[1])
        return (product(x, y).reshape(shape) * met[:, None, :, :, None]).sum((0, 3, 6))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b', for matrices or, in groups, several of them."""
    if a.dim() == 3 and a.shape[0] == 1:
        return ops.matmul(a[0], b[0].mT).unsqueeze(0)
    return ops.matmul(a, b.mT)


def _axes(part: Part) -> tuple[int, ...]:
    """Where the axis of examples goes in a leaf's features: after the seeds', which are outermost."""
    return (1,) if not part.gram else (0,) if part.seeds else (0, 1)


def _lifted(features: Features, axes: list[tuple[int, ...]]) -> Features:
    """The features of one example as those of a batch of one."""
    return [
        tuple(x.unsqueeze(axis) for x, axis in zip(parts, where, strict=True))
        for parts, where in zip(features, axes, strict=True)
    ]
