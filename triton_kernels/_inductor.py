"""What the operators ask of Inductor."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._guards import TracingContext
from torch.utils._python_dispatch import _disable_current_modes

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
WRITES_MAY_OVERTAKE_READS = VERSION < (2, 13)
ZEROS_MAY_HAVE_NO_MEMORY = VERSION < (2, 15)


def tracing() -> bool:
    """Whether a graph is being traced. `torch.compiler.is_compiling()` says so only to the traced function itself."""
    return TracingContext.try_get() is not None


def keep_writes_after_reads() -> None:
    """Where torch is older than 2.13, stops Inductor from reordering a graph for its peak memory.

    In 2.11 that order may write to an input (a parameter that is updated in place) before an operator which is called
    as it is has read it: gradients are then silently those of the new value. Such graphs are in `tests/test_ops.py`.
    """
    if WRITES_MAY_OVERTAKE_READS:
        from torch._inductor import config

        config.reorder_for_peak_memory = False


@cache
def give_zeros_memory() -> None:
    """Where torch is older than 2.15, has Inductor make the zero tangents of forward mode in memory.

    There its code reads them from a null pointer: forward mode over forward mode of a product with a constant, which
    the mean of `cross_entropy` is, ends the process (https://github.com/pytorch/pytorch/issues/190856).
    """
    if ZEROS_MAY_HAVE_NO_MEMORY:
        with _disable_current_modes():  # called while a graph is traced; what an import computes is not part of it
            from torch._inductor import decomposition

        zeros = torch.ops.aten._efficientzerotensor.default
        if zeros not in decomposition.decompositions:
            decomposition.register_decomposition([zeros])(_zeros)
            decomposition.fast_random_decomps.cache_clear()


@cache
def tell_the_caches() -> None:
    """Has torch's caches of compiled graphs tell apart versions of this package.

    They know an operator by its name: a graph that was compiled with an older derivative would be found again.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    torch.compiler.config.cache_key_tag += f" triton_kernels {hashlib.sha256(sources).hexdigest()[:8]}"


def decompose(source: str, compositions: dict[Any, Callable[..., Any]]) -> None:
    """Has Inductor compute operators as compositions of others, and torch's caches tell apart versions of `source`.

    Called while a graph is traced, for importing Inductor takes a second; `source` is the file that defines them.
    """
    with _disable_current_modes():  # what an import computes is not part of the graph
        from torch._inductor import decomposition

    path = Path(source)
    torch.compiler.config.cache_key_tag += f" {path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    for op, composition in compositions.items():
        decomposition.register_decomposition([op])(composition)
    decomposition.fast_random_decomps.cache_clear()


def _zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return torch.zeros(size, dtype=dtype, device=device)
