"""How the operations of a linear graph pass index sets on: one rule an operation, by the operator's name.

Every rule may give more than the true dependence, never less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fnn.diff._sparse.call import Call, Unknown, moved, shape_of
from fnn.diff._sparse.convolutions import (
    avg_pool,
    avg_pool_backward,
    convolution,
    convolution_backward,
    max_pool_backward,
)
from fnn.diff._sparse.index_sets import IndexSets, check_size, collect, in_one_family, reduce, union_all
from fnn.diff._sparse.indexing import gather, index, index_put, index_select, scatter

Rule = Callable[[Call], Any]


def pointwise(call: Call) -> IndexSets:
    return union_all(call.dependent, tuple(call.result.shape))


def multiply(call: Call) -> IndexSets:
    """Elementwise, except that a constant zero lets nothing through."""
    result = pointwise(call)
    for factor in call.args[:2]:
        if isinstance(factor, Tensor):
            result = result.replace(np.where(_array(factor != 0), result.ids, 0))
        elif isinstance(factor, int | float) and factor == 0:
            result = result.replace(np.zeros_like(result.ids))
    return result


def where(call: Call) -> IndexSets:
    """A condition that is constant chooses; any other lets both through."""
    condition, a, b = call.args
    if not isinstance(condition, Tensor):
        return pointwise(call)
    a, b = (0.0 if isinstance(branch, int | float) else branch for branch in (a, b))
    return moved(lambda a, b: torch.where(condition.cpu(), a, b), (a, b))


def masked_fill(call: Call) -> IndexSets:
    if not isinstance(call.args[1], Tensor) or isinstance(call.args[2], IndexSets):
        return pointwise(call)
    mask = call.args[1].cpu()
    return moved(lambda x: torch.where(mask, 0.0, x), (call.args[0],))


def move(call: Call) -> Any:
    return moved(call.target, call.args, call.kwargs)


def view(call: Call) -> IndexSets:
    return moved(lambda x: x.reshape(tuple(call.result.shape)), (call.args[0],))


def as_strided(call: Call) -> Any:
    """as_strided(x, size, stride, offset) and as_strided_scatter(x, source, size, stride, offset)."""
    tensors = 1 if call.target._schema.name == "aten::as_strided" else 2
    like, options = call.first, call.args[tensors:]
    if not like.is_contiguous() or like.storage_offset() != 0:
        return everything(call)
    return moved(lambda *tensors: call.target(*tensors, *options), call.args[:tensors])


def pad(call: Call) -> IndexSets:
    return moved(lambda x: torch.ops.aten.constant_pad_nd(x, call.args[1], 0.0), (call.args[0],))


def copy(call: Call) -> IndexSets | Unknown:
    source = call.args[1]
    return source.broadcast(shape_of(call.result)) if isinstance(source, IndexSets) else Unknown(call.result)


def total(call: Call) -> IndexSets:
    """sum and mean, of everything or along dimensions."""
    sets, dims, keepdim = call.args[0], call.argument(1), bool(call.argument(2, call.kwargs.get("keepdim", False)))
    return reduce(sets, [dims] if isinstance(dims, int) else dims, keepdim)


def along(dims_at: int) -> Rule:
    """Each element may depend on all of its line (plane, ...) along the dimensions in argument `dims_at`."""

    def rule(call: Call) -> IndexSets:
        dims = call.args[dims_at]
        dims = [dims] if isinstance(dims, int) else dims
        lines = [reduce(sets, dims, True) if sets.shape else sets for sets in call.dependent]
        return union_all(lines, tuple(call.result.shape))

    return rule


def cumsum(call: Call) -> IndexSets:
    sets, dim = call.args[:2]
    if not sets.shape:
        return sets
    ids = np.moveaxis(sets.ids, dim, -1)
    lines = ids.reshape(-1, ids.shape[-1])
    check_size(lines.size * lines.shape[1] // 2)
    later, earlier = np.tril_indices(ids.shape[-1])
    groups = np.arange(lines.shape[0])[:, None] * ids.shape[-1] + later
    united = collect(groups.ravel(), lines[:, earlier].ravel(), lines.size, sets.family)
    return united.replace(np.moveaxis(united.ids.reshape(ids.shape), -1, dim))


def matmul(call: Call) -> IndexSets:
    """Products over the last two dimensions, with or without a bias that broadcasts."""
    a, b = call.args[:2]
    shape = tuple(call.result.shape)
    parts = []
    if isinstance(a, IndexSets):
        parts.append(_times_constant(a, b) if _has_zeros(b) else reduce(a, [-1], True))
    if isinstance(b, IndexSets):
        parts.append(_transposed(_times_constant(_transposed(b), a.mT)) if _has_zeros(a) else reduce(b, [-2], True))
    if isinstance(bias := call.argument(2), IndexSets):
        parts.append(bias)
    return union_all(parts, shape)


def _has_zeros(matrix: Any) -> TypeGuard[Tensor]:
    strided = isinstance(matrix, Tensor) and matrix.layout == torch.strided
    return strided and matrix.dim() == 2 and bool((matrix == 0).any())


def _times_constant(a: IndexSets, matrix: Tensor) -> IndexSets:
    """a (..., m, k) times a constant (k, n): only through its nonzeros."""
    inner, outer = (each.numpy() for each in torch.nonzero(matrix.cpu(), as_tuple=True))
    lines = a.ids.reshape(-1, a.shape[-1])
    check_size(lines.shape[0] * len(inner))
    groups = np.arange(lines.shape[0])[:, None] * matrix.shape[1] + outer
    united = collect(groups.ravel(), lines[:, inner].ravel(), lines.shape[0] * matrix.shape[1], a.family)
    return united.replace(united.ids.reshape(*a.shape[:-1], matrix.shape[1]))


def _transposed(sets: IndexSets) -> IndexSets:
    return sets.replace(np.swapaxes(sets.ids, -1, -2))


def view_as_real(call: Call) -> IndexSets:
    return call.args[0].replace(np.repeat(call.args[0].ids[..., None], 2, axis=-1))


def view_as_complex(call: Call) -> IndexSets:
    return reduce(call.args[0], [-1], False)


def everything(call: Call) -> Any:
    """The conservative answer: each element of each result depends on all that any argument depends on."""
    ids, family = in_one_family(call.dependent)
    joined = IndexSets(np.concatenate([each.ravel() for each in ids]), family)
    whole = reduce(joined, None, False)
    results = [call.result] if isinstance(call.result, Tensor) else call.result
    sets = tuple(whole.broadcast(tuple(r.shape)) if isinstance(r, Tensor) else None for r in results)
    return sets[0] if isinstance(call.result, Tensor) else sets


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


_SAME = "_to_copy clone alias detach lift_fresh lift_fresh_copy contiguous conj _conj _neg_view complex"
_MOVE = (
    "permute transpose t expand slice select unsqueeze squeeze split split_with_sizes unbind chunk cat stack flip roll "
    "repeat diagonal diag_embed unfold tril triu slice_scatter select_scatter diagonal_scatter movedim pixel_shuffle "
    "pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d slice_backward select_backward diagonal_backward"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), pointwise),
    **dict.fromkeys(_MOVE.split(), move),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view),
    **dict.fromkeys(("sum", "mean"), total),
    **dict.fromkeys(("mm", "bmm"), matmul),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), along(1)),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), avg_pool),
    **dict.fromkeys(("avg_pool2d_backward", "avg_pool3d_backward"), avg_pool_backward),
    **dict.fromkeys(("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward"), max_pool_backward),
    **dict.fromkeys(("scatter", "scatter_add"), scatter),
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), index_put),
    "mul": multiply,
    "where": where,
    "masked_fill": masked_fill,
    "constant_pad_nd": pad,
    "copy": copy,
    "as_strided": as_strided,
    "as_strided_scatter": as_strided,
    "cumsum": cumsum,
    "gather": gather,
    "index_select": index_select,
    "convolution": convolution,
    "convolution_backward": convolution_backward,
    "view_as_real": view_as_real,
    "view_as_complex": view_as_complex,
    "_softmax_backward_data": along(2),
    "_log_softmax_backward_data": along(2),
}
RULES: dict[str, Rule] = {
    **{f"aten::{name}": rule for name, rule in _RULES.items()},
    "triton_kernels::product": matmul,
    "triton_kernels::softmax_gradient": along(2),
}
