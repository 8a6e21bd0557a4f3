"""`Linear`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fnn import ops, random
from fnn.nn._inference import inferring
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn.initializers import Initializer, fan_in_uniform, uniform_bound


@layer
class Linear(Layer):
    """`x @ weight.T + bias`, x: (..., in_features) -> (..., out_features); in_features comes from the input.

    params: `weight` (out_features, in_features), `bias` (out_features,). Both start as in torch, uniform within
    1 / sqrt(in_features); `weight_init` and `bias_init` are initializers `(key, shape, dtype) -> tensor`.
    """

    out_features: int
    bias: bool = True
    weight_init: Initializer = fan_in_uniform
    bias_init: Initializer | None = None
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bias(self, self.bias, "features")

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        if x.dim() == 0:
            raise ValueError("Linear: expected an input of shape (..., in_features), got a scalar")
        dtype = parameter_dtype(x)
        weight_key, bias_key = random.split(key).unbind()
        params = {"weight": self.weight_init(weight_key, (self.out_features, x.shape[-1]), dtype)}
        if self.bias:
            bias_init = self.bias_init or uniform_bound(x.shape[-1] ** -0.5 if x.shape[-1] else 0.0)
            params["bias"] = bias_init(bias_key, (self.out_features,), dtype)
        expect(self, params, self._shapes(x))
        return params, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        operands = expect(self, params, self._shapes(x))
        if inferring() and not x.is_floating_point():  # shapes are known, though only floating values can be multiplied
            x = x.to(operands[0].dtype)
        return ops.linear(x, *operands), state

    def _shapes(self, x: Tensor) -> Shapes:
        shapes: Shapes = {"weight": (self.out_features, x.shape[-1])}
        return {**shapes, "bias": (self.out_features,)} if self.bias else shapes
