"""Activations by name, as differentiable functions of torch; the kernels compute the same in their epilogue."""

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def activate(x: Tensor, name: str | None) -> Tensor:
    return x if name is None else ACTIVATIONS[name](x)
