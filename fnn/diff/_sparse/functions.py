"""The transforms: `sparse_jacobian` and `sparse_hessian`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fnn._rules._checks import check_function
from fnn.diff._arguments import Argnums
from fnn.diff._purity import call
from fnn.diff._sparse.detect import detect
from fnn.diff._sparse.flat import FlatFunction, input_shapes
from fnn.diff._sparse.pattern import SparsityPattern
from fnn.diff._sparse.plan import plan_hessian, plan_jacobian
from fnn.diff._sparse.prepared import PreparedDerivative
from fnn.diff._sparse.probe import probe


class SparseDerivative:
    """What `sparse_jacobian(f)` and `sparse_hessian(f)` return: a function that prepares itself at its first call."""

    def __init__(
        self, function: FlatFunction, pattern: Any, mode: str, value: bool, chunk_size: int | None, check: bool
    ) -> None:
        if mode not in ("auto", "fwd", "rev"):
            raise ValueError(f"{function.name}: mode must be 'auto', 'fwd' or 'rev', got {mode!r}")
        whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
        if chunk_size is not None and (not whole or chunk_size < 1):
            raise ValueError(f"{function.name}: chunk_size must be a positive number of products, got {chunk_size!r}")
        self._function, self._pattern, self._mode = function, pattern, mode
        self._value, self._chunk_size, self._check = value, chunk_size, check
        self._prepared: list[tuple[Any, PreparedDerivative]] = []  # the compiler cannot hash a structure

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The derivative as a torch sparse matrix (COO, coalesced); prepares for shapes that it has not met."""
        return self._at(args, kwargs)(*args, **kwargs)

    def values(self, *args: Any, **kwargs: Any) -> Any:
        """The entries alone, (nnz,): see `PreparedDerivative.values`."""
        return self._at(args, kwargs).values(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> PreparedDerivative:
        """Detect the pattern, color it, and check it at these arguments; the result serves all of the same shapes."""
        function = self._function
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{function.name}: detection and coloring cannot run inside torch.compile or a transform; prepare "
                f"outside, J = fnn.{function.name}(f).prepare(*args), and use J.values inside"
            )
        return call(function.name, self._prepared_at, args, kwargs)

    def _prepared_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedDerivative:
        function = self._function
        _, x = function.bind(args, kwargs)
        if self._pattern is None:
            pattern, traced = detect(function, args, kwargs, self._mode)
        else:
            pattern, traced = self._given(args, kwargs)
        if function.scalar:
            plan = plan_hessian(pattern, traced)
        else:
            modes = (self._mode,) if self._mode != "auto" else ("fwd", "rev") if traced == "fwd" else ("rev",)
            plan = plan_jacobian(pattern, modes)
        derivative = PreparedDerivative(
            function, pattern, plan, x, input_shapes(args, kwargs), self._value, self._chunk_size
        )
        if self._check:
            probe(derivative, args, kwargs)
        return derivative

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[SparsityPattern, str]:
        flat, x = self._function.bind(args, kwargs)
        map_of: Any = torch.func.grad(flat, has_aux=True) if self._function.scalar else flat
        mode = self._mode
        with torch.no_grad():
            try:
                out, *_ = torch.func.jvp(map_of, (x,), (torch.zeros_like(x),), has_aux=True)
            except NotImplementedError:
                if mode == "fwd":
                    raise
                out, mode = map_of(x)[0], "rev"
        pattern = SparsityPattern.of(self._pattern, (out.numel(), x.numel()))
        if self._function.scalar and not pattern.is_symmetric():
            raise ValueError(f"{self._function.name}: the pattern of a Hessian must be symmetric")
        return pattern, "fwd" if mode == "auto" else mode

    def _at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedDerivative:
        shapes = input_shapes(args, kwargs)
        for known, prepared in self._prepared:
            if known == shapes:
                return prepared
        prepared = self.prepare(*args, **kwargs)
        self._prepared.append((shapes, prepared))
        return prepared

    def __repr__(self) -> str:
        known = ", ".join((str(prepared) for _, prepared in self._prepared))
        return f"{self._function.name}({known or 'not prepared yet'})"


def sparse_jacobian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    pattern: Any = None,
    mode: str = "auto",
    has_aux: bool = False,
    value: bool = False,
    chunk_size: int | None = None,
    check: bool = True,
) -> SparseDerivative:
    """The Jacobian of `f` where most of its entries are zero, from few products instead of one a column.

    Returns J, a function of f's arguments: `J(x)` is a torch sparse matrix (m, n), COO and coalesced, in `fnn.tree`'s
    leaf order. Its first call detects the pattern (see `jacobian_sparsity`) and colors it. `J.prepare(x)` does that
    alone and returns an object that prints itself; its `values(x)`, the (nnz,) entries, is pure tensor code, which
    compiles and batches, and its `matrix(entries)` and `to_scipy(entries)` make matrices of them.
    f: a function of pytrees of real tensors. argnums: as in `jacobian`. pattern: given instead of detected, anything
    that `SparsityPattern.of` takes. mode: "fwd" colors columns, for JVPs; "rev" rows, for VJPs; "auto" takes the fewer.
    value, has_aux: as in `jacobian`. chunk_size: products at once. check: compare, when preparing, with a product along
    a random vector, which finds a nonzero that the pattern misses at these arguments.
    Raises `ValueError` for a pattern of another shape or one that misses a nonzero, for a function that branches on
    values or draws from torch's generator; `RuntimeError` for a first call inside a transform or a compiled function.
    Source: Gebremedhin, Manne, Pothen, SIAM Review 47 (2005); Hill and Dalle, arXiv:2501.17737.

    Example:
        >>> J = sparse_jacobian(lambda x: (x[1:] - x[:-1]) ** 2).prepare(torch.ones(1000))
        >>> J
        SparseJacobian(999x1000, nnz=1998, 2 colors by JVP)
        >>> x = torch.arange(1000.0)
        >>> J(x).shape, J.values(x)[:4]
        (torch.Size([999, 1000]), tensor([-2.,  2., -2.,  2.]))
    """
    check_function("sparse_jacobian", f)
    function = FlatFunction("sparse_jacobian", f, argnums, has_aux, scalar=False)
    return SparseDerivative(function, pattern, mode, value, chunk_size, check)


def sparse_hessian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    pattern: Any = None,
    has_aux: bool = False,
    value: bool = False,
    chunk_size: int | None = None,
    check: bool = True,
) -> SparseDerivative:
    """The Hessian of a scalar `f` where most of its entries are zero, from few Hessian-vector products.

    As `sparse_jacobian`, with f's output of shape (). The coloring is a star coloring, which reads each entry from its
    own product or its mirror image's and so takes fewer colors than columns would. A given pattern must be symmetric.
    Source: Gebremedhin, Manne, Pothen, SIAM Review 47 (2005).

    Example:
        >>> def rosenbrock(x):
        ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> sparse_hessian(rosenbrock).prepare(torch.ones(1000))
        SparseHessian(1000x1000, nnz=2998, 3 colors by HVP)
    """
    check_function("sparse_hessian", f)
    function = FlatFunction("sparse_hessian", f, argnums, has_aux, scalar=True)
    return SparseDerivative(function, pattern, "auto", value, chunk_size, check)
