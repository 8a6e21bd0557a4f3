"""What a layer that multiplies asks of its input: floating values, and enough digits."""

from __future__ import annotations

import torch
from torch import Tensor

from fnn.nn._inference import inferring
from fnn.nn._layer import Layer


def floating(layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, after a check that it can be multiplied with parameters; integers only to learn shapes, as `dtype`."""
    if x.is_floating_point() or x.is_complex():
        return x
    if inferring():
        return x.to(dtype)
    raise TypeError(
        f"{type(layer).__name__}: expected floating values, got {x.dtype}; convert them first, x.to({dtype})"
    )


def exact(x: Tensor) -> Tensor:
    """Half-precision inputs are normalised in float32, as torch does: a bfloat16 variance has 8 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
