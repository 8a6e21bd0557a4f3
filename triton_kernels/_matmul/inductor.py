"""What Inductor makes of `product` on a CPU: the library's call itself, without a step through Python.

The operator works without this too. All that depends on Inductor's interface is in this file; it is installed while
the first graph that holds the operator is traced, because importing Inductor takes a second.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from triton_kernels import _launch
from triton_kernels._matmul import cpu

aten = torch.ops.aten


@functools.cache
def install(op: Any) -> None:
    """Registers the lowering of `op`, which is `product`."""
    with _disable_current_modes():  # this is called while a graph is traced; what an import computes is not part of it
        from torch._inductor import ir
        from torch._inductor import lowering as inductor_lowering
    lowering: Any = inductor_lowering  # its functions take less narrow types than they say

    # Inductor's cache does not know what a lowering depends on: another rule must not find this one's graphs.
    torch.compiler.config.cache_key_tag += f" {op.name()}: {cpu.RULE}"

    onednn = lowering.fallback_handler(cpu.linear_pointwise, add_to_fallback_set=False)
    opaque = lowering.fallback_handler(op, add_to_fallback_set=False)

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lower(a, b, bias, precision, out_dtype, backend):
        interpreted = backend == "triton" and _launch.INTERPRETED
        if a.get_device().type != "cpu" or interpreted or out_dtype not in (None, a.get_dtype()):
            return opaque(a, b, bias, precision, out_dtype, backend)
        *batch, m, k = a.get_size()
        n = b.get_size()[-1]
        if len(b.get_size()) > 2:
            return with_bias(batched(a, b), bias)
        rows = a if not batch else lowering.view(a, [math.prod(batch) * m, k])
        multiply_adds = known(rows.get_size()[0]) * known(n) * known(k)
        faster = cpu.onednn_is_faster(multiply_adds, known(n), known(k), by_rows(rows), by_rows(b))
        if faster and a.get_dtype() == torch.float32:
            weight = lowering.permute(b, [1, 0])
            out = onednn(ir.ExternKernel.require_contiguous(rows), weight, bias, "none", [], "")
        elif bias is None:
            out = lowering.lowerings[aten.mm.default](rows, b)
        else:
            out = lowering.lowerings[aten.addmm.default](bias, rows, b)
        return lowering.view(out, [*batch, m, n]) if batch else out

    def batched(a, b):
        *a_batch, m, k = a.get_size()
        *b_batch, _, n = b.get_size()
        if k == 1:  # outer products, which fuse with what follows
            return lowering.lowerings[aten.mul.Tensor](a, b)
        batch = list(lowering.broadcast_symbolic_shapes(a_batch, b_batch))
        a = lowering.view(lowering.expand(a, [*batch, m, k]), [math.prod(batch), m, k])
        b = lowering.view(lowering.expand(b, [*batch, k, n]), [math.prod(batch), k, n])
        return lowering.view(lowering.lowerings[aten.bmm.default](a, b), [*batch, m, n])

    def with_bias(out, bias):
        return out if bias is None else lowering.lowerings[aten.add.Tensor](out, bias)

    def known(size) -> int:
        """A size of a dynamic graph counts as 256, so that the choice does not depend on the first call's."""
        return int(size) if getattr(size, "is_number", True) else 256

    def by_rows(x) -> bool:
        """Whether x lies in memory row by row, or will: what is not computed yet can be written so."""
        strides = x.maybe_get_stride()
        return strides is None or strides[-1] == 1
