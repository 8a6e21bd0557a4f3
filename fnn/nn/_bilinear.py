"""`Bilinear`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fnn import ops, random
from fnn.nn._floating import floating
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn._window import check_count
from fnn.nn.initializers import Initializer, uniform_bound


@layer
class Bilinear(Layer):
    """`x1 @ weight[o] @ x2 + bias[o]`, x1: (..., in1), x2: (..., in2) -> (..., out_features), as `torch.nn.Bilinear`.

    params: `weight` (out_features, in1, in2), `bias` (out_features,). Both start as in torch, uniform within
    1 / sqrt(in1); `weight_init` and `bias_init` are initializers `(key, shape, dtype) -> tensor`.

    Raises ValueError for inputs of different leading shapes and TypeError for integers.

    Example:
        >>> from fnn import nn, random
        >>> scores = nn.Bilinear(5)
        >>> params, _ = scores.init(random.key(0), torch.zeros(1, 10), torch.zeros(1, 12))
        >>> scores(params, torch.zeros(8, 10), torch.zeros(8, 12)).shape
        torch.Size([8, 5])
    """

    out_features: int
    bias: bool = True
    weight_init: Initializer | None = None
    bias_init: Initializer | None = None
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bias(self, self.bias, "features")
        check_count(self, out_features=self.out_features)

    def init(self, key: Tensor, x1: Tensor, x2: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        shapes, dtype = self._shapes(x1, x2), parameter_dtype(x1)
        within = uniform_bound(x1.shape[-1] ** -0.5 if x1.shape[-1] else 0.0)
        draws = {"weight": self.weight_init or within, "bias": self.bias_init or within}
        keys = random.split(key).unbind()
        params = {name: draws[name](k, shape, dtype) for k, (name, shape) in zip(keys, shapes.items(), strict=False)}
        expect(self, params, shapes)
        return params, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x1: Tensor, x2: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        weight, *bias = expect(self, params, self._shapes(x1, x2))
        x1, x2 = (floating(self, x, weight.dtype) for x in (x1, x2))
        # One product either way; what else is in memory is (..., in1, in2), or (..., out_features, in1).
        if x2.shape[-1] <= self.out_features:
            pairs = (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2)
            return ops.linear(pairs, weight.flatten(1), *bias), state
        rows = ops.linear(x2, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        y = (rows * x1.unsqueeze(-2)).sum(-1)
        return (y + bias[0] if bias else y), state

    def _shapes(self, x1: Tensor, x2: Tensor) -> Shapes:
        if not (x1.dim() and x2.dim()) or x1.shape[:-1] != x2.shape[:-1]:
            raise ValueError(
                "Bilinear: expected inputs of shape (..., in1) and (..., in2) with equal leading axes, "
                f"got {tuple(x1.shape)} and {tuple(x2.shape)}"
            )
        shapes: Shapes = {"weight": (self.out_features, x1.shape[-1], x2.shape[-1])}
        return {**shapes, "bias": (self.out_features,)} if self.bias else shapes
