"""Initializers: functions `(key, shape, dtype=torch.float32) -> tensor` on the key's device.

`fan_in_uniform` is torch's default for linear and convolution layers, and so the layers' default here. The others
are JAX's set; from the same key, with the same axes, they give `jax.nn.initializers`' numbers. Weights have torch's
layout, (out, in, *kernel), so `in_axis=1, out_axis=0` are the defaults (JAX's are -2 and -1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fnn import random

Initializer = Callable[..., Tensor]
Axes = int | Sequence[int]


def zeros(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """All zeros."""
    return torch.zeros(tuple(shape), dtype=dtype, device=key.device)


def ones(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """All ones."""
    return torch.ones(tuple(shape), dtype=dtype, device=key.device)


def constant(value: float) -> Initializer:
    """Everywhere `value`."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=key.device)

    return init


def uniform(scale: float = 1e-2) -> Initializer:
    """Uniform in [0, scale)."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.uniform(key, shape, dtype) * scale

    return init


def uniform_bound(bound: float) -> Initializer:
    """Uniform in [-bound, bound)."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.uniform(key, shape, dtype, -bound, bound)

    return init


def normal(stddev: float = 1e-2) -> Initializer:
    """Normal with mean 0."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.normal(key, shape, dtype) * stddev

    return init


def truncated_normal(stddev: float = 1e-2, lower: float = -2.0, upper: float = 2.0) -> Initializer:
    """Normal cut to [lower, upper] standard deviations. `stddev` is that of the normal before the cut."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.truncated_normal(key, lower, upper, shape, dtype) * stddev

    return init


def variance_scaling(
    scale: float,
    mode: str,
    distribution: str,
    in_axis: Axes = 1,
    out_axis: Axes = 0,
    batch_axis: Axes = (),
) -> Initializer:
    """Variance `scale / n`, where `mode` says what n is: "fan_in", "fan_out", "fan_avg" or "fan_geo_avg".

    `distribution` is "truncated_normal" (two standard deviations), "normal" or "uniform".
    """
    if mode not in ("fan_in", "fan_out", "fan_avg", "fan_geo_avg"):
        raise ValueError(f"mode must be 'fan_in', 'fan_out', 'fan_avg' or 'fan_geo_avg', got {mode!r}")
    if distribution not in ("truncated_normal", "normal", "uniform"):
        raise ValueError(f"distribution must be 'truncated_normal', 'normal' or 'uniform', got {distribution!r}")

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        fan_in, fan_out = fans(shape, in_axis, out_axis, batch_axis)
        n = {
            "fan_in": fan_in,
            "fan_out": fan_out,
            "fan_avg": (fan_in + fan_out) / 2,
            "fan_geo_avg": math.sqrt(fan_in * fan_out),
        }[mode]
        # JAX rounds the variance and its root to the dtype, so these do as well.
        variance = torch.tensor(scale / n, dtype=dtype, device=key.device)
        if distribution == "normal":
            return random.normal(key, shape, dtype) * torch.sqrt(variance)
        if distribution == "uniform":
            return random.uniform(key, shape, dtype, -1) * torch.sqrt(3 * variance)
        # The standard deviation of a standard normal cut to [-2, 2].
        stddev = torch.sqrt(variance) / torch.tensor(0.87962566103423978, dtype=dtype, device=key.device)
        return random.truncated_normal(key, -2, 2, shape, dtype) * stddev

    return init


def lecun_normal(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 1 / fan_in, truncated normal. Source: LeCun et al., Efficient BackProp, 1998."""
    return variance_scaling(1.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis)


def lecun_uniform(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 1 / fan_in, uniform. Source: LeCun et al., Efficient BackProp, 1998."""
    return variance_scaling(1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis)


def glorot_normal(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 2 / (fan_in + fan_out), truncated normal. Source: Glorot and Bengio, 2010."""
    return variance_scaling(1.0, "fan_avg", "truncated_normal", in_axis, out_axis, batch_axis)


def glorot_uniform(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 2 / (fan_in + fan_out), uniform. Source: Glorot and Bengio, 2010."""
    return variance_scaling(1.0, "fan_avg", "uniform", in_axis, out_axis, batch_axis)


def he_normal(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 2 / fan_in, truncated normal. Source: He et al., 2015."""
    return variance_scaling(2.0, "fan_in", "truncated_normal", in_axis, out_axis, batch_axis)


def he_uniform(in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> Initializer:
    """Variance 2 / fan_in, uniform. Source: He et al., 2015."""
    return variance_scaling(2.0, "fan_in", "uniform", in_axis, out_axis, batch_axis)


xavier_normal, xavier_uniform = glorot_normal, glorot_uniform
kaiming_normal, kaiming_uniform = he_normal, he_uniform


def orthogonal(scale: float = 1.0, column_axis: int = -1) -> Initializer:
    """Orthonormal rows or columns, whichever is the smaller set. Source: Saxe, McClelland and Ganguli, 2014."""

    def init(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: expected at least two axes, got shape {tuple(shape)}")
        columns = shape[column_axis]
        rows = math.prod(shape) // columns
        tall = (rows, columns) if rows > columns else (columns, rows)
        exact = torch.promote_types(dtype, torch.float32)  # LAPACK has no half precision
        q, r = torch.linalg.qr(random.normal(key, tall, dtype).to(exact))
        signs = torch.sign(torch.diagonal(r))  # makes the factorisation, and so the distribution, unique
        q = q * signs
        if rows < columns:
            q = q.T
        others = [n for axis, n in enumerate(shape) if axis != column_axis % len(shape)]
        return (scale * q.reshape(*others, columns).movedim(-1, column_axis)).to(dtype)

    return init


def fan_in_uniform(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform within 1 / sqrt(fan_in), torch's default, `kaiming_uniform_(a=sqrt(5))`."""
    fan_in, _ = fans(shape)
    return uniform_bound(fan_in**-0.5 if fan_in else 0.0)(key, shape, dtype)


def fans(shape: Sequence[int], in_axis: Axes = 1, out_axis: Axes = 0, batch_axis: Axes = ()) -> tuple[float, float]:
    """(fan_in, fan_out) of a weight: inputs to and outputs of one unit, each times the kernel's size."""
    if len(shape) < 2:
        raise ValueError(f"an initializer with fans needs a weight of at least two axes, got shape {tuple(shape)}")
    inputs, outputs, batch = (_product(shape, axes) for axes in (in_axis, out_axis, batch_axis))
    kernel = math.prod(shape) / (inputs * outputs * batch) if math.prod(shape) else 0
    return inputs * kernel, outputs * kernel


def _product(shape: Sequence[int], axes: Axes) -> int:
    return shape[axes] if isinstance(axes, int) else math.prod(shape[axis] for axis in axes)
