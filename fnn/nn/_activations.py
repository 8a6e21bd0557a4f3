"""Activations: torch's own, under one roof, with the class axis last where torch asks for one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn import ops


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    return torch.relu(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`x * Phi(x)`; `approximate="tanh"` for GPT-2's form. Source: Hendrycks and Gimpel, 2016."""
    return F.gelu(x, approximate=approximate)


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`, also called swish."""
    return F.silu(x)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(x)


def sigmoid(x: Tensor) -> Tensor:
    """`1 / (1 + exp(-x))`."""
    return torch.sigmoid(x)


def leaky_relu(x: Tensor, negative_slope: float = 0.01) -> Tensor:
    """`x` where positive, `negative_slope * x` elsewhere."""
    return F.leaky_relu(x, negative_slope)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """`x` where positive, `alpha * (exp(x) - 1)` elsewhere."""
    return F.elu(x, alpha)


def selu(x: Tensor) -> Tensor:
    """The self-normalising exponential unit. Source: Klambauer et al., 2017."""
    return F.selu(x)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`."""
    return F.softplus(x)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """`exp(x) / sum(exp(x))` along `dim`."""
    return ops.softmax(x, dim)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """`log(softmax(x))` along `dim`, without overflow."""
    return ops.log_softmax(x, dim)
