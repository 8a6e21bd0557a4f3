"""Normalisation: `BatchNorm`, `LayerNorm`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fnn.nn._inference import inferring
from fnn.nn._layer import Layer, Params, State, expect, layer, parameter_dtype


@layer
class BatchNorm(Layer):
    """Normalise each channel over batch and space, x: (N, C, ...); `torch.nn.BatchNorm1d`, 2d and 3d in one.

    params: `weight` (C,), `bias` (C,) where `affine`. state: `running_mean` (C,), `running_var` (C,), which
    training moves by `momentum` towards the batch's mean and unbiased variance, and evaluation uses; float32 for
    half-precision inputs.
    Written in pure operations, so it is right under `vmap`, each copy with its own state.
    Source: Ioffe and Szegedy, 2015.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    affine: bool = True
    uses_key: ClassVar[bool] = False

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        channels = self._channels(x)
        options = {"dtype": parameter_dtype(x), "device": key.device}
        params = {"weight": torch.ones(channels, **options), "bias": torch.zeros(channels, **options)}
        # A running mean in half precision stands still as soon as a step moves it by less than a digit.
        options["dtype"] = torch.promote_types(parameter_dtype(x), torch.float32)
        state = {"running_mean": torch.zeros(channels, **options), "running_var": torch.ones(channels, **options)}
        return params if self.affine else {}, state

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        if not state:
            raise ValueError(
                "BatchNorm needs its state: net(params, x, state=state), or TrainState.create(..., state=state)"
            )
        channel = (self._channels(x),)
        affine = expect(self, params, {"weight": channel, "bias": channel} if self.affine else {})
        running_mean, running_var = expect(self, state, {"running_mean": channel, "running_var": channel}, "state")
        column = (1, -1, *[1] * (x.dim() - 2))
        exact = _exact(x)
        if train:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            count = x.numel() // max(1, x.shape[1])
            if count <= 1 and not inferring():
                raise ValueError(
                    f"BatchNorm: training needs more than one value per channel, got an input of shape {tuple(x.shape)}"
                )
            variance, mean = torch.var_mean(exact, axes, correction=0)
            unbiased = variance * (count / max(1, count - 1))
            state = {
                "running_mean": torch.lerp(running_mean, mean.detach().to(running_mean.dtype), self.momentum),
                "running_var": torch.lerp(running_var, unbiased.detach().to(running_var.dtype), self.momentum),
            }
        else:
            mean, variance = running_mean, running_var
        y = (exact - mean.reshape(column)) * torch.rsqrt(variance + self.eps).reshape(column)
        if self.affine:
            weight, bias = affine
            y = y * weight.reshape(column) + bias.reshape(column)
        return y.to(x.dtype), state

    def _channels(self, x: Tensor) -> int:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm: expected an input of shape (N, C, ...), got {tuple(x.shape)}")
        return x.shape[1]


@layer
class LayerNorm(Layer):
    """Normalise over the last `dims` axes, x: (..., *normalized) -> the same; as `torch.nn.LayerNorm`.

    Written in pure operations: torch's fused one fails under a compiled `hessian`.
    params: `weight` and `bias` of the shape of those axes. Source: Ba, Kiros and Hinton, 2016.
    """

    dims: int = 1
    eps: float = 1e-5
    affine: bool = True
    bias: bool = True
    uses_key: ClassVar[bool] = False

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        shape, options = self._shape(x), {"dtype": parameter_dtype(x), "device": key.device}
        start = {"weight": torch.ones(shape, **options), "bias": torch.zeros(shape, **options)}
        return {name: start[name] for name in self._names()}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, x: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        shape = self._shape(x)
        leaves = expect(self, params, dict.fromkeys(self._names(), shape))
        exact = _exact(x)
        variance, mean = torch.var_mean(exact, list(range(-self.dims, 0)), correction=0, keepdim=True)
        y = (exact - mean) * torch.rsqrt(variance + self.eps)
        for leaf, operation in zip(leaves, (torch.mul, torch.add), strict=False):
            y = operation(y, leaf)
        return y.to(x.dtype), state

    def _names(self) -> list[str]:
        return [] if not self.affine else ["weight", "bias"] if self.bias else ["weight"]

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        if not 1 <= self.dims <= x.dim():
            raise ValueError(f"LayerNorm: dims={self.dims} axes to normalise, but the input has shape {tuple(x.shape)}")
        return tuple(x.shape[x.dim() - self.dims :])


def _exact(x: Tensor) -> Tensor:
    """Half-precision inputs are normalised in float32, as torch does: a bfloat16 variance has 8 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
