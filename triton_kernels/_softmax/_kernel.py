"""Softmax in Triton.

A tensor is seen as (outer_0, outer_1, outer_2, rows, columns) with any strides, and reduced over its columns. A program
takes ROWS rows of one outer position: all their columns at once, or COLUMNS at a time (ONLINE).
"""

import triton
import triton.language as tl


@triton.jit
def block_indices(block, SIZE: tl.constexpr, INDEX_64: tl.constexpr):
    """The SIZE indices of a block; they and the offsets computed from them are 64 bits wide with INDEX_64, else 32."""
    return tl.cast(block, tl.int64 if INDEX_64 else tl.int32) * SIZE + tl.arange(0, SIZE)


@triton.jit
def outer_offset(index, size_1, size_2, stride_0, stride_1, stride_2, INDEX_64: tl.constexpr):
    """Where the index-th of the (.., size_1, size_2) outer positions begins."""
    index = tl.cast(index, tl.int64 if INDEX_64 else tl.int32)
    return index // size_2 // size_1 * stride_0 + index // size_2 % size_1 * stride_1 + index % size_2 * stride_2


@triton.jit
def accumulate(x, maximum, total):
    """The running maximum, and the sum of exp(value - maximum), of every place of the tile with one more value each.

    Of the factors exp(old maximum - new) and exp(x - new) one is always 1, so one exponential serves for both. Equal
    infinities differ by 0 here; no finite value ever counts beside them.
    """
    difference = tl.where(x == maximum, 0.0, x - maximum)
    factor = tl.exp(-tl.abs(difference))
    larger = x > maximum
    return tl.where(larger, x, maximum), tl.where(larger, total * factor + 1.0, total + factor)


@triton.jit
def combine(maximum, total):
    """The maximum and sum of exponentials of each row from those of its places; sums of no finite value are NaN."""
    row_maximum = tl.max(maximum, axis=1)
    row_total = tl.sum(total * tl.exp(maximum - row_maximum[:, None]), axis=1)
    return row_maximum, row_total


@triton.jit
def normalize(x, row_maximum, row_total, LOG: tl.constexpr):
    """Softmax of x, whose row has this maximum and this sum of exp(value - maximum)."""
    shifted = x - row_maximum[:, None]
    return shifted - tl.log(row_total)[:, None] if LOG else tl.exp(shifted) * (1.0 / row_total)[:, None]


@triton.jit
def summand(grad, output, LOG: tl.constexpr):
    """What the backward pass sums over a row."""
    return grad if LOG else output * grad


@triton.jit
def differentiate(grad, output, row_sum, LOG: tl.constexpr):
    """The gradient of x from the row's sum of `summand`."""
    return grad - tl.exp(output) * row_sum[:, None] if LOG else output * (grad - row_sum[:, None])


