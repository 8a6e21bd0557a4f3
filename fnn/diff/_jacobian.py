"""The Jacobian of a function of pytrees, by the cheaper mode, all rows at once or some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack

from fnn import tree
from fnn._rules._checks import check_function
from fnn.diff import _chunk, _seeds
from fnn.diff._arguments import Argnums, at, own_code
from fnn.diff._purity import call
from fnn.diff._transforms import pullback_of, pushforward

BUDGET = 256 * 2**20
REVERSE_BIAS = 1.5  # a column costs about as much more than a row: fused forward-mode formulas are fewer


class Options(NamedTuple):
    """How a Jacobian is computed and given; the names are those of `jacobian`."""

    name: str
    mode: str
    has_aux: bool
    chunk_size: int | str | None
    flat: bool
    batched: bool
    holomorphic: bool
    budget: int


def jacobian(
    f: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: str = "auto",
    has_aux: bool = False,
    chunk_size: int | str | None = None,
    flat: bool = False,
    batched: bool = False,
    value: bool = False,
    holomorphic: bool = False,
    budget: int = BUDGET,
) -> Callable[..., Any]:
    """The function that computes the Jacobian of `f`, with the arguments of `f`.

    The result has the structure of the output; in the place of each leaf is the structure of the argument (a tuple
    for a tuple of argnums), with leaves of shape out.shape + in.shape, in the wider dtype of the two.

    argnums: the argument, or a tuple of arguments, to differentiate with respect to.
    mode: "rev" computes rows, "fwd" columns, "auto" rows unless there are more than 1.5 times as many as columns.
    has_aux: `f` returns `(output, aux)`, and the result is `(jacobian, aux)`.
    chunk_size: how many rows or columns are computed at once; None means all. "auto" measures what one needs and
    takes as many as keep the memory beside the result within `budget` bytes, at least one.
    flat: give one matrix (m, n), in the order of `fnn.tree.leaves`; `unravel_jacobian` makes the trees of it.
    batched: `f` takes one sample, and the chosen arguments have a leading axis of B samples: the result is
    (B, *out, *in), or (B, m, n). Other arguments are the same for all samples.
    value: the result is `(output, jacobian)`, or `((output, aux), jacobian)`, without a second evaluation.
    holomorphic: complex arguments and outputs; the complex derivative of a function that has one. Real arguments
    with complex outputs need no flag and take forward mode.

    Raises TypeError for arguments without derivatives, complex ones without `holomorphic`, and a function that draws
    from torch's global generator; ValueError for options that do not fit; RuntimeError for control flow on values.

    Example:
        >>> jacobian(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    check_function("jacobian", f)
    options = Options("jacobian", mode, has_aux, chunk_size, flat, batched, holomorphic, budget)
    check_options(options)

    def derivative(*args: Any, **kwargs: Any) -> Any:
        of_selected, selected = at("jacobian", f, argnums, args, kwargs)

        def run(point: Any, *_: Any) -> tuple[Any, Any, Any]:
            return value_aux_jacobian(of_selected, point, options)

        output, aux, result = call("jacobian", run, selected, args, kwargs)
        if value:
            return ((output, aux) if has_aux else output), result
        return (result, aux) if has_aux else result

    return own_code(derivative)


def auto_chunk_size(
    f: Callable[..., Any],
    *args: Any,
    argnums: Argnums = 0,
    mode: str = "auto",
    has_aux: bool = False,
    batched: bool = False,
    holomorphic: bool = False,
    budget: int = BUDGET,
) -> int:
    """The chunk size that `jacobian(f, chunk_size="auto")(*args)` takes, for use in a compiled function.

    It evaluates a few rows (or columns) and counts the bytes that are alive at once; no clock is read and the result
    is the same on every run. budget: bytes beside the result. For `hessian(f)` measure `grad(f)`.

    Raises what `jacobian` raises.

    Example:
        >>> auto_chunk_size(torch.sin, torch.zeros(1000), budget=1_000_000)
        124
    """
    check_function("auto_chunk_size", f)
    options = Options("auto_chunk_size", mode, has_aux, "auto", False, batched, holomorphic, budget)
    check_options(options)
    of_selected, selected = at("auto_chunk_size", f, argnums, args)
    return call("auto_chunk_size", lambda point, *_: _measured(of_selected, point, options), selected, args)


def check_options(options: Options) -> None:
    """Raise ValueError for options that do not exist."""
    name, mode, chunk_size = options.name, options.mode, options.chunk_size
    if mode not in ("auto", "fwd", "rev"):
        raise ValueError(f'{name}: mode must be "auto", "fwd" or "rev", got {mode!r}')
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool) and chunk_size > 0
    if chunk_size is not None and chunk_size != "auto" and not whole:
        raise ValueError(f'{name}: chunk_size must be None, "auto" or a positive int, got {chunk_size!r}')
    if not isinstance(options.budget, int) or options.budget <= 0:
        raise ValueError(f"{name}: budget must be a positive number of bytes, got {options.budget!r}")


