"""Rules of convolution and pooling: sliding windows, and the derivatives of those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fnn.diff._sparse.call import Call, Unknown, shape_of
from fnn.diff._sparse.index_sets import IndexSets, collect, reduce, union_all

Pairs = tuple[np.ndarray, np.ndarray]


def convolution(call: Call) -> IndexSets:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
    shape, kernel = tuple(call.result.shape), shape_of(weight)[2:]
    parts = []
    if isinstance(x, IndexSets):
        pairs = _taps(shape[2:], x.shape[2:], kernel, stride, padding, dilation, transposed)
        parts.append(_slid(x, shape, groups, pairs))
    if isinstance(weight, IndexSets):
        parts.append(_as_channels(_weight_channels(weight, groups, first=not transposed), len(shape)))
    if isinstance(bias, IndexSets):
        parts.append(_as_channels(bias, len(shape)))
    return union_all(parts, shape)


def convolution_backward(call: Call) -> Any:
    grad, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = call.args
    x_shape, weight_shape = shape_of(x), shape_of(weight)
    spatial = [0, *range(2, len(x_shape))]
    of_x, of_weight, of_bias = [], [], []
    if isinstance(grad, IndexSets):
        out, into = _taps(grad.shape[2:], x_shape[2:], weight_shape[2:], stride, padding, dilation, transposed)
        channels = reduce(grad, spatial, False)
        of_x.append(_slid(grad, x_shape, groups, (into, out)))
        of_weight.append(_at_weight(channels, weight_shape, groups, first=not transposed))
        of_bias.append(channels)
    if isinstance(x, IndexSets):
        of_weight.append(_at_weight(reduce(x, spatial, False), weight_shape, groups, first=transposed))
    if isinstance(weight, IndexSets):
        of_x.append(_as_channels(_weight_channels(weight, groups, first=transposed), len(x_shape)))
    bias_shape = (shape_of(grad)[1],)
    results = zip((of_x, of_weight, of_bias), (x_shape, weight_shape, bias_shape), wanted, strict=True)
    return tuple(union_all(parts, shape) if want and parts else None for parts, shape, want in results)


def avg_pool(call: Call) -> IndexSets:
    """avg_pool(x, kernel, stride, padding, ...)"""
    shape = tuple(call.result.shape)
    x = call.args[0]
    return _slid_planes(x, shape, *_pool_taps(shape, x.shape, call.args[1:4]))


def avg_pool_backward(call: Call) -> IndexSets:
    """avg_pool_backward(grad, x, kernel, stride, padding, ...)"""
    return _pool_backward(call, call.args[2:5])


def max_pool_backward(call: Call) -> IndexSets:
    """max_pool_with_indices_backward(grad, x, kernel, stride, padding, dilation, ...)"""
    return _pool_backward(call, call.args[2:6])


def _pool_backward(call: Call, windows: Sequence[Any]) -> Any:
    grad, shape = call.args[0], tuple(call.result.shape)
    if not isinstance(grad, IndexSets):
        return Unknown(call.result)
    n, (out, into) = _pool_taps(grad.shape, shape, windows)
    return _slid_planes(grad, shape, n, (into, out))


def _pool_taps(out: Sequence[int], into: Sequence[int], windows: Sequence[Any]) -> tuple[int, Pairs]:
    """How many dimensions a pooling slides over, and the pairs; no stride means that of the kernel."""
    defaults = ([], [], [0], [1])
    kernel, stride, padding, dilation = (*windows, *defaults[len(windows) :])
    n = len(kernel)
    return n, _taps(out[-n:], into[-n:], kernel, stride or kernel, padding, dilation, False)


def _taps(
    out: Sequence[int],
    into: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
) -> Pairs:
    """All pairs (output place, input place) that a window joins, as flat numbers."""
    if transposed:
        sources, places = _taps(into, out, kernel, stride, padding, dilation, False)
        return places, sources
    n = len(out)
    stride, padding, dilation = ([*each] * n if len(each) == 1 else each for each in (stride, padding, dilation))
    places, sources = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for d in range(n):
        o, k = (each.ravel() for each in np.indices((out[d], kernel[d])))
        i = o * stride[d] - padding[d] + k * dilation[d]
        inside = (i >= 0) & (i < into[d])
        places = (places[:, None] * out[d] + o[inside]).ravel()
        sources = (sources[:, None] * into[d] + i[inside]).ravel()
    return places, sources


def _slid(sets: IndexSets, shape: Sequence[int], groups: int, pairs: Pairs) -> IndexSets:
    """sets (N, C, ...) to `shape` (N, C2, ...), where every channel of a group sees every channel of its group."""
    grouped = sets.replace(sets.ids.reshape(sets.shape[0], groups, -1, *sets.shape[2:]))
    slid = _slid_planes(reduce(grouped, [2], False), (shape[0], groups, *shape[2:]), len(shape) - 2, pairs)
    wide = slid.ids[:, :, None]
    wide = np.broadcast_to(wide, (shape[0], groups, shape[1] // groups, *shape[2:]))
    return slid.replace(wide.reshape(shape))


def _slid_planes(sets: IndexSets, shape: Sequence[int], n: int, pairs: Pairs) -> IndexSets:
    """Each plane of the last n dimensions by itself."""
    size = int(np.prod(shape[-n:], dtype=np.int64))
    planes = sets.ids.reshape(int(np.prod(shape[:-n], dtype=np.int64)), -1)
    targets, sources = pairs
    owners = np.arange(len(planes))[:, None] * size + targets
    united = collect(owners.ravel(), planes[:, sources].ravel(), len(planes) * size, sets.family)
    return united.replace(united.ids.reshape(shape))


def _weight_channels(weight: IndexSets, groups: int, first: bool) -> IndexSets:
    """Of a weight (A, B, ...) the union for each of its first channels A, or of its second, groups * B."""
    if first:
        return reduce(weight, range(1, len(weight.shape)), False)
    grouped = weight.replace(weight.ids.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:]))))
    channels = reduce(grouped, [1, 3], False)
    return channels.replace(channels.ids.reshape(-1))


def _at_weight(channels: IndexSets, shape: Sequence[int], groups: int, first: bool) -> IndexSets:
    """The inverse: channels' sets at all places of a weight of `shape` that belong to them."""
    kernel = [1] * (len(shape) - 2)
    if first:
        return channels.replace(channels.ids.reshape(-1, 1, *kernel)).broadcast(shape)
    wide = np.broadcast_to(channels.ids.reshape(groups, 1, -1), (groups, shape[0] // groups, shape[1]))
    return channels.replace(wide.reshape(shape[0], shape[1], *kernel)).broadcast(shape)


def _as_channels(channels: IndexSets, rank: int) -> IndexSets:
    return channels.replace(channels.ids.reshape(-1, *[1] * (rank - 2)))
