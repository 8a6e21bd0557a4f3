"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn pair (i, i + d / 2) of the vector at position t by the angle `t * base**(-2 i / d)`, x: (..., T, d).

    The product of two vectors turned so depends on their positions through the difference only. The pairs are halves
    apart, as in GPT-NeoX and LLaMA, not neighbours. Angles and turns are float32 for half-precision inputs.
    Source: Su et al., RoFormer, 2021.
    """
    length, width = x.shape[-2:]
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    options = {"dtype": exact.dtype, "device": x.device}
    speeds = base ** (torch.arange(0, width, 2, **options) / -width)
    angles = torch.arange(length, **options)[:, None] * speeds
    cos, sin = torch.cos(angles), torch.sin(angles)
    first, second = exact[..., : width // 2], exact[..., width // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