def value_aux_jacobian(f: Callable[[Any], Any], selected: Any, options: Options) -> tuple[Any, Any, Any]:
    """`(output, aux, jacobian)` of a function of one tree."""
    _check_numbers(options, selected)
    if isinstance(options.chunk_size, str):
        if torch.compiler.is_compiling() or get_interpreter_stack():
            raise ValueError(
                f'{options.name}: chunk_size="auto" measures, which it cannot do inside torch.compile or another '
                "transform; measure before, chunk_size = fnn.diff.auto_chunk_size(f, *args), and pass the number"
            )
        chunk_size = _measured(f, selected, options)
    else:
        chunk_size = options.chunk_size
    pieces = _pieces(f, selected, options)
    output, aux, leaves = pieces(0, chunk_size)
    point, sample = _sample(selected, options), _sample(output, options)
    forward = _is_forward(options, point, sample)
    total = tree.size(point) if forward else tree.size(sample)
    lead = tree.leaves(selected)[0].shape[:1] if options.batched else ()
    if chunk_size is None or chunk_size >= total:
        matrices = [_matrix(leaf, lead, total, forward) for leaf in leaves]
        flat = None
    else:
        matrices, flat = _in_chunks(pieces, leaves, lead, total, chunk_size, forward, point, sample, options)
    if options.flat:
        if flat is None:
            flat = matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=-2 if forward else -1)
        return output, aux, flat.to(_seeds.widest(sample, point))
    if forward:
        return output, aux, _seeds.from_rows(matrices, sample, point)
    return output, aux, _seeds.from_columns(matrices, sample, point, flat_input=False)


def _pieces(f: Callable[[Any], Any], selected: Any, options: Options) -> Callable[[int, int | None], Any]:
    """`pieces(start, stop) -> (output, aux, leaves)`, where the leaves are those rows or columns.

    Rows have the leaves of the argument, (rows, *in.shape), columns those of the output, (columns, *out.shape); in
    front of both, and of output and aux, is the axis of samples where there is one.
    """
    if not options.batched:
        return _pieces_at(f, selected, options)

    def pieces(start: int, stop: int | None) -> Any:
        return torch.vmap(lambda point: _pieces_at(f, point, options)(start, stop))(selected)

    return pieces


def _pieces_at(f: Callable[[Any], Any], point: Any, options: Options) -> Callable[[int, int | None], Any]:
    if options.mode != "fwd" or tree.size(point) == 0:
        rows = _rows_at(f, point, options)
        if rows is not None:
            return rows

    def columns(start: int, stop: int | None) -> Any:
        stop = tree.size(point) if stop is None else min(stop, tree.size(point))

        def column(tangent: Any) -> Any:
            output, tangent, aux = pushforward(options.name, f, (point,), (tangent,), options.has_aux)
            return output, aux, tree.leaves(tangent)

        output, aux, leaves = torch.vmap(column)(_seeds.unit_vectors(point, start, stop))
        output, aux = tree.map(lambda leaf: leaf[0], (output, aux))  # the same for all columns
        return output, aux, leaves

    return columns


def _rows_at(f: Callable[[Any], Any], point: Any, options: Options) -> Callable[[int, int | None], Any] | None:
    """The pieces in reverse mode, or None where the sizes of the output ask for forward mode."""
    output, pullback, aux = pullback_of(options.name, f, (point,), options.has_aux, composed=True)
    if _is_forward(options, point, output):
        return None
    total = tree.size(output)

    def rows(start: int, stop: int | None) -> Any:
        stop = total if stop is None else min(stop, total)
        if start == stop:
            return output, aux, [leaf.new_zeros((0, *leaf.shape)) for leaf in tree.leaves(point)]

        def row(cotangent: Any) -> list[Tensor]:
            leaves = tree.leaves(pullback(cotangent, retain_graph=stop < total))
            # torch's pullback is that of the conjugate
            return [leaf.conj().resolve_conj() for leaf in leaves] if options.holomorphic else leaves

        return output, aux, torch.vmap(row)(_seeds.unit_vectors(output, start, stop))

    return rows


def _is_forward(options: Options, point: Any, output: Any) -> bool:
    """Whether columns are computed, for one sample; raises for complex outputs that neither mode can do."""
    if options.holomorphic and not all(leaf.is_complex() for leaf in tree.leaves(output)):
        raise TypeError(f"{options.name}: the output is real, and a real function that varies is not holomorphic")
    if tree.size(point) == 0:
        return False
    if not options.holomorphic and any(leaf.is_complex() for leaf in tree.leaves(output)):
        if options.mode == "rev":
            raise TypeError(f'{options.name}: complex outputs of real arguments need mode="fwd" or "auto"')
        return True
    if options.mode == "auto":
        return tree.size(output) > REVERSE_BIAS * tree.size(point)
    return options.mode == "fwd"


