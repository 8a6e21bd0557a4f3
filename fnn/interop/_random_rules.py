"""Random functions, drawn from the key of the mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn import random
from fnn.interop._pure import Pure, rule

ALPHA = 1.7580993408473766  # -(scale * alpha) of SELU is where alpha dropout sends dropped elements


def dropped(mode: Pure, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    """`x` with elements zeroed with probability `p`, the others divided by `1 - p`; one draw for each of `shape`."""
    if not 0 <= p <= 1:
        raise ValueError(f"{mode.who}: dropout's p must be a probability in [0, 1], got {p!r}")
    if p == 0:
        return x
    keep = random.bernoulli(mode.key("dropout"), 1 - p, tuple(shape))
    return torch.zeros_like(x) if p == 1 else torch.where(keep, x / (1 - p), 0.0)


def _channels(x: Tensor, unbatched: int) -> tuple[int, ...]:
    """The shape of one draw a channel, for (N, C, ...), or (C, ...) of `unbatched` dimensions."""
    kept = 1 if x.dim() == unbatched else 2
    return (*x.shape[:kept], *[1] * (x.dim() - kept))


def _result(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    return x.copy_(y) if inplace else y


@rule(F.dropout, torch.dropout)
def _dropout(mode: Pure, _: Any, input: Tensor, p: float = 0.5, training: Any = True, inplace: bool = False, *,
             train: Any = None) -> Tensor:  # fmt: skip
    training = training if train is None else train
    return _result(input, dropped(mode, input, p, input.shape), inplace) if training else input


@rule(torch.dropout_)
def _dropout_(mode: Pure, _: Any, input: Tensor, p: float, train: bool) -> Tensor:
    return _result(input, dropped(mode, input, p, input.shape), True) if train else input


def _channel_dropout(unbatched: int) -> Any:
    def definition(mode: Pure, _: Any, input: Tensor, p: float = 0.5, training: Any = True, inplace: bool = False, *,
                   train: Any = None) -> Tensor:  # fmt: skip
        training = training if train is None else train
        if not training:
            return input
        return _result(input, dropped(mode, input, p, _channels(input, unbatched)), inplace)

    return definition


rule(F.dropout1d)(_channel_dropout(2))
rule(F.dropout2d, torch.feature_dropout)(_channel_dropout(0))
rule(F.dropout3d)(_channel_dropout(4))


def _alpha(mode: Pure, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    if p in (0, 1):
        return x * (1 - p)
    keep = random.bernoulli(mode.key("alpha_dropout"), 1 - p, tuple(shape))
    scale = 1 / math.sqrt((1 - p) * (1 + p * ALPHA**2))
    return torch.where(keep, x * scale + scale * ALPHA * p, scale * ALPHA * (p - 1))


@rule(F.alpha_dropout, torch.alpha_dropout)
def _alpha_dropout(mode: Pure, _: Any, input: Tensor, p: float = 0.5, training: Any = False, inplace: bool = False, *,
                   train: Any = None) -> Tensor:  # fmt: skip
    training = training if train is None else train
    return _result(input, _alpha(mode, input, p, input.shape), inplace) if training else input


@rule(F.feature_alpha_dropout, torch.feature_alpha_dropout)
def _feature_alpha_dropout(mode: Pure, _: Any, input: Tensor, p: float = 0.5, training: Any = False,
                           inplace: bool = False, *, train: Any = None) -> Tensor:  # fmt: skip
    training = training if train is None else train
    return _result(input, _alpha(mode, input, p, _channels(input, 0)), inplace) if training else input


@rule(F.rrelu, torch.rrelu)
def _rrelu(mode: Pure, func: Any, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False,
           inplace: bool = False) -> Tensor:  # fmt: skip
    if not training:
        return func(input, lower, upper, False)
    slope = random.uniform(mode.key("rrelu"), input.shape, input.dtype, lower, upper)
    return _result(input, torch.where(input > 0, input, input * slope), inplace)


@rule(F.gumbel_softmax)
def _gumbel_softmax(mode: Pure, _: Any, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10,
                    dim: int = -1) -> Tensor:  # fmt: skip
    noise = -torch.log(_exponential(mode, "gumbel_softmax", logits.shape, logits.dtype))
    soft = torch.softmax((logits + noise) / tau, dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return chosen - soft.detach() + soft


def _exponential(mode: Pure, what: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Exponential numbers of rate 1; never 0, whose logarithm would be infinite."""
    uniform = random.uniform(mode.key(what), tuple(shape), dtype)
    return (-torch.log1p(-uniform)).clamp_min(torch.finfo(dtype).tiny)


