"""`dot_product_attention`: attention without parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fnn import ops
from fnn.ops._whole import product


def dot_product_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`softmax(queries @ keys.mT / sqrt(d)) @ values` for each head.

    queries: (..., heads, T, d), keys: (..., kv_heads, S, d), values: (..., kv_heads, S, e) -> (..., heads, T, e).
    Where kv_heads is less than heads and divides it, each head of the keys serves heads / kv_heads consecutive ones.
    mask: bool, True where a query may attend to a key, as in `F.scaled_dot_product_attention` and Flax (and not as in
    `torch.nn.MultiheadAttention`, where True forbids). (T, S), or of as many axes as the queries, (..., heads, T, S);
    axes of size 1 broadcast. causal: query t attends to keys 0 to t. drop: applied to the weights (..., heads, T, S)
    before they multiply the values, such as a dropout.

    A query that may attend to nothing gives zeros, with zero gradients. For half-precision inputs the scores are
    rounded to their dtype, then softmax is float32: scores of 100 are then exact to 0.25 in bfloat16, and scores
    beyond 65504 give NaN in float16. Where they are that large give float32 queries and keys; the values may stay half.
    Written in pure operations, so every derivative of every order is there; torch's fused attention has the first
    reverse one only. Raises ValueError for shapes that do not fit, TypeError for a mask that is not boolean.

    Example:
        >>> from fnn import nn
        >>> q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8)
        >>> nn.dot_product_attention(q, k, v).shape
        torch.Size([2, 4, 5, 8])

    Source: Vaswani et al., 2017; grouped heads Ainslie et al., 2023.
    """
    *batch, heads, length, width = queries.shape if queries.dim() > 2 else (0, 0, 0)
    kv_heads, size = keys.shape[-3:-1] if keys.dim() > 2 else (0, 0)
    fits = keys.shape == (*batch, kv_heads, size, width) and values.shape[:-1] == keys.shape[:-1]
    if not fits or not kv_heads or heads % kv_heads:
        raise ValueError(
            "dot_product_attention: expected queries (..., heads, T, d), keys (..., kv_heads, S, d) and values "
            f"(..., kv_heads, S, e) where kv_heads divides heads, got {tuple(queries.shape)}, {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    grouped, shape = (*batch, kv_heads, heads // kv_heads * length), (*batch, heads, length)
    # The queries are scaled, not the scores, which could leave float16. Products of two batches have no kernel of ours,
    # and `ops.matmul` would not follow `torch.set_float32_matmul_precision`.
    scores = product((queries * width**-0.5).reshape(*grouped, width), keys.mT)
    scores = scores.reshape(*shape, size)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    allowed = mask
    if mask is not None:
        check_mask("dot_product_attention", mask, (*shape, size))
    if causal:
        past = _past(length, size, scores.device)
        allowed = past if mask is None else mask & past
    if allowed is not None:
        # Not -inf, of which a row would be NaN. Beside any other score its exponential is exactly 0.
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
    weights = ops.softmax(scores)
    if mask is not None:
        weights = torch.where(allowed, weights, 0.0)  # type: ignore[arg-type]  # rows without any key
    if drop is not None:
        weights = drop(weights)
    mixed = product(weights.to(values.dtype).reshape(*grouped, size), values)
    return mixed.reshape(*shape, values.shape[-1])


def check_mask(who: str, mask: Tensor, scores: tuple[int, ...]) -> None:
    """Raise unless `mask` is boolean and broadcasts to the scores without a doubt about what its axes are."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{who}: mask must be a bool tensor, True where a query may attend to a key, got {got}")
    axes = list(zip(reversed(mask.shape), reversed(scores), strict=False))
    if mask.dim() not in (2, len(scores)) or not all([given in (1, wanted) for given, wanted in axes]):
        raise ValueError(
            f"{who}: mask must have shape {scores[-2:]} (queries, keys) or {scores} (..., heads, queries, keys), "
            f"1 where it is the same along an axis, got {tuple(mask.shape)}; a mask for each example needs an axis "
            "for the heads, mask[:, None]"
        )


def _past(length: int, size: int, device: torch.device) -> Tensor:
    if length != size:
        raise ValueError(f"causal attention is that of a sequence to itself, got {length} queries and {size} keys")
    position = torch.arange(length, device=device)
    return position[:, None] >= position
