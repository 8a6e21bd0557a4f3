"""`MultiHeadAttention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY
from numbers import Real

import torch
from torch import Tensor

from fnn import ops, random
from fnn.nn._dot_product_attention import check_mask, dot_product_attention
from fnn.nn._dropout import Dropout
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn._linear import Linear
from fnn.nn._rotary import rotate
from fnn.nn.initializers import Initializer, fan_in_uniform, glorot_uniform, zeros

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@layer
class MultiHeadAttention(Layer):
    """Attention of queries to keys in `num_heads` subspaces; `torch.nn.MultiheadAttention`, batch first.

    `attention(params, x)` is self-attention, `attention(params, queries, memory)` and
    `attention(params, queries, keys, values)` attend to other sequences. queries: (..., T, E) -> (..., T, E);
    keys (..., S, K), values (..., S, V); E comes from the queries, and num_heads must divide it.

    params, by torch's names: `in_proj_weight` (3 E, E) for queries, keys and values; if K or V is not E
    `q_proj_weight` (E, E), `k_proj_weight` (E, K) and `v_proj_weight` (E, V) instead; `in_proj_bias` (3 E,);
    `out_proj.weight` (E, E), `out_proj.bias` (E,). They start as in torch: inputs Glorot-uniform, `out_proj` uniform
    within 1 / sqrt(E), biases zero.

    num_kv_heads: keys and values have this many heads, each for num_heads / num_kv_heads heads of the queries; their
    rows are num_kv_heads * E / num_heads then. causal: position t attends to 0 ... t. rotary: the base of rotary
    positions, 10000.0 in the paper; pairs are halves apart, as in GPT-NeoX and LLaMA. dropout: of the attention
    weights, in training.

    Named inputs, both bool and both True where attention is ALLOWED (in `torch.nn.MultiheadAttention` True forbids):
    `mask`, (T, S) or (..., num_heads, T, S), 1 where it is the same along an axis; `padding_mask`, (..., S), True at
    the keys that are there. A query that may attend to nothing gets `out_proj.bias`, and gives no gradient.

    Raises ValueError for heads that do not divide and shapes that do not fit, TypeError for masks that are not bool.

    Example:
        >>> from fnn import nn, random
        >>> attention = nn.MultiHeadAttention(4, causal=True)
        >>> params, _ = attention.init(random.key(0), torch.zeros(2, 5, 8))
        >>> attention(params, torch.zeros(2, 5, 8), padding_mask=torch.ones(2, 5, dtype=torch.bool)).shape
        torch.Size([2, 5, 8])

    Source: Vaswani et al., 2017; rotary positions Su et al., 2021; grouped queries Ainslie et al., 2023.
    """

    num_heads: int
    _: KW_ONLY
    num_kv_heads: int | None = None
    causal: bool = False
    rotary: float | None = None
    dropout: float = 0.0
    bias: bool = True
    weight_init: Initializer = glorot_uniform()
    out_init: Initializer = fan_in_uniform

    def __post_init__(self) -> None:
        check_bias(self, self.bias, "heads")
        Dropout(self.dropout)  # its check of the probability
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(f"MultiHeadAttention: num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        rotary = 2.0 if self.rotary is None else self.rotary
        if not isinstance(rotary, Real) or isinstance(rotary, bool) or not 1 < rotary < math.inf:
            raise ValueError(
                "MultiHeadAttention: rotary must be None or the base of the positions, a finite number > 1 such as "
                f"10000.0, got {rotary!r}"
            )

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return self.dropout > 0

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def init(  # type: ignore[override]
        self,
        key: Tensor,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Params, State]:
        shapes = self._shapes(*_sequences(queries, keys, values))
        starts = [self.weight_init if len(shape) == 2 else zeros for shape in shapes.values()]
        *own_keys, out_key = random.split(key, len(shapes) + 1).unbind()
        params: Params = {
            name: start(own_key, shape, parameter_dtype(queries))
            for (name, shape), start, own_key in zip(shapes.items(), starts, own_keys, strict=True)
        }
        params["out_proj"], _ = self._out(queries).init(out_key, queries)
        expect(self, {name: params[name] for name in shapes}, shapes)
        return params, {}

    def apply(  # type: ignore[override]
        self,
        params: Params,
        state: State,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        *,
        key: Tensor | None = None,
        train: bool = False,
        mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        sequences = _sequences(queries, keys, values)
        shapes = self._shapes(*sequences)
        if not isinstance(params, dict) or "out_proj" not in params:
            raise ValueError(f"MultiHeadAttention: params must be a dict with {[*shapes, 'out_proj']}")
        expect(self, {name: leaf for name, leaf in params.items() if name != "out_proj"}, shapes)
        projected = self._project(params, sequences, keys is None)
        q, k, v = [_split(x, heads) for x, heads in zip(projected, self._heads(), strict=True)]
        if self.rotary is not None:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        mask = _joint(mask, padding_mask, (*q.shape[:-1], k.shape[-2]))
        drop = Dropout(self.dropout)
        y = dot_product_attention(
            q, k, v, mask=mask, causal=self.causal, drop=lambda w: drop.apply({}, {}, w, key=key, train=train)[0]
        )
        y = y.transpose(-3, -2).reshape(queries.shape)
        return self._out(queries).apply(params["out_proj"], {}, y)[0], state

    def _project(self, params: Params, sequences: tuple[Tensor, ...], itself: bool) -> Sequence[Tensor]:
        """Queries, keys and values (..., length, heads * d); of one sequence in one product."""
        rows = [heads * (sequences[0].shape[-1] // self.num_heads) for heads in self._heads()]
        bias = params.get("in_proj_bias")
        if itself:
            return ops.linear(sequences[0], params["in_proj_weight"], bias).split(rows, -1)
        packed = params.get("in_proj_weight")
        weights = [params[name] for name in SEPARATE] if packed is None else packed.split(rows)
        biases = [None] * 3 if bias is None else bias.split(rows)
        return [ops.linear(x, weight, b) for x, weight, b in zip(sequences, weights, biases, strict=True)]

    def _heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.kv_heads, self.kv_heads

    def _out(self, queries: Tensor) -> Linear:
        return Linear(queries.shape[-1], bias=self.bias, weight_init=self.out_init, bias_init=zeros)

    def _shapes(self, *sequences: Tensor) -> Shapes:
        """The shapes of the leaves, but those of `out_proj`."""
        widths = [x.shape[-1] for x in sequences]
        width = widths[0] // self.num_heads
        if not width or widths[0] % self.num_heads:
            raise ValueError(
                f"MultiHeadAttention: num_heads={self.num_heads} must divide the width of the queries, {widths[0]}"
            )
        if self.rotary is not None and width % 2:
            raise ValueError(
                f"MultiHeadAttention: rotary positions turn pairs, but a head has {width} features, "
                f"{widths[0]} / num_heads={self.num_heads}"
            )
        rows = [heads * width for heads in self._heads()]
        shapes: Shapes = dict(zip(SEPARATE, zip(rows, widths, strict=True), strict=True))
        if len(set(widths)) == 1:
            shapes = {"in_proj_weight": (sum(rows), widths[0])}
        return {**shapes, "in_proj_bias": (sum(rows),)} if self.bias else shapes


def _sequences(queries: Tensor, keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All three, after a check that their axes before the last fit."""
    keys = queries if keys is None else keys
    values = keys if values is None else values
    expected = (*queries.shape[:-2], *keys.shape[-2:-1])
    if queries.dim() < 2 or keys.shape[:-1] != expected or values.shape[:-1] != expected:
        raise ValueError(
            "MultiHeadAttention: expected queries (..., T, E), keys (..., S, K) and values (..., S, V), got "
            f"{tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    return queries, keys, values


def _split(x: Tensor, heads: int) -> Tensor:
    """(..., length, heads * d) as (..., heads, length, d)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(-3, -2)


def _joint(mask: Tensor | None, padding_mask: Tensor | None, scores: tuple[int, ...]) -> Tensor | None:
    """One mask that broadcasts to the scores (..., heads, T, S), or None."""
    if mask is not None:
        check_mask("MultiHeadAttention", mask, scores)
    if padding_mask is None:
        return mask
    expected, cure = (*scores[:-3], scores[-1]), "True at the keys that are there"
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        got = padding_mask.dtype if isinstance(padding_mask, Tensor) else type(padding_mask).__name__
        raise TypeError(f"MultiHeadAttention: padding_mask must be a bool tensor, {cure}, got {got}")
    if padding_mask.shape != expected:
        raise ValueError(
            f"MultiHeadAttention: padding_mask must have shape {expected}, {cure}, got {tuple(padding_mask.shape)}"
        )
    padding_mask = padding_mask[..., None, None, :]
    return padding_mask if mask is None else mask & padding_mask
