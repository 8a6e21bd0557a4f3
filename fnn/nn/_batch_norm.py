"""`BatchNorm`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fnn.nn._floating import exact, floating
from fnn.nn._inference import inferring
from fnn.nn._layer import Layer, Params, Shapes, State, expect, layer, parameter_dtype
from fnn.ops import _synchronised


@layer
class BatchNorm(Layer):
    """Normalise each channel over batch and space, x: (N, C, ...); `torch.nn.BatchNorm1d`, 2d and 3d in one.

    params: `weight` (C,), `bias` (C,) where `affine`. state: `running_mean` (C,), `running_var` (C,), which
    training moves by `momentum` towards the batch's mean and unbiased variance, and evaluation uses; float32 for
    half-precision inputs. With `momentum=None` they are the averages over all batches so far, and the state has
    their number too: `num_batches_tracked`, a 0-d int64.
    Written in pure operations, so it is right under `vmap`: each copy has its own batch and its own state. So in
    training a `vmap` over examples makes each example a batch.

    Raises ValueError without a state, and in training for one value a channel; TypeError for integer inputs.

    Example:
        >>> from fnn import nn, random
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> params, state = nn.BatchNorm().init(random.key(0), x)
        >>> y, state = nn.BatchNorm().apply(params, state, x, train=True)
        >>> state
        {'running_mean': tensor([0.2000]), 'running_var': tensor([1.1000])}

    Source: Ioffe and Szegedy, 2015.
    """

    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(
                f"BatchNorm: momentum is the weight of the new batch, in [0, 1], or None; got {self.momentum!r}"
            )

    def init(self, key: Tensor, x: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        channels = self._channels(x)
        options = {"dtype": parameter_dtype(x), "device": key.device}
        params = {"weight": torch.ones(channels, **options), "bias": torch.zeros(channels, **options)}
        # A running mean in half precision stands still as soon as a step moves it by less than a digit.
        options["dtype"] = torch.promote_types(parameter_dtype(x), torch.float32)
        state = {"running_mean": torch.zeros(channels, **options), "running_var": torch.ones(channels, **options)}
        if self.momentum is None:
            state["num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=key.device)
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
        running_mean, running_var, *tracked = expect(self, state, self._state_shapes(channel), "state")
        column = (1, -1, *[1] * (x.dim() - 2))
        values = exact(floating(self, x, running_mean.dtype))
        if train:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            count = x.numel() // max(1, x.shape[1])
            if count * _synchronised.processes() <= 1 and not inferring():
                raise ValueError(
                    f"BatchNorm: training needs more than one value per channel, got an input of shape {tuple(x.shape)}"
                )
            variance, mean, correction = _synchronised.var_mean(values, axes, count)
            unbiased = variance * correction
            state, rate = {}, self.momentum
            if rate is None:
                state["num_batches_tracked"] = tracked[0] + 1
                rate = state["num_batches_tracked"].to(running_mean.dtype).reciprocal()
            moved = {"running_mean": (running_mean, mean), "running_var": (running_var, unbiased)}
            for name, (old, new) in moved.items():
                state[name] = torch.lerp(old, new.detach().to(old.dtype), rate)
            state = {name: state[name] for name in self._state_shapes(channel)}
        else:
            mean, variance = running_mean, running_var
        y = (values - mean.reshape(column)) * torch.rsqrt(variance + self.eps).reshape(column)
        if self.affine:
            weight, bias = affine
            y = y * weight.reshape(column) + bias.reshape(column)
        return y.to(x.dtype), state

    def _channels(self, x: Tensor) -> int:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm: expected an input of shape (N, C, ...), got {tuple(x.shape)}")
        return x.shape[1]

    def _state_shapes(self, channel: tuple[int]) -> Shapes:
        shapes: Shapes = {"running_mean": channel, "running_var": channel}
        return {**shapes, "num_batches_tracked": ()} if self.momentum is None else shapes
