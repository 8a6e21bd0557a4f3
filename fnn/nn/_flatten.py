"""`Flatten`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fnn.nn._layer import Layer, Params, State, expect, layer


@layer
class Flatten(Layer):
    """Join the axes from `start_dim` to `end_dim`: (N, C, H, W) -> (N, C * H * W)."""

    start_dim: int = 1
    end_dim: int = -1
    uses_key: ClassVar[bool] = False

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        expect(self, params, {})
        return x.flatten(self.start_dim, self.end_dim), state
