"""Cross entropy and its backward pass on the tensors as they lie, nothing copied."""

from typing import Any

import torch
from torch import Tensor

from triton_kernels._launch import needs_64_bit
from triton_kernels._softmax import _configs


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of each row, (N,), and its normalizers, (N, 2): its maximum, and log(sum(exp(logits - maximum))).

    logits: (N, C), float32, float16 or bfloat16; labels: (N,), any integers; both of any strides. Results are float32.
    Rows labelled ignore_index have loss 0, rows with another label outside 0 .. C - 1 have NaN. The logarithm of a row
    that holds +inf, or nothing but -inf, is NaN, as in log_softmax.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalizers = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    if not rows:
        return losses, normalizers
    from triton_kernels._cross_entropy._kernel import cross_entropy_kernel

    config = _configs.reduction(
        1,
        rows,
        columns,
        along_columns=_along_columns(logits),
        itemsize=logits.element_size(),
        read_once=True,
    )
    row_blocks, column_blocks = -(-rows // config.rows), -(-columns // config.columns)
    covered = (row_blocks * config.rows, column_blocks * config.columns)
    launch: Any = cross_entropy_kernel[(row_blocks,)]
    with torch.cuda.device_of(logits):
        launch(
            *(logits, labels, losses, normalizers),
            *(rows, columns, column_blocks),
            *(*logits.stride(), labels.stride(0)),
            *(ignore_index, label_smoothing),
            SMOOTHED=label_smoothing != 0,
            ONLINE=config.kind == "online",
            INDEX_64=needs_64_bit((covered, logits.stride()), (covered[:1], labels.stride()), (covered[:1], (2,))),
            ROWS=config.rows,
            COLUMNS=config.columns,
            STAGES=config.stages,
            num_warps=config.warps,
        )
    return losses, normalizers


def cross_entropy_backward(
    grad_losses: Tensor | None,
    grad_log_totals: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, (N, C) in their dtype, from those of the losses and of the normalizers' logarithms.

    grad_losses, grad_log_totals: (N,), any strides, or None for 0. normalizers: what `cross_entropy` returned
    for the same logits and labels. out: where the gradient goes; the logits themselves will do.
    Rows with a label that is neither a class nor ignore_index are NaN.
    """
    rows, columns = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    if not logits.numel():
        return result
    from triton_kernels._cross_entropy._kernel import cross_entropy_backward_kernel

    along_columns = _along_columns(logits, result)
    config = _configs.elementwise(rows, columns, along_columns=along_columns, itemsize=logits.element_size())
    row_blocks, column_blocks = -(-rows // config.rows), -(-columns // config.columns)
    covered = (row_blocks * config.rows, column_blocks * config.columns)
    vectors = [labels if x is None else x for x in (grad_losses, grad_log_totals)]
    of_rows = [*vectors, labels]
    extents = [(covered, x.stride()) for x in (logits, result)] + [(covered[:1], x.stride()) for x in of_rows]
    extents.append(((covered[0], 2), normalizers.stride()))
    launch: Any = cross_entropy_backward_kernel[(row_blocks * column_blocks,)]
    with torch.cuda.device_of(logits):
        launch(
            *(*vectors, logits, labels, normalizers, result),
            *(rows, columns, column_blocks),
            *(x.stride(0) for x in vectors),
            *(*logits.stride(), labels.stride(0), *normalizers.stride()),
            *result.stride(),
            *(ignore_index, label_smoothing),
            SMOOTHED=label_smoothing != 0,
            HAS_GRAD_LOSSES=grad_losses is not None,
            HAS_GRAD_LOG_TOTALS=grad_log_totals is not None,
            INDEX_64=needs_64_bit(*extents),
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.warps,
        )
    return result


def _along_columns(*matrices: Tensor) -> bool:
    """Whether neighbours in memory lie in one row rather than in one column of these."""
    strides = [x.stride() for x in matrices]
    return matrices[0].shape[1] > 1 and sum(column for _, column in strides) <= sum(row for row, _ in strides)
