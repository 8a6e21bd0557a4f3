"""What Inductor makes of the operators of `_max_pool.py` on a CPU.

Three things make Inductor's own max pooling slow there. The maximum is chosen by a branch, which random data predicts
wrongly: here it is `maximum`, and the places are counted in floating point, where masks need no conversion. Every
second element of a row is read alone: here a pair of float32 is read as one 64-bit number and taken apart, so that
loads are contiguous. And its derivative compares every element of the image: here the image is zeros into which the
gradients are written. With channels innermost, loads are contiguous anyway.
[64 x 4 x 64 x 64, windows 2 x 2, one thread, value and gradient, ms: 6.6 -> 2.5, eager torch 15]

All that depends on Inductor's interface is in this file; it is installed while the first graph that holds an operator
is traced, because importing Inductor takes a second.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

LANES = 16  # float32 numbers of the widest vector


@functools.cache
def install(largest: Any, take: Any, put: Any) -> None:
    """Registers the lowerings of the operators."""
    with _disable_current_modes():  # this is called while a graph is traced; what an import computes is not part of it
        from torch._inductor import ir as inductor_ir
        from torch._inductor import lowering as inductor_lowering
        from torch._inductor.virtualized import V, ops
        from torch.utils._sympy.functions import FloorDiv, ModularIndexing
    ir: Any = inductor_ir  # its functions, and those of `lowering`, take less narrow types than they say
    lowering: Any = inductor_lowering
    # The caches of compiled code know neither lowerings nor derivatives: those of other sources must not be found.
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("_max_pool*.py")))
    torch.compiler.config.cache_key_tag += f" fnn::max_pool {hashlib.sha256(sources).hexdigest()[:8]}"

    reinterpret = lowering.fallback_handler(torch.ops.aten.view.dtype, add_to_fallback_set=False)
    opaque = {op: lowering.fallback_handler(op, add_to_fallback_set=False) for op in (largest, take, put)}

    def pointwise(like: Any, dtype: torch.dtype, size: Any, element: Any) -> Any:
        return ir.Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=element, ranges=list(size))

    def channels_last(x: Any) -> bool:
        """Whether x lies in memory with channels innermost, which Inductor decides now if it has not before."""
        size = x.get_size()
        x.realize()
        if isinstance(x.data, ir.StorageBox):
            x.data.data.decide_layout()
        strides = x.maybe_get_stride()
        return len(size) == 4 and strides is not None and strides[1] == 1 and size[1] != 1

    def in_memory(x: Any, by_channels: bool) -> Any:
        x.realize()
        if by_channels:
            return ir.ExternKernel.require_stride_order(x, ir.NHWC_STRIDE_ORDER)
        x.freeze_layout()
        return x

    def is_multiple(size: Any, of: int) -> bool:
        return V.graph.sizevars.statically_known_multiple_of(size, of)

    def ours(x: Any) -> bool:
        return x.get_device().type == "cpu" and x.get_dtype() == torch.float32

    @lowering.register_lowering(largest, type_promotion_kind=None)
    def lower_largest(x, height, width):
        if not ours(x):
            return opaque[largest](x, height, width)
        *batch, rows, columns = x.get_size()
        by_channels = channels_last(x)
        in_pairs = not by_channels and width == 2 and is_multiple(columns, 2) and can_be_paired(x)
        read = pairs(x) if in_pairs else singles(x, width)

        def best(index):
            *where, i, j = index
            window = [element for row in range(height) for element in read(where, i * height + row, j)]
            value, place = window[0], ops.constant(0.0, torch.float32)
            for number, candidate in enumerate(window[1:], 1):
                better = ops.or_(ops.gt(candidate, value), ops.ne(candidate, candidate))
                found = ops.where(better, ops.constant(float(number), torch.float32), ops.constant(0.0, torch.float32))
                place, value = ops.maximum(place, found), ops.maximum(value, candidate)
            return value, place

        size = [*batch, rows // height, columns // width]
        values = pointwise(x, torch.float32, size, lambda index: best(index)[0])
        places = pointwise(
            x, torch.uint8, size, lambda index: ops.to_dtype(best(index)[1], torch.uint8, src_dtype=torch.float32)
        )
        # Both in memory, in the order of x: what reads them in another neither computes them again nor slows this loop.
        return in_memory(values, by_channels), in_memory(places, by_channels)

    def can_be_paired(x):
        """Whether x starts where a 64-bit number may; of the program's inputs nothing is known."""
        own = isinstance(x.data, ir.StorageBox) and not isinstance(x.data.data, ir.InputBuffer)
        return own and is_multiple(x.get_layout().offset, 2) and sys.byteorder == "little"

    def singles(x, width):
        load = x.make_loader()
        return lambda where, row, j: [load([*where, row, j * width + column]) for column in range(width)]

    def pairs(x):
        load = reinterpret(ir.ExternKernel.require_contiguous(x), torch.int64).make_loader()

        def read(where, row, j):
            both = load([*where, row, j])
            return half(both), half(ops.bitwise_right_shift(both, ops.constant(32, torch.int64)))

        return read

    def half(both):
        low = ops.to_dtype(both, torch.int32, src_dtype=torch.int64)
        return ops.to_dtype_bitcast(low, torch.float32, torch.int32)

    @lowering.register_lowering(take, type_promotion_kind=None)
    def lower_take(x, places, height, width):
        if not ours(x):
            return opaque[take](x, places, height, width)
        load, place = x.make_loader(), number(places)

        def element(index):
            *where, i, j = index
            here, value = place(index), None
            for row in range(height):
                for column in range(width):
                    candidate = load([*where, i * height + row, j * width + column])
                    chosen = ops.eq(here, ops.constant(float(row * width + column), torch.float32))
                    value = candidate if value is None else ops.where(chosen, candidate, value)
            return value

        return pointwise(x, torch.float32, places.get_size(), element)

    def number(places):
        load = places.make_loader()
        return lambda index: ops.to_dtype(load(index), torch.float32, src_dtype=torch.uint8)

    @lowering.register_lowering(put, type_promotion_kind=None)
    def lower_put(values, places, height, width, rows, columns):
        if not ours(values):
            return opaque[put](values, places, height, width, rows, columns)
        by_channels = channels_last(places)
        *batch, down, across = places.get_size()
        whole = is_multiple(rows, height) and is_multiple(columns, width)
        size = [*batch, rows, columns]
        if by_channels and whole and is_multiple(batch[-1], LANES):
            load, place = in_memory(values, by_channels).make_loader(), number(places)

            def element(index):
                *where, i, j = index
                window = [*where, FloorDiv(i, height), FloorDiv(j, width)]
                here = ModularIndexing(i, 1, height) * width + ModularIndexing(j, 1, width)
                chosen = ops.eq(place(window), ops.index_expr(here, torch.float32))
                return ops.where(chosen, load(window), ops.constant(0.0, torch.float32))

            return pointwise(values, torch.float32, size, element)

        image = pointwise(values, torch.float32, size, lambda index: ops.constant(0.0, torch.float32))
        image = in_memory(image, by_channels)
        load_place = places.make_loader()

        def target(index):
            *where, i, j = index
            place = ops.to_dtype(load_place(index), torch.int64, src_dtype=torch.uint8)
            row = ops.truncdiv(place, ops.constant(width, torch.int64))
            column = ops.sub(place, ops.mul(row, ops.constant(width, torch.int64)))
            row = ops.indirect_indexing(row, height, check=False)
            column = ops.indirect_indexing(column, width, check=False)
            return [*where, i * height + row, j * width + column]

        scatter = ir.Scatter(
            device=values.get_device(),
            dtype=torch.float32,
            inner_fn=values.make_loader(),
            ranges=[*batch, down, across],
            output_indexer=target,
        )
        written = ir.ComputedBuffer(name=None, layout=ir.MutationLayoutSHOULDREMOVE(image), data=scatter)
        written.name = V.graph.register_buffer(written)
        V.graph.register_operation(written)
        return image
