"""A sparse derivative that is ready to be evaluated: pure tensor code, which compiles and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn.diff._purity import call
from fnn.diff._sparse.flat import FlatFunction, input_shapes
from fnn.diff._sparse.pattern import SparsityPattern
from fnn.diff._sparse.plan import Plan


class PreparedDerivative:
    """A sparse Jacobian or Hessian of a function at inputs of known shapes; prints its size, nonzeros and colors.

    Made by `sparse_jacobian(f).prepare(*args)` or `sparse_hessian(f).prepare(*args)`.
    pattern: the `SparsityPattern`. mode: "fwd" or "rev". count: how many products an evaluation takes.
    """

    def __init__(
        self,
        function: FlatFunction,
        pattern: SparsityPattern,
        plan: Plan,
        x: Tensor,
        shapes: tuple[Any, ...],
        value: bool,
        chunk_size: int | None,
    ) -> None:
        self.pattern, self.mode, self.count = pattern, plan.mode, plan.count
        self._function, self._shapes, self._value = function, shapes, value
        self._chunk = chunk_size or max(plan.count, 1)
        # Comparing integers would take twice as long; narrower numbers could not tell 257 colors apart.
        self._colors = torch.from_numpy(plan.colors).to(x.device, torch.promote_types(x.dtype, torch.float32))
        self._places = torch.from_numpy(plan.places).to(x.device)
        self._rows = torch.from_numpy(pattern.rows).to(x.device)
        self._cols = torch.from_numpy(pattern.cols).to(x.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The derivative as a torch sparse matrix (COO, coalesced), with value and aux where they were asked for.

        Raises `RuntimeError` in a compiled function and under `vmap`, which have no sparse matrices: use `values`.
        """
        result = self.values(*args, **kwargs)
        aux, value = self._function.has_aux, self._value
        entries = result[0 if not value else 1] if aux or value else result
        matrix = self.matrix(entries)
        if value:
            return result[0], matrix
        return (matrix, result[1]) if aux else matrix

    def values(self, *args: Any, **kwargs: Any) -> Any:
        """The entries alone, (nnz,) in the order of the pattern's rows and cols: this works under every transform.

        With value=True and has_aux=True as `jacobian` returns them, the entries in the place of the matrix.
        """
        if (found := input_shapes(args, kwargs)) != self._shapes:
            known, given = self._shapes[1:], found[1:]
            what = f"shapes {known}, got {given}" if known != given else "another structure"
            raise ValueError(f"{self._function.name}: prepared for inputs of {what}; prepare again")
        flat, x = self._function.bind(args, kwargs)
        products, (value, aux) = call(self._function.name, lambda x, *_: self._products(flat, x), x, args, kwargs)
        entries = products.reshape(-1).index_select(0, self._places)
        if self._value:
            return ((value, aux) if self._function.has_aux else value), entries
        return (entries, aux) if self._function.has_aux else entries

    def matrix(self, entries: Tensor) -> Tensor:
        """The torch sparse matrix (COO, coalesced) with these entries, (nnz,)."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self._function.name}: torch.compile cannot build sparse matrices; compile the entries, "
                "torch.compile(J.values), and make a matrix of them outside: J.matrix(entries)"
            )
        if torch._C._functorch.is_batchedtensor(entries):  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{self._function.name}: vmap has no sparse matrices; batch the entries, torch.vmap(J.values)(xs), and "
                "make matrices of them outside: J.matrix(entries[i])"
            )
        indices = torch.stack([self._rows, self._cols])
        return torch.sparse_coo_tensor(indices, entries, self.pattern.shape, is_coalesced=True, check_invariants=False)

    def to_scipy(self, entries: Tensor) -> Any:
        """The `scipy.sparse.csr_array` with these entries, (nnz,). Raises `ImportError` without SciPy."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise ImportError("to_scipy needs SciPy: pip install scipy") from error
        data = entries.detach().cpu().numpy()
        return csr_array((data, self.pattern.cols, self.pattern.starts), shape=self.pattern.shape)

    def _products(self, flat: Any, x: Tensor) -> tuple[Tensor, Any]:
        """One product a color, (count, m) or (count, n), and (value, aux) of the same pass."""
        map_of = torch.func.grad(flat, has_aux=True) if self._function.scalar else flat
        wanted = self._value or self._function.has_aux
        if self.count == 0:
            out, extra = map_of(x)
            return out.new_zeros(0), extra
        starts = range(0, self.count, self._chunk)
        if self.mode == "rev":
            out, pullback, extra = torch.func.vjp(map_of, x, has_aux=True)  # type: ignore[misc]
            parts = [torch.vmap(lambda seed: pullback(seed)[0])(self._seeds(start, out)) for start in starts]
            return torch.cat(parts) if len(parts) > 1 else parts[0], extra

        def product(seed: Tensor) -> Any:
            _, tangent, extra = torch.func.jvp(map_of, (x,), (seed,), has_aux=True)  # type: ignore[misc]
            return (tangent, extra) if wanted else (tangent, ())

        per_color: Any = (0, None)
        passes = [torch.vmap(product, out_dims=per_color)(self._seeds(start, x)) for start in starts]
        parts = [tangents for tangents, _ in passes]
        extra = passes[0][1] if wanted else (None, None)
        return torch.cat(parts) if len(parts) > 1 else parts[0], extra

    def _seeds(self, start: int, like: Tensor) -> Tensor:
        """(colors from `start`, n): of each color the sum of its unit vectors; not stored, as the compiler fuses it."""
        stop = min(start + self._chunk, self.count)
        colors = torch.arange(start, stop, dtype=self._colors.dtype, device=like.device)
        return (self._colors == colors[:, None]).to(like.dtype)

    def __repr__(self) -> str:
        m, n = self.pattern.shape
        hessian = self._function.scalar
        kind = "HVP" if hessian else "JVP" if self.mode == "fwd" else "VJP"
        note = f", conservative at {', '.join(self.pattern.conservative)}" if self.pattern.conservative else ""
        colors = f"{self.count} color{'' if self.count == 1 else 's'} by {kind}"
        return f"Sparse{'Hessian' if hessian else 'Jacobian'}({m}x{n}, nnz={self.pattern.nnz}, {colors}{note})"
