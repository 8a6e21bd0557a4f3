"""GPT-2."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnn import nn, ops
from fnn.nn._layer import Params, State, expect, layer, parameter_dtype
from fnn.nn.initializers import normal
from fnn.ops._whole import whole


def gpt(
    vocab_size: int = 50257,
    context: int = 1024,
    layers: int = 12,
    heads: int = 12,
    width: int = 768,
    dropout: float = 0.0,
    *,
    stacked: bool = False,
) -> nn.Block:
    """GPT-2, small by default: tokens (..., T), integers below `vocab_size` -> logits (..., T, vocab_size).

    Logits t depend on tokens 0 to t; T is at most `context`. The head is the token embedding, one leaf used twice.
    `dropout` (0.1 in GPT-2) is that of the embeddings, the attention weights and both parts of a block. With
    `stacked=True` the blocks' parameters are stacked as in `nn.Repeat`, which compiles faster.

    Names and shapes are those of Hugging Face's `GPT2Model`, weights of linear layers (in, out) therefore. They start
    normal with deviation 0.02, those before a residual sum with 0.02 / sqrt(2 layers); positions are learnt.
    Raises ValueError for heads that do not divide the width, and for more tokens than `context`.
    Source: Radford et al., Language models are unsupervised multitask learners, 2019.

    Example:
        >>> from fnn import models, random
        >>> net = models.gpt(vocab_size=11, context=8, layers=2, heads=2, width=4)
        >>> tokens = torch.tensor([[3, 1, 4, 1, 5]])
        >>> params, _ = net.init(random.key(0), tokens)
        >>> net(params, tokens).shape
        torch.Size([1, 5, 11])
        >>> params["h"]["0"]["attn"]["c_attn"]["weight"].shape
        torch.Size([4, 12])
    """
    if heads < 1 or width % heads:
        raise ValueError(f"gpt: heads={heads} must divide width={width}")

    def forward(m: Any, tokens: Tensor) -> Tensor:
        if tokens.dim() == 0 or tokens.shape[-1] > context:
            raise ValueError(
                f"gpt: expected tokens (..., T) with T at most context={context}, got {tuple(tokens.shape)}"
            )
        x = m.drop(m.wte(tokens) + m.wpe(tokens))
        return ops.linear(m.ln_f(m.h(x)), m.wte.params["weight"])

    def positions(m: Any, tokens: Tensor) -> Tensor:
        return m.weight()[: tokens.shape[-1]]

    def block(m: Any, x: Tensor) -> Tensor:
        x = x + m.attn(m.ln_1(x))
        return x + m.mlp(m.ln_2(x))

    def attention(m: Any, x: Tensor) -> Tensor:
        # Features that are parted among processes are no parts of queries, keys and values.
        features = whole(m.c_attn(x), examples=True).unflatten(-1, (3, heads, -1))
        q, k, v = [part.transpose(-3, -2) for part in features.unbind(-3)]
        y = nn.dot_product_attention(q, k, v, causal=True, drop=m.attn_dropout)
        return m.resid_dropout(m.c_proj(y.transpose(-3, -2).flatten(-2)))

    residual = 0.02 * (2 * layers) ** -0.5
    mlp = {
        "c_fc": _Conv1D(4 * width),
        "act": functools.partial(nn.gelu, approximate="tanh"),
        "c_proj": _Conv1D(width, residual),
        "dropout": nn.Dropout(dropout),
    }
    attn = nn.Block(
        attention,
        c_attn=_Conv1D(3 * width),
        c_proj=_Conv1D(width, residual),
        attn_dropout=nn.Dropout(dropout),
        resid_dropout=nn.Dropout(dropout),
    )
    layer = nn.Block(block, ln_1=nn.LayerNorm(), attn=attn, ln_2=nn.LayerNorm(), mlp=nn.Sequential(mlp))
    return nn.Block(
        forward,
        wte=nn.Embedding(vocab_size, width, weight_init=normal(0.02)),
        wpe=nn.Block(positions, weight=nn.Parameter((context, width), normal(0.02))),
        drop=nn.Dropout(dropout),
        h=nn.Repeat(layer, layers, stacked=stacked),
        ln_f=nn.LayerNorm(),
    )


@layer
class _Conv1D(nn.Layer):
    """`x @ weight + bias`, x: (..., in_features) -> (..., out_features): GPT-2's linear layer, its weight (in, out)."""

    out_features: int
    stddev: float = 0.02
    uses_key: ClassVar[bool] = False

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        dtype = parameter_dtype(x)
        weight = normal(self.stddev)(key, (x.shape[-1], self.out_features), dtype)
        return {"weight": weight, "bias": torch.zeros(self.out_features, dtype=dtype, device=key.device)}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        shapes = {"weight": (x.shape[-1], self.out_features), "bias": (self.out_features,)}
        weight, bias = expect(self, params, shapes)
        return ops.linear(x, weight.mT, bias), state