def _size(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], tuple | list) else size


def _made(drawn: Tensor, like: Tensor | None, options: dict[str, Any]) -> Tensor:
    """New numbers with the options of torch's factories; `requires_grad` has no meaning in a pure function."""
    default = torch.get_default_dtype() if like is None else like.dtype
    dtype, device = options.get("dtype") or default, options.get("device")
    return drawn.to(dtype=dtype, device=device) if device is not None else drawn.to(dtype)


def _check_generator(mode: Pure, what: str, options: dict[str, Any]) -> None:
    if options.get("generator") is not None:
        mode.refuse(f"{what} with a generator", "leave the generator out, and the key draws")


def _float(options: dict[str, Any], like: Tensor | None = None) -> torch.dtype:
    return options.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)


@rule(torch.rand)
def _rand(mode: Pure, _: Any, *size: Any, **options: Any) -> Tensor:
    _check_generator(mode, "rand", options)
    shape = _size(size or (options["size"],))
    return _made(random.uniform(mode.key("rand"), shape, _float(options)), None, options)


@rule(torch.randn)
def _randn(mode: Pure, _: Any, *size: Any, **options: Any) -> Tensor:
    _check_generator(mode, "randn", options)
    shape = _size(size or (options["size"],))
    return _made(random.normal(mode.key("randn"), shape, _float(options)), None, options)


@rule(torch.rand_like)
def _rand_like(mode: Pure, _: Any, input: Tensor, **options: Any) -> Tensor:
    return _made(random.uniform(mode.key("rand_like"), input.shape, _float(options, input)), input, options)


@rule(torch.randn_like)
def _randn_like(mode: Pure, _: Any, input: Tensor, **options: Any) -> Tensor:
    return _made(random.normal(mode.key("randn_like"), input.shape, _float(options, input)), input, options)


@rule(torch.randint)
def _randint(mode: Pure, _: Any, *bounds: Any, **options: Any) -> Tensor:
    _check_generator(mode, "randint", options)
    shape = options["size"] if "size" in options else bounds[-1]
    limits = [bound for bound in bounds if not isinstance(bound, tuple | list | torch.Size)]
    high = options["high"] if "high" in options else limits[-1]
    low = options["low"] if "low" in options else limits[0] if len(limits) > 1 else 0
    drawn = random.randint(mode.key("randint"), tuple(shape), low, high)
    return _made(drawn, None, {"dtype": torch.int64, **options})


@rule(torch.randint_like)
def _randint_like(mode: Pure, _: Any, input: Tensor, *bounds: int, **options: Any) -> Tensor:
    high = options["high"] if "high" in options else bounds[-1]
    low = options["low"] if "low" in options else bounds[0] if len(bounds) > 1 else 0
    return _made(random.randint(mode.key("randint_like"), input.shape, low, high), input, options)


@rule(torch.randperm)
def _randperm(mode: Pure, _: Any, n: int, **options: Any) -> Tensor:
    _check_generator(mode, "randperm", options)
    return _made(random.permutation(mode.key("randperm"), n), None, {"dtype": torch.int64, **options})


