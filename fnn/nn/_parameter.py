"""`Parameter`: a bare tensor as a layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fnn import tree
from fnn.nn._layer import Layer, Params, State, layer
from fnn.nn.initializers import Initializer, zeros


@layer
class Parameter(Layer):
    """A tensor to train, for `Block`: `m.name()` gives it. Its params are the tensor itself, at the path `name`.

    Starts from `init_fn(key, shape, dtype)`; the dtype is that of a floating input, `m.name(x)`, else float32.

    Example: a learnt scale.
        >>> from fnn import nn, random
        >>> scaled = nn.Block(lambda m, x: m.scale() * x, scale=nn.Parameter((3,), nn.initializers.ones))
        >>> params, _ = scaled.init(random.key(0), torch.zeros(2, 3))
        >>> params
        {'scale': tensor([1., 1., 1.])}
    """

    shape: tuple[int, ...]
    init_fn: Initializer = zeros
    uses_key: ClassVar[bool] = False

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        floating = [x for x in tree.leaves((xs, inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
        return self.init_fn(key, self.shape, floating[0].dtype if floating else torch.float32), {}

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Tensor, State]:
        if not isinstance(params, Tensor) or tuple(params.shape) != tuple(self.shape):
            got = f"one of shape {tuple(params.shape)}" if isinstance(params, Tensor) else type(params).__name__
            raise ValueError(f"Parameter: params must be a tensor of shape {tuple(self.shape)}, got {got}")
        return params, state
