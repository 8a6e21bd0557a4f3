"""Softmax and its backward pass on the tensors as they lie: any dimension, any strides, nothing copied."""

import dataclasses
import itertools

import torch
from torch import Tensor

from triton_kernels._launch import needs_64_bit
from triton_kernels._softmax import _configs

OUTER_DIMS = 3  # what the kernel takes beside rows and columns; further ones are looped over here
SHORT_ROW_TILE = 512  # values that rows and columns should have together for a program to be worth its launch


def softmax(x: Tensor, dim: int, *, log: bool = False) -> Tensor:
    """Softmax of x over dim, or its logarithm: contiguous, of x's shape and dtype, computed in float32.

    x: float32, float16 or bfloat16 of any shape and strides.
    """
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        from triton_kernels._softmax._kernel import softmax_kernel

        _launch(softmax_kernel, [x], output, dim, log)
    return output


def softmax_backward(grad: Tensor, output: Tensor, dim: int, *, log: bool = False) -> Tensor:
    """The gradient of x from that of output = softmax(x, dim, log=log): contiguous, of output's dtype.

    grad, output: of one shape, each with strides of its own.
    """
    result = torch.empty_like(output, memory_format=torch.contiguous_format)
    if output.numel():
        from triton_kernels._softmax._kernel import softmax_backward_kernel

        _launch(softmax_backward_kernel, [grad, output], result, dim, log)
    return result


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a kernel sees its tensors: sizes are (outer..., rows, columns), strides those of each tensor."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    along_columns: bool


def _launch(kernel, inputs: list[Tensor], output: Tensor, dim: int, log: bool) -> None:
    tensors = (*inputs, output)
    layout = _layout(tensors, dim)
    views = [x.as_strided(layout.sizes, strides) for x, strides in zip(tensors, layout.strides, strict=True)]
    *outer, rows, columns = layout.sizes
    looped, outer = outer[:-OUTER_DIMS], outer[-OUTER_DIMS:]
    config = _configs.reduction(
        _product(outer),
        rows,
        columns,
        along_columns=layout.along_columns,
        itemsize=output.element_size(),
        tensors=len(inputs),
    )
    row_blocks, column_blocks = -(-rows // config.rows), -(-columns // config.columns)
    # Counted to the end of the last tile: its masked places have offsets too.
    covered = (*layout.sizes[:-2], row_blocks * config.rows, column_blocks * config.columns)
    index_64 = needs_64_bit(*((covered, strides) for strides in layout.strides))
    missing = OUTER_DIMS - len(outer)
    _, size_1, size_2 = (*[1] * missing, *outer)

    with torch.cuda.device_of(output):
        for position in itertools.product(*map(range, looped)):
            kernel[(row_blocks * _product(outer),)](
                *(view[position] for view in views),
                *(rows, columns, row_blocks, column_blocks, size_1, size_2),
                *(stride for view in views for stride in (*[0] * missing, *view[position].stride())),
                LOG=log,
                ONLINE=config.kind == "online",
                INDEX_64=index_64,
                ROWS=config.rows,
                COLUMNS=config.columns,
                STAGES=config.stages,
                num_warps=config.warps,
            )


def _layout(tensors: tuple[Tensor, ...], dim: int) -> _Layout:
    """Columns are dim. Of the other dimensions, merged where every tensor's strides allow, one becomes the rows."""
    tensors = tuple(x.reshape(1) if x.dim() == 0 else x for x in tensors)
    dim %= tensors[0].dim()
    columns = tensors[0].shape[dim]
    # A lone column has no neighbour: rows are what memory is read along then.
    column_strides = tuple(x.stride(dim) if columns > 1 else 0 for x in tensors)
    others = _merged(tensors, dim) or [(1, (0,) * len(tensors))]

    nearest = min(range(len(others)), key=lambda i: sum(others[i][1]))
    along_columns = columns > 1 and (others[nearest][0] == 1 or sum(column_strides) <= sum(others[nearest][1]))
    longest = max(range(len(others)), key=lambda i: others[i][0])
    rows = longest if along_columns or others[nearest][0] * columns < SHORT_ROW_TILE else nearest

    ordered = sorted((others[i] for i in range(len(others)) if i != rows), key=lambda other: other[0])
    ordered += [others[rows], (columns, column_strides)]
    return _Layout(
        sizes=tuple(size for size, _ in ordered),
        strides=tuple(zip(*(strides for _, strides in ordered), strict=True)),
        along_columns=along_columns,
    )


def _merged(tensors: tuple[Tensor, ...], dim: int) -> list[tuple[int, tuple[int, ...]]]:
    """The dimensions other than dim as (size, stride in each tensor), neighbours that lie on one line as one."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for i, size in enumerate(tensors[0].shape):
        if i == dim or size == 1:
            continue
        strides = tuple(x.stride(i) for x in tensors)
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _product(sizes) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