@triton.jit
def softmax_kernel(
    x_ptr, output_ptr,
    rows, columns, row_blocks, column_blocks, outer_size_1, outer_size_2,
    x_stride_0, x_stride_1, x_stride_2, x_stride_row, x_stride_column,
    output_stride_0, output_stride_1, output_stride_2, output_stride_row, output_stride_column,
    LOG: tl.constexpr, ONLINE: tl.constexpr, INDEX_64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax over the columns of x, or its logarithm (LOG).

    x_ptr, output_ptr: tensors of (outer_0, outer_size_1, outer_size_2, rows, columns), each with its five strides.
    row_blocks, column_blocks: rows / ROWS and columns / COLUMNS, rounded up; one program for each block of rows.
    INDEX_64: offsets may pass what 32 bits hold. STAGES: blocks of columns loaded ahead.
    """
    outer = tl.program_id(0) // row_blocks
    row = block_indices(tl.program_id(0) % row_blocks, ROWS, INDEX_64)[:, None]
    in_rows = row < rows
    x_ptr += outer_offset(outer, outer_size_1, outer_size_2, x_stride_0, x_stride_1, x_stride_2, INDEX_64)
    output_ptr += outer_offset(
        outer, outer_size_1, outer_size_2, output_stride_0, output_stride_1, output_stride_2, INDEX_64
    )
    x_rows = x_ptr + row * x_stride_row
    output_rows = output_ptr + row * output_stride_row

    if ONLINE:
        maximum = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            column = block_indices(block, COLUMNS, INDEX_64)[None, :]
            x = tl.load(x_rows + column * x_stride_column, mask=in_rows & (column < columns), other=float("-inf"))
            maximum, total = accumulate(x.to(tl.float32), maximum, total)
        row_maximum, row_total = combine(maximum, total)
        # Back to front: what was read last is the likeliest to be in the cache still.
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            column = block_indices(column_blocks - 1 - block, COLUMNS, INDEX_64)[None, :]
            mask = in_rows & (column < columns)
            x = tl.load(x_rows + column * x_stride_column, mask=mask, other=float("-inf"))
            result = normalize(x.to(tl.float32), row_maximum, row_total, LOG)
            tl.store(output_rows + column * output_stride_column, result, mask=mask)
    else:
        column = block_indices(0, COLUMNS, INDEX_64)[None, :]
        mask = in_rows & (column < columns)
        x = tl.load(x_rows + column * x_stride_column, mask=mask, other=float("-inf")).to(tl.float32)
        row_maximum = tl.max(x, axis=1)
        row_total = tl.sum(tl.exp(x - row_maximum[:, None]), axis=1)
        tl.store(output_rows + column * output_stride_column, normalize(x, row_maximum, row_total, LOG), mask=mask)


@triton.jit
def softmax_backward_kernel(
    grad_ptr, output_ptr, result_ptr,
    rows, columns, row_blocks, column_blocks, outer_size_1, outer_size_2,
    grad_stride_0, grad_stride_1, grad_stride_2, grad_stride_row, grad_stride_column,
    output_stride_0, output_stride_1, output_stride_2, output_stride_row, output_stride_column,
    result_stride_0, result_stride_1, result_stride_2, result_stride_row, result_stride_column,
    LOG: tl.constexpr, ONLINE: tl.constexpr, INDEX_64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of softmax's input (LOG: of log-softmax's) from its output and that output's gradient.

    grad_ptr, output_ptr, result_ptr: tensors of (outer_0, outer_size_1, outer_size_2, rows, columns), each with its
    five strides. The rest as in `softmax_kernel`.
    """
    outer = tl.program_id(0) // row_blocks
    row = block_indices(tl.program_id(0) % row_blocks, ROWS, INDEX_64)[:, None]
    in_rows = row < rows
    grad_ptr += outer_offset(outer, outer_size_1, outer_size_2, grad_stride_0, grad_stride_1, grad_stride_2, INDEX_64)
    output_ptr += outer_offset(
        outer, outer_size_1, outer_size_2, output_stride_0, output_stride_1, output_stride_2, INDEX_64
    )
    result_ptr += outer_offset(
        outer, outer_size_1, outer_size_2, result_stride_0, result_stride_1, result_stride_2, INDEX_64
    )
    grad_rows = grad_ptr + row * grad_stride_row
    output_rows = output_ptr + row * output_stride_row
    result_rows = result_ptr + row * result_stride_row

    if ONLINE:
        partial_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            column = block_indices(block, COLUMNS, INDEX_64)[None, :]
            mask = in_rows & (column < columns)
            grad = tl.load(grad_rows + column * grad_stride_column, mask=mask, other=0.0)
            output = tl.load(output_rows + column * output_stride_column, mask=mask, other=0.0)
            partial_sum += summand(grad.to(tl.float32), output.to(tl.float32), LOG)
        row_sum = tl.sum(partial_sum, axis=1)
        # Back to front: what was read last is the likeliest to be in the cache still.
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            column = block_indices(column_blocks - 1 - block, COLUMNS, INDEX_64)[None, :]
            mask = in_rows & (column < columns)
            grad = tl.load(grad_rows + column * grad_stride_column, mask=mask, other=0.0)
            output = tl.load(output_rows + column * output_stride_column, mask=mask, other=0.0)
            result = differentiate(grad.to(tl.float32), output.to(tl.float32), row_sum, LOG)
            tl.store(result_rows + column * result_stride_column, result, mask=mask)
    else:
        column = block_indices(0, COLUMNS, INDEX_64)[None, :]
        mask = in_rows & (column < columns)
        grad = tl.load(grad_rows + column * grad_stride_column, mask=mask, other=0.0).to(tl.float32)
        output = tl.load(output_rows + column * output_stride_column, mask=mask, other=0.0).to(tl.float32)
        row_sum = tl.sum(summand(grad, output, LOG), axis=1)
        tl.store(result_rows + column * result_stride_column, differentiate(grad, output, row_sum, LOG), mask=mask)