@rule(torch.normal)
def _normal(mode: Pure, _: Any, mean: Any, std: Any = 1.0, size: Any = None, **options: Any) -> Tensor:
    _check_generator(mode, "normal", options)
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    like = tensors[0] if tensors else None
    shape = tuple(size) if size is not None else torch.broadcast_shapes(*[value.shape for value in tensors])
    drawn = random.normal(mode.key("normal"), shape, _float(options, like))
    return _made(mean + std * drawn, like, options)


@rule(torch.bernoulli, Tensor.bernoulli)
def _bernoulli(mode: Pure, _: Any, input: Tensor, p: Any = None, **options: Any) -> Tensor:
    _check_generator(mode, "bernoulli", options)
    probability = input if p is None else p
    return random.bernoulli(mode.key("bernoulli"), _probability(probability), input.shape).to(input.dtype)


def _probability(p: Any) -> Any:
    return p.detach() if isinstance(p, Tensor) else p


@rule(Tensor.bernoulli_)
def _bernoulli_(mode: Pure, _: Any, self: Tensor, p: Any = 0.5, **options: Any) -> Tensor:
    _check_generator(mode, "bernoulli_", options)
    return _fill(self, random.bernoulli(mode.key("bernoulli_"), _probability(p), self.shape))


@rule(Tensor.uniform_)
def _uniform_(mode: Pure, _: Any, self: Tensor, a: Any = 0.0, b: Any = 1.0, **options: Any) -> Tensor:
    _check_generator(mode, "uniform_", options)
    low, high = options.get("from", a), options.get("to", b)
    return _fill(self, random.uniform(mode.key("uniform_"), self.shape, self.dtype, low, high))


@rule(Tensor.normal_)
def _normal_(mode: Pure, _: Any, self: Tensor, mean: float = 0.0, std: float = 1.0, **options: Any) -> Tensor:
    _check_generator(mode, "normal_", options)
    return _fill(self, mean + std * random.normal(mode.key("normal_"), self.shape, self.dtype))


@rule(Tensor.exponential_)
def _exponential_(mode: Pure, _: Any, self: Tensor, lambd: float = 1.0, **options: Any) -> Tensor:
    _check_generator(mode, "exponential_", options)
    return _fill(self, _exponential(mode, "exponential_", self.shape, self.dtype) / lambd)


def _fill(target: Tensor, drawn: Tensor) -> Tensor:
    return target.copy_(drawn.to(target.dtype))


@rule(
    torch.empty, torch.empty_like, Tensor.new_empty, torch.zeros, torch.zeros_like, Tensor.new_zeros, torch.ones,
    torch.ones_like, Tensor.new_ones, torch.full, torch.full_like, Tensor.new_full,
)  # fmt: skip
def _fresh(mode: Pure, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A tensor that random numbers may be written into: under `vmap` over keys, one for each key."""
    out = func(*args, **kwargs)
    if mode.given is None or not out.is_floating_point():
        return out
    return out + (mode.given.sum() * 0).to(dtype=out.dtype, device=out.device)


def _refused(what: str, cure: str) -> Any:
    def definition(mode: Pure, func: Any, *args: Any, **kwargs: Any) -> Any:
        mode.refuse(what, cure)

    return definition


_CURE = "draw by torch.rand, torch.bernoulli or Tensor.exponential_, which a key replaces"
_PRIVATE = (getattr(torch, name) for name in ("_standard_gamma", "_sample_dirichlet"))
for _function in (
    torch.multinomial, Tensor.multinomial, torch.poisson, torch.binomial, torch.native_dropout, *_PRIVATE,
    torch.rrelu_, torch.feature_dropout_, torch.alpha_dropout_, torch.feature_alpha_dropout_, Tensor.cauchy_,
    Tensor.geometric_, Tensor.log_normal_, Tensor.random_, F.fractional_max_pool2d, F.fractional_max_pool3d,
    F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices,
):  # fmt: skip
    rule(_function)(_refused(_function.__name__, _CURE))
