"""`LinearOperator`: a matrix of which only products are computed, and the algebra of such matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from fnn import tree
from fnn._rules._checks import check_function, check_tensors
from fnn.diff._purity import call
from fnn.diff.operators._lanczos import Eigenpairs, eigsh, logdet
from fnn.diff.operators._scipy import to_scipy
from fnn.diff.operators._solve import solve
from fnn.diff.operators._trace import diag, trace
from fnn.diff.operators._vectors import check_real, compiled, over_columns, ravel, unravel

_BLOCK_BYTES = 2**26


class LinearOperator:
    """A linear map from one space of pytrees to another, known by its products.

    `A @ v` takes a vector `(n,)` and gives a vector `(m,)`, a matrix `(n, k)` and gives `(m, k)`, or a tree of the
    domain's structure and gives one of the codomain's. Vectors hold the leaves in `fnn.tree`'s order, one after the
    other. `A.T`, `A + B`, `A - B`, `A @ B`, `2 * A`, `A / 2` and `-A` are operators again.

    Args:
        apply: the map, linear, from a tree like `domain` to one like `codomain`.
        domain, codomain: trees of real floating tensors that give structure, shapes and dtypes; by default the codomain
            is that of `apply`, which is called once for it.
        transpose: the transposed map; by default the pullback of `apply`.
        symmetric: whether A equals its transpose, which `eigsh`, `solve` and `logdet` require. It is not checked.
        chunk_size: how many columns of a matrix are multiplied at a time; by default as many as fit into 64 MiB.

    Raises `TypeError` for leaves that are not real and floating, `ValueError` for vectors and trees of another size.

    Products run under `torch.compile(fullgraph=True)`, `torch.vmap` and every transform; in compiled code write `A(v)`
    for `A @ v`, which Dynamo knows only for a symmetric A and a vector. `trace`, `diag`, `eigsh`,
    `solve` and `logdet` are loops around products, that record no gradients; `compile()` makes these products fast.

    Example:
        >>> from fnn.diff.operators import LinearOperator
        >>> A = LinearOperator(lambda x: {"sum": x.sum(), "twice": 2 * x}, torch.zeros(2))
        >>> A.shape, (A.T @ A).to_dense()
        ((3, 2), tensor([[5., 1.],
                [1., 5.]]))
    """

    def __init__(
        self,
        apply: Callable[[Any], Any],
        domain: Any,
        codomain: Any = None,
        *,
        transpose: Callable[[Any], Any] | None = None,
        symmetric: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        check_function("LinearOperator", apply)
        check_real("LinearOperator", domain, "the domain")
        if codomain is None:
            codomain = domain if symmetric else apply(tree.zeros_like(domain))
        self._set_spaces(domain, codomain, symmetric, chunk_size)
        self._apply, self._apply_transposed = apply, transpose
        self._product = self._of_trees(apply)
        self._block_product = over_columns(self._product)

    def _set_spaces(self, domain: Any, codomain: Any, symmetric: bool, chunk_size: int | None) -> None:
        name = type(self).__name__
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"{name}: chunk_size must be a positive int or None, got {chunk_size!r}")
        check_tensors(name, codomain, "the codomain")
        check_real(name, codomain, "the codomain")
        self.domain, self.codomain, self.symmetric, self.chunk_size = domain, codomain, symmetric, chunk_size
        self._transposed: LinearOperator | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`: the sizes of the codomain and of the domain."""
        return tree.size(self.codomain), tree.size(self.domain)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of vectors: the widest of the domain's leaves and the codomain's."""
        dtype = torch.float16
        for leaf in tree.leaves((self.domain, self.codomain)):
            dtype = leaf.dtype if dtype == torch.float16 else torch.promote_types(dtype, leaf.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where vectors live: the device of the domain's first leaf."""
        return tree.leaves(self.domain)[0].device

    @property
    def T(self) -> LinearOperator:
        """The transposed operator."""
        if self.symmetric:
            return self
        if self._transposed is None:
            self._transposed = self._transpose()
            self._transposed._transposed = self
        return self._transposed

    def _transpose(self) -> LinearOperator:
        def pullback(value: Any) -> Any:
            return torch.func.vjp(self._apply, tree.zeros_like(self.domain))[1](value)[0]

        transpose = pullback if self._apply_transposed is None else self._apply_transposed
        return LinearOperator(transpose, self.codomain, self.domain, transpose=self._apply, chunk_size=self.chunk_size)

    def __matmul__(self, other: Any) -> Any:
        return self(other)

    def __call__(self, other: Any) -> Any:
        """`A(v)` is `A @ v`, v a vector, a matrix, a tree or an operator; compiled functions need this form."""
        if isinstance(other, LinearOperator):
            return _algebra().Product([self, other])
        n = self.shape[1]
        if isinstance(other, Tensor) and (other.ndim == 1 or (other.ndim == 2 and other.shape[0] == n)):
            if other.shape[0] != n:
                raise ValueError(f"{self}: expected a vector of length {n}, got {other.shape[0]}")
            if other.dtype != self.dtype:
                raise TypeError(f"{self}: expected {self.dtype}, got {other.dtype}; convert it with .to(A.dtype)")
            return self._vector(other) if other.ndim == 1 else self._matrix(other)
        if isinstance(other, Tensor) and not isinstance(self.domain, Tensor):
            raise ValueError(
                f"{self}: expected a vector ({n},), a matrix ({n}, k) or a tree like the domain, "
                f"got a tensor of shape {tuple(other.shape)}"
            )
        tree.check_like(self.domain, other, f"{self}: the tree to multiply with")
        return unravel(self._vector(ravel(other, self.dtype)), self.codomain)

    # What a kind of operator defines: its product with one vector, and with the columns of a matrix at a time.

    def _vector(self, v: Tensor) -> Tensor:
        return call(type(self).__name__, self._product, v)

    def _block(self, columns: Tensor) -> Tensor:
        return call(type(self).__name__, self._block_product, columns)

    def _matrix(self, columns: Tensor) -> Tensor:
        if columns.shape[1] == 0:
            return columns.new_zeros(self.shape[0], 0)
        chunk = self.columns_at_once()
        return torch.cat([self._block(part) for part in columns.split(chunk, 1)], 1)

    def columns_at_once(self) -> int:
        """How many columns are multiplied at a time."""
        return self.chunk_size or max(1, _BLOCK_BYTES // (max(*self.shape, 1) * self.dtype.itemsize))

    def _of_trees(self, apply: Callable[..., Any]) -> Callable[..., Tensor]:
        domain, codomain, dtype, name = self.domain, self.codomain, self.dtype, type(self).__name__

        def product(v: Tensor, *batch: Any) -> Tensor:
            value = apply(unravel(v, domain), *batch)
            if not torch.compiler.is_compiling():
                tree.check_like(codomain, value, f"{name}: the product")
            return ravel(value, dtype)

        return product

    def compile(self) -> LinearOperator:
        """The same operator, its products compiled by `torch.compile` at their first use and then reused.

        A compiled operator is for eager loops such as `eigsh`; inside of a compiled or vmapped function take the
        operator itself.
        """
        result = copy.copy(self)
        result._transposed = None
        result._product = compiled(self._product)
        result._block_product = compiled(self._block_product)
        if self._apply_transposed is not None:
            result._transposed = copy.copy(self.T)
            result._transposed._product = compiled(self.T._product)
            result._transposed._block_product = compiled(self.T._block_product)
            result._transposed._transposed = result
        return result

    def __add__(self, other: Any) -> LinearOperator:
        return _algebra().Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return _algebra().Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scalar: Any) -> LinearOperator:
        number = isinstance(scalar, Real) or (isinstance(scalar, Tensor) and scalar.ndim == 0)
        return _algebra().Scaled(self, scalar) if number else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        return self * (1 / scalar)

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # While compiling, Dynamo asks here for `A @ v` and for `v @ A` alike, so that only what is equal is taken.
        if torch.compiler.is_compiling() and func is Tensor.matmul:
            v, operator = args if isinstance(args[0], Tensor) else (args[1], args[0])
            if operator.symmetric and v.ndim == 1:
                return operator(v)
            raise TypeError("write A(v) instead of A @ v in compiled code, for A not symmetric, and for matrices")
        name = getattr(func, "__name__", func)
        raise TypeError(f"torch's {name} takes no {cls.__name__}; write A @ v, with A.T for a vector on the left")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype})"

    def to_dense(self) -> Tensor:
        """The matrix, `(m, n)`, by a product with each unit vector of the smaller side."""
        m, n = self.shape
        if m < n:
            return self.T.to_dense().T
        return self @ torch.eye(n, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> Any:
        """The operator as a `scipy.sparse.linalg.LinearOperator` over NumPy arrays.

        Raises `ImportError` without SciPy.
        """
        return to_scipy(self)

    def trace(
        self,
        method: Literal["exact", "hutchinson", "hutch++", "xtrace"] = "exact",
        *,
        key: Tensor | None = None,
        samples: int | None = None,
    ) -> Tensor:
        """The sum of the diagonal, a 0-d tensor.

        `"exact"` needs n products. The others are unbiased estimates from `samples` products: Hutchinson's, whose error
        falls as 1 / sqrt(samples); Hutch++ (`samples` a multiple of 3) and XTrace (even), whose error falls at least as
        1 / samples and which are exact where the rank is at most a third, or less than a half, of `samples`.
        `key`: of `fnn.random`, for the estimates.

        Raises `ValueError` for an operator that is not square, a missing key, or samples that do not fit.

        Source: Hutchinson 1989; Meyer et al. 2021, https://arxiv.org/abs/2010.09649; Epperly, Tropp and Webber 2024,
        https://arxiv.org/abs/2301.07825
        """
        return trace(self, method, key, samples)

    def diag(
        self,
        method: Literal["exact", "hutchinson", "xdiag"] = "exact",
        *,
        key: Tensor | None = None,
        samples: int | None = None,
    ) -> Tensor:
        """The diagonal, `(n,)`: exact by n products, or estimated from `samples` products.

        Hutchinson's estimate is exact for a diagonal matrix; XDiag (`samples` even) for a rank below half of `samples`.
        `key`: of `fnn.random`, for the estimates.

        Raises `ValueError` as `trace` does.

        Source: Bekas, Kokiopoulou and Saad 2007; Epperly, Tropp and Webber 2024, https://arxiv.org/abs/2301.07825
        """
        return diag(self, method, key, samples)

    def eigsh(
        self,
        k: int,
        which: Literal["LM", "LA", "SA"] = "LM",
        *,
        key: Tensor | None = None,
        rtol: float | None = None,
        maxiter: int = 300,
    ) -> Eigenpairs:
        """The k eigenvalues largest in magnitude ("LM"), the largest ("LA") or smallest ("SA"), and their vectors.

        Block Lanczos with k vectors at a time, so that an eigenvalue is found as often as it occurs, full
        reorthogonalisation and thick restarts; the memory is some 6 k vectors. It starts from the same numbers in every
        call, or from `key`. It ends where every residual |A x - value x| is at most `rtol` times the largest
        eigenvalue's magnitude (by default the square root of the dtype's precision).
        Returns `(values, vectors)`: `(k,)`, ascending, and `(n, k)`, orthonormal.

        Raises `ValueError` for an operator that is not symmetric and for k outside 1..n, `RuntimeError` where `maxiter`
        block products do not suffice.

        Source: Golub and Underwood 1977; Wu and Simon 2000.
        """
        return eigsh(self, k, which, key, rtol, maxiter)

    def solve(
        self,
        b: Any,
        method: Literal["cg", "minres"] = "cg",
        *,
        damping: float = 0.0,
        rtol: float = 1e-5,
        maxiter: int | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> Any:
        """x with (A + damping I) x = b, for a symmetric operator.

        b: `(n,)`, `(n, k)` or a tree of the codomain's structure; x has the same form. "cg" (conjugate gradients) is
        for positive definite operators, "minres" for indefinite ones too. preconditioner: a symmetric positive definite
        operator close to the inverse. It ends where the residual of each column, computed anew, is at most `rtol` times
        the norm of b.

        Raises `ValueError` for an operator that is not symmetric or, with "cg", not positive definite, `RuntimeError`
        where `maxiter` iterations (by default 10 n, at most 1,000) or the precision do not suffice.

        Source: Hestenes and Stiefel 1952; Paige and Saunders 1975.
        """
        operator = self + damping * _algebra().IdentityOperator(self.codomain) if damping else self
        options = (method, rtol, maxiter, preconditioner)
        if isinstance(b, Tensor) and b.ndim == 1:
            return solve(operator, b[:, None], *options)[:, 0]
        if isinstance(b, Tensor) and b.ndim == 2 and b.shape[0] == self.shape[0]:
            return solve(operator, b, *options)
        tree.check_like(self.codomain, b, f"{self}: b")
        return unravel(solve(operator, ravel(b, self.dtype)[:, None], *options)[:, 0], self.domain)

    def logdet(
        self,
        method: Literal["exact", "lanczos"] = "exact",
        *,
        damping: float = 0.0,
        key: Tensor | None = None,
        samples: int = 10,
        steps: int = 30,
    ) -> Tensor:
        """The logarithm of the determinant of A + damping I, symmetric and positive definite; a 0-d tensor.

        `"exact"` by a Cholesky factor of the dense matrix; `"lanczos"` by stochastic Lanczos quadrature, which needs
        `samples * steps` products and memory for as many vectors: its error falls as 1 / sqrt(samples) and
        exponentially with `steps`. `key`: of `fnn.random`, for the estimate.

        Raises `ValueError` for an operator that is not symmetric and positive definite, and for a missing key.

        Source: Ubaru, Chen and Saad 2017, https://doi.org/10.1137/16M1104974
        """
        operator = self + damping * _algebra().IdentityOperator(self.codomain) if damping else self
        return logdet(operator, method, key, samples, steps)


def _algebra() -> Any:
    # Its classes are operators themselves, so it can be imported only once this module is there.
    from fnn.diff.operators import _algebra

    return _algebra
