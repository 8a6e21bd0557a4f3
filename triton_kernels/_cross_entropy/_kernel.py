"""Cross entropy in Triton: one read of the logits forward, one read and one write backward."""

import triton
import triton.language as tl

from triton_kernels._softmax._kernel import accumulate, block_indices, combine


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, normalizers_ptr,
    rows, columns, column_blocks,
    logits_stride_row, logits_stride_column, labels_stride,
    ignore_index, label_smoothing,
    SMOOTHED: tl.constexpr, ONLINE: tl.constexpr, INDEX_64: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The loss of each row of logits, its maximum, and the logarithm of its sum of exp(logit - maximum).

    logits_ptr, labels_ptr: (rows, columns) and (rows,), with their strides. losses_ptr, normalizers_ptr: (rows,) and
    (rows, 2), float32, contiguous. column_blocks: columns / COLUMNS, rounded up.
    ignore_index: the label of rows without a loss.
    label_smoothing: the share of the target that all classes have in common; SMOOTHED: it is not 0.
    ONLINE: a row has more than COLUMNS columns. INDEX_64: offsets may pass 32 bits. STAGES: blocks loaded ahead.
    """
    row = block_indices(tl.program_id(0), ROWS, INDEX_64)
    in_rows = row < rows
    logits_rows = logits_ptr + row * logits_stride_row

    label = tl.load(labels_ptr + row * labels_stride, mask=in_rows, other=0).to(tl.int64)
    is_class = (label >= 0) & (label < columns)
    label_logit = tl.load(logits_rows + label * logits_stride_column, mask=in_rows & is_class, other=0.0)
    label_logit = label_logit.to(tl.float32)
    # The mean over classes is taken of distances to this, so that large logits do not cancel (inf - inf would be NaN).
    origin = tl.where(tl.abs(label_logit) < float("inf"), label_logit, 0.0)

    distance = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ONLINE:
        maximum = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for block in tl.range(0, column_blocks, num_stages=STAGES):
            column = block_indices(block, COLUMNS, INDEX_64)[None, :]
            mask = in_rows[:, None] & (column < columns)
            logits = tl.load(logits_rows[:, None] + column * logits_stride_column, mask=mask, other=float("-inf"))
            logits = logits.to(tl.float32)
            maximum, total = accumulate(logits, maximum, total)
            if SMOOTHED:
                distance += tl.where(mask, origin[:, None] - logits, 0.0)
        row_maximum, row_total = combine(maximum, total)
    else:
        column = block_indices(0, COLUMNS, INDEX_64)[None, :]
        mask = in_rows[:, None] & (column < columns)
        logits = tl.load(logits_rows[:, None] + column * logits_stride_column, mask=mask, other=float("-inf"))
        logits = logits.to(tl.float32)
        row_maximum = tl.max(logits, axis=1)
        row_total = tl.sum(tl.exp(logits - row_maximum[:, None]), axis=1)
        if SMOOTHED:
            distance = tl.where(mask, origin[:, None] - logits, 0.0)

    log_total = tl.log(row_total)
    # Not (row_maximum + log_total) - label_logit: where logits are large, the sum would round off the logarithm.
    loss = row_maximum - label_logit
    if SMOOTHED:
        to_mean = row_maximum - origin + tl.sum(distance, axis=1) / columns
        loss = (1.0 - label_smoothing) * loss + label_smoothing * to_mean
    loss += log_total
    loss = tl.where(is_class, loss, float("nan"))
    loss = tl.where(label == ignore_index, 0.0, loss)
    tl.store(losses_ptr + row, loss, mask=in_rows)
    tl.store(normalizers_ptr + 2 * row, row_maximum, mask=in_rows)
    tl.store(normalizers_ptr + 2 * row + 1, log_total, mask=in_rows)


@triton.jit
def cross_entropy_backward_kernel(
    grad_losses_ptr, grad_log_totals_ptr, logits_ptr, labels_ptr, normalizers_ptr, result_ptr,
    rows, columns, column_blocks,
    grad_losses_stride, grad_log_totals_stride,
    logits_stride_row, logits_stride_column, labels_stride, normalizers_stride, log_totals_offset,
    result_stride_row, result_stride_column,
    ignore_index, label_smoothing,
    SMOOTHED: tl.constexpr, HAS_GRAD_LOSSES: tl.constexpr, HAS_GRAD_LOG_TOTALS: tl.constexpr,
    INDEX_64: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, one tile of it per program.

    grad_losses_ptr, grad_log_totals_ptr: gradients of the losses and of the logarithms, (rows,); HAS_..: it is given.
    logits_ptr, labels_ptr, normalizers_ptr: what the forward kernel read, and its second result.
    result_ptr: (rows, columns), may be the logits themselves. Each has its strides; the rest as in the forward kernel.
    """
    row = block_indices(tl.program_id(0) // column_blocks, ROWS, INDEX_64)
    column = block_indices(tl.program_id(0) % column_blocks, COLUMNS, INDEX_64)[None, :]
    in_rows = row < rows
    mask = in_rows[:, None] & (column < columns)

    label = tl.load(labels_ptr + row * labels_stride, mask=in_rows, other=0).to(tl.int64)
    maximum_ptrs = normalizers_ptr + row * normalizers_stride
    maximum = tl.load(maximum_ptrs, mask=in_rows, other=0.0)
    log_total = tl.load(maximum_ptrs + log_totals_offset, mask=in_rows, other=0.0)
    logits_ptrs = logits_ptr + row[:, None] * logits_stride_row + column * logits_stride_column
    logits = tl.load(logits_ptrs, mask=mask, other=0.0).to(tl.float32)
    loss_weight = tl.zeros([ROWS], tl.float32)
    if HAS_GRAD_LOSSES:
        grad_losses = tl.load(grad_losses_ptr + row * grad_losses_stride, mask=in_rows, other=0.0)
        loss_weight = tl.where(label == ignore_index, 0.0, grad_losses.to(tl.float32))
    weight = loss_weight
    if HAS_GRAD_LOG_TOTALS:
        grad_log_totals = tl.load(grad_log_totals_ptr + row * grad_log_totals_stride, mask=in_rows, other=0.0)
        weight += grad_log_totals.to(tl.float32)

    # In this order: where logits are large, their sum would round off the logarithm.
    probability = tl.exp((logits - maximum[:, None]) - log_total[:, None])
    gradient = weight[:, None] * probability
    label_weight = loss_weight
    if SMOOTHED:
        gradient -= (loss_weight * (label_smoothing / columns))[:, None]
        label_weight = loss_weight * (1.0 - label_smoothing)
    gradient -= tl.where(column == label[:, None], label_weight[:, None], 0.0)
    is_class_or_ignored = (label >= 0) & (label < columns) | (label == ignore_index)
    gradient = tl.where(is_class_or_ignored[:, None], gradient, float("nan"))

    result_ptrs = result_ptr + row[:, None] * result_stride_row + column * result_stride_column
    tl.store(result_ptrs, gradient, mask=mask)
