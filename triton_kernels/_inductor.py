"""What the operators ask of Inductor."""

import torch
from torch._guards import TracingContext

WRITES_MAY_OVERTAKE_READS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def tracing() -> bool:
    """Whether a compiler traces; `torch.compiler.is_compiling()` tells those that are traced, not those that help."""
    return TracingContext.try_get() is not None


def keep_writes_after_reads() -> None:
    """Where torch is older than 2.13, stops Inductor from reordering a graph for its peak memory.

    In 2.11 that order may write to an input (a parameter that is updated in place) before an operator which is called
    as it is has read it: gradients are then silently those of the new value. Such graphs are in `tests/test_ops.py`.
    """
    if WRITES_MAY_OVERTAKE_READS:
        from torch._inductor import config

        config.reorder_for_peak_memory = False
