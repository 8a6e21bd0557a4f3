"""Operators that torch differentiates wrongly or not at all in nested transforms, as compositions of others.

Measured on torch 2.11 to 2.15, against finite differences: a reverse pass over `jvp`, and `vmap` of a pullback inside
a derivative, are wrong for layer norm, batch norm and instance norm, whose formulas take the mean and the deviation
for constants, and any second derivative of weight norm; before 2.15 a reverse pass over `jvp` is wrong for solve, det
and slogdet. Fused attention has neither a forward nor a second derivative, and some losses' gradients have no forward
derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def by_operators() -> Iterator[None]:
    """A context in which every function consists of operators that have right derivatives of every order."""
    with sdpa_kernel(SDPBackend.MATH), _Composed():
        yield


def through(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The call that a mode passes on."""
    if func is Tensor.unflatten:  # Dynamo cannot trace this method under a mode
        return torch.unflatten(*args, **kwargs)
    return func(*args, **kwargs)


def composed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The call, by operators that have right derivatives of every order."""
    if func in _FUNCTIONS:
        return _FUNCTIONS[func](func, *args, **kwargs)
    if func in _LINALG and kwargs.get("out") is None:
        return _LINALG[func](*args, **kwargs)
    return through(func, args, kwargs)


class _Composed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return composed(func, args, kwargs or {})


def _layer_norm(
    func: Any, input: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *__: Any, **___: Any,
) -> Tensor:  # fmt: skip
    if tuple(input.shape[input.dim() - len(normalized_shape) :]) != tuple(normalized_shape):
        return func(input, normalized_shape, weight, bias, eps)  # which says what does not fit
    out = _normalized(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(input.dtype)


def _batch_norm(
    func: Any, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training:
        scale = torch.rsqrt(running_var + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - running_mean * scale
        return _scaled(input, scale, shift).to(input.dtype)
    if running_mean is not None:
        func(input, running_mean, running_var, weight, bias, training, momentum, eps)  # it updates the averages
    return _scaled(_normalized(input, (0, *range(2, input.dim())), eps), weight, bias).to(input.dtype)


def _weight_norm(_: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _torch_batch_norm(
    _: Any, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
    momentum: float, eps: float, *__: Any, **___: Any,
) -> Tensor:  # fmt: skip
    return _batch_norm(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    func: Any, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(func, input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        func(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _scaled(_normalized(input, tuple(range(2, input.dim())), eps), weight, bias).to(input.dtype)


def _normalized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # as torch computes it
    centred = wide - wide.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """With the weight and bias of each channel, axis 1."""
    channels = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.reshape(channels)
    return x if bias is None else x + bias.reshape(channels)


def _mse_loss(
    func: Any, input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    weight: Any = None,
) -> Tensor:  # fmt: skip
    if size_average is not None or reduce is not None or weight is not None:
        return func(input, target, size_average, reduce, reduction, weight)
    return _reduced((input - target).square(), reduction)


def _huber_loss(
    func: Any, input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Tensor:
    if weight is not None:
        return func(input, target, reduction, delta, weight)
    error = input - target
    near = error.clamp(-delta, delta)
    return _reduced(near * (error - near / 2), reduction)  # without |error|, whose second derivative at 0 would be lost


def _soft_margin_loss(
    func: Any, input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean"
) -> Tensor:
    if size_average is not None or reduce is not None:
        return func(input, target, size_average, reduce, reduction)
    return _reduced(F.softplus(-target * input), reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _solve(A: Tensor, B: Tensor, *, left: bool = True, out: None = None) -> Tensor:
    vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    solution = torch.linalg.lu_solve(*torch.linalg.lu_factor(A), B.unsqueeze(-1) if vector else B, left=left)
    return solution.squeeze(-1) if vector else solution


class _SignLog(NamedTuple):
    """The fields of torch's result, in both spellings of it."""

    sign: Tensor
    logabsdet: Tensor


def _slogdet(A: Tensor, *, out: None = None) -> _SignLog:
    diagonal, parity = _pivots(A)
    return _SignLog(parity * diagonal.sgn().prod(-1), diagonal.abs().log().sum(-1))


def _det(A: Tensor, *, out: None = None) -> Tensor:
    diagonal, parity = _pivots(A)
    return parity * diagonal.prod(-1)


def _logdet(A: Tensor) -> Tensor:
    sign, log = _slogdet(A)
    return log + sign.log()


def _pivots(A: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of U in A = P L U, and the determinant of P."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)  # singular matrices have a determinant too
    places = torch.arange(1, A.shape[-1] + 1, device=A.device)
    return factors.diagonal(dim1=-2, dim2=-1), (1 - 2 * ((pivots != places).sum(-1) % 2)).to(A.dtype)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    torch._weight_norm: _weight_norm,  # type: ignore[attr-defined]
    F.instance_norm: _instance_norm,
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.soft_margin_loss: _soft_margin_loss,
}
_LINALG: dict[Any, Callable[..., Any]] = {}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
    _LINALG = {torch.linalg.solve: _solve} | {
        func: run
        for run, name in ((_det, "det"), (_slogdet, "slogdet"), (_logdet, "logdet"))
        for func in (getattr(torch, name), getattr(Tensor, name), getattr(torch.linalg, name, None))
        if func is not None
    }
