"""The vision transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn import nn
from fnn.nn.initializers import normal, variance_scaling, xavier_uniform, zeros


def vit(
    classes: int = 1000,
    image_size: int = 224,
    patch_size: int = 16,
    layers: int = 12,
    heads: int = 12,
    hidden_dim: int = 768,
    mlp_dim: int = 3072,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> nn.Block:
    """Patches of an image as a sequence for a transformer; input (N, C, image_size, image_size) -> logits (N, classes).

    A learnt token goes before the (image_size / patch_size)^2 patches, and the classes are read from it. `dropout` is
    that of the embeddings and of each layer's two parts, `attention_dropout` that of the attention weights. The last
    layer starts at zero.

    Names, shapes and initial distributions are those of `torchvision.models.vit_b_16`, which the defaults are.
    Raises ValueError where the patches do not divide the image, and for images of another size.
    Source: Dosovitskiy et al., An image is worth 16x16 words, 2021, https://arxiv.org/abs/2010.11929.

    Example:
        >>> from fnn import models, random
        >>> net = models.vit(10, image_size=32, patch_size=8, layers=2, heads=4, hidden_dim=16, mlp_dim=32)
        >>> params, _ = net.init(random.key(0), torch.zeros(1, 3, 32, 32))
        >>> net(params, torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> params["encoder"]["pos_embedding"].shape
        torch.Size([1, 17, 16])
    """
    if image_size % patch_size:
        raise ValueError(f"vit: patch_size={patch_size} must divide image_size={image_size}")

    def forward(m: Any, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2:] != (image_size, image_size):
            raise ValueError(f"vit: expected images (N, C, {image_size}, {image_size}), got {tuple(x.shape)}")
        patches = m.conv_proj(x).flatten(2).mT
        token = m.class_token(x).expand(len(x), 1, hidden_dim)
        return m.heads(m.encoder(torch.cat([token, patches], 1))[:, 0])

    def encoder(m: Any, x: Tensor) -> Tensor:
        return m.ln(m.layers(m.dropout(x + m.pos_embedding(x))))

    def layer(m: Any, x: Tensor) -> Tensor:
        x = x + m.dropout(m.self_attention(m.ln_1(x)))
        return x + m.mlp(m.ln_2(x))

    tokens = (image_size // patch_size) ** 2 + 1
    fan_in = variance_scaling(1.0, "fan_in", "normal")
    encoder_layer = nn.Block(
        layer,
        ln_1=nn.LayerNorm(eps=1e-6),
        self_attention=nn.MultiHeadAttention(heads, dropout=attention_dropout),
        dropout=nn.Dropout(dropout),
        ln_2=nn.LayerNorm(eps=1e-6),
        mlp=nn.Sequential(_linear(mlp_dim), nn.gelu, nn.Dropout(dropout), _linear(hidden_dim), nn.Dropout(dropout)),
    )
    return nn.Block(
        forward,
        class_token=nn.Parameter((1, 1, hidden_dim)),
        conv_proj=nn.Conv2d(hidden_dim, patch_size, patch_size, weight_init=fan_in, bias_init=zeros),
        encoder=nn.Block(
            encoder,
            pos_embedding=nn.Parameter((1, tokens, hidden_dim), normal(0.02)),
            dropout=nn.Dropout(dropout),
            layers=nn.Sequential({f"encoder_layer_{i}": encoder_layer for i in range(layers)}),
            ln=nn.LayerNorm(eps=1e-6),
        ),
        heads=nn.Sequential({"head": nn.Linear(classes, weight_init=zeros, bias_init=zeros)}),
    )


def _linear(width: int) -> nn.Linear:
    return nn.Linear(width, weight_init=xavier_uniform(), bias_init=normal(1e-6))