def _check_numbers(options: Options, selected: Any) -> None:
    leaves = tree.leaves(selected)
    for path, leaf in tree.paths(selected).items() if not torch.compiler.is_compiling() else enumerate(leaves):
        where = f"leaf {path!r} of the argument" if len(leaves) > 1 else "the argument"
        if leaf.is_complex() and not options.holomorphic:
            raise TypeError(
                f"{options.name}: {where} is {leaf.dtype}; with holomorphic=True the complex derivative is computed, "
                "for functions that have one; for others differentiate with respect to torch.view_as_real(z)"
            )
        if options.holomorphic and not leaf.is_complex():
            raise TypeError(f"{options.name}: holomorphic=True needs complex arguments, but {where} is {leaf.dtype}")
        if options.batched and (leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[:1].numel()):
            raise ValueError(
                f"{options.name}: with batched=True every leaf has a leading axis of samples, of one length; {where} "
                f"has shape {tuple(leaf.shape)}, the first leaf {tuple(leaves[0].shape)}"
            )


def _sample(values: Any, options: Options) -> Any:
    """Shapes and dtypes of one sample, on the meta device."""

    def one(leaf: Tensor) -> Tensor:
        shape = leaf.shape[1:] if options.batched else leaf.shape
        return torch.empty(shape, dtype=leaf.dtype, device="meta")

    return tree.map(one, values)


def _matrix(leaf: Tensor, lead: tuple[int, ...], count: int, forward: bool) -> Tensor:
    """A leaf of `count` rows or columns as a matrix (*lead, m, n)."""
    size = leaf[(0,) * len(lead)].numel() // count if count else leaf.shape[len(lead) + 1 :].numel()
    matrix = leaf.reshape(*lead, count, size)
    return matrix.mT if forward else matrix


def _in_chunks(
    pieces: Callable[[int, int | None], Any],
    first: list[Tensor],
    lead: tuple[int, ...],
    total: int,
    chunk_size: int,
    forward: bool,
    point: Any,
    sample: Any,
    options: Options,
) -> tuple[list[Tensor], Tensor | None]:
    """The matrix of each leaf, and all of them as one where that is asked for and was written at once."""
    starts = range(chunk_size, total, chunk_size)
    functional = torch.compiler.is_compiling() or get_interpreter_stack() or any(leaf.requires_grad for leaf in first)
    if functional:
        parts = [[leaf] for leaf in first]
        for start in starts:
            for part, leaf in zip(parts, pieces(start, start + chunk_size)[2], strict=True):
                part.append(leaf)
        return [_matrix(torch.cat(part, len(lead)), lead, total, forward) for part in parts], None
    sizes = [leaf.numel() for leaf in tree.leaves(sample if forward else point)]
    shape = (tree.size(sample), tree.size(point))
    flat = None
    if options.flat:
        flat = first[0].new_empty((*lead, *shape), dtype=_seeds.widest(sample, point))
        matrices = list(flat.split(sizes, dim=-2 if forward else -1))
    else:
        shapes = [(size, shape[1]) if forward else (shape[0], size) for size in sizes]
        matrices = [leaf.new_empty((*lead, *shape)) for leaf, shape in zip(first, shapes, strict=True)]
    # Each chunk goes to its place at once: collecting the chunks would need the result twice.
    _write(first, matrices, 0, lead, forward)
    for start in starts:
        _write(pieces(start, min(start + chunk_size, total))[2], matrices, start, lead, forward)
    return matrices, flat


def _write(leaves: list[Tensor], matrices: list[Tensor], start: int, lead: tuple[int, ...], forward: bool) -> None:
    """Copies a chunk into the matrices and empties its list, which the caller still holds."""
    for matrix, leaf in zip(matrices, leaves, strict=True):
        count = leaf.shape[len(lead)]
        matrix.narrow(-1 if forward else -2, start, count).copy_(_matrix(leaf, lead, count, forward))
    leaves.clear()


def _measured(f: Callable[[Any], Any], selected: Any, options: Options) -> int:
    def run(count: int) -> int:
        """Evaluates so many rows or columns and gives how many there are in all."""
        pieces = _pieces(f, selected, options)
        output, _, leaves = pieces(0, count)
        point, sample = _sample(selected, options), _sample(output, options)
        total = tree.size(point) if _is_forward(options, point, sample) else tree.size(sample)
        if count < total:  # as in the loop, where the first chunk's output is still there
            leaves.clear()
            pieces(count, min(2 * count, total))
        return total

    return _chunk.size_for(run, options.budget)
