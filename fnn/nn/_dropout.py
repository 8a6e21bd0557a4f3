"""`Dropout`."""

from __future__ import annotations

import torch
from torch import Tensor

from fnn import random
from fnn.nn._layer import Layer, Params, State, expect, layer


@layer
class Dropout(Layer):
    """In training, zero each element with probability `p` and divide the others by `1 - p`; else the identity.

    The mask is drawn from the key: the same key drops the same elements. Source: Srivastava et al., 2014.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"Dropout: p must be a probability in [0, 1], got {self.p!r}")

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return self.p > 0

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        expect(self, params, {})
        if not train or self.p == 0:
            return x, state
        if key is None:
            raise ValueError("Dropout needs a key in training: net.apply(params, state, x, key=key, train=True)")
        if self.p == 1:
            return torch.zeros_like(x), state
        keep = random.bernoulli(key, 1 - self.p, x.shape)
        return torch.where(keep, x / (1 - self.p), 0.0), state
