"""Where Triton kernels can run: on CUDA, or on the CPU in Triton's interpreter."""

import importlib.util
import os

INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when it is first imported, so what holds then holds for the whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def needs_64_bit(*extents: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether an offset into one of the tensors, given as (shape, strides), passes what an int32 holds."""
    return any(
        sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= 2**31
        for shape, strides in extents
    )
