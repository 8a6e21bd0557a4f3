"""The maximum over windows that lie side by side, as operators with an exact derivative of every order.

A maximum is a selection: where each window has its first maximum is an integer that no derivative reaches, and with it
fixed, taking these elements is linear and putting them back is its adjoint. So three operators are closed under
differentiation, in both directions: `largest` finds the places, `take` reads them, `put` writes them among zeros.

They are for compiled programs on a CPU, where Inductor's own code for small windows is slow; `_max_pool_inductor.py`
says what is made of them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn.ops import _max_pool_inductor
from fnn.ops._use import setting
from triton_kernels._inductor import tracing
from triton_kernels._register import register


def max_pool(x: Tensor, height: int, width: int) -> Tensor:
    """The largest value of each window, x: (..., H, W) -> (..., H // height, W // width).

    Ties and NaN are as in `torch.nn.functional.max_pool2d`: the gradient goes to the first maximum, or to a NaN.
    A window holds at most 256 elements: places are stored in eight bits.
    """
    return largest(x, height, width)[0]


def is_faster(x: Tensor, height: int, width: int) -> bool:
    """Whether to call `max_pool`, not torch: in a compiled program, but not in one that is exported, on a CPU.

    So it is for windows two wide and at most two high. Of larger ones Inductor's own code is the faster and sooner
    compiled [3 x 3: 3.1 ms and not 5.8; 15 x 15: compiled in 6 s and not 97].
    Torch 2.11 says of every program that it compiles that it is exported, so there this is never so.
    """
    if setting.backend == "torch" or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return x.device.type == "cpu" and x.dtype is torch.float32 and width == 2 and height <= 2


def _largest(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    images = x.reshape(-1, 1, *x.shape[-2:])
    values, flat = torch.ops.aten.max_pool2d_with_indices(images, [height, width], [height, width])
    row, column = flat // x.shape[-1], flat % x.shape[-1]
    places = (row % height * width + column % width).to(torch.uint8)
    shape = (*x.shape[:-2], *values.shape[-2:])
    return values.reshape(shape), places.reshape(shape)


def _take(x: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    flat = _flat(places, height, width, x.shape[-1])
    return x.flatten(-2).gather(-1, flat.flatten(-2)).reshape(places.shape)


def _put(values: Tensor, places: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    flat = _flat(places, height, width, columns)
    zeros = values.new_zeros((*values.shape[:-2], rows * columns))
    return zeros.scatter(-1, flat.flatten(-2), values.flatten(-2)).unflatten(-1, (rows, columns))


def _flat(places: Tensor, height: int, width: int, columns: int) -> Tensor:
    """Of each place in its window, the place in the image, counted row by row."""
    places = places.long()
    row = torch.arange(places.shape[-2], device=places.device)[:, None] * height + places // width
    return row * columns + torch.arange(places.shape[-1], device=places.device) * width + places % width


def _fake_largest(x, height, width):
    _prepare()
    shape = (*x.shape[:-2], x.shape[-2] // height, x.shape[-1] // width)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


def _fake_take(x, places, height, width):
    _prepare()
    return x.new_empty(places.shape)


def _fake_put(values, places, height, width, rows, columns):
    _prepare()
    return values.new_empty((*values.shape[:-2], rows, columns))


def _prepare() -> None:
    if tracing():
        _max_pool_inductor.install(largest, take, put)


def _vmap_largest(op, in_dims, x, *sizes):
    return op(x.movedim(in_dims[0], 0), *sizes), (0, 0)


def _vmap_linear(op, in_dims, x, places, *sizes):
    x_dim, places_dim = in_dims[:2]
    batch = places.shape[places_dim] if x_dim is None else x.shape[x_dim]
    x = x.expand(batch, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
    places = places.expand(batch, *places.shape) if places_dim is None else places.movedim(places_dim, 0)
    return op(x, places, *sizes), 0


class _LargestRule:
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.sizes = inputs
        ctx.image = x.shape[-2:]
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return put(grad, *ctx.saved_tensors, *ctx.sizes, *ctx.image), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return take(tangent, *ctx.primals, *ctx.sizes), None


class _Linear:
    """The derivative of an operator that is linear in its first argument, given its places."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, places, *ctx.sizes = inputs
        ctx.image = x.shape[-2:]
        ctx.save_for_backward(places)
        ctx.save_for_forward(places)


class _TakeRule(_Linear):
    @staticmethod
    def backward(ctx, grad):
        return put(grad, *ctx.saved_tensors, *ctx.sizes, *ctx.image), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return take(tangent, *ctx.primals, *ctx.sizes)


class _PutRule(_Linear):
    @staticmethod
    def backward(ctx, grad):
        return take(grad, *ctx.saved_tensors, *ctx.sizes[:2]), None, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return put(tangent, *ctx.primals, *ctx.sizes)


LIBRARY = torch.library.Library("fnn", "FRAGMENT")


def _operator(schema: str, kernel: Any, fake: Any, vmap: Any, rule: type) -> Any:
    return register(schema, cpu=kernel, cuda=kernel, fake=fake, vmap=vmap, rule=rule, library=LIBRARY)


largest = _operator(
    "max_pool(Tensor x, int height, int width) -> (Tensor, Tensor)",
    *(_largest, _fake_largest, _vmap_largest, _LargestRule),
)
take = _operator(
    "max_pool_take(Tensor x, Tensor places, int height, int width) -> Tensor",
    *(_take, _fake_take, _vmap_linear, _TakeRule),
)
put = _operator(
    "max_pool_put(Tensor values, Tensor places, int height, int width, SymInt rows, SymInt columns) -> Tensor",
    *(_put, _fake_put, _vmap_linear, _PutRule),
)
